"""Token weights measured on a model: against eager attention and loops, whatever the batch, and over noise levels."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lib.calibration import measured_weights, sets, token_weights
from lib.calibration.measured_weights import activation_norms, measure, measure_over_levels
from lib.calibration.sets import Inputs
from lib.calibration.token_weights import CONTROLS, Weighting
from lib.core.errors import InputError
from lib.models import loading
from lib.models.language_model import LanguageModel
from tests import tiny
from tests.unit import slow_pruning as slow

SAMPLES, LENGTH = 5, 20


@pytest.fixture(scope="module", params=["llada", "dream", "causal"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    if request.param == "causal":
        return tiny.model(tmp_path_factory.mktemp("causal"), causal=True, kv_heads=2)
    return loading.load({"llada": tiny.LLADA, "dream": tiny.DREAM}[request.param])


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Attention far from uniform, so that there are sinks by every rule."""
    return tiny.model(tmp_path_factory.mktemp("diffusion"), causal=False, kv_heads=2)


def windows() -> Tensor:
    return tiny.ids(SAMPLES, LENGTH)


# --- sinks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("margin", "alpha"), [(2.0, 5.0), (1.0, 0.5), (0.5, 0.2)])
def test_sink_weights_against_eager_attention_and_a_loop(model: LanguageModel, margin: float, alpha: float) -> None:
    got = measure(model, windows(), Weighting(margin=margin, alpha=alpha), batch_size=2)
    expected = slow.sink_weights(model, windows(), num_std=margin, alpha=alpha)
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=0)
    assert got.max() - got.min() > 0.1  # some of them are sinks
    assert got.dtype == torch.float32 and got.device.type == "cpu" and bool(((got >= 0) & (got <= 1)).all())
    up = measure(model, windows(), Weighting("sinks_up", margin=margin, alpha=alpha, boost=3.0), batch_size=2)
    torch.testing.assert_close(up.double(), 1 + 3 * (1 - expected), atol=3e-3, rtol=0)


@pytest.mark.parametrize("level", ["layer", "head"])
def test_weights_by_layer_and_head_against_eager_attention(model: LanguageModel, level: Any) -> None:
    """Batches of 2, 2 and 1 samples; 2 layers and 4 heads, so that no two axes could be swapped unseen."""
    got = measure(model, windows(), Weighting(level=level, margin=1.0, alpha=2.0), batch_size=2)
    mass = slow.masses(model, windows())
    values = mass if level == "head" else mass.sum(2)
    assert got.shape == values.shape
    rows = [[1 - score for score in slow.scores(row, num_std=1.0, alpha=2.0)] for row in values.flatten(0, -2).tolist()]
    torch.testing.assert_close(got.double().flatten(0, -2), torch.tensor(rows, dtype=torch.float64), atol=1e-3, rtol=0)


@pytest.mark.parametrize("level", ["aggregate", "layer", "head"])
@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_weights_do_not_depend_on_the_batch(model: LanguageModel, batch_size: int, level: Any) -> None:
    """The mean and deviation are those of each window, not of the batch; windows of very different concentration show it."""
    ids, before = windows(), slow.state_of(model)
    ids[1] = ids[1, 0]
    weighting = Weighting(level=level, margin=1.0, alpha=0.5)
    whole = measure(model, ids, weighting, batch_size=SAMPLES)
    torch.testing.assert_close(measure(model, ids, weighting, batch_size=batch_size), whole, atol=1e-4, rtol=0)
    assert slow.same_state(model, before)


@pytest.mark.parametrize("kind", ["sinks_down", "sinks_up"])
@pytest.mark.parametrize("level", ["aggregate", "layer", "head"])
def test_weights_of_one_pass_are_the_measured_ones(diffusion: LanguageModel, kind: Any, level: Any) -> None:
    weighting = Weighting(kind, level=level, margin=1.0, alpha=0.5, boost=2.0)
    mass = slow.masses(diffusion, windows()).float()
    got = measured_weights.weigher(weighting)(mass)
    torch.testing.assert_close(got, measure(diffusion, windows(), weighting), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [*CONTROLS, "variance", "presence"])
def test_weights_of_one_pass_must_be_those_of_sinks(kind: Any) -> None:
    with pytest.raises(InputError, match=f"weights of one pass must be those of sinks, got {kind}: build a calibration set"):
        measured_weights.weigher(Weighting(kind))


# --- controls ------------------------------------------------------------------------------------------------------------


def noised(model: LanguageModel, levels: int = 4) -> Tensor:
    return sets.noised_windows(model, windows(), sets.Inputs("noised", levels=levels), seed=0)


def norms_by_hand(model: LanguageModel, ids: Tensor) -> Tensor:
    """From transformers' hidden states: embeddings and the outputs of all blocks but the last."""
    with torch.no_grad():
        hidden = cast(Any, model.network)(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    norms = [layer.double().norm(dim=-1) for layer in hidden[: len(hidden) - 1]]
    return torch.stack([norm / norm.mean(1, keepdim=True) for norm in norms]).mean(0)


def test_activation_norms_are_relative_to_the_mean_of_each_sample(model: LanguageModel) -> None:
    got = activation_norms(model, windows())
    torch.testing.assert_close(got.double(), norms_by_hand(model, windows()), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.mean(1), torch.ones(SAMPLES))
    body = cast(Any, model.network.get_decoder())
    assert not any(block._forward_pre_hooks for block in body.layers)


@pytest.mark.parametrize("batch_size", [2, SAMPLES * 4])
@pytest.mark.parametrize("control", CONTROLS)
def test_controls_take_out_as_many_as_there_are_sinks_in_the_right_places(
    diffusion: LanguageModel, control: Any, batch_size: int
) -> None:
    ids = noised(diffusion).flatten(0, 1)
    weight = measure(diffusion, ids, Weighting(control, margin=1.0), seed=3, batch_size=batch_size)
    counts = (slow.sink_weights(diffusion, ids, num_std=1.0, alpha=5.0) < 0.5).sum(1)
    norms = norms_by_hand(diffusion, ids)
    assert int(counts.min()) > 0 and len(set(counts.tolist())) > 1
    score = 1.0 - slow.sink_weights(diffusion, ids, num_std=1.0, alpha=5.0)
    for row in range(len(ids)):
        gone, count = set((weight[row] == 0).nonzero()[:, 0].tolist()), int(counts[row])
        others = [place for place in range(LENGTH) if score[row, place] <= 0.5]
        masked = {place for place in others if ids[row, place] == tiny.MASK}
        assert gone <= set(others) and len(gone) == min(count, len(masked if control == "mask" else others))
        assert control != "mask" or gone <= masked
        assert control != "first" or gone == set(others[:count])
        if control == "norm":  # where all tokens are masked, all norms are equal but for rounding
            kept = [place for place in others if place not in gone]
            assert float(norms[row, list(gone)].min()) >= float(norms[row, kept].max()) - 1e-5


@pytest.mark.parametrize("control", ["random", "mask"])
def test_drawn_controls_depend_on_the_seed_alone(diffusion: LanguageModel, control: Any) -> None:
    ids = noised(diffusion).flatten(0, 1)
    weighting = Weighting(control, margin=0.5)
    first, other_batch, other_seed = (
        measure(diffusion, ids, weighting, seed=seed, batch_size=size) for seed, size in ((0, 3), (0, 20), (1, 3))
    )
    assert torch.equal(first, other_batch) and not torch.equal(first, other_seed)


def test_a_control_of_mask_tokens_needs_a_model_that_has_them(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="the control 'mask' must have mask tokens to weigh down, got none with"):
        measure(tiny.model(tmp_path), windows(), Weighting("mask", margin=0.5))


# --- over noise levels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [3, 20])
def test_averaged_weights_are_the_mean_over_the_levels(diffusion: LanguageModel, batch_size: int) -> None:
    given, weighting = noised(diffusion), Weighting(margin=1.0, alpha=0.5, averaged=True)
    got = measure_over_levels(diffusion, given, weighting, batch_size=batch_size)
    by_level = torch.stack([slow.sink_weights(diffusion, given[:, level], num_std=1.0, alpha=0.5) for level in range(4)])
    torch.testing.assert_close(got.double(), by_level.mean(0), atol=1e-4, rtol=0)
    assert by_level.std(0).max() > 0.1  # one level alone would be another weight


@pytest.mark.parametrize("kind", ["variance", "presence"])
def test_instability_comes_from_the_mass_of_every_level(diffusion: LanguageModel, kind: Any) -> None:
    given = noised(diffusion, levels=6)
    got = measure_over_levels(diffusion, given, Weighting(kind, margin=1.0), batch_size=4)
    mass = slow.masses(diffusion, given.flatten(0, 1)).mean((0, 2)).view(SAMPLES, 6, LENGTH)
    expected = 1 - token_weights.instability_score(mass, kind=kind, margin=1.0)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0)
    assert 0 < float((got < 1).float().mean()) < 0.6
    # it is not the sinks that are taken out, averaged or of one level
    sinks = measure_over_levels(diffusion, given, Weighting(margin=1.0, alpha=None, averaged=True))
    assert not torch.equal(got, sinks)


@pytest.mark.parametrize("level", ["layer", "head"])
def test_weights_over_levels_are_those_of_the_aggregate(diffusion: LanguageModel, level: Any) -> None:
    with pytest.raises(
        InputError, match=f"weights over noise levels must be those of the aggregate, got level {level}: use aggre"
    ):
        measure_over_levels(diffusion, noised(diffusion), Weighting(level=level, averaged=True))


def test_instability_of_one_level_is_refused(diffusion: LanguageModel) -> None:
    with pytest.raises(InputError, match="at least 2 noise levels, got 1"):
        sets.build(diffusion, windows(), inputs=Inputs("noised", levels=1), weighting=Weighting("variance"), seed=0)


@pytest.mark.parametrize("control", ["random", "mask"])
def test_averaged_controls_follow_the_seed(diffusion: LanguageModel, control: Any) -> None:
    given = sets.read(diffusion, windows(), Inputs("noised", levels=4), seed=7)
    built = sets.build(
        diffusion, windows(), inputs=Inputs("noised", levels=4), weighting=Weighting(control, margin=0.5, averaged=True), seed=7
    )
    single = measure(diffusion, given.flatten(0, 1), Weighting(control, margin=0.5), seed=7).view(given.shape)
    expected = single.mean(1, keepdim=True).expand(given.shape).flatten(0, 1)
    assert torch.equal(cast(Tensor, built.token_weight), expected)


@pytest.mark.parametrize("kind", ["variance", "presence"])
def test_instability_is_never_averaged_sinks(diffusion: LanguageModel, kind: Any) -> None:
    """It is refused, or it is the instability; so is asking one pass for it."""
    given = noised(diffusion)
    with pytest.raises(InputError):
        measure_over_levels(diffusion, given, Weighting(kind, margin=1.0, averaged=True))
    with pytest.raises(InputError):
        measure(diffusion, given.flatten(0, 1), Weighting(kind, margin=1.0))


# --- where the model is about to write -----------------------------------------------------------------------------------


def test_confidence_is_the_highest_probability_of_masked_tokens(model: LanguageModel) -> None:
    if model.mask_token_id is None:
        with pytest.raises(InputError, match="confidence in masked tokens must be of a diffusion model"):
            measure(model, windows(), Weighting("confidence"))
        return
    ids = noised(model).flatten(0, 1)
    with torch.no_grad():
        probabilities = cast(Any, model.network)(input_ids=ids, use_cache=False).logits.double().softmax(-1).amax(-1)
    if model.logit_shift:
        probabilities = torch.cat([probabilities[:, :1], probabilities[:, :-1]], 1)
    got = measure(model, ids, Weighting("confidence"), batch_size=3)
    frontier = measure(model, ids, Weighting("frontier"), batch_size=3)
    for row, sure, confident, near in zip(ids, probabilities, got.double().square(), frontier.double().square(), strict=True):
        masked = row == model.mask_token_id
        torch.testing.assert_close(confident, 0.5 + torch.where(masked, sure, 0.0), atol=1e-4, rtol=0)
        hits = (near - torch.where(masked, sure, 0.0)).round().bool()  # of equals, any
        torch.testing.assert_close(near, torch.where(masked, sure, 0.0) + hits, atol=1e-4, rtol=0)
        assert int(hits.sum()) == min(token_weights.FRONTIER, int(masked.sum())) and not bool((hits & ~masked).any())
        assert sure[hits].amin() > sure[masked & ~hits].amax() - 1e-5 if bool((masked & ~hits).any()) else True


def test_weights_of_the_frontier_prune_and_are_refused_where_nothing_is_masked(diffusion: LanguageModel) -> None:
    for kind in token_weights.DECODING:
        built = sets.build(diffusion, windows(), inputs=Inputs("noised", levels=2), weighting=Weighting(kind), seed=0)
        assert built.token_weight is not None and built.token_weight.shape == built.input_ids.shape
    with pytest.raises(InputError, match="token weights must be finite, not negative and not all 0"):
        sets.build(diffusion, windows(), weighting=Weighting("frontier"), seed=0)
    with pytest.raises(InputError, match="weights by layer or head must be those of sinks"):
        Weighting("confidence", level="layer")
