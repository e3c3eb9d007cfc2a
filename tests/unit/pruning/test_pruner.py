"""Whole models: every method reaches its sparsity in every matrix, does what its choices say, and refuses before it changes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from math import inf, nan
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lib.calibration import measured_weights, one_shot, sets
from lib.calibration.reads import READS
from lib.calibration.sets import Inputs
from lib.calibration.statistics import CalibrationSet
from lib.calibration.sums import InputStatistics
from lib.calibration.token_weights import Weighting
from lib.core.errors import InputError
from lib.models import loading
from lib.models.language_model import LanguageModel
from lib.models.layers import attention
from lib.pruning import allocation, methods, pruner, sparsegpt
from lib.pruning import importances as pruning
from lib.pruning.methods import METHODS, RELEASE, SINKS, Method, Target
from lib.pruning.pruner import restored
from tests import tiny
from tests.unit import slow_pruning as slow

SAMPLES, LENGTH = 5, 20
HALF = Target(0.5)
SOFT = Weighting(margin=1.0, alpha=0.5)
NOISE = Inputs("noised", levels=2)
# every importance, kind of input, kind of weight, level and order at least once
ALL: Mapping[str, Method] = {
    **RELEASE,
    "random": Method("random"),
    "sink_preserve": Method("wanda", weighting=Weighting("sinks_up")),
    "dwanda": Method("wanda", Inputs("noised", times="uniform", levels=2)),
    "one_shot": Method("wanda", sequential=False),
    "trajectory": Method("wanda", Inputs("trajectory", levels=2), SOFT),
    "layer_weights": Method("sparsegpt", weighting=replace(SOFT, level="layer")),
    "head_weights": Method("wanda", weighting=replace(SOFT, level="head"), aggregate="sum_of_norms"),
    "one_shot_heads": Method("wanda", NOISE, Weighting("sinks_up", level="head"), sequential=False),
    "control": Method("wanda", NOISE, Weighting("random", margin=0.5)),
    "instability": Method("wanda", weighting=Weighting("variance", margin=1.0)),
    "exact_sparsegpt": Method("sparsegpt"),
    "exact_magnitude": Method("magnitude"),
}
NOISY = [name for name, method in ALL.items() if method.inputs.kind != "clean" or (method.weighting or SOFT).over_levels]
ONE_SHOT = [name for name, method in ALL.items() if method.needs_calibration and not method.sequential]


@pytest.fixture(scope="module", params=["llada", "dream", "causal"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    if request.param == "causal":
        return tiny.model(tmp_path_factory.mktemp("causal"), causal=True, kv_heads=2)
    return loading.load({"llada": tiny.LLADA, "dream": tiny.DREAM}[request.param])


@pytest.fixture
def model(loaded: LanguageModel) -> Iterator[LanguageModel]:
    yield from lent(loaded)


@pytest.fixture(scope="module")
def loaded_diffusion(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Grouped queries, and attention far from uniform, so that there are sinks."""
    return tiny.model(tmp_path_factory.mktemp("diffusion"), causal=False, kv_heads=2)


@pytest.fixture
def diffusion(loaded_diffusion: LanguageModel) -> Iterator[LanguageModel]:
    yield from lent(loaded_diffusion)


@pytest.fixture(scope="module")
def loaded_causal(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("causal"), causal=True, kv_heads=2)


def lent(loaded: LanguageModel) -> Iterator[LanguageModel]:
    """Undo what a test did to any parameter; `pruner.restored` is itself under test."""
    before = slow.state_of(loaded)
    yield loaded
    loaded.network.load_state_dict(before)


def fitting(model: LanguageModel, name: str) -> Method:
    """The method, on clean text where the model has no mask token."""
    method = ALL[name] if model.mask_token_id is not None else methods.without_noise(ALL[name])
    if model.mask_token_id is None and method.weighting is not None and method.weighting.over_levels:
        pytest.skip("instability is measured on noised text alone")
    return method


def windows() -> Tensor:
    return tiny.ids(SAMPLES, LENGTH)


def token_weights(*shape: int, seed: int = 1) -> Tensor:
    """ω of very different size between tokens, and between samples, layers or heads."""
    return torch.rand(shape or (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(seed)).pow(4)


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {layer.name: layer.module.weight.clone() for layer in model.layers}


def pruned(model: LanguageModel, method: Method, target: Target = HALF, **options: Any) -> dict[str, Tensor]:
    """The weights after `prune_` with windows; the model keeps its own."""
    return after(model, lambda: pruner.prune_(model, method, target, **{"windows": windows(), **options}))


def pruned_on(
    model: LanguageModel, method: Method, given: CalibrationSet, target: Target = HALF, **options: Any
) -> dict[str, Tensor]:
    return after(model, lambda: pruner.prune_on_(model, method, target, given, **options))


def after(model: LanguageModel, prune: Callable[[], object]) -> dict[str, Tensor]:
    state = slow.state_of(model)
    prune()
    found = weights(model)
    model.network.load_state_dict(state)
    return found


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


def in_block(found: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if f"layers.{block}." in name}


SAME, OTHER = 2e-3, 1e-2  # shares of other zeros: what rounding may do in tiny matrices, and what another choice does at least


# --- every method reaches what it is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_row_or_matrix_loses_exactly_what_was_asked(model: LanguageModel, name: str) -> None:
    """0.29 of no size here is whole. One more goes where the release removes the weight at the threshold."""
    method = fitting(model, name)
    for weight in pruned(model, method, Target(0.29)).values():
        gone, (rows, columns) = (weight == 0).sum(1), weight.shape
        if method.importance == "sparsegpt" or method.granularity == "layer":
            assert int(gone.sum()) == slow.removed(rows * columns, "0.29") + method.inclusive
            assert len(set(gone.tolist())) > 1  # rows compete
        else:
            assert gone.tolist() == [slow.removed(columns, "0.29")] * rows
        assert torch.isfinite(weight).all()


@pytest.mark.parametrize("name", ["random", "exact_magnitude", "wanda", "sink_wanda", "head_weights", "instability"])
def test_all_weights_of_a_matrix_compete_when_asked(model: LanguageModel, name: str) -> None:
    for weight in pruned(model, replace(fitting(model, name), granularity="layer"), Target(0.29)).values():
        assert int((weight == 0).sum()) == slow.removed(weight.numel(), "0.29")
        assert len(set((weight == 0).sum(1).tolist())) > 1 and len(set((weight == 0).sum(0).tolist())) > 1


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("name", ALL)
def test_every_method_keeps_n_of_m(model: LanguageModel, name: str, pattern: str) -> None:
    """The sink variant of the release ignores the pattern and prunes unstructured."""
    n, m = map(int, pattern.split(":"))
    for weight in pruned(model, fitting(model, name), Target(0.5, pattern)).values():
        kept = weight != 0
        assert (kept.view(len(weight), -1, m).sum(-1) == n).all()
        assert not (kept.view(-1, m, weight.shape[1]).sum(1) == n).all()  # not along the output features
        assert m == 4 or not (kept.view(len(weight), -1, 4).sum(-1) == 2).all()
        assert float((weight == 0).double().mean()) == 0.5


@pytest.mark.parametrize("name", ALL)
def test_only_the_prunable_matrices_change(model: LanguageModel, name: str) -> None:
    before, prunable = slow.state_of(model), {layer.name for layer in model.layers}
    pruner.prune_(model, fitting(model, name), HALF, windows=windows())
    after = model.network.state_dict()
    assert prunable < set(after)
    for parameter, value in after.items():
        assert torch.equal(value, before[parameter]) == (parameter not in prunable), parameter
    if ALL[name].importance != "sparsegpt":  # what stays is left as it was
        for parameter in prunable:
            kept = after[parameter] != 0
            assert torch.equal(after[parameter][kept], before[parameter][kept])
    assert model.network.config._attn_implementation == attention.NAME
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.network.modules())


def test_a_bfloat16_model_stays_one() -> None:
    model = loading.load(tiny.DREAM, dtype=torch.bfloat16)
    for name in ("wanda", "sparsegpt", "sink_wanda", "head_weights", "random"):
        for weight in pruned(model, ALL[name]).values():
            assert weight.dtype == torch.bfloat16
            assert 0.45 < float((weight == 0).double().mean()) < 0.55


def test_the_measured_sparsity_is_that_of_all_matrices_together(diffusion: LanguageModel) -> None:
    """`down` is the largest: a mean over matrices would be another number."""
    assert pruner.measured_sparsity(diffusion) == 0.0
    down = diffusion.layers[-1].module.weight
    down.zero_()
    total = sum(layer.module.weight.numel() for layer in diffusion.layers)
    assert pruner.measured_sparsity(diffusion) == down.numel() / total != 1 / len(diffusion.layers)


# --- each choice does what it says ---------------------------------------------------------------------------------------


def importances(model: LanguageModel, method: Method, weight: Tensor | None) -> dict[str, Tensor]:
    """|W| times the norms of what each layer reads now, from transformers' own pass and sums token by token."""
    inputs, found = slow.captured(model, windows()), {}
    kv_heads = model.network.config.num_key_value_heads
    for layer in model.layers:
        omega = weight[layer.block] if weight is not None and weight.dim() > 2 else weight
        if omega is not None and omega.dim() == 3:
            sums = slow.statistics_by_head(inputs[layer.name], omega, layer.role, kv_heads=kv_heads)
        else:
            sums = slow.statistics(inputs[layer.name], omega, products=False)
        norms = torch.atleast_2d(sums["norms"] if method.aggregate == "sum_of_norms" else sums["squares"].sqrt())
        matrix = layer.module.weight.double().abs()
        per_group = len(matrix) // len(norms)
        found[layer.name] = torch.stack([row * norms[index // per_group] for index, row in enumerate(matrix)])
    return found


SHAPES: dict[str, tuple[int, ...] | None] = {
    "plain": None,
    "by token": (SAMPLES, LENGTH),
    "by layer": (2, SAMPLES, LENGTH),
    "by head": (2, SAMPLES, 4, LENGTH),
}


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4", "4:8"])
@pytest.mark.parametrize("aggregate", ["root_mean_square", "sum_of_norms"])
@pytest.mark.parametrize("given", SHAPES)
def test_one_shot_wanda_ranks_by_the_norms_of_the_dense_model(
    model: LanguageModel, given: str, aggregate: Any, pattern: str
) -> None:
    """Rows of `v` by their own key-value head, columns of `o` by their own head, all else by the mean over heads."""
    shape = SHAPES[given]
    weight = None if shape is None else token_weights(*shape)
    method = Method("wanda", weighting=None if shape is None else SINKS, sequential=False, aggregate=aggregate)
    method = replace(method, granularity="layer" if pattern == "layer" else "row")
    expected = importances(model, method, weight)
    target = Target(0.5, pattern if ":" in pattern else "unstructured")
    for name, got in pruned_on(model, method, CalibrationSet(windows(), weight), target).items():
        group = {"row": got.shape[1], "layer": got.numel()}.get(pattern) or int(pattern[2:])
        assert ((got != 0).view(-1, group).sum(1) == group - group // 2).all()
        assert chosen(got != 0, expected[name], group), name


@pytest.mark.parametrize("given", SHAPES)
def test_sequential_wanda_ranks_by_the_norms_behind_the_pruned_blocks(model: LanguageModel, given: str) -> None:
    """Walk by hand: read with transformers, prune one block, read again."""
    shape = SHAPES[given]
    weight = None if shape is None else token_weights(*shape)
    method = Method("wanda", weighting=None if shape is None else SINKS)
    got = pruned_on(model, method, CalibrationSet(windows(), weight))
    for block in range(2):
        expected = importances(model, method, weight)
        for layer in [layer for layer in model.layers if layer.block == block]:
            assert chosen(got[layer.name] != 0, expected[layer.name], got[layer.name].shape[1]), layer.name
            layer.module.weight.copy_(got[layer.name])


@pytest.mark.parametrize("given", ["plain", "by token", "by layer"])
def test_sparsegpt_uses_the_hessian_of_what_its_layer_reads(model: LanguageModel, given: str) -> None:
    """All seven matrices of a block from one pass: also what `o` and `down` read is that of the block before it is pruned."""
    shape = SHAPES[given]
    weight = None if shape is None else token_weights(*shape)
    method = RELEASE["sparsegpt" if shape is None else "sink_sparsegpt"]
    state, inputs = slow.state_of(model), slow.captured(model, windows())
    got = pruned_on(model, method, CalibrationSet(windows(), weight))
    for layer in [layer for layer in model.layers if layer.block == 0]:
        omega = weight[0] if weight is not None and weight.dim() == 3 else weight
        hessian = slow.statistics(inputs[layer.name], omega)["products"] * 2 / SAMPLES
        expected, kept = sparsegpt.sparsegpt(state[layer.name].double(), hessian, sparsity=0.5, inclusive=True)
        same = ((got[layer.name] != 0) == kept).all(1)  # single precision may swap two weights of nearly equal cost
        assert same.double().mean() > 0.9
        torch.testing.assert_close(
            got[layer.name][same].double(), expected[same], atol=2e-3 * float(expected.abs().max()), rtol=0
        )


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "sink_preserve", "head_weights"])
def test_the_order_matters_from_the_second_block_on(diffusion: LanguageModel, name: str) -> None:
    sequential, one_shot = (pruned(diffusion, replace(ALL[name], sequential=value)) for value in (True, False))
    assert share_of_other_zeros(in_block(sequential, 0), in_block(one_shot, 0)) < SAME
    assert share_of_other_zeros(in_block(sequential, 1), in_block(one_shot, 1)) > OTHER


@pytest.mark.parametrize(
    "changed",
    [
        {"aggregate": "sum_of_norms"},
        {"granularity": "layer"},
        {"weighting": None},
        {"weighting": replace(SOFT, kind="sinks_up", boost=5.0)},
        {"weighting": replace(SOFT, level="layer")},
        {"weighting": replace(SOFT, level="head")},
        {"weighting": replace(SOFT, averaged=True)},
        {"weighting": replace(SOFT, rule="leave_one_out")},
        {"weighting": Weighting("random", margin=1.0)},
        {"weighting": Weighting("first", margin=1.0)},
        {"weighting": Weighting("mask", margin=1.0)},
        {"weighting": Weighting("norm", margin=1.0)},
        {"weighting": Weighting("variance", margin=1.0)},
        {"weighting": Weighting("presence", margin=1.0)},
        {"inputs": Inputs()},
        {"inputs": Inputs("trajectory", levels=4)},
        {"inputs": Inputs("noised", levels=4, times="uniform")},
        {"inputs": Inputs("noised", levels=4, times="grid_below_one")},
    ],
    ids=lambda changed: "-".join(map(str, changed)),
)
def test_every_choice_changes_the_mask(diffusion: LanguageModel, changed: dict[str, Any]) -> None:
    plain = Method("wanda", Inputs("noised", levels=4), SOFT)
    long = tiny.ids(3, 32)
    first, other = (in_block(pruned(diffusion, method, windows=long), 0) for method in (plain, replace(plain, **changed)))
    assert share_of_other_zeros(first, other) > OTHER / 2


@pytest.mark.parametrize("name", ["random", "dwanda", "trajectory", "control", "sink_wanda"])
def test_random_choices_follow_the_seed(diffusion: LanguageModel, name: str) -> None:
    first, again, other = (pruned(diffusion, ALL[name], seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(value, again[layer]) for layer, value in first.items())
    assert share_of_other_zeros(first, other) > OTHER


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "sink_preserve", "magnitude"])
def test_methods_without_chance_ignore_the_seed(diffusion: LanguageModel, name: str) -> None:
    first, other = (pruned(diffusion, ALL[name], seed=seed) for seed in (0, 1))
    assert all(torch.equal(value, other[layer]) for layer, value in first.items())


def test_random_pruning_draws_anew_for_each_matrix(diffusion: LanguageModel) -> None:
    found = pruned(diffusion, Method("random"), windows=None)
    same_shape = [weight == 0 for name, weight in found.items() if "up_proj" in name or "gate_proj" in name]
    assert not torch.equal(same_shape[0], same_shape[1])


@pytest.mark.parametrize(
    "name", ["wanda", "sink_wanda", "sink_preserve", "one_shot_heads", "head_weights", "layer_weights", "control"]
)
def test_the_batch_size_does_not_matter(diffusion: LanguageModel, name: str) -> None:
    found = [pruned(diffusion, ALL[name], batch_size=batch_size) for batch_size in (1, 3, SAMPLES)]
    assert share_of_other_zeros(found[0], found[1]) < SAME and share_of_other_zeros(found[0], found[2]) < SAME


@pytest.mark.parametrize("factor", [0.37, 1024.0])
@pytest.mark.parametrize("aggregate", ["root_mean_square", "sum_of_norms"])
def test_a_common_factor_of_the_token_weights_changes_no_wanda_mask(model: LanguageModel, aggregate: Any, factor: float) -> None:
    method = Method("wanda", weighting=SINKS, aggregate=aggregate)
    plain, scaled = (pruned_on(model, method, CalibrationSet(windows(), token_weights() * by)) for by in (1.0, factor))
    assert share_of_other_zeros(plain, scaled) <= (SAME if factor == 0.37 else 0.0)  # powers of two round nothing


def test_the_methods_of_the_release_are_what_the_paper_compares() -> None:
    """One choice apart for SparseGPT, four for Wanda."""
    assert replace(RELEASE["sink_sparsegpt"], weighting=None) == RELEASE["sparsegpt"]
    assert RELEASE["sink_sparsegpt"].weighting == replace(SINKS, averaged=True)
    back = {"inputs": Inputs(), "weighting": None, "sequential": True, "aggregate": "root_mean_square"}
    assert replace(RELEASE["sink_wanda"], **cast(Any, back)) == RELEASE["wanda"]
    assert RELEASE["sink_wanda"].inputs == Inputs("noised", times="grid", levels=10, schedule="llada")
    assert set(READS) == {"q", "k", "v", "o", "gate", "up", "down"}


def test_the_methods_that_are_compared_are_those_of_the_release_with_exact_counts() -> None:
    exact = {name: replace(method, inclusive=False) for name, method in RELEASE.items()}
    names = {"Wanda": "wanda", "SparseGPT": "sparsegpt", "magnitude": "magnitude"}
    names |= {"sink-aware (Wanda)": "sink_wanda", "sink-aware (SparseGPT)": "sink_sparsegpt"}
    assert {shown: METHODS[shown] for shown in names} == {shown: exact[name] for shown, name in names.items()}
    assert [name for name, method in METHODS.items() if not method.needs_calibration] == [
        "random",
        "magnitude",
        "magnitude per row",
    ]
    assert replace(METHODS["DWANDA"], inputs=Inputs()) == METHODS["Wanda"]
    assert replace(METHODS["AR sink-preserve"], weighting=None) == METHODS["Wanda"]


@pytest.mark.parametrize("name", METHODS)
def test_an_autoregressive_model_runs_what_needs_no_noise(loaded_causal: LanguageModel, name: str) -> None:
    method = methods.without_noise(METHODS[name])
    assert replace(method, inputs=METHODS[name].inputs, weighting=METHODS[name].weighting) == METHODS[name]
    assert (method.weighting is None) == (METHODS[name].weighting is None)
    for weight in pruned(loaded_causal, method).values():
        assert float((weight == 0).double().mean()) == 0.5


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75), ("3:4", 0.25)])
def test_a_pattern_fixes_the_sparsity(pattern: str, sparsity: float) -> None:
    assert methods.pattern_target(pattern) == Target(sparsity, pattern)
    assert methods.pattern_target("unstructured") == Target(0.0)


# --- three ways in -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, method in ALL.items() if method.needs_calibration])
def test_clean_windows_and_the_built_set_prune_alike(diffusion: LanguageModel, name: str) -> None:
    """Also where `prune_` takes weights and norms from the same passes."""
    method = ALL[name]
    built = sets.build(diffusion, windows(), inputs=method.inputs, weighting=method.weighting, seed=3)
    first, second = pruned(diffusion, method, seed=3), pruned_on(diffusion, method, built)
    assert share_of_other_zeros(first, second) < SAME
    if method.importance == "sparsegpt":
        assert all(torch.allclose(value, second[layer], atol=1e-4) for layer, value in first.items())


@pytest.mark.parametrize("name", [*ONE_SHOT, "one_shot_sparsegpt"])
def test_statistics_of_the_dense_model_serve_every_target(diffusion: LanguageModel, name: str) -> None:
    method = ALL.get(name) or Method("sparsegpt", weighting=SOFT, sequential=False)
    built = sets.build(diffusion, windows(), inputs=method.inputs, weighting=method.weighting, seed=3)
    found = one_shot.dense_statistics(diffusion, built, hessian=method.importance == "sparsegpt")
    for target in (HALF, Target(0.3), Target(0.5, "2:4")):
        first = pruned(diffusion, method, target, seed=3)
        second = after(diffusion, partial(pruner.prune_with_, diffusion, method, target, found))
        assert share_of_other_zeros(first, second) < SAME


@pytest.mark.parametrize("name", ONE_SHOT)
def test_short_memory_takes_a_second_pass_and_gives_the_same(diffusion: LanguageModel, name: str) -> None:
    """6 x 10 = 60 samples or 12 of them, 4 at one time; a second pass reaches the same norms to rounding."""
    passes, given = [0], tiny.ids(6, LENGTH)
    handle = cast(Any, diffusion.network.get_decoder()).register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    found, counts = [], []
    for budget in (2**30, 0):
        passes[0] = 0
        found.append(pruned(diffusion, ALL[name], windows=given, memory_budget=budget))
        counts.append(passes[0])
    handle.remove()
    samples = {"sink_wanda": 60, "one_shot_heads": 12}.get(name)
    assert counts == ([2, 2] if samples is None else [samples // 4, samples // 2])  # without weights nothing has to be kept
    assert share_of_other_zeros(found[0], found[1]) < SAME


@pytest.mark.parametrize("level", ["aggregate", "layer", "head"])
def test_weights_and_norms_of_one_pass_are_those_of_two(diffusion: LanguageModel, level: Any) -> None:
    ids, weighting = sets.read(diffusion, windows(), NOISE, seed=0).flatten(0, 1), replace(SOFT, level=level)
    weight = measured_weights.measure(diffusion, ids, weighting)
    streamed = one_shot.dense_statistics(diffusion, CalibrationSet(ids, weight))
    for budget in (0, 2**30):
        found = one_shot.one_shot_statistics(diffusion, ids, measured_weights.weigher(weighting), memory_budget=budget)
        for first, second in zip(streamed, found, strict=True):
            assert set(first) == set(second)
            for role, expected in first.items():
                torch.testing.assert_close(second[role].squares, expected.squares, atol=0, rtol=1e-5)
                torch.testing.assert_close(second[role].norms, expected.norms, atol=0, rtol=1e-5)


# --- exact numbers -------------------------------------------------------------------------------------------------------


def removal(model: LanguageModel, *, sparsity: float, epsilon: float = 0.2) -> dict[str, int]:
    """Early is sparser, to whole numbers that add up to what the sparsity says."""
    sizes = [layer.module.weight.numel() for layer in model.layers]
    offsets = allocation.early_is_sparser(2, epsilon=epsilon)[[layer.block for layer in model.layers]]
    wanted = allocation.with_total(offsets, sizes, sparsity=sparsity)
    counts = allocation.removed_counts(wanted, sizes, total=pruning.removed_count(sum(sizes), sparsity))
    return {layer.name: count for layer, count in zip(model.layers, counts, strict=True)}


@pytest.mark.parametrize("name", ["magnitude", "exact_magnitude", "random", "wanda", "sink_wanda", "sparsegpt", "layer_weights"])
def test_exact_numbers_go_from_every_matrix_and_from_the_model(model: LanguageModel, name: str) -> None:
    """Also for the methods of the release that else remove one more of each."""
    wanted = removal(model, sparsity=0.5)
    total = sum(layer.module.weight.numel() for layer in model.layers)
    assert sum(wanted.values()) == total // 2 and len(set(wanted.values())) >= 4
    state = slow.state_of(model)
    pruner.prune_(model, fitting(model, name), Target(0.5, removed=wanted), windows=windows())
    assert pruner.measured_sparsity(model) == (total // 2) / total
    for layer in model.layers:
        gone = (layer.module.weight == 0).sum(1)
        assert int(gone.sum()) == wanted[layer.name]
        if ALL[name].importance != "sparsegpt" and ALL[name].granularity == "row":
            assert int(gone.max() - gone.min()) <= 1
    if ALL[name].importance == "magnitude" and ALL[name].granularity == "layer":  # per matrix: the smallest of all rows together
        for layer in model.layers:
            order = state[layer.name].abs().flatten().argsort(stable=True)[: wanted[layer.name]]
            assert not layer.module.weight.flatten()[order].any()


def test_exact_numbers_that_are_those_of_the_sparsity_change_nothing(diffusion: LanguageModel) -> None:
    half = {layer.name: layer.module.weight.numel() // 2 for layer in diffusion.layers}
    for name in ("wanda", "exact_sparsegpt", "random"):
        first, second = (pruned(diffusion, ALL[name], target) for target in (HALF, Target(0.1, removed=half)))
        assert all(torch.equal(value, second[layer]) for layer, value in first.items())


# --- refused before anything changes -------------------------------------------------------------------------------------


def refused(model: LanguageModel, method: Method, message: str, **options: Any) -> None:
    before = slow.state_of(model)
    with pytest.raises(InputError, match=message):
        pruner.prune_(model, method, **{"target": HALF, "windows": windows(), **options})
    assert slow.same_state(model, before)


@pytest.mark.parametrize(
    ("importance", "granularity"), [("wanda", "row"), ("random", "row"), ("magnitude", "row"), ("wanda", "layer")]
)
def test_inclusive_goes_with_the_two_rules_of_the_release_alone(importance: Any, granularity: Any) -> None:
    message = f"inclusive must go with SparseGPT or magnitude per layer, got {importance} per {granularity}: drop it"
    with pytest.raises(InputError, match=message):
        Method(importance, granularity=granularity, inclusive=True)


@pytest.mark.parametrize("importance", ["random", "magnitude"])
def test_methods_that_read_nothing_take_no_inputs_and_no_weights(importance: Any) -> None:
    for options in ({"weighting": SINKS}, {"inputs": NOISE}):
        with pytest.raises(InputError, match=f"token weights and inputs must go with a method that reads, got {importance}"):
            Method(importance, **cast(Any, options))


@pytest.mark.parametrize("sparsity", [50, -0.1, 1.0, nan])
def test_sparsities_out_of_range_are_refused(sparsity: float) -> None:
    for pattern in ("unstructured", "2:4"):
        with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\), got"):
            Target(sparsity, pattern)


def test_patterns_that_contradict_are_refused() -> None:
    with pytest.raises(InputError, match=r"sparsity must be 0\.5 for the pattern 2:4, got 0\.3: change one of them"):
        Target(0.3, "2:4")
    with pytest.raises(InputError, match=r"sparsity_pattern must be .* got '124'"):
        Target(0.5, "124")
    with pytest.raises(InputError, match="exact numbers must go with unstructured sparsity, got 2:4: drop one of them"):
        Target(0.5, "2:4", {"a": 3})


@pytest.mark.parametrize("name", ALL)
def test_a_pattern_that_fits_only_some_layers_is_refused_before_the_others_change(name: str) -> None:
    """32 divides the hidden size 64 and the intermediate size 96; 64 divides the first alone."""
    model = loading.load(tiny.DREAM)
    refused(model, ALL[name], "the pattern 32:64 must divide the input features, got 96", target=Target(0.5, "32:64"))
    refused(model, ALL[name], "the pattern 3:5 must divide the input features, got 64", target=Target(0.4, "3:5"))


@pytest.mark.parametrize("name", [name for name, method in ALL.items() if method.needs_calibration])
def test_missing_windows_are_refused(diffusion: LanguageModel, name: str) -> None:
    refused(
        diffusion, ALL[name], f"{ALL[name].importance} must be given calibration windows, got none: pass windows", windows=None
    )


@pytest.mark.parametrize("length", [1, 65])
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "dwanda", "sink_wanda"])
def test_windows_that_do_not_fit_the_model_are_refused(diffusion: LanguageModel, name: str, length: int) -> None:
    message = f"calibration windows must have 2 to 64 tokens, got {length}: choose another length"
    refused(diffusion, ALL[name], message, windows=tiny.ids(2, length))


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "dwanda", "sink_wanda", "sink_preserve"])
def test_no_windows_are_refused(diffusion: LanguageModel, name: str) -> None:
    refused(diffusion, ALL[name], "got (none|0)", windows=tiny.ids(0, LENGTH))


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("name", ["magnitude", "random", "wanda", "sparsegpt", "sink_wanda"])
def test_a_weight_that_is_not_finite_is_refused_by_name(diffusion: LanguageModel, name: str, value: float) -> None:
    """It sits in the last matrix, so pruning layer by layer would have changed all others before it is found."""
    diffusion.layers[-1].module.weight[3, 5] = value
    refused(diffusion, ALL[name], r"weights of model\.layers\.1\.mlp\.down_proj\.weight must be finite, got 1 that are not")
    given = CalibrationSet(windows())
    before = slow.state_of(diffusion)
    for prune in (
        lambda: pruner.prune_on_(diffusion, Method("wanda"), HALF, given),
        lambda: pruner.prune_with_(
            diffusion, Method("wanda", sequential=False), HALF, one_shot.dense_statistics(diffusion, given)
        ),
    ):
        with pytest.raises(InputError, match=r"weights of model\.layers\.1\.mlp\.down_proj\.weight must be finite"):
            prune()
    assert slow.same_state(diffusion, before)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "one_shot"])
def test_inputs_that_are_not_finite_are_refused_by_name(diffusion: LanguageModel, name: str) -> None:
    embedding = cast(Any, diffusion.network.get_decoder()).embed_tokens.weight
    embedding[int(windows()[0, 0])] = inf
    refused(diffusion, ALL[name], r"inputs of model\.layers\.0\.self_attn\.q_proj\.weight must be finite")


@pytest.mark.parametrize("name", ["sink_wanda", "sink_preserve", "sink_sparsegpt"])
def test_activations_that_are_not_finite_stop_methods_that_measure_sinks(diffusion: LanguageModel, name: str) -> None:
    cast(Any, diffusion.network.get_decoder()).layers[1].input_layernorm.weight[3] = nan
    refused(diffusion, ALL[name], "must be finite")


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_a_later_block_that_cannot_be_read_is_named_and_the_earlier_ones_come_back(diffusion: LanguageModel, name: str) -> None:
    """A sequential method has changed block 0 when block 1 is read."""
    cast(Any, diffusion.network.get_decoder()).layers[1].input_layernorm.weight[3] = nan
    before = slow.state_of(diffusion)
    with (
        pytest.raises(InputError, match=r"inputs of model\.layers\.1\.self_attn\.q_proj\.weight must be finite"),
        restored(diffusion),
    ):
        try:
            pruner.prune_(diffusion, ALL[name], HALF, windows=windows())
        finally:
            assert pruner.measured_sparsity(diffusion) == pytest.approx(0.25, abs=0.01)
    assert slow.same_state(diffusion, before)


def test_a_hessian_that_is_not_positive_definite_names_the_layer_and_the_remedy(
    diffusion: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of `down`, so that the other six matrices of the block have changed."""
    own = InputStatistics.hessian

    def broken(self: InputStatistics) -> Tensor:
        hessian = own(self)
        if len(hessian) == 40:
            hessian[0, 1] = hessian[1, 0] = 100 * hessian.diagonal().max()
        return hessian

    monkeypatch.setattr(InputStatistics, "hessian", broken)
    before = slow.state_of(diffusion)
    message = (
        r"the Hessian of model\.layers\.0\.mlp\.down_proj\.weight must be positive definite after damping, .* raise damping above"
    )
    with pytest.raises(InputError, match=message), restored(diffusion):
        pruner.prune_(diffusion, ALL["sparsegpt"], HALF, windows=windows())
    assert slow.same_state(diffusion, before)


@pytest.mark.parametrize("name", ["random", "wanda", "sink_wanda", "sparsegpt"])
def test_a_layer_table_with_nothing_to_prune_is_refused(diffusion: LanguageModel, name: str) -> None:
    empty = replace(diffusion, name="bare", layers=())
    refused(empty, ALL[name], "a model must have linear layers to prune, got none in bare: check its layer table")


def test_token_weights_that_contradict_the_method_are_refused(diffusion: LanguageModel) -> None:
    before = slow.state_of(diffusion)
    for method, weight, message in (
        (ALL["wanda"], token_weights(), "must have no token weights for this method, got some: build it for the method"),
        (ALL["sink_wanda"], None, "must have some token weights for this method, got none: build it for the method"),
        (ALL["sink_sparsegpt"], None, "must have some token weights"),
        (ALL["sparsegpt"], token_weights(2, SAMPLES, LENGTH), "must have no token weights"),
        (ALL["sink_sparsegpt"], token_weights(2, SAMPLES, 4, LENGTH), "token weights by head must go with norms, got a Hessian"),
    ):
        with pytest.raises(InputError, match=message):
            pruner.prune_on_(diffusion, method, HALF, CalibrationSet(windows(), weight))
    assert slow.same_state(diffusion, before)


def test_weights_by_head_with_sparsegpt_are_refused_from_windows_too(diffusion: LanguageModel) -> None:
    for sequential in (True, False):
        method = Method("sparsegpt", weighting=Weighting(level="head"), sequential=sequential)
        refused(diffusion, method, "token weights by head must go with norms, got a Hessian: use weights by layer with SparseGPT")


@pytest.mark.parametrize("layers", [1, 3])
def test_token_weights_for_another_model_are_refused(diffusion: LanguageModel, layers: int) -> None:
    before = slow.state_of(diffusion)
    with pytest.raises(InputError, match="token weights"), restored(diffusion):
        pruner.prune_on_(diffusion, ALL["sink_preserve"], HALF, CalibrationSet(windows(), torch.ones(layers, SAMPLES, LENGTH)))
    assert slow.same_state(diffusion, before)


def test_statistics_of_the_dense_model_do_not_serve_sequential_methods(diffusion: LanguageModel) -> None:
    found, before = one_shot.dense_statistics(diffusion, CalibrationSet(windows())), slow.state_of(diffusion)
    with pytest.raises(InputError, match="must go with a one-shot method, got a sequential one: use prune_on_"):
        pruner.prune_with_(diffusion, ALL["wanda"], HALF, found)
    with pytest.raises(InputError, match="a Hessian must be collected, got norms only"):
        pruner.prune_with_(diffusion, Method("sparsegpt", sequential=False), HALF, found)
    assert slow.same_state(diffusion, before)


def test_statistics_of_too_few_blocks_are_refused(diffusion: LanguageModel) -> None:
    found = one_shot.dense_statistics(diffusion, CalibrationSet(windows()))
    with pytest.raises(InputError):
        pruner.prune_with_(diffusion, ALL["one_shot"], HALF, found[:1])


@pytest.mark.parametrize("importance", ["random", "magnitude"])
def test_methods_that_read_nothing_are_refused_a_calibration(diffusion: LanguageModel, importance: Any) -> None:
    given = CalibrationSet(windows())
    with pytest.raises(InputError):
        pruner.prune_on_(diffusion, Method(importance), HALF, given)
    with pytest.raises(InputError):
        pruner.prune_with_(diffusion, Method(importance, sequential=False), HALF, one_shot.dense_statistics(diffusion, given))


@pytest.mark.parametrize("name", NOISY)
def test_noise_for_an_autoregressive_model_is_refused(tmp_path: Any, name: str) -> None:
    refused(tiny.model(tmp_path), ALL[name], "must use a diffusion model, got")


def test_exact_numbers_must_name_all_layers(diffusion: LanguageModel) -> None:
    half = {layer.name: 5 for layer in diffusion.layers}
    first = next(iter(half))
    for wrong, count in (({first: 5}, 1), ({**half, "lm_head.weight": 5}, 14), ({}, 0)):
        refused(
            diffusion,
            ALL["magnitude"],
            f"exact numbers must name all 14 layers, got {count}: complete",
            target=Target(0.5, removed=wrong),
        )


@pytest.mark.parametrize("count", [-1, 10**6])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "exact_sparsegpt"])
def test_exact_numbers_out_of_range_are_refused_before_anything_changes(diffusion: LanguageModel, name: str, count: int) -> None:
    wanted = {layer.name: 5 for layer in diffusion.layers}
    wanted[diffusion.layers[-1].name] = count
    refused(diffusion, ALL[name], "must be in", target=Target(0.5, removed=wanted))


# --- lending a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "random"])
def test_a_lent_model_gets_its_weights_back(diffusion: LanguageModel, name: str) -> None:
    before = slow.state_of(diffusion)
    kept = [layer.module.weight for layer in diffusion.layers]
    with restored(diffusion) as model:
        pruner.prune_(model, ALL[name], HALF, windows=windows())
        assert pruner.measured_sparsity(model) >= 0.5 and model is diffusion
    assert slow.same_state(diffusion, before)
    assert all(layer.module.weight is weight for layer, weight in zip(diffusion.layers, kept, strict=True))  # in place


def test_a_lent_model_gets_its_weights_back_after_an_error(diffusion: LanguageModel) -> None:
    before = slow.state_of(diffusion)
    lending: AbstractContextManager[LanguageModel] = restored(diffusion)
    with pytest.raises(RuntimeError, match="inside"), lending as model:
        pruner.prune_(model, ALL["magnitude"], HALF)
        raise RuntimeError("inside")
    assert slow.same_state(diffusion, before)


@pytest.mark.parametrize("kind", ["confidence", "frontier"])
def test_weights_by_confidence_are_not_those_of_one_pass(diffusion: LanguageModel, kind: Any) -> None:
    method = Method("wanda", NOISE, Weighting(kind), sequential=False)
    windows = tiny.ids(SAMPLES, LENGTH)
    with restored(diffusion) as model:
        pruner.prune_(model, method, HALF, windows=windows)
        got = [layer.module.weight.clone() for layer in model.layers]
    with restored(diffusion) as model:
        built = sets.build(model, windows, inputs=NOISE, weighting=method.weighting, seed=0)
        assert built.token_weight is not None and built.token_weight.std() > 0.05
        pruner.prune_on_(model, method, HALF, built)
        assert all(torch.equal(layer.module.weight, each) for layer, each in zip(model.layers, got, strict=True))


def test_methods_of_structured_pruning_are_refused(diffusion: LanguageModel) -> None:
    for method in (Method("fluctuation"), Method("wanda", bias=True)):
        with pytest.raises(InputError, match="a method of structured pruning must go with shrink"):
            pruner.prune_(diffusion, method, HALF, windows=tiny.ids(SAMPLES, LENGTH))
    with pytest.raises(InputError, match="fluctuation must count all tokens alike"):
        Method("fluctuation", weighting=SINKS)
