"""Prune, measure, restore: common masks, shared calibrations against pruning from scratch, and nothing left behind."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.attention import masses as attention
from lib.calibration import one_shot, sets
from lib.calibration.sets import Inputs
from lib.calibration.token_weights import Weighting
from lib.core.errors import InputError
from lib.diffusion import likelihood
from lib.models.language_model import LanguageModel, network_body
from lib.pruning import methods, pruner, shrink
from lib.pruning.methods import SINKS, Method, Target
from lib.studies.pruning import runs
from lib.studies.pruning.runs import Bench, Calibrations
from lib.timing import clock
from lib.timing.effort import Effort
from tests import tiny
from tests.unit import slow_pruning as slow

LENGTH, DRAWS, BATCH, HALF = 16, 3, 16, Target(0.5)
FEW = Inputs("noised", levels=2)
PLAIN = Method("wanda", FEW, sequential=False, aggregate="sum_of_norms")
SOFT = replace(SINKS, margin=1.0)
MIXED: Mapping[str, Method] = {
    "random": Method("random"),
    "magnitude": Method("magnitude", granularity="layer"),
    "Wanda": Method("wanda"),
    "one-shot": Method("wanda", sequential=False),
    "noised": PLAIN,
    "sink-aware": replace(PLAIN, weighting=SOFT),
    "by head": replace(PLAIN, weighting=Weighting(level="head", unit="mean_one", margin=1.0)),
    "random control": replace(PLAIN, weighting=Weighting("random", margin=1.0)),
    "instability": replace(PLAIN, weighting=Weighting("variance", margin=1.0)),
    "SparseGPT": Method("sparsegpt"),
    "sink-aware SparseGPT": Method("sparsegpt", weighting=replace(SOFT, averaged=True)),
}


@pytest.fixture(scope="module")
def diffusion_model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("diffusion"), causal=False)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("causal"), causal=True)


def bench_of(model: LanguageModel, **changes: Any) -> Bench:
    return replace(Bench(model, tiny.ids(12, LENGTH, seed=3), tiny.ids(4, LENGTH, seed=4), 4, DRAWS, 11, BATCH), **changes)


@pytest.fixture(params=["diffusion", "twin"])
def bench(request: pytest.FixtureRequest, diffusion_model: LanguageModel, twin: LanguageModel) -> Iterator[Bench]:
    yield from unchanged(bench_of({"diffusion": diffusion_model, "twin": twin}[request.param]))


@pytest.fixture
def noisy(diffusion_model: LanguageModel) -> Iterator[Bench]:
    yield from unchanged(bench_of(diffusion_model))


def unchanged(bench: Bench) -> Iterator[Bench]:
    """Whatever is measured, the model is bit for bit what it was."""
    before = slow.state_of(bench.model)
    yield bench
    same = slow.same_state(bench.model, before)
    bench.model.network.load_state_dict(before)  # for the other tests
    assert same


def fitting(bench: Bench, names: list[str] | None = None) -> dict[str, Method]:
    chosen = {name: MIXED[name] for name in names or MIXED if not (bench.model.is_causal and name == "instability")}
    return {name: methods.without_noise(method) if bench.model.is_causal else method for name, method in chosen.items()}


def after(model: LanguageModel, prune: Callable[[], object]) -> dict[str, Tensor]:
    """The matrices after something; the model gets its own back."""
    with pruner.restored(model):
        prune()
        return {layer.name: layer.module.weight.detach().clone() for layer in model.layers}


def other_zeros(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Share of the weights removed in one of the two only."""
    count = sum(int(((value == 0) != (second[name] == 0)).sum()) for name, value in first.items())
    return count / sum(value.numel() for value in first.values())


def inputs_seen(model: LanguageModel, work: Callable[[], object]) -> list[Tensor]:
    """What goes into the embedding while something runs."""
    seen: list[Tensor] = []
    handle = cast(Any, model.network.get_decoder()).embed_tokens.register_forward_hook(
        lambda _m, ids, _o: seen.append(ids[0].clone())
    )
    try:
        work()
    finally:
        handle.remove()
    return seen


# --- the loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_diffusion_model_weighs_each_mask_by_its_share(noisy: Bench) -> None:
    """Over draws with k of L tokens masked: the sum of cross-entropies at masks times L / k, over L."""
    seen = inputs_seen(noisy.model, lambda: runs.loss(noisy))
    rows = torch.cat(seen)
    assert rows.shape == (len(noisy.windows) * DRAWS, LENGTH)
    with torch.no_grad():
        logits = cast(Any, noisy.model.network)(input_ids=rows).logits.double()
    wanted = []
    for index, window in enumerate(noisy.windows):
        values = []
        for row in range(index * DRAWS, (index + 1) * DRAWS):
            masked = rows[row] == tiny.MASK
            assert torch.equal(rows[row][~masked], window[~masked])
            values.append(float(F.cross_entropy(logits[row][masked], window[masked], reduction="sum")) / int(masked.sum()))
        wanted.append(sum(values) / DRAWS)
    assert runs.loss(noisy).tolist() == pytest.approx(wanted, rel=1e-4)


def test_the_loss_of_the_twin_is_its_exact_negative_log_likelihood(twin: LanguageModel) -> None:
    bench = bench_of(twin)
    with torch.no_grad():
        logits = cast(Any, twin.network)(input_ids=bench.windows).logits.double()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), bench.windows[:, 1:], reduction="none")
    assert runs.loss(bench).tolist() == pytest.approx(losses.mean(1).tolist(), rel=1e-4)


def test_every_variant_reads_the_same_masks(noisy: Bench) -> None:
    reference = torch.cat(inputs_seen(noisy.model, lambda: runs.loss(noisy)))
    small = runs.shrunk(Calibrations(noisy, 0), PLAIN, sparsity=0.5)
    assert torch.equal(torch.cat(inputs_seen(small, lambda: runs.loss(noisy, small))), reference)
    outcomes = []

    def measure() -> None:
        outcomes.extend(runs.compare(noisy, {"random": Method("random")}, [HALF, Target(0.75)], seeds=[0, 5]))

    assert torch.equal(torch.cat(inputs_seen(noisy.model, measure)), reference.repeat(4, 1))  # whatever the calibration seed
    assert len({float(outcome.loss.sum()) for outcome in outcomes}) == 4
    other = torch.cat(inputs_seen(noisy.model, lambda: runs.loss(replace(noisy, seed=12))))
    assert not torch.equal(other, reference)
    assert torch.equal(runs.loss(noisy), likelihood.nelbo(noisy.model, noisy.windows, draws=DRAWS, seed=11).per_window)


def test_the_dense_model_is_measured_as_it_is(bench: Bench) -> None:
    found = runs.dense(bench)
    assert (found.model, found.method, found.pattern) == (bench.model.name, "dense", "unstructured")
    assert found.sparsity == found.measured_sparsity == 0.0
    assert torch.equal(found.loss, runs.loss(bench)) and found.loss.shape == (4,)


def test_masks_of_their_own_are_those_of_each_calibrations_seed_for_all_of_its_models(noisy: Bench) -> None:
    """Random pruning of one seed under the masks of that seed; the dense model and magnitude, too, though they draw nothing."""
    own = replace(noisy, own_masks=True)
    reference = {
        seed: torch.cat(inputs_seen(noisy.model, lambda seed=seed: runs.loss(replace(noisy, seed=seed)))) for seed in (0, 5)
    }
    outcomes: list[runs.Outcome] = []

    def measure() -> None:
        outcomes.extend(runs.compare(own, {"random": Method("random"), "magnitude": Method("magnitude")}, [HALF], seeds=[0, 5]))
        outcomes.extend(runs.dense_of(own, [0, 5]))

    wanted = [reference[0], reference[0], reference[5], reference[5], reference[0], reference[5]]
    assert torch.equal(torch.cat(inputs_seen(noisy.model, measure)), torch.cat(wanted))
    assert not torch.equal(reference[0], reference[5])
    assert [(one.method, one.seed) for one in outcomes if one.method != "random"] == [
        ("magnitude", 0), ("magnitude", 5), ("dense", 0), ("dense", 5)
    ]  # fmt: skip
    alone = runs.compare(replace(noisy, seed=5), {"random": Method("random")}, [HALF], seeds=[5])
    assert torch.equal(alone[0].loss, next(one.loss for one in outcomes if (one.method, one.seed) == ("random", 5)))


def test_exact_losses_need_no_masks_of_their_own(twin: LanguageModel) -> None:
    own = bench_of(twin, own_masks=True)
    assert not own.masks_differ and len(runs.dense_of(own, [4, 9])) == 1
    assert len(runs.compare(own, {"magnitude": Method("magnitude")}, [HALF], seeds=[4, 9])) == 1


def test_cut_models_are_measured_under_masks_of_their_own(noisy: Bench) -> None:
    own = replace(noisy, own_masks=True)
    found = runs.structured(own, {"Wanda-sp": PLAIN}, [0.5], seeds=[5, 9])
    for one in found:
        wanted = runs.structured(replace(noisy, seed=one.seed), {"Wanda-sp": PLAIN}, [0.5], seeds=[one.seed])
        assert torch.equal(one.loss, wanted[0].loss)
    assert [one.seed for one in found] == [5, 9]


# --- comparisons ---------------------------------------------------------------------------------------------------------


def test_every_seed_method_and_target_is_measured_once_and_magnitude_with_the_first_seed(bench: Bench) -> None:
    chosen = fitting(bench, ["magnitude", "random", "Wanda"])
    targets = [Target(0.25), Target(0.5), methods.pattern_target("2:4")]
    found = runs.compare(bench, chosen, targets, seeds=[7, 2])
    kinds = [(target.sparsity, target.pattern) for target in targets]
    wanted = [
        (seed, name, *kind) for seed in (7, 2) for name in chosen for kind in kinds if not (name == "magnitude" and seed == 2)
    ]
    assert [(one.seed, one.method, one.sparsity, one.pattern) for one in found] == wanted
    assert all(one.model == bench.model.name and one.measured_sparsity == one.sparsity for one in found)
    by_condition = {(one.method, one.sparsity, one.pattern): set[float]() for one in found}
    for one in found:
        by_condition[one.method, one.sparsity, one.pattern].add(float(one.loss.mean()))
    assert {name for (name, *_), values in by_condition.items() if len(values) == 2} == {"random", "Wanda"}


@pytest.mark.parametrize(("importance", "wanted"), [("magnitude", [4]), ("random", [4, 9]), ("wanda", [4, 9])])
def test_only_magnitude_draws_nothing(importance: Any, wanted: list[int]) -> None:
    assert list(runs.seeds_that_matter(Method(importance), [4, 9])) == wanted


def test_shared_calibrations_prune_as_from_scratch(bench: Bench) -> None:
    """One after another with the same calibrations, at two targets; magnitudes and random numbers bit for bit."""
    found = Calibrations(bench, seed=6)
    windows = sets.draw_windows(bench.pool, count=4, seed=6)
    assert torch.equal(found.windows, windows)
    at_half = {}
    for target in (Target(0.25), HALF):
        for name, method in fitting(bench).items():
            at_half[name] = after(bench.model, partial(runs.prune_, found, method, target))
            scratch = partial(pruner.prune_, bench.model, method, target, windows=windows, seed=6, batch_size=BATCH)
            assert other_zeros(at_half[name], after(bench.model, scratch)) <= (2e-3 if method.needs_calibration else 0.0), name
    for first, second in itertools.combinations(at_half, 2):  # each choice makes a difference
        assert other_zeros(at_half[first], at_half[second]) > 3e-3, (first, second)


def test_outcomes_are_those_of_the_pruned_model(noisy: Bench) -> None:
    chosen = fitting(noisy, ["Wanda", "sink-aware", "SparseGPT"])
    for one in runs.compare(noisy, chosen, [Target(0.3)], seeds=[1]):
        windows = sets.draw_windows(noisy.pool, count=4, seed=1)
        with pruner.restored(noisy.model) as model:
            pruner.prune_(model, chosen[one.method], Target(0.3), windows=windows, seed=1, batch_size=BATCH)
            zeros = sum(int((layer.module.weight == 0).sum()) for layer in model.layers)
            total = sum(layer.module.weight.numel() for layer in model.layers)
            assert one.measured_sparsity == pytest.approx(zeros / total, abs=1e-9)
            assert torch.allclose(one.loss, runs.loss(noisy), rtol=1e-3), one.method
        if one.method != "SparseGPT":  # 9 of 32 and 12 of 40 in every row, which is not what was asked
            rows = {32: 2 * 32 + 2 * 16 + 2 * 40, 40: 32}
            assert one.measured_sparsity == pytest.approx((9 * rows[32] + 12 * rows[40]) / (32 * rows[32] + 40 * rows[40]))


def test_other_seeds_draw_other_windows_noise_and_random_numbers(noisy: Bench) -> None:
    first, second = (Calibrations(noisy, seed) for seed in (0, 1))
    assert not torch.equal(first.windows, second.windows)
    for name in ("random", "Wanda", "sink-aware", "random control"):
        pair = [after(noisy.model, lambda f=f, n=name: runs.prune_(f, MIXED[n], HALF)) for f in (first, second)]
        assert other_zeros(*pair) > 0.02, name
    same = [replace(noisy, pool=noisy.pool[:4]) for _ in range(2)]  # the pool is the calibration: only the noise is left
    noises = [Calibrations(bench, seed).set_of(PLAIN).input_ids for bench, seed in zip(same, (0, 1), strict=True)]
    masks = [sorted((row != tiny.MASK).int().tolist() for row in noise) for noise in noises]
    assert masks[0] != masks[1]


def test_calibrations_are_made_once(noisy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    read, collect, mass = sets.read, one_shot.shared_statistics, attention.sink_mass

    def collected(model: LanguageModel, ids: Tensor, weights: Sequence[Any], **named: Any) -> Any:
        made.append(("statistics", len(weights)))
        return collect(model, ids, weights, **named)

    def measured(model: LanguageModel, ids: Tensor) -> Tensor:
        made.append(("masses", len(ids)))
        return mass(model, ids)

    monkeypatch.setattr(sets, "read", lambda *args, **named: made.append(("read", args[2])) or read(*args, **named))
    monkeypatch.setattr(one_shot, "shared_statistics", collected)
    monkeypatch.setattr(attention, "sink_mass", measured)
    sharper = replace(SOFT, margin=2.0)
    chosen = {"a": PLAIN, "b": replace(PLAIN, aggregate="root_mean_square"), "c": MIXED["sink-aware"]}
    chosen["d"] = replace(chosen["c"], weighting=sharper)
    runs.compare(noisy, chosen, [HALF, Target(0.25)], seeds=[3, 4])
    samples = noisy.calibration_windows * FEW.levels
    assert samples <= noisy.batch_size
    assert made == 2 * [("read", FEW), ("masses", samples), ("statistics", 3)]


@pytest.mark.parametrize("late", [False, True])
def test_a_calibration_is_that_of_the_dense_model_even_after_pruning(noisy: Bench, late: bool) -> None:
    """Made before anything, or behind a model that was pruned and measured meanwhile: the same statistics."""
    found = Calibrations(noisy, 2)
    if late:
        runs.measured(found, "x", MIXED["magnitude"], Target(0.75))
    norms = [found.statistics_of(MIXED["sink-aware"])[block]["down"].norms for block in (0, 1)]
    inputs = slow.captured(noisy.model, found.set_of(PLAIN).input_ids)
    omega = slow.sink_weights(noisy.model, found.set_of(PLAIN).input_ids, num_std=1.0, alpha=cast(float, SOFT.alpha))
    for block in (0, 1):
        name = f"model.layers.{block}.mlp.down_proj.weight"
        wanted = slow.statistics(inputs[name], omega, products=False)["norms"]
        assert torch.allclose(norms[block][0].double(), wanted, rtol=1e-3)


# --- other measures ------------------------------------------------------------------------------------------------------


def test_something_else_is_measured_while_the_model_is_pruned(noisy: Bench) -> None:
    sink_aware, wanda = MIXED["sink-aware"], MIXED["Wanda"]
    conditions = {("dense", 0.0): None, ("s", 0.5): sink_aware, ("s", 0.25): sink_aware, ("w", 0.5): wanda, ("d", 0.0): None}
    found = runs.while_pruned(noisy, conditions, lambda model: after(model, lambda: None), seed=6)
    assert list(found) == list(conditions)
    fresh = Calibrations(noisy, 6)
    for (name, sparsity), weights in found.items():
        method = conditions[name, sparsity]
        work = (lambda: None) if method is None else lambda m=method, s=sparsity: runs.prune_(fresh, m, Target(s))
        wanted = after(noisy.model, work)
        assert all(torch.equal(value, wanted[layer]) for layer, value in weights.items()), name


def test_a_measure_that_fails_leaves_the_model_as_it_was(noisy: Bench) -> None:
    before = slow.state_of(noisy.model)

    def fail(model: LanguageModel) -> float:
        assert pruner.measured_sparsity(model) == 0.5
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        runs.while_pruned(noisy, {("Wanda", 0.5): MIXED["Wanda"]}, fail, seed=0)
    assert slow.same_state(noisy.model, before)


def test_a_pruned_copy_lives_on_its_own(noisy: Bench) -> None:
    found = Calibrations(noisy, 0)
    copied = runs.pruned_copy(found, MIXED["Wanda"], HALF)
    wanted = after(noisy.model, lambda: runs.prune_(found, MIXED["Wanda"], HALF))
    loss = runs.loss(noisy, copied)
    assert all(torch.equal(layer.module.weight, wanted[layer.name]) for layer in copied.layers)
    assert [layer.name for layer in copied.layers] == [layer.name for layer in noisy.model.layers]
    with pruner.restored(noisy.model) as model:
        for layer in model.layers:
            layer.module.weight.zero_()
        assert torch.equal(runs.loss(noisy, copied), loss)
    with pruner.restored(copied):
        for layer in copied.layers:
            layer.module.weight.zero_()
        assert pruner.measured_sparsity(noisy.model) == 0.0
    own = {id(layer.module.weight) for layer in copied.layers}
    theirs = dict(noisy.model.network.named_parameters())
    for name, parameter in copied.network.named_parameters():
        assert (parameter is theirs[name]) == (id(parameter) not in own), name
    assert not torch.equal(loss, runs.loss(noisy))


def test_stacking_nothing_is_refused() -> None:
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    assert runs.stack(values).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(InputError, match="a comparison must have outcomes on both sides, got none: measure the condition first"):
        runs.stack([])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_first_windows_are_held_out(count: int) -> None:
    windows = tiny.ids(5, LENGTH)
    assert torch.equal(runs.held_out(windows, count=count), windows[:count])


@pytest.mark.parametrize("count", [-1, 0, 1, 6])
def test_too_few_or_too_many_held_out_windows_are_refused(count: int) -> None:
    message = rf"held-out windows must be in \[2, 5\] \(those there are\), got {count}: lower windows"
    with pytest.raises(InputError, match=message):
        runs.held_out(tiny.ids(5, LENGTH), count=count)


# --- smaller models ------------------------------------------------------------------------------------------------------


def slow_norms(found: Calibrations, method: Method) -> dict[tuple[int, str], Tensor]:
    """Norms of what `o` and `down` read in transformers' own pass, as the method sums them."""
    model, ids = found.bench.model, found.set_of(method).input_ids
    inputs, omega = slow.captured(model, ids), None
    if method.weighting is not None:
        omega = slow.sink_weights(model, ids, num_std=method.weighting.margin, alpha=cast(float, method.weighting.alpha))
    norms = {}
    for layer in model.layers:
        if layer.role in ("o", "down"):
            sums = slow.statistics(inputs[layer.name], omega, products=False)
            root = (sums["squares"] / len(ids)).sqrt()
            norms[layer.block, layer.role] = (sums["norms"] if method.aggregate == "sum_of_norms" else root).float()
    return norms


@pytest.mark.parametrize("name", ["one-shot", "noised", "sink-aware"])
def test_the_groups_and_channels_that_go_are_those_of_the_methods_norms(noisy: Bench, name: str) -> None:
    found = Calibrations(noisy, 1)
    small = runs.shrunk(found, MIXED[name], sparsity=0.5)
    wanted = shrink.shrunk(noisy.model, *shrink.choose(noisy.model, sparsity=0.5, input_norms=slow_norms(found, MIXED[name])))
    state = wanted.network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in small.network.state_dict().items())
    bare = shrink.shrunk(noisy.model, *shrink.choose(noisy.model, sparsity=0.5))
    assert any(not torch.equal(value, state[key]) for key, value in bare.network.state_dict().items())


@pytest.mark.parametrize("name", methods.STRUCTURES)
def test_every_structured_method_leaves_what_its_choices_say(bench: Bench, name: str) -> None:
    """The heads and channels that stay, their weights or the refit of these, and the mean of the dense outputs with a bias."""
    found, method = Calibrations(bench, 1), methods.STRUCTURES[name]
    small = runs.shrunk(found, method, sparsity=0.5)
    ids = found.windows
    read: dict[tuple[int, str], list[Tensor]] = {}
    for layer in bench.model.layers:
        if layer.role in ("o", "down"):
            place = (layer.block, layer.role)
            kept_here: list[Tensor] = read.setdefault(place, [])
            keep: Any = lambda _, given, kept=kept_here: kept.append(given[0].flatten(0, 1).double())  # noqa: E731
            handle = layer.module.register_forward_pre_hook(keep)
            network_body(bench.model)(input_ids=ids)
            handle.remove()
    for layer, cut in zip(bench.model.layers, small.layers, strict=True):
        if layer.role != "down":
            continue
        inputs = read[layer.block, "down"][0]
        spread = inputs.std(0, correction=0) if method.importance == "fluctuation" else inputs.norm(dim=0)
        kept = (spread * layer.module.weight.norm(dim=0)).argsort()[20:].sort().values
        producer = layer.name.replace("down_proj", "up_proj")
        rows = bench.model.network.get_parameter(producer)[kept]
        assert torch.equal(small.network.get_parameter(producer), rows)
        assert torch.equal(cut.module.weight, layer.module.weight[:, kept]) == (method.repair == "none")
        assert (cut.module.bias is not None) == method.bias
        outputs = cut.module(inputs[:, kept].float()).double(), layer.module(inputs.float()).double()
        if method.bias:
            torch.testing.assert_close(outputs[0].mean(0), outputs[1].mean(0), atol=1e-4, rtol=0)
        if method.repair == "refit":
            plain = inputs[:, kept] @ layer.module.weight[:, kept].double().T
            centred = (lambda x: x - x.mean(0)) if method.bias else (lambda x: x)
            errors = [float((centred(each) - centred(outputs[1])).square().sum()) for each in (outputs[0], plain)]
            assert errors[0] < errors[1]


def test_structured_pruning_cuts_and_counts_what_is_gone(bench: Bench) -> None:
    """4 query heads of 8 in 2 groups, 40 channels: half leaves 1 group and 20 channels, 0.3 leaves both groups and 28."""
    chosen = fitting(bench, ["magnitude", "noised", "sink-aware"])
    found = runs.structured(bench, chosen, [0.3, 0.5], seeds=[1, 8])
    names = [(seed, name) for seed in (1, 8) for name in chosen if not (name == "magnitude" and seed == 8)]
    wanted = [(seed, name, sparsity) for seed, name in names for sparsity in (0.3, 0.5)]
    assert [(one.seed, one.method, one.sparsity) for one in found] == wanted
    assert {one.pattern for one in found} == {"structured"} and {one.model for one in found} == {bench.model.name}
    dense = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 40
    left = {0.3: 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 28, 0.5: 2 * 16 * 32 + 2 * 8 * 32 + 3 * 32 * 20}
    for one in found:
        assert one.measured_sparsity == pytest.approx(1 - left[one.sparsity] / dense)
        if one.method != "magnitude":
            small = runs.shrunk(Calibrations(bench, one.seed), chosen[one.method], sparsity=one.sparsity)
            assert small.layers[0].module.weight.shape == ((32, 32) if one.sparsity == 0.3 else (16, 32))
            assert torch.allclose(one.loss, runs.loss(bench, small), rtol=1e-4)
    assert not torch.equal(found[0].loss, found[2].loss)


# --- speed ---------------------------------------------------------------------------------------------------------------


def test_speed_ups_are_positive_and_ordered(noisy: Bench) -> None:
    found = runs.speed_ups(Calibrations(noisy, 0), PLAIN, sparsities=(0.3, 0.5), repeats=3)
    assert list(found) == [(pattern, sparsity) for pattern in ("unstructured", "structured") for sparsity in (0.3, 0.5)]
    assert all(0 < low <= middle <= high for middle, low, high in found.values())


def test_each_speed_up_is_the_dense_time_over_that_of_its_own_model(noisy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    found, outputs = Calibrations(noisy, 0), {}

    def fake(calls: Mapping[str, Callable[[], Any]], *, repeats: int, device: torch.device) -> dict[str, Tensor]:
        """Seconds that tell which call they are of; the dense one takes 12."""
        assert repeats == 7 and device == noisy.model.device
        outputs.update({name: call().last_hidden_state for name, call in calls.items()})
        return {name: torch.full((7,), 12.0 / max(index, 1)).double() for index, name in enumerate(calls)}

    monkeypatch.setattr(clock, "interleaved", fake)
    speeds = runs.speed_ups(found, PLAIN, sparsities=(0.3, 0.5), repeats=7)
    assert next(iter(outputs)) == "dense"
    assert [value[0] for value in speeds.values()] == pytest.approx([1.0, 2.0, 3.0, 4.0])
    exact = [pruner.exact_target(noisy.model, sparsity) for sparsity in (0.3, 0.5)]
    variants = [noisy.model, *(runs.pruned_copy(found, PLAIN, target) for target in exact)]
    variants += [runs.shrunk(found, PLAIN, sparsity=sparsity) for sparsity in (0.3, 0.5)]
    for variant, output in zip(variants, outputs.values(), strict=True):
        with torch.no_grad():
            wanted = cast(Any, network_body(variant))(input_ids=noisy.windows[:4], use_cache=False).last_hidden_state
        assert torch.allclose(output, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["random", "Wanda", "SparseGPT"])
def test_rankings_of_groups_that_are_not_defined_are_refused(noisy: Bench, name: str) -> None:
    with pytest.raises(InputError, match="structured pruning must be by magnitude or one-shot Wanda, got"):
        runs.structured(noisy, {name: MIXED[name]}, [0.5], seeds=[0])


def test_a_pruned_copy_does_not_pass_for_the_checkpoint(noisy: Bench) -> None:
    copied = runs.pruned_copy(Calibrations(noisy, 0), MIXED["magnitude"], HALF)
    assert noisy.model.fingerprint and not copied.fingerprint


def test_a_bias_without_a_flag_for_it_is_left_out_before_any_work(diffusion_model: LanguageModel, tmp_path: Path) -> None:
    other = tiny.model(tmp_path, family="qwen2", causal=False)
    chosen = {name: methods.STRUCTURES[name] for name in ("FLAP's score alone", "FLAP")}
    assert not runs.refusals(diffusion_model, chosen, [0.5])
    reasons = runs.refusals(other, chosen, [0.5])
    assert list(reasons) == [("FLAP", 0.5)] and "a layout that has the flag" in reasons["FLAP", 0.5]
    assert not runs.structured(bench_of(other), {"FLAP": chosen["FLAP"]}, [0.5], seeds=[0])


def test_every_model_says_what_pruning_it_took(diffusion_model: LanguageModel) -> None:
    """Not what measuring its loss took, nor what methods share."""
    bench = bench_of(diffusion_model)
    one = runs.measured(Calibrations(bench, 0), "Wanda", Method("wanda", sequential=False), HALF)
    cut = runs.structured(bench, {"FLAP": methods.STRUCTURES["FLAP"]}, [0.5], seeds=[0])[0]
    assert all(0 < found.effort.seconds < 60 and found.effort.peak >= 0 for found in (one, cut))
    assert math.isnan(runs.dense(bench).effort.seconds)


def test_the_effort_of_token_weights_is_counted_for_every_outcome(noisy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is made anew with its own calibration's text: what one method has measured is not there for the next."""
    chosen = {name: MIXED[name] for name in ("noised", "sink-aware", "random control")}
    outcomes = [replace(each, effort=Effort(2.0, 3e6)) for each in runs.compare(noisy, chosen, [HALF], seeds=[4, 5])]
    passes: list[str] = []
    real, effort = attention.sink_mass, iter(range(1, 7))
    monkeypatch.setattr(attention, "sink_mass", lambda *given: passes.append("") or real(*given))

    def watched(work: Callable[[], Any], **_: Any) -> tuple[Any, Effort]:
        before = len(passes)
        made = work()
        order.append((len(passes) - before, made.input_ids))
        return made, Effort(float(next(effort)), 1e6 * len(order))

    order: list[tuple[int, Tensor]] = []
    monkeypatch.setattr(runs, "watched", watched)
    found = runs.with_token_weights(noisy, outcomes, chosen)
    assert [each.effort for each in found] == [Effort(2.0 + n, 1e6 * max(3, n)) for n in range(1, 7)]
    assert [replace(each, effort=Effort(2.0, 3e6)) for each in found] == outcomes
    assert [count > 0 for count, _ in order] == [False, True, True] * 2, "no weights need no masses"
    texts = [sets.read(noisy.model, Calibrations(noisy, seed).windows, FEW, seed=seed).flatten(0, 1) for seed in (4, 5)]
    assert all(torch.equal(ids, texts[index // 3]) for index, (_, ids) in enumerate(order))
