"""Planes: each step is the best for the others, blocks hand on their errors exactly, and bytes are counted by hand."""

import itertools

import pytest
import torch

from lib.core.errors import InputError
from lib.quantization import planes
from lib.quantization.planes import Planes
from tests.unit.pruning.test_sparsegpt import layer, loss


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_sign_row_or_column_alone_would_be_better(count: int) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(count)).double()
    got = planes.fit(weight, planes=count, rounds=200)
    for row, column in itertools.product(range(6), range(8)):
        sizes = got.rows[:, row] * got.columns[:, column]
        tried = [abs(float(weight[row, column] - sum(s * v for s, v in zip(signs, sizes, strict=True))))
                 for signs in itertools.product((-1, 1), repeat=count)]  # fmt: skip
        assert abs(float((weight - got.dequantize())[row, column])) == pytest.approx(min(tried), abs=1e-9)
    for row in range(6):  # the last step: least squares for the rows
        basis = (got.columns * got.signs[:, row]).T
        best = torch.linalg.lstsq(basis, weight[row, :, None]).solution[:, 0]
        torch.testing.assert_close(got.rows[:, row], best, atol=1e-5, rtol=1e-5)


def test_rounds_and_planes_lower_the_error_and_a_sum_of_planes_is_found() -> None:
    weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(0)).double()
    by_round = [float((planes.fit(weight, rounds=rounds).dequantize() - weight).square().sum()) for rounds in range(8)]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(by_round)) and by_round[-1] < 0.9 * by_round[0]
    by_plane = [float((planes.fit(weight, planes=count).dequantize() - weight).square().sum()) for count in (1, 2, 3)]
    assert by_plane[0] > by_plane[1] > by_plane[2]
    stream = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (1, 5, 7), generator=stream).mul(2).sub(1).to(torch.int8)
    exact = Planes(torch.rand(1, 5, generator=stream) + 0.5, torch.rand(1, 7, generator=stream) + 0.5, signs).dequantize()
    torch.testing.assert_close(planes.fit(exact, planes=1).dequantize(), exact, atol=1e-5, rtol=1e-5)


def test_what_follows_a_block_makes_up_for_it_exactly() -> None:
    """Behind each block, the columns not yet done are the best ones for what is done."""
    weight, hessian = layer(0)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    got, found = planes.planed(weight, hessian, block=8)
    work = weight.clone()
    for number, part in enumerate(found):
        start, stop = 8 * number, 8 * number + 8
        expected = planes.fit(work[:, start:stop])
        torch.testing.assert_close(part.dequantize(), expected.dequantize(), atol=1e-8, rtol=1e-8)
        change = part.dequantize() - work[:, start:stop]
        rest, own = damped[stop:, stop:], damped[start:stop, stop:]
        work[:, stop:] -= torch.linalg.solve(rest, change @ own, left=False) if len(rest) else 0.0
        work[:, start:stop] += change
    torch.testing.assert_close(got, work, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(got, torch.cat([part.dequantize() for part in found], 1), atol=1e-9, rtol=0)


def test_handing_errors_on_helps_on_average() -> None:
    ratios = []
    for seed in range(10):
        weight, hessian = layer(seed, rows=16)
        alone = torch.cat([planes.fit(part).dequantize() for part in weight.split(4, dim=1)], 1)
        ratios.append(loss(weight, planes.planed(weight, hessian, block=4)[0], hessian) / loss(weight, alone, hessian))
    assert sum(ratios) / len(ratios) < 0.9


def test_bytes_and_refusals() -> None:
    assert planes.stored_bytes((5, 9), planes=2, block=4) == 12 + 4 * (5 * 3 + 9)
    with pytest.raises(InputError, match="planes must be at least 1, got 0"):
        planes.fit(torch.eye(2), planes=0)
    with pytest.raises(InputError, match="the weights of q must be finite"):
        planes.planed(torch.full((2, 2), torch.nan), torch.eye(2), name="q")
