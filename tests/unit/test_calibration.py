"""Statistics of what layers read: against transformers' own pass and slow sums, in both orders, whatever the batch size."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakSet

import pytest
import torch
from torch import Tensor

from lib import calibration, models
from lib.calibration import READS, CalibrationSet, InputStatistics, stream
from lib.config import InputError
from lib.models import LanguageModel, Role
from tests import tiny
from tests.unit import slow_pruning as slow

BLOCKS, SAMPLES, LENGTH = 3, 5, 9
RTOL = 2e-4  # float32 sums in another order, of inputs that passed through up to three blocks
Found = dict[int, dict[Role, InputStatistics]]


@pytest.fixture(
    scope="module", params=[("llama", True), ("llama", False), ("qwen2", False)], ids=lambda param: f"{param[0]} {param[1]}"
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, causal = request.param
    return tiny.folder(tmp_path_factory.mktemp("model"), family=family, causal=causal, kv_heads=2, num_hidden_layers=BLOCKS)


@pytest.fixture
def model(folder: Path) -> LanguageModel:
    return models.load(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """For what does not depend on the kind of attention; its tests leave it as it is."""
    return tiny.model(tmp_path_factory.mktemp("small"), causal=False, kv_heads=2, num_hidden_layers=BLOCKS)


def token_weights(seed: int = 0) -> Tensor:
    """ω of very different size, some 0."""
    weight = 2 * torch.rand(SAMPLES, LENGTH, generator=torch.Generator().manual_seed(seed)).pow(3)
    weight[0, 0] = weight[2, 3:6] = 0.0
    return weight


def collected(
    model: LanguageModel, given: CalibrationSet, visit: Callable[[int], None] = lambda block: None, **options: Any
) -> Found:
    """The statistics of every block; they are kept here only because the model is tiny."""
    found: Found = {}

    def keep(block: int, statistics: dict[Role, InputStatistics]) -> None:
        found[block] = statistics
        visit(block)

    stream(model, given, keep, **options)
    return found


def halved(model: LanguageModel, block: int) -> None:
    """Zero every other weight of the block: a change that later blocks notice."""
    for layer in model.layers:
        if layer.block == block:
            layer.module.weight.data.view(-1)[::2] = 0.0


def equal(got: InputStatistics, expected: dict[str, Tensor]) -> None:
    """Compare with slow sums, to a share of the largest of each kind."""
    for name, values in expected.items():
        tolerance = RTOL * float(values.abs().max())
        torch.testing.assert_close(getattr(got, name).double(), values, atol=tolerance, rtol=0)
    assert got.samples == SAMPLES


def reads(model: LanguageModel, role: Role, block: int) -> str:
    return next(layer.name for layer in model.layers if (layer.role, layer.block) == (role, block))


# --- against transformers' own pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("sequential", [True, False])
def test_statistics_of_the_dense_model_equal_slow_sums(model: LanguageModel, weighted: bool, sequential: bool) -> None:
    """ω enters squares and products squared; it must not change what the next block reads."""
    ids, weight = tiny.ids(SAMPLES, LENGTH), token_weights() if weighted else None
    inputs = slow.captured(model, ids)
    found = collected(model, CalibrationSet(ids, weight), hessian=True, sequential=sequential, batch_size=3)
    assert list(found) == list(range(BLOCKS))
    for block, statistics in found.items():
        assert set(statistics) == {"q", "o", "gate", "down"}
        for role, got in statistics.items():
            equal(got, slow.statistics(inputs[reads(model, role, block)], weight))
    wrong = slow.statistics(inputs[reads(model, "q", 1)], None if weight is None else weight.sqrt())
    assert weight is None or not torch.allclose(found[1]["q"].squares.double(), wrong["squares"], rtol=0.05)


def test_layers_that_share_statistics_do_read_the_same_tensor(model: LanguageModel) -> None:
    inputs = slow.captured(model, tiny.ids(SAMPLES, LENGTH))
    for block in range(BLOCKS):
        for role, reader in READS.items():
            assert torch.equal(inputs[reads(model, role, block)], inputs[reads(model, reader, block)])
        distinct = [inputs[reads(model, role, block)] for role in dict.fromkeys(READS.values())]
        assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(distinct) for b in distinct[:i])


def test_a_token_of_weight_zero_is_as_if_it_gave_nothing_but_is_still_attended_to(model: LanguageModel) -> None:
    ids, weight = tiny.ids(SAMPLES, LENGTH), torch.ones(SAMPLES, LENGTH)
    weight[:, 0] = 0.0
    found = collected(model, CalibrationSet(ids, weight), hessian=True)
    for block in range(BLOCKS):
        rest = slow.captured(model, ids)[reads(model, "o", block)][:, 1:]
        equal(found[block]["o"], slow.statistics(rest))


# --- the two orders ------------------------------------------------------------------------------------------------------


def test_sequential_statistics_are_those_behind_the_changed_blocks(folder: Path) -> None:
    model, other, ids = models.load(folder), models.load(folder), tiny.ids(SAMPLES, LENGTH)
    found = collected(model, CalibrationSet(ids), lambda block: halved(model, block), hessian=True, batch_size=2)
    for block in range(BLOCKS):  # `other` is now changed in all blocks before this one
        inputs = slow.captured(other, ids)
        for role, got in found[block].items():
            equal(got, slow.statistics(inputs[reads(other, role, block)]))
        halved(other, block)


def test_one_shot_statistics_are_those_of_the_dense_model(folder: Path) -> None:
    model, dense, ids = models.load(folder), models.load(folder), tiny.ids(SAMPLES, LENGTH)
    inputs = slow.captured(dense, ids)
    found = collected(
        model, CalibrationSet(ids), lambda block: halved(model, block), hessian=True, sequential=False, batch_size=2
    )
    for block, statistics in found.items():
        for role, got in statistics.items():
            equal(got, slow.statistics(inputs[reads(dense, role, block)]))
    assert not slow.same_state(model, slow.state_of(dense))


def test_the_two_orders_differ_from_the_second_block_on(folder: Path) -> None:
    found = []
    for sequential in (True, False):
        model = models.load(folder)
        given = CalibrationSet(tiny.ids(SAMPLES, LENGTH))
        found.append(collected(model, given, lambda block, model=model: halved(model, block), sequential=sequential))
    assert all(torch.equal(found[0][0][role].squares, found[1][0][role].squares) for role in found[0][0])
    for block in range(1, BLOCKS):
        for role in found[0][block]:
            assert not torch.allclose(found[0][block][role].squares, found[1][block][role].squares, rtol=0.05)


# --- batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("sequential", [True, False])
def test_the_batch_size_changes_only_the_rounding(folder: Path, batch_size: int, sequential: bool) -> None:
    """Batches of 2 and 3 leave a smaller last one."""
    given = CalibrationSet(tiny.ids(SAMPLES, LENGTH), token_weights())
    found = []
    for size in (SAMPLES, batch_size):
        model = models.load(folder)
        visit: Callable[[int], None] = lambda block, model=model: halved(model, block)  # noqa: E731
        found.append(collected(model, given, visit, hessian=True, batch_size=size, sequential=sequential))
    for block in range(BLOCKS):
        for role, got in found[1][block].items():
            expected = found[0][block][role]
            assert expected.products is not None
            equal(got, {name: getattr(expected, name).double() for name in ("squares", "norms", "products")})


def test_norms_are_taken_sample_by_sample() -> None:
    """The norm over all tokens is another number than the sum of samples' norms; a batch must not count as one sample."""
    inputs = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    inputs[0, :, 1] *= 20.0  # a feature that lives in one sample
    weight = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    for given in (None, weight):
        whole = InputStatistics(3, hessian=True, device=torch.device("cpu"))
        whole.add(inputs[:3], None if given is None else given[:3])
        whole.add(inputs[3:], None if given is None else given[3:])
        expected = slow.statistics(inputs.double(), given)
        torch.testing.assert_close(whole.input_norm("sum_of_norms").double(), expected["norms"], atol=0, rtol=1e-5)
        torch.testing.assert_close(
            whole.input_norm("root_mean_square").double(), (expected["squares"] / 4).sqrt(), atol=0, rtol=1e-5
        )
        torch.testing.assert_close(whole.hessian().double(), expected["products"] / 2, atol=1e-4, rtol=1e-5)
        ratio = whole.input_norm("sum_of_norms") / whole.input_norm("root_mean_square")
        assert ratio.max() / ratio.min() > 1.02  # another ranking, not only another unit


def test_sums_are_kept_in_single_precision() -> None:
    """In bfloat16 a sum of ones stops at 256."""
    statistics = InputStatistics(2, hessian=True, device=torch.device("cpu"))
    for _ in range(300):
        statistics.add(torch.ones(1, 1, 2, dtype=torch.bfloat16), None)
    assert statistics.squares.tolist() == [300.0, 300.0] and statistics.norms.tolist() == [300.0, 300.0]
    assert statistics.hessian().tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert statistics.squares.dtype == torch.float32


def test_a_bfloat16_model_is_read_in_its_dtype(tmp_path: Path) -> None:
    model = models.load(tiny.folder(tmp_path, causal=False), dtype=torch.bfloat16)
    ids = tiny.ids(SAMPLES, LENGTH)
    found = collected(model, CalibrationSet(ids, token_weights()), batch_size=SAMPLES)
    equal(
        found[0]["q"], {"squares": slow.statistics(slow.captured(model, ids)[reads(model, "q", 0)], token_weights())["squares"]}
    )
    assert found[1]["down"].norms.dtype == torch.float32


# --- memory, hooks, side effects -----------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[WeakSet, list[int]]:
    """Statistics that are alive, and how many there were whenever one was made."""
    alive: WeakSet = WeakSet()
    peaks: list[int] = []

    class Counted(InputStatistics):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            alive.add(self)
            peaks.append(len(alive))

    monkeypatch.setattr(calibration, "InputStatistics", Counted)
    return alive, peaks


@pytest.mark.parametrize("sequential", [True, False])
def test_only_one_block_has_statistics_when_it_is_visited(
    small: LanguageModel, sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, _ = counted(monkeypatch)
    seen: list[int] = []

    def visit(block: int, found: dict[Role, InputStatistics]) -> None:
        assert set(found.values()) == set(alive)
        seen.append(block)

    stream(small, CalibrationSet(tiny.ids(2, LENGTH)), visit, sequential=sequential)
    assert seen == [0, 1, 2] and not alive


def test_at_no_time_do_two_blocks_have_statistics(small: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _, peaks = counted(monkeypatch)
    stream(small, CalibrationSet(tiny.ids(2, LENGTH)), lambda block, found: None)
    assert max(peaks) == 4


def hooks_left(model: LanguageModel) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.network.modules())


def test_no_hook_stays_behind(small: LanguageModel) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("inside")

    before, given = hooks_left(small), CalibrationSet(tiny.ids(2, LENGTH))
    stream(small, given, lambda block, found: None)
    assert hooks_left(small) == before
    with pytest.raises(RuntimeError, match="inside"):
        stream(small, given, fail)
    assert hooks_left(small) == before
    for place in (small.layers[-1].module, cast(Any, small.network.get_decoder()).embed_tokens):  # inside a block, and before all
        own = place.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="inside"):
            stream(small, given, lambda block, found: None)
        own.remove()
        assert hooks_left(small) == before


def test_no_hook_is_there_during_a_visit(small: LanguageModel) -> None:
    """So a visit may run the network without disturbing the sums."""
    plain = collected(small, CalibrationSet(tiny.ids(2, LENGTH)))

    def read(block: int) -> None:
        slow.captured(small, tiny.ids(1, 4))

    again = collected(small, CalibrationSet(tiny.ids(2, LENGTH)), read)
    for block in range(BLOCKS):
        for role, statistics in plain[block].items():
            assert torch.equal(statistics.squares, again[block][role].squares) and again[block][role].samples == 2


@pytest.mark.parametrize("sequential", [True, False])
def test_looking_changes_no_weight(model: LanguageModel, sequential: bool) -> None:
    before, ids = slow.state_of(model), tiny.ids(SAMPLES, LENGTH)
    given = CalibrationSet(ids.clone(), token_weights())
    collected(model, given, hessian=True, sequential=sequential)
    assert slow.same_state(model, before)
    assert torch.equal(given.input_ids, ids) and torch.equal(cast(Tensor, given.token_weight), token_weights())
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


# --- refusals ------------------------------------------------------------------------------------------------------------


def test_an_empty_set_is_refused_before_any_visit(small: LanguageModel) -> None:
    with pytest.raises(InputError, match="a calibration set must hold samples, got none: give at least one window"):
        collected(small, CalibrationSet(tiny.ids(0, LENGTH)), lambda block: pytest.fail("visited"))


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_token_weights_that_cannot_be_weights_are_refused(value: float) -> None:
    weight = torch.ones(2, LENGTH)
    weight[1, 4] = value
    with pytest.raises(InputError, match=r"token weights must be finite, not negative, and of shape \(2, 9\), got others: mend"):
        CalibrationSet(tiny.ids(2, LENGTH), weight)


@pytest.mark.parametrize("shape", [(1, 9), (2, 8), (2, 1)])
def test_token_weights_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    """Also those that would broadcast. The rule is asked directly: under test the constructor's types catch them first."""
    with pytest.raises(InputError, match=rf"of shape \(2, 9\), got shape \({shape[0]}, {shape[1]}\): mend them"):
        CalibrationSet.__post_init__(cast(Any, SimpleNamespace(input_ids=tiny.ids(2, LENGTH), token_weight=torch.ones(shape))))


def test_a_hessian_that_was_not_collected_is_refused(small: LanguageModel) -> None:
    found = collected(small, CalibrationSet(tiny.ids(2, LENGTH)))
    assert found[0]["q"].products is None
    with pytest.raises(InputError, match="a Hessian must be collected, got norms only: ask for hessian=True"):
        found[0]["q"].hessian()
