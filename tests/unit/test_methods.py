"""Whole models: every method reaches its sparsity in every matrix, does what its choices say, and refuses before it changes."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import inf, nan
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lib import methods, models, pruning, sparsegpt
from lib.calibration import READS, CalibrationSet
from lib.config import InputError
from lib.methods import RELEASE, Method
from lib.models import LanguageModel
from lib.runtime import generator
from tests import tiny
from tests.unit import slow_pruning as slow

ALL: Mapping[str, Method] = {**RELEASE, "random": Method("random")}
WANDAS = [name for name, method in ALL.items() if method.importance == "wanda"]
SAMPLES, LENGTH = 5, 20


def restored(loaded: LanguageModel) -> Iterator[LanguageModel]:
    """Lend a model and undo what the test did to its weights."""
    before = slow.state_of(loaded)
    yield loaded
    loaded.network.load_state_dict(before)


@pytest.fixture(scope="module", params=["llada", "dream", "causal"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    if request.param == "causal":
        return tiny.model(tmp_path_factory.mktemp("causal"), causal=True, kv_heads=2)
    return models.load({"llada": tiny.LLADA, "dream": tiny.DREAM}[request.param])


@pytest.fixture
def model(loaded: LanguageModel) -> Iterator[LanguageModel]:
    yield from restored(loaded)


@pytest.fixture(scope="module")
def loaded_diffusion() -> LanguageModel:
    return models.load(tiny.DREAM)


@pytest.fixture
def diffusion(loaded_diffusion: LanguageModel) -> Iterator[LanguageModel]:
    yield from restored(loaded_diffusion)


def token_weights(seed: int = 1) -> Tensor:
    """ω of very different size between tokens and between samples."""
    drawn = torch.rand(SAMPLES, LENGTH, generator=torch.Generator().manual_seed(seed)).pow(4)
    return drawn * torch.tensor([1.0, 0.05, 0.3, 3.0, 0.1])[:, None]


def windows() -> Tensor:
    return tiny.ids(SAMPLES, LENGTH)


def prune(model: LanguageModel, method: Method, weight: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """Prune with everything that any method could ask for; the new weights by name."""
    given = {
        "sparsity": 0.5,
        "calibration_set": CalibrationSet(windows(), weight),
        "generator": generator(0, "pruning"),
        "batch_size": 2,
        **options,
    }
    methods.prune_model_(model, method, **given)
    return weights(model)


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {layer.name: layer.module.weight.clone() for layer in model.layers}


def chosen(kept: Tensor, importance: Tensor, group: int) -> bool:
    """Whether nothing removed outranks anything kept in its group; single precision may swap two of nearly equal importance."""
    kept, importance = kept.reshape(-1, group), importance.reshape(-1, group)
    largest_gone = importance.masked_fill(kept, -1.0).amax(1)
    smallest_kept = importance.masked_fill(~kept, inf).amin(1)
    return bool((largest_gone <= smallest_kept * (1 + 1e-4)).all())


def share_of_other_zeros(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Share of the weights removed in one model only."""
    other = sum(int(((value == 0) != (second[name] == 0)).sum()) for name, value in first.items())
    return other / sum(value.numel() for value in first.values())


def zeros_differ(first: Mapping[str, Tensor], second: Mapping[str, Tensor], block: int | None = None) -> bool:
    place = "" if block is None else f"layers.{block}."
    return any(not torch.equal(value == 0, second[name] == 0) for name, value in first.items() if place in name)


# --- every method reaches what it is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["0.5", "0.29"])
@pytest.mark.parametrize("name", ALL)
def test_every_matrix_loses_what_was_asked(model: LanguageModel, name: str, sparsity: str) -> None:
    """One more goes where the release removes the weight at the threshold: the matrices are one block of columns wide."""
    method = ALL[name]
    for weight in prune(model, method, sparsity=float(sparsity)).values():
        rows, columns = weight.shape
        gone = (weight == 0).sum(1)
        if method.importance in ("random", "wanda"):
            assert gone.tolist() == [slow.removed(columns, sparsity)] * rows
        else:
            assert int(gone.sum()) == slow.removed(rows * columns, sparsity) + 1
            assert len(set(gone.tolist())) > 1  # rows compete
        assert torch.isfinite(weight).all()


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("name", ALL)
def test_every_method_keeps_n_of_m(model: LanguageModel, name: str, pattern: str) -> None:
    """The sink variant of the release ignores the pattern and prunes unstructured."""
    n, m = map(int, pattern.split(":"))
    for weight in prune(model, ALL[name], token_weights(), pattern=pattern).values():
        assert ((weight != 0).view(len(weight), -1, m).sum(-1) == n).all()
        assert pruning.measured_sparsity(weight) == 0.5


@pytest.mark.parametrize("name", [*RELEASE, "random"])
def test_an_exact_variant_removes_exactly_the_floor(diffusion: LanguageModel, name: str) -> None:
    for weight in prune(diffusion, replace(ALL[name], inclusive=False), sparsity=0.3).values():
        assert abs(int((weight == 0).sum()) - 0.3 * weight.numel()) < (len(weight) if ALL[name].granularity == "row" else 1)


@pytest.mark.parametrize("name", ALL)
def test_only_the_prunable_matrices_change(model: LanguageModel, name: str) -> None:
    before, prunable = slow.state_of(model), {layer.name for layer in model.layers}
    prune(model, ALL[name], token_weights())
    after = model.network.state_dict()
    assert prunable < set(after)
    for parameter, value in after.items():
        assert torch.equal(value, before[parameter]) == (parameter not in prunable), parameter
    if ALL[name].importance != "sparsegpt":  # what stays is left as it was
        for parameter in prunable:
            kept = after[parameter] != 0
            assert torch.equal(after[parameter][kept], before[parameter][kept])


def test_a_bfloat16_model_stays_one() -> None:
    model = models.load(tiny.DREAM, dtype=torch.bfloat16)
    for name in ("wanda", "sparsegpt"):
        for weight in prune(model, ALL[name]).values():
            assert weight.dtype == torch.bfloat16
            assert 0.45 < pruning.measured_sparsity(weight) < 0.55


# --- each choice does what it says ---------------------------------------------------------------------------------------


def norms(model: LanguageModel, weight: Tensor | None, kind: str) -> dict[str, Tensor]:
    """Norms of what each layer reads now, from transformers' own pass."""
    found = slow.captured(model, windows())
    return {name: slow.statistics(inputs, weight, products=False)[kind] for name, inputs in found.items()}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("aggregate", ["root_mean_square", "sum_of_norms"])
def test_one_shot_wanda_ranks_by_the_norms_of_the_dense_model(model: LanguageModel, aggregate: str, pattern: str) -> None:
    method = Method("wanda", sequential=False, aggregate=cast(Any, aggregate))
    for weight in (None, token_weights()):
        dense, found = weights(model), norms(model, weight, "norms" if aggregate == "sum_of_norms" else "squares")
        state = slow.state_of(model)
        for name, got in prune(model, method, weight, pattern=pattern).items():
            norm = found[name] if aggregate == "sum_of_norms" else found[name].sqrt()
            importance = dense[name].double().abs() * norm
            group, kept = (4, 2) if ":" in pattern else (importance.shape[1], importance.shape[1] - importance.shape[1] // 2)
            assert ((got != 0).view(-1, group).sum(1) == kept).all()
            assert chosen(got != 0, importance, group), name
        model.network.load_state_dict(state)


def test_sequential_wanda_ranks_by_the_norms_behind_the_pruned_blocks(model: LanguageModel) -> None:
    """Walk by hand: read with transformers, prune one block, read again."""
    state = slow.state_of(model)
    got = prune(model, ALL["wanda"], token_weights())
    model.network.load_state_dict(state)
    for block in range(2):
        found = norms(model, token_weights(), "squares")
        for layer in [layer for layer in model.layers if layer.block == block]:
            weight = layer.module.weight
            assert chosen(got[layer.name] != 0, weight.double().abs() * found[layer.name].sqrt(), weight.shape[1]), layer.name
            weight.copy_(got[layer.name])


@pytest.mark.parametrize("weighted", [False, True])
def test_sparsegpt_uses_the_hessian_of_what_its_layer_reads(model: LanguageModel, weighted: bool) -> None:
    """All seven matrices of a block from one pass: also what `o` and `down` read is that of the block before it is pruned."""
    weight = token_weights() if weighted else None
    state = slow.state_of(model)
    inputs = slow.captured(model, windows())
    got = prune(model, RELEASE["sink_sparsegpt" if weighted else "sparsegpt"], weight)
    for layer in [layer for layer in model.layers if layer.block == 0]:
        hessian = slow.statistics(inputs[layer.name], weight)["products"] * 2 / SAMPLES
        expected, kept = sparsegpt.sparsegpt(state[layer.name].double(), hessian, sparsity=0.5, inclusive=True)
        same = ((got[layer.name] != 0) == kept).all(1)  # single precision may swap two weights of nearly equal cost
        assert same.double().mean() > 0.9
        torch.testing.assert_close(
            got[layer.name][same].double(), expected[same], atol=2e-3 * float(expected.abs().max()), rtol=0
        )


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_the_order_matters_from_the_second_block_on(diffusion: LanguageModel, name: str) -> None:
    state = slow.state_of(diffusion)
    sequential = prune(diffusion, ALL[name])
    diffusion.network.load_state_dict(state)
    one_shot = prune(diffusion, replace(ALL[name], sequential=False))
    assert not zeros_differ(sequential, one_shot, block=0)
    assert zeros_differ(sequential, one_shot, block=1)


@pytest.mark.parametrize(
    ("changed", "weighted"),
    [
        (Method("wanda", aggregate="sum_of_norms"), True),
        (Method("wanda", granularity="layer"), True),
        (Method("wanda"), False),
        (Method("magnitude"), True),
    ],
)
def test_every_choice_changes_the_mask(diffusion: LanguageModel, changed: Method, weighted: bool) -> None:
    state = slow.state_of(diffusion)
    plain = prune(diffusion, Method("wanda"), token_weights())
    diffusion.network.load_state_dict(state)
    assert zeros_differ(plain, prune(diffusion, changed, token_weights() if weighted else None), block=0)


def test_random_pruning_follows_the_generator(diffusion: LanguageModel) -> None:
    state, found = slow.state_of(diffusion), []
    for seed in (0, 0, 1):
        found.append(prune(diffusion, Method("random"), generator=generator(seed, "pruning")))
        diffusion.network.load_state_dict(state)
    assert not zeros_differ(found[0], found[1])
    assert zeros_differ(found[0], found[2])
    same_shape = [weight == 0 for name, weight in found[0].items() if "up_proj" in name or "gate_proj" in name]
    assert not torch.equal(same_shape[0], same_shape[1])  # each matrix draws anew


def test_the_batch_size_does_not_matter(diffusion: LanguageModel) -> None:
    state, found = slow.state_of(diffusion), []
    for batch_size in (1, 3, SAMPLES):
        found.append(prune(diffusion, RELEASE["sink_wanda"], token_weights(), batch_size=batch_size))
        diffusion.network.load_state_dict(state)
    assert share_of_other_zeros(found[0], found[1]) < 1e-3 and share_of_other_zeros(found[0], found[2]) < 1e-3


@pytest.mark.parametrize("factor", [0.37, 1024.0])
@pytest.mark.parametrize("name", WANDAS)
def test_a_common_factor_of_the_token_weights_changes_no_wanda_mask(model: LanguageModel, name: str, factor: float) -> None:
    state = slow.state_of(model)
    plain = prune(model, ALL[name], token_weights())
    model.network.load_state_dict(state)
    other = share_of_other_zeros(plain, prune(model, ALL[name], token_weights() * factor))
    assert other <= (1e-3 if factor == 0.37 else 0.0)  # powers of two round nothing


def test_the_methods_of_the_release_are_what_the_paper_compares() -> None:
    """One choice apart for SparseGPT, four for Wanda (noise is the caller's: the weights of the sink mask or the windows)."""
    assert replace(RELEASE["sink_sparsegpt"], sink_weights=False) == RELEASE["sparsegpt"]
    assert (
        replace(RELEASE["sink_wanda"], noised=False, sink_weights=False, sequential=True, aggregate="root_mean_square")
        == RELEASE["wanda"]
    )
    assert [name for name, method in ALL.items() if not method.needs_calibration] == ["magnitude", "random"]
    assert set(READS) == {"q", "k", "v", "o", "gate", "up", "down"}


@pytest.mark.parametrize(("importance", "granularity"), [("wanda", "row"), ("random", "row"), ("magnitude", "row")])
def test_inclusive_goes_with_the_two_rules_of_the_release_alone(importance: Any, granularity: Any) -> None:
    with pytest.raises(InputError, match=f"inclusive must go with SparseGPT or magnitude per layer, got {importance} per row"):
        Method(importance, granularity=granularity, inclusive=True)


# --- refused before anything changes -------------------------------------------------------------------------------------


def refused(model: LanguageModel, method: Method, message: str, **options: Any) -> None:
    before = slow.state_of(model)
    with pytest.raises(InputError, match=message):
        methods.prune_model_(model, method, **{"sparsity": 0.5, **options})
    assert slow.same_state(model, before)


@pytest.mark.parametrize("name", [name for name, method in ALL.items() if method.needs_calibration])
def test_a_missing_calibration_set_is_refused(diffusion: LanguageModel, name: str) -> None:
    importance = ALL[name].importance
    refused(diffusion, ALL[name], f"{importance} must be given a calibration set, got none: pass calibration_set")
    empty = CalibrationSet(tiny.ids(0, LENGTH))
    refused(diffusion, ALL[name], "a calibration set must hold samples, got none", calibration_set=empty)


def test_a_missing_generator_is_refused(diffusion: LanguageModel) -> None:
    refused(diffusion, Method("random"), r"random pruning must be given a generator, got None: pass runtime\.generator")


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("name", ALL)
def test_a_weight_that_is_not_finite_is_refused_by_name(diffusion: LanguageModel, name: str, value: float) -> None:
    """It sits in the last matrix, so pruning layer by layer would have changed all others before it is found."""
    last = diffusion.layers[-1]
    last.module.weight[3, 5] = value
    given = {"calibration_set": CalibrationSet(windows()), "generator": generator(0)}
    refused(
        diffusion, ALL[name], r"weights of model\.layers\.1\.mlp\.down_proj\.weight must be finite, got 1 that are not", **given
    )


@pytest.mark.parametrize("name", ALL)
def test_bad_sparsities_and_patterns_are_refused(diffusion: LanguageModel, name: str) -> None:
    given = {"calibration_set": CalibrationSet(windows()), "generator": generator(0)}
    for sparsity in (50, -0.1, 1.0, nan):
        refused(diffusion, ALL[name], r"sparsity must be in \[0, 1\), got", **given, sparsity=sparsity)
    refused(diffusion, ALL[name], "sparsity must be 0.5 for the pattern 2:4, got 0.3", **given, sparsity=0.3, pattern="2:4")
    refused(diffusion, ALL[name], "must divide the input features, got 64", **given, sparsity=0.4, pattern="3:5")
    refused(diffusion, ALL[name], "sparsity_pattern must be .* got '124'", **given, pattern="124")


def test_a_pattern_that_fits_only_some_layers_is_refused_before_the_others_change(diffusion: LanguageModel) -> None:
    """32 divides the hidden size 64 and the intermediate size 96; 64 divides the first alone."""
    given = {"calibration_set": CalibrationSet(windows())}
    refused(diffusion, RELEASE["wanda"], "the pattern 32:64 must divide the input features, got 96", **given, pattern="32:64")


def test_inputs_that_are_not_finite_are_refused_by_name(diffusion: LanguageModel) -> None:
    embedding = cast(Any, diffusion.network.get_decoder()).embed_tokens.weight
    embedding[int(windows()[0, 0])] = inf
    message = r"inputs of model\.layers\.0\.self_attn\.q_proj\.weight must be finite"
    refused(diffusion, RELEASE["wanda"], message, calibration_set=CalibrationSet(windows()))
    refused(diffusion, RELEASE["sparsegpt"], message, calibration_set=CalibrationSet(windows()))


# --- sink weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_std", "alpha"), [(2.0, 5.0), (1.0, 0.5), (0.5, 0.2)])
def test_sink_weights_against_eager_attention_and_a_loop(model: LanguageModel, num_std: float, alpha: float) -> None:
    got = methods.sink_weights(model, windows(), num_std=num_std, alpha=alpha, batch_size=2)
    expected = slow.sink_weights(model, windows(), num_std=num_std, alpha=alpha)
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=0)
    assert got.max() - got.min() > 0.1  # some of them are sinks


def test_sink_weights_by_default_are_those_of_the_release(model: LanguageModel) -> None:
    got = methods.sink_weights(model, windows())
    assert torch.equal(got, methods.sink_weights(model, windows(), num_std=2.0, alpha=5.0))
    assert got.dtype == torch.float32 and got.device.type == "cpu"
    assert bool(((got >= 0) & (got <= 1)).all())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 9])
def test_sink_weights_do_not_depend_on_the_batch(model: LanguageModel, batch_size: int) -> None:
    """The mean and deviation are those of each window, not of the batch; windows of very different concentration show it."""
    ids = windows()
    ids[1] = ids[1, 0]
    before = slow.state_of(model)
    whole = methods.sink_weights(model, ids, num_std=1.0, alpha=0.5, batch_size=SAMPLES)
    got = methods.sink_weights(model, ids, num_std=1.0, alpha=0.5, batch_size=batch_size)
    torch.testing.assert_close(got, whole, atol=1e-4, rtol=0)
    assert slow.same_state(model, before)


def test_sink_weights_go_straight_into_a_calibration_set(diffusion: LanguageModel) -> None:
    """They are made in inference mode and used outside it."""
    omega = methods.sink_weights(diffusion, windows(), num_std=0.5)
    state = slow.state_of(diffusion)
    weighted = prune(diffusion, RELEASE["sink_wanda"], omega)
    diffusion.network.load_state_dict(state)
    even = torch.ones_like(omega)
    assert zeros_differ(weighted, prune(diffusion, RELEASE["sink_wanda"], even))
