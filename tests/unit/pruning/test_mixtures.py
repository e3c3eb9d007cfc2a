"""Every method on mixtures of experts: its sparsity in every matrix, the router as it was, and no change but in the matrices."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lib.calibration import one_shot, sets
from lib.calibration.reads import READS
from lib.calibration.routes import Routes, routed_mass, routes
from lib.calibration.statistics import CalibrationSet
from lib.calibration.token_weights import Weighting
from lib.core.errors import InputError
from lib.models.language_model import LanguageModel, LinearLayer
from lib.models.layers import attention
from lib.pruning import allocation, expert_removal, phases, pruner, repairs, shrink
from lib.pruning.methods import METHODS, RELEASE, STRONGER, STRUCTURES, Method, Target, pattern_target
from tests import tiny
from tests.unit import slow_experts, slow_pruning
from tests.unit.models.test_experts import logits

SAMPLES, LENGTH = 5, 24
HALF = Target(0.5)
families = pytest.mark.parametrize("family", tiny.MIXTURES)
NAMED: Mapping[str, Method] = {
    **METHODS,
    **{f"release {name}": method for name, method in RELEASE.items()},
    "by layer": Method("wanda", weighting=Weighting(level="layer")),
    "by head": Method("wanda", weighting=Weighting(level="head"), sequential=False),
    "one-shot SparseGPT": Method("sparsegpt", sequential=False),
    **{name: STRONGER[name] for name in ("ALPS", "Wanda, swaps, refit", "SparseGPT, refit")},
}


@pytest.fixture(scope="module", params=tiny.MIXTURES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """Its tests leave it as it is."""
    return tiny.mixture(request.param)


def windows() -> Tensor:
    return tiny.ids(SAMPLES, LENGTH)


def removed(layer: LinearLayer, method: Method, target: Target) -> list[int]:
    """How many weights may be gone of a matrix; the release removes one more of each block of columns, or of the matrix."""
    size = layer.module.weight.numel()
    if target.pattern != "unstructured":
        return [size // 2]
    return [size // 2, size // 2 + 1] if method.inclusive else [size // 2]


def plain_logits(model: LanguageModel, ids: Tensor) -> Tensor:
    """Logits of transformers' own stacks with the weights of a model."""
    stacked = tiny.stacked(model.network.config.model_type, seed=99)
    state = dict(model.network.state_dict())
    for block in range(3):
        if not model.has_experts_in(block):
            continue
        prefix = f"model.layers.{block}.mlp.experts."
        own = {
            role: [state.pop(f"{prefix}{number}.{role}_proj.weight") for number in range(8)] for role in ("gate", "up", "down")
        }
        pairs = zip(own["gate"], own["up"], strict=True)
        state[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        state[f"{prefix}down_proj"] = torch.stack(own["down"])
    stacked.load_state_dict(state)
    cast(Any, stacked).set_experts_implementation("eager")
    return logits(stacked, ids)


@pytest.mark.parametrize("target", [HALF, pattern_target("2:4")], ids=["half", "2:4"])
@pytest.mark.parametrize("name", NAMED)
def test_every_method_prunes_every_matrix_and_nothing_else(model: LanguageModel, name: str, target: Target) -> None:
    method, twin = NAMED[name], tiny.of_network(copy.deepcopy(model.network))
    fallen = pruner.prune_(twin, method, target, windows=windows(), batch_size=2)
    before = {layer.name: layer.module.weight for layer in model.layers}
    for layer in twin.layers:
        weight, old = layer.module.weight, before[layer.name]
        gone = int((weight == 0).sum())
        assert gone in removed(layer, method, target), layer.name
        if target.pattern == "2:4":
            assert ((weight.unflatten(1, (-1, 4)) != 0).sum(2) == 2).all()
        elif method.granularity == "row" and not method.updates:
            assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()
        if not method.changes_values:
            assert torch.equal(weight[weight != 0], old[weight != 0])
    state, names = twin.network.state_dict(), set(before)
    untouched = {key: value for key, value in model.network.state_dict().items() if key not in names}
    assert any(key.endswith("mlp.gate.weight") for key in untouched)
    assert all(torch.equal(value, state[key]) for key, value in untouched.items())
    found, wanted = logits(twin.network, windows()), plain_logits(twin, windows())
    torch.testing.assert_close(found, wanted, atol=2e-6 * float(wanted.abs().max()), rtol=0)
    assert not torch.equal(found, logits(model.network, windows()))
    assert len(set(fallen)) == len(fallen) and set(fallen) <= {layer.name for layer in twin.layers if layer.expert is not None}
    assert bool(fallen) or not method.needs_hessian


def given(weighted: bool) -> CalibrationSet:
    weight = torch.rand(3, SAMPLES, LENGTH, generator=torch.Generator().manual_seed(1)).pow(4)
    return CalibrationSet(windows(), weight if weighted else None)


@pytest.mark.parametrize("weighted", [False, True])
def test_experts_are_pruned_by_the_norms_of_their_own_tokens(model: LanguageModel, weighted: bool) -> None:
    """Against sums over tokens routed by hand: the layer's norms, or another expert's, would keep other weights."""
    method = Method("wanda", weighting=Weighting(level="layer") if weighted else None, sequential=False)
    built, twin = given(weighted), tiny.of_network(copy.deepcopy(model.network))
    fallen = pruner.prune_on_(twin, method, HALF, built, batch_size=3)
    wanted, differ, expected = slow_experts.statistics(model, windows(), built.token_weight), 0, []
    for layer, old in zip(twin.layers, model.layers, strict=True):
        if layer.expert is None:
            continue
        reads = READS[layer.role]
        own = wanted[layer.block, reads, None if layer.expert == "shared" and reads == "gate" else layer.expert]
        whole = wanted[layer.block, reads, None]
        if isinstance(layer.expert, int) and not own["tokens"]:
            expected.append(layer.name)
            own = whole
        kept = [
            slow_pruning.keep_by_row(old.module.weight.double().abs() * sums["squares"].sqrt(), old.module.in_features // 2)
            for sums in (own, whole)
        ]
        assert torch.equal(layer.module.weight != 0, kept[0]), layer.name
        differ += not torch.equal(kept[0], kept[1])
    assert differ > 20
    assert list(fallen) == expected


def test_sparsegpt_uses_the_hessian_of_an_expert_or_of_its_layer(model: LanguageModel) -> None:
    method, built = Method("sparsegpt", weighting=Weighting(level="layer"), sequential=False), given(True)
    twin = tiny.of_network(copy.deepcopy(model.network))
    fallen = pruner.prune_on_(twin, method, HALF, built, batch_size=3)
    wanted, short = slow_experts.statistics(model, windows(), built.token_weight), set()
    block = next(block for block in model.by_block if model.has_experts_in(block))
    for layer, old in zip(twin.by_block[block], model.by_block[block], strict=True):
        if layer.expert is None:
            continue
        reads = READS[layer.role]
        own = wanted[block, reads, None if layer.expert == "shared" and reads == "gate" else layer.expert]
        if isinstance(layer.expert, int) and own["tokens"] < layer.module.in_features:
            short.add(layer.name)
            own = wanted[block, reads, None]
        weight, _ = slow_pruning.sparsegpt(old.module.weight, own["products"])
        torch.testing.assert_close(layer.module.weight.double(), weight, atol=2e-3, rtol=2e-3)
    assert short == {name for name in fallen if f"layers.{block}." in name}
    assert short


def test_a_refit_measures_errors_with_other_statistics_of_the_same_expert(model: LanguageModel) -> None:
    """Masks by weighted norms, errors of all tokens alike: either kind of sums, or another expert's, gives other weights."""
    method = Method("wanda", weighting=Weighting(level="layer"), sequential=False, repair="refit")
    ranked, errors_of = (one_shot.dense_statistics(model, given(weighted), hessian=not weighted) for weighted in (True, False))
    twin = tiny.of_network(copy.deepcopy(model.network))
    fallen = pruner.prune_with_(twin, method, HALF, ranked, errors_of=errors_of)
    by_weight, plain = (slow_experts.statistics(model, windows(), given(weighted).token_weight) for weighted in (True, False))
    short = set()
    for layer, old in zip(twin.layers, model.layers, strict=True):
        if layer.expert is None:
            continue
        block, reads, weight = layer.block, READS[layer.role], old.module.weight.double()
        own = (block, reads, None if layer.expert == "shared" and reads == "gate" else layer.expert)
        ranks, errors = by_weight[own], plain[own]
        if isinstance(layer.expert, int) and not ranks["tokens"]:
            ranks = by_weight[block, reads, None]
        if isinstance(layer.expert, int) and errors["tokens"] < layer.module.in_features:
            short.add(layer.name)
            errors = plain[block, reads, None]
        kept = slow_pruning.keep_by_row(weight.abs() * ranks["squares"].sqrt(), layer.module.in_features // 2)
        assert torch.equal(layer.module.weight != 0, kept), layer.name
        wanted = repairs.refit(weight, kept, errors["products"])
        torch.testing.assert_close(layer.module.weight.double(), wanted, atol=2e-3, rtol=2e-3)
    assert short == set(fallen) and len(fallen) == len(short) > 0


@pytest.mark.parametrize("name", ["SparseGPT", "sink-aware (SparseGPT)", "Wanda", "one-shot SparseGPT", "Wanda, swaps, refit"])
@pytest.mark.parametrize("options", [{"by_role": True}, {"states": "cpu"}, {"states": "disk", "by_role": True}], ids=str)
def test_less_memory_gives_the_same_bits(model: LanguageModel, name: str, options: dict[str, Any]) -> None:
    one, other = (tiny.of_network(copy.deepcopy(model.network)) for _ in range(2))
    usual = pruner.prune_(one, NAMED[name], HALF, windows=windows(), batch_size=2)
    thrifty = pruner.prune_(other, NAMED[name], HALF, windows=windows(), batch_size=2, **options)
    assert sorted(usual) == sorted(thrifty)
    for left, right in zip(one.layers, other.layers, strict=True):
        assert torch.equal(left.module.weight, right.module.weight)


@families
def test_not_finite_inputs_are_found_before_anything_changes(family: str) -> None:
    model = tiny.mixture(family)
    block = next(block for block in model.by_block if model.has_experts_in(block))
    norm: Any = model.network.get_submodule(f"model.layers.{block}.post_attention_layernorm")
    norm.weight.data[3] = float("inf")
    before = {layer.name: layer.module.weight.clone() for layer in model.by_block[block]}
    for name in ("Wanda", "SparseGPT"):
        for by_role in (False, True):
            with pytest.raises(InputError, match="must be finite"):
                pruner.prune_(model, replace(NAMED[name], sequential=True), HALF, windows=windows(), by_role=by_role)
            assert all(torch.equal(layer.module.weight, before[layer.name]) for layer in model.by_block[block])


# Exact numbers by layer, phases


def test_exact_numbers_reach_every_matrix(model: LanguageModel) -> None:
    sizes = [layer.module.weight.numel() for layer in model.layers]
    by_layer = allocation.early_is_sparser(3, epsilon=0.1)[[layer.block for layer in model.layers]]
    total = round(0.5 * sum(sizes))
    counts = allocation.removed_counts(allocation.with_total(by_layer, sizes, sparsity=total / sum(sizes)), sizes, total=total)
    names = [layer.name for layer in model.layers]
    twin = tiny.of_network(copy.deepcopy(model.network))
    pruner.prune_(twin, NAMED["Wanda"], Target(0.5, removed=dict(zip(names, counts, strict=True))), windows=windows())
    assert [int((layer.module.weight == 0).sum()) for layer in twin.layers] == counts


def test_phases_of_a_mixture_compute_each_row_with_its_own_masks(model: LanguageModel) -> None:
    gentle, harsh = (tiny.of_network(copy.deepcopy(model.network)) for _ in range(2))
    pruner.prune_(gentle, METHODS["magnitude"], Target(0.25))
    pruner.prune_(harsh, METHODS["magnitude"], Target(0.75))
    joined = phases.phased(model, [gentle, harsh], borders=[0.5])
    assert len(joined.layers) == 2 * len(model.layers)
    noisy, clear = windows()[:2].clone(), windows()[2:4]
    noisy[:, 4:] = tiny.MASK
    mixed = torch.cat([noisy[:1], clear[:1], noisy[1:], clear[1:]])
    found = logits(joined.network, mixed)
    for rows, one in (([0, 2], gentle), ([1, 3], harsh)):
        wanted = logits(one.network, mixed[rows])
        torch.testing.assert_close(found[rows], wanted, atol=2e-6 * float(wanted.abs().max()), rtol=0)


# Whole experts


def hand_mass(model: LanguageModel, weight: Tensor | None) -> dict[int, list[float]]:
    """Router weights added up token by token, routed by hand."""
    found = {}
    for block, inputs in slow_experts.mixture_inputs(model, windows()).items():
        mlp, sums = model.network.get_submodule(f"model.layers.{block}.mlp"), [0.0] * 8
        for sample in range(SAMPLES):
            for position in range(LENGTH):
                omega = 1.0 if weight is None else float(weight[block, sample, position])
                for expert, share in slow_experts.routed(mlp, inputs[sample, position], model.network.config).items():
                    sums[expert] += omega * share
        found[block] = sums
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_routed_mass_is_what_the_router_gives_each_token_times_its_weight(model: LanguageModel, weighted: bool) -> None:
    built = given(weighted)
    found, wanted = routed_mass(model, built, batch_size=2), hand_mass(model, built.token_weight)
    assert found.keys() == wanted.keys() and len(found) == 2
    for block, mass in found.items():
        torch.testing.assert_close(mass, torch.tensor(wanted[block]).double(), atol=1e-4, rtol=1e-4)


@families
def test_sink_weights_can_change_which_experts_go(family: str) -> None:
    """All that expert 0 gets it gets from one token, which weighs nothing."""
    shares = torch.tensor([[0.9, 0.1]] + [[0.6, 0.4]] * 3)
    own = Routes(torch.tensor([[0, 1], [1, 2], [1, 2], [3, 2]]), shares, 4)
    assert own.mass().argmin() == 3 and own.mass(torch.tensor([0.0, 1.0, 1.0, 1.0])).argmin() == 0
    assert family in tiny.MIXTURES


def test_a_router_without_experts_chooses_as_if_their_logits_were_minus_infinity(model: LanguageModel) -> None:
    """The rows that are left decide alone: masked logits in the dense model give the same network."""
    grouped = model.network.config.model_type == "glm4_moe"
    model = tiny.mixture("glm4_moe", n_routed_experts=16) if grouped else model
    mass = routed_mass(model, given(True))
    kept = expert_removal.choose(model, mass, sparsity=0.5)
    small = expert_removal.without_experts(model, kept)
    for block, own in kept.items():
        order = mass[block].argsort().tolist()
        if not grouped:
            assert own.tolist() == sorted(order[4:])
    masked = tiny.of_network(copy.deepcopy(model.network))
    for block, own in kept.items():
        gone = [number for number in range(len(mass[block])) if number not in own.tolist()]
        router = masked.network.get_submodule(f"model.layers.{block}.mlp.gate")
        router.register_forward_hook(lambda module, inputs, _, gone=gone: without(module, inputs[0], gone))
    found, wanted = logits(small.network, windows()), logits(masked.network, windows())
    torch.testing.assert_close(found, wanted, atol=2e-6 * float(wanted.abs().max()), rtol=0)
    assert not torch.allclose(found, logits(model.network, windows()), atol=1e-2)
    assert len([layer for layer in small.layers if isinstance(layer.expert, int)]) == 2 * 3 * len(next(iter(kept.values())))


def without(router: Any, hidden: Tensor, gone: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """A router whose logits for some experts are minus infinity, routed token by token."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    scores = flat.double() @ router.weight.double().T
    scores[:, gone] = float("-inf")
    if not hasattr(router, "e_score_correction_bias"):
        shares, chosen = scores.softmax(-1).topk(router.top_k)
        return scores.float(), shares.float(), chosen
    shares = scores.sigmoid()
    biased = shares + router.e_score_correction_bias.double()
    biased[:, gone] = float("-inf")
    best = biased.unflatten(1, (router.num_group, -1)).topk(2, dim=2).values.sum(2)
    closed = torch.ones_like(best, dtype=torch.bool).scatter(1, best.topk(router.topk_group).indices, False)
    biased = biased.unflatten(1, (router.num_group, -1)).masked_fill(closed[:, :, None], float("-inf")).flatten(1)
    chosen = biased.topk(router.top_k).indices
    own = shares.gather(1, chosen)
    return scores.float(), (own / own.sum(1, keepdim=True) * router.routed_scaling_factor).float(), chosen


def test_a_model_without_experts_of_its_own_family_is_read_back(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny.mixture("glm4_moe", n_routed_experts=16, n_group=4)
    small = expert_removal.without_experts(model, expert_removal.choose(model, routed_mass(model, given(False)), sparsity=0.5))
    small.network.save_pretrained(tmp_path / "small")
    again = tiny.of_network(cast(Any, AutoModelForCausalLM.from_pretrained(tmp_path / "small")).eval())
    with attention.without_products(small.network):
        assert torch.equal(logits(again.network, windows()), logits(small.network, windows()))
    groups = {int(number) // 4 for number in expert_removal.choose(model, routed_mass(model, given(False)), sparsity=0.5)[1]}
    assert groups == {0, 1, 2, 3}


def test_what_cannot_be_cut_is_refused(model: LanguageModel, tmp_path: Any) -> None:
    mass = routed_mass(model, given(False))
    with pytest.raises(InputError, match=r"a token must find 2 experts|must leave a unit"):
        expert_removal.choose(model, mass, sparsity=0.9)
    with pytest.raises(InputError, match="masses must be of blocks"):
        expert_removal.choose(model, {0: torch.ones(8)}, sparsity=0.25)
    with pytest.raises(InputError, match="as many experts"):
        expert_removal.without_experts(model, {0: torch.arange(4), 2: torch.arange(5)})
    with pytest.raises(InputError, match="mixture of experts, which loses whole experts: use expert_removal"):
        shrink.choose(model, sparsity=0.5)
    others = [method for name, method in STRUCTURES.items() if name != "Wanda-sp"]
    for method in (METHODS["magnitude"], METHODS["Wanda"], METHODS["SparseGPT"], *others):
        with pytest.raises(InputError, match="ranked by what a one-shot Wanda method reads"):
            expert_removal.by_routed_mass(model, method, given(False), sparsity=0.25)
    with pytest.raises(InputError, match="moments must be of dense blocks"):
        one_shot.dense_moments(model, windows(), ["o"])
    dense = tiny.model(tmp_path / "dense", causal=False)
    assert routes(dense, windows()) == {}
    with pytest.raises(InputError, match="must be of a mixture of experts"):
        routed_mass(dense, given(False))


def test_sets_and_one_shot_weights_are_built_on_mixtures(model: LanguageModel) -> None:
    """Weightings of every kind meet the walk through a mixture."""
    for weighting in (Weighting(), Weighting("sinks_up"), Weighting("random"), Weighting("norm")):
        built = sets.build(model, windows(), weighting=weighting, inputs=METHODS["Wanda"].inputs, seed=0, batch_size=2)
        assert built.token_weight is not None
        assert len(one_shot.dense_statistics(model, built)) == 3
