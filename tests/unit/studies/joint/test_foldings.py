"""Rewritings before rounding: the dense loss stays, the rounded one is that of the rewritten model, and sinks are left out."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from lib.calibration.sets import Inputs
from lib.core.errors import InputError
from lib.models.language_model import LanguageModel
from lib.quantization import folding
from lib.quantization.rounding import Grid, round_to_nearest
from lib.studies.joint import foldings
from lib.studies.joint import runs as joint_runs
from lib.studies.joint.runs import Recipe
from lib.studies.pruning import runs
from lib.studies.pruning.runs import Bench, Calibrations
from lib.timing.effort import Effort
from tests import tiny

INT3 = Grid(3, group_size=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("foldings"), causal=False, kv_heads=4)


@pytest.fixture
def found(model: LanguageModel) -> Iterator[Calibrations]:
    before = {name: tensor.clone() for name, tensor in model.network.named_parameters()}
    yield Calibrations(Bench(model, tiny.ids(8, 16, seed=3), tiny.ids(3, 16, seed=4), 4, 2, 5), seed=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.network.named_parameters())


@pytest.mark.parametrize("rewriting", foldings.FOLDINGS)
def test_the_dense_loss_stays_and_the_rounded_one_moves(found: Calibrations, rewriting: str) -> None:
    dense = runs.loss(found.bench)
    with folding.folded(found.bench.model) as model:
        if rewriting in foldings.SCALED:
            folding.scale_(model, foldings.scales(found, rewriting, INT3))
        elif rewriting == foldings.ROTATED:
            folding.rotate_(model)
        torch.testing.assert_close(runs.loss(found.bench), dense, atol=1e-4, rtol=1e-4)
    rounded = foldings.measured(found, "RTN", Recipe(INT3, rounding="nearest"), rewriting=rewriting)
    plain = foldings.measured(found, "RTN", Recipe(INT3, rounding="nearest"), rewriting=foldings.NONE)
    assert torch.allclose(rounded.loss, plain.loss) == (rewriting == foldings.NONE)
    assert rounded.name == ("RTN" if rewriting == foldings.NONE else f"RTN, {rewriting}") and rounded.bytes == plain.bytes


def test_scales_lower_the_error_on_the_calibration_and_see_which_tokens_count(found: Calibrations) -> None:
    model, inputs = found.bench.model, Inputs("noised", levels=2)
    got = {name: foldings.scales(found, name, INT3, inputs=inputs) for name in foldings.SCALED}
    hessians = found.hessians_of(inputs)
    for layer in model.layers:
        if layer.role in ("o", "down"):
            hessian, weight = hessians[layer.block][layer.role].hessian(), layer.module.weight.detach()
            errors = []
            for scale in (torch.ones(layer.module.in_features), got[foldings.AWQ][layer.block, layer.role]):
                change = round_to_nearest(weight * scale, INT3).dequantize() / scale - weight
                errors.append(float(torch.einsum("ri,ij,rj->", change, hessian, change)))
            assert errors[1] <= errors[0] * (1 + 1e-5)
    sizes = [
        folding.mean_sizes(model, found.set_of(foldings.Method("wanda", inputs, weighting)))
        for weighting in foldings.SCALED.values()
    ]
    assert not any(torch.allclose(sizes[0][0, "q"], other[0, "q"], rtol=1e-3) for other in sizes[1:])
    assert not torch.allclose(sizes[1][0, "q"], sizes[2][0, "q"], rtol=1e-3)


def test_a_rewritten_model_takes_the_time_of_its_rewriting_too(found: Calibrations, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(call: Any, *, device: torch.device) -> tuple[Any, Effort]:
        """Do the work, and say what was written down for it."""
        return call(), {"_rewrite_": Effort(10.0, 7.0), "compress_": Effort(1.0, 3.0)}[call.func.__name__]

    for module in (foldings, joint_runs):
        monkeypatch.setattr(module, "watched", told)
    got = foldings.measured(found, "RTN", Recipe(INT3, rounding="nearest"), rewriting=foldings.AWQ)
    assert got.effort == Effort(11.0, 7.0)


def test_all_pairs_are_measured_and_others_refused(found: Calibrations) -> None:
    recipes = {"RTN": Recipe(INT3, rounding="nearest"), "GPTQ": Recipe(INT3)}
    got = foldings.compare([found], recipes, [foldings.NONE, foldings.ROTATED])
    assert [each.name for each in got] == ["RTN", "RTN, rotated", "GPTQ", "GPTQ, rotated"]
    with pytest.raises(InputError, match="a rewriting must be among as it is, AWQ"):
        foldings.measured(found, "RTN", recipes["RTN"], rewriting="turned")


def test_what_a_model_cannot_take_is_left_out_and_named(found: Calibrations) -> None:
    """40 features are no power of two; a mixture's experts read what would be rewritten, too."""
    every = list(foldings.FOLDINGS)
    assert foldings.possible(found.bench.model, every) == (every, {})
    odd, mixture = tiny.of_network(tiny.network(causal=False, hidden_size=40)), tiny.mixture("qwen3_moe")
    taken, left_out = foldings.possible(odd, every)
    assert taken == every[:-1] and "a rotated width must be a power of two, got 40" in left_out[foldings.ROTATED]
    taken, left_out = foldings.possible(mixture, every)
    assert taken == [foldings.NONE] and set(left_out) == {*foldings.SCALED, foldings.ROTATED}
    with pytest.raises(InputError, match="two streams"):
        joint_runs.check(mixture, Recipe(INT3, shifted=True))


def test_rotations_spread_outliers_of_channels_and_not_of_tokens(found: Calibrations) -> None:
    model = found.bench.model
    with folding.folded(model):
        embeddings = cast(torch.Tensor, model.network.get_input_embeddings().weight)
        embeddings.data[:, 3] *= 40.0  # one channel of the residual stream, in every token
        table = foldings.outlier_table(found).set_index("rewriting")
    before, after = (table.loc[name] for name in (foldings.NONE, foldings.ROTATED))
    assert after["largest channel / median"] < 0.5 * before["largest channel / median"]
    assert after["largest sink mass"] == pytest.approx(before["largest sink mass"], rel=1e-3)
