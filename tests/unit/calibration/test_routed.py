"""Statistics of experts: over the tokens that went to each, with their weights, or over the layer for want of tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.calibration import one_shot
from lib.calibration.hidden_states import HiddenStates
from lib.calibration.reads import READS, fell_back, ready, statistics_of
from lib.calibration.routed import KEPT
from lib.calibration.statistics import CalibrationSet, stream
from lib.calibration.sums import InputStatistics
from lib.core.errors import InputError
from lib.models import experts
from lib.models.language_model import LanguageModel, Role
from tests import tiny
from tests.unit import slow_experts as slow

SAMPLES, LENGTH = 5, 24
RTOL = 2e-4  # float32 sums in another order, of inputs that passed through up to three blocks
families = pytest.mark.parametrize("family", tiny.MIXTURES)
Found = dict[tuple[int, str, object], tuple[InputStatistics, Tensor | None]]


@pytest.fixture(scope="module", params=tiny.MIXTURES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """Its tests leave it as it is."""
    return tiny.mixture(request.param)


def ids(samples: int = SAMPLES) -> Tensor:
    return tiny.ids(samples, LENGTH)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    """ω of very different size, some 0."""
    weight = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)).pow(3)
    return weight.masked_fill(weight < 0.02, 0.0)


def weighted(kind: str) -> Tensor | None:
    return {"none": None, "by token": drawn(SAMPLES, LENGTH), "by layer": drawn(3, SAMPLES, LENGTH)}[kind]


def equal(got: InputStatistics, wanted: slow.Sums, products: Tensor | None = None) -> None:
    """Compare with slow sums, to a share of the largest of each kind."""
    pairs = [(got.squares[0], wanted["squares"]), (got.norms[0], wanted["norms"])]
    pairs += [] if products is None else [(products, wanted["products"])]
    for found, expected in pairs:
        torch.testing.assert_close(found.double(), expected, atol=RTOL * float(expected.abs().max()), rtol=0)


Wanted = dict[tuple[int, str, object], slow.Sums]


def check(found: list[dict[Role, InputStatistics]], wanted: Wanted, model: LanguageModel) -> None:
    """Compare norms of every expert, of the layers and of shared ones."""
    for (block, role, expert), sums in wanted.items():
        layer = found[block][role]  # type: ignore[index]
        own = layer if expert is None else layer.experts[expert]  # type: ignore[index]
        equal(own, sums)
        if expert == "shared":
            assert statistics_of(found[block], "down", "shared") is own
            assert statistics_of(found[block], "up", "shared") is found[block]["gate"]
        if isinstance(expert, int):
            assert own.tokens == sums["tokens"] and own.samples == pytest.approx(sums["rows"] / LENGTH)
            assert own.is_short == (sums["tokens"] == 0)
            used = statistics_of(found[block], role, expert)  # type: ignore[arg-type]
            assert used is (layer if own.is_short else own)
    assert {(block, role, expert) for block, role, expert in wanted if expert is not None} == {
        (layer.block, READS[layer.role], layer.expert)
        for layer in model.layers
        if isinstance(layer.expert, int) or (layer.expert == "shared" and layer.role == "down")
    }


@pytest.mark.parametrize("kind", ["none", "by token", "by layer"])
def test_norms_of_every_expert_equal_slow_sums_over_its_tokens(model: LanguageModel, kind: str) -> None:
    weight = weighted(kind)
    wanted = slow.statistics(model, ids(), weight)
    streamed = one_shot.dense_statistics(model, CalibrationSet(ids(), weight), batch_size=3)
    check(streamed, wanted, model)
    check(one_shot.shared_statistics(model, ids(), [weight, None], batch_size=2)[0], wanted, model)


def test_weights_of_the_wrong_tokens_would_show(model: LanguageModel) -> None:
    """Each expert's weights are those of its own tokens: shifted by one position every sum is another."""
    weight = drawn(SAMPLES, LENGTH)
    right, wrong = slow.statistics(model, ids(), weight), slow.statistics(model, ids(), weight.roll(1, 1))
    for key, sums in right.items():
        if sums["rows"] > 3:
            assert not torch.allclose(sums["squares"], wrong[key]["squares"], rtol=0.02)


def test_weights_by_head_reach_experts_as_their_mean(model: LanguageModel) -> None:
    weight = drawn(3, SAMPLES, 4, LENGTH)
    found = one_shot.dense_statistics(model, CalibrationSet(ids(), weight), batch_size=2)
    check(found, slow.statistics(model, ids(), weight.mean(2)), model)
    check(one_shot.shared_statistics(model, ids(), [weight])[0], slow.statistics(model, ids(), weight.mean(2)), model)


@pytest.mark.parametrize("budget", [None, 0])
def test_weights_that_the_same_pass_decides_meet_the_tokens_of_each_expert(model: LanguageModel, budget: int | None) -> None:
    given = drawn(SAMPLES, LENGTH)
    parts = iter(given.split(2))
    found = one_shot.one_shot_statistics(model, ids(), lambda mass: next(parts), batch_size=2, memory_budget=budget)
    check(found, slow.statistics(model, ids(), given), model)


def test_inputs_that_are_kept_are_counted_once_and_by_choices(model: LanguageModel) -> None:
    """Of two choices among eight experts two rows of `down` are kept, and one of the tensor that all gates read."""
    attention = 3 * (32 + 32)
    mixture, dense = 32 + 2 * 16, 32 + 40
    shared = 16 * 2 if model.network.config.model_type == "glm4_moe" else 0
    assert one_shot.input_bytes(model, samples=3, positions=5) == 4 * 15 * (attention + 2 * mixture + dense + shared)


# Hessians


def served(
    model: LanguageModel, given: CalibrationSet, visit: Callable[[int], object] = lambda block: None, **options: Any
) -> tuple[Found, list[set[tuple[str, object]]]]:
    """What every layer would use when its Hessian is there, and which layers are served together."""
    found: Found = {}
    order: list[set[tuple[str, object]]] = []

    def keep(block: int, statistics: dict[Role, InputStatistics]) -> None:
        layers = ready(model, block, statistics, hessian=True)
        for layer in layers:
            own = statistics_of(statistics, layer.role, layer.expert)
            assert (block, layer.role, layer.expert) not in found, "a matrix is served twice"
            found[block, layer.role, layer.expert] = own, own.hessian().clone() * own.samples / 2
        order.append({(layer.role, layer.expert) for layer in layers})
        visit(block)

    stream(model, given, keep, hessian=True, **options)
    return found, order


@pytest.mark.parametrize("by_role", [False, True])
@pytest.mark.parametrize("kind", ["none", "by layer"])
@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_hessians_of_every_expert_or_of_its_layer(
    model: LanguageModel, by_role: bool, kind: str, place: Any, tmp_path: Any
) -> None:
    weight = weighted(kind)
    wanted = slow.statistics(model, ids(), weight)
    states = HiddenStates(place, model.device, tmp_path if place == "disk" else None)
    found, order = served(model, CalibrationSet(ids(), weight), batch_size=2, by_role=by_role, states=states)
    assert found.keys() == {(layer.block, layer.role, layer.expert) for layer in model.layers}
    fallen = set()
    for (block, role, expert), (own, products) in found.items():
        if not model.has_experts_in(block) or role in "qkvo":
            continue
        reads = READS[role]  # type: ignore[index]
        tokens = wanted[block, reads, expert]["tokens"] if isinstance(expert, int) else 10**6
        width = {"gate": 32, "down": 16}[reads]
        short = tokens < width
        key: Any = (block, reads, None if short or (expert == "shared" and reads == "gate") else expert)
        equal(own, wanted[key], products)
        fallen |= {(block, reads)} if short else set()
    assert fallen, "a test of falling back must have experts that do"
    for layers in order:
        roles = {role for role, _ in layers}
        assert not by_role or len({READS[role] for role in roles}) == 1  # type: ignore[index]
        assert ("gate", 0) not in layers or roles == {"gate", "up"}
    assert not states._kept and not states._stored
    if place == "disk":
        assert not list(tmp_path.glob(f"{KEPT}-*"))


@pytest.mark.parametrize("by_role", [False, True])
def test_hessians_are_those_of_the_block_as_it_was(model: LanguageModel, by_role: bool) -> None:
    """Everything that was served is zeroed at once, and the statistics of the same block must not notice."""
    twin = tiny.of_network(tiny.stacked(model.network.config.model_type))
    first = min(block for block in twin.by_block if twin.has_experts_in(block))
    wanted, _ = served(model, CalibrationSet(ids()), by_role=by_role, batch_size=2)
    got: Found = {}

    def zero(block: int, statistics: dict[Role, InputStatistics]) -> None:
        for layer in ready(twin, block, statistics, hessian=True):
            own = statistics_of(statistics, layer.role, layer.expert)
            got[block, layer.role, layer.expert] = own, own.hessian().clone() * own.samples / 2
            if block == first:
                layer.module.weight.zero_()

    stream(twin, CalibrationSet(ids()), zero, hessian=True, by_role=by_role, batch_size=2)
    for key, (_, products) in wanted.items():
        if key[0] <= first:
            assert torch.equal(products, got[key][1]), key  # type: ignore[arg-type]
    later = next(key for key in wanted if key[0] == first + 1)
    assert not torch.equal(wanted[later][1], got[later][1])  # type: ignore[arg-type]


def test_by_role_gives_the_same_bits_and_one_shot_reads_the_dense_model(model: LanguageModel) -> None:
    given = CalibrationSet(ids(), drawn(SAMPLES, LENGTH))
    usual, _ = served(model, given, batch_size=2)
    tried: list[dict[str, Any]] = [{"by_role": True}, {"sequential": False}, {"by_role": True, "sequential": False}]
    for options in tried:
        other, _ = served(model, given, batch_size=2, **options)
        for key, (_, products) in usual.items():
            assert torch.equal(products, other[key][1])  # type: ignore[arg-type]


def test_all_statistics_of_the_dense_model_come_together(model: LanguageModel) -> None:
    given = CalibrationSet(ids(), drawn(SAMPLES, LENGTH))
    usual, _ = served(model, given, batch_size=2)
    found = one_shot.dense_statistics(model, given, hessian=True, batch_size=2)
    for layer in model.layers:
        own = statistics_of(found[layer.block], layer.role, layer.expert)
        products = own.hessian() * own.samples / 2
        assert torch.equal(products, usual[layer.block, layer.role, layer.expert][1])  # type: ignore[arg-type]


@families
def test_one_token_is_enough_for_norms_and_as_many_as_features_for_a_hessian(family: str) -> None:
    model = tiny.mixture(family)
    short = tiny.ids(1, 3)
    found = one_shot.dense_statistics(model, CalibrationSet(short))
    counts = slow.statistics(model, short)
    fallen = [layer for layer in model.layers if fell_back(found[layer.block], layer)]
    unseen = [layer for layer in model.layers if isinstance(layer.expert, int)
              and not counts[layer.block, READS[layer.role], layer.expert]["tokens"]]  # fmt: skip
    assert fallen == unseen and 0 < len(fallen) < len(model.layers)


def test_a_token_of_weight_zero_is_none(model: LanguageModel) -> None:
    """An expert whose only tokens weigh nothing has statistics of nothing."""
    block = next(block for block in model.by_block if model.has_experts_in(block))
    mlp = model.network.get_submodule(f"model.layers.{block}.mlp")
    index: list[Tensor] = []
    handle = mlp.get_submodule("experts").register_forward_pre_hook(lambda _, inputs: index.append(inputs[1]))
    slow.mixture_inputs(model, ids())
    handle.remove()
    expert = int(index[0][0, 0])
    weight = torch.ones(SAMPLES, LENGTH)
    weight.view(-1)[(index[0] == expert).any(1)] = 0.0
    found = one_shot.dense_statistics(model, CalibrationSet(ids(), weight))[block]
    assert found["gate"].experts[expert].samples > 0
    assert found["gate"].experts[expert].is_short and found["down"].experts[expert].is_short
    assert statistics_of(found, "up", expert) is found["gate"]


def test_no_hook_stays_behind(model: LanguageModel) -> None:
    def fail(*_: Any) -> None:
        raise InputError("stop")

    for hessian in (False, True):
        with pytest.raises(InputError, match="stop"):
            stream(model, CalibrationSet(ids()), fail, hessian=hessian)
    assert not sum(len(each._forward_pre_hooks) + len(each._forward_hooks) for each in model.network.modules())
    assert experts.choices(model.network) == 2
