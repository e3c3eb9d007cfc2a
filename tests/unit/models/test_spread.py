"""Models spread over devices: equal to those on one, whatever the map, and maps that cannot work are refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.attention import masses
from lib.calibration import sets, statistics
from lib.calibration.statistics import CalibrationSet
from lib.calibration.token_weights import Weighting
from lib.core.errors import InputError
from lib.diffusion import likelihood
from lib.models import language_model, loading, spread
from lib.models.language_model import LanguageModel
from lib.pruning import pruner, shrink
from lib.pruning.methods import METHODS, RELEASE, Method, Target
from tests import tiny
from tests.unit import slow_pruning as slow

BODY = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb")
ALL = (*BODY, "lm_head")
ON_CPU: dict[str, int | str] = dict.fromkeys(ALL, "cpu")
METHODS_HERE = {
    **{name: METHODS[name] for name in ("random", "magnitude", "Wanda", "SparseGPT", "sink-aware (SparseGPT)")},
    "sink-aware (Wanda)": RELEASE["sink_wanda"],
    "by head": Method("wanda", weighting=Weighting("sinks_up", level="head")),
}


@pytest.fixture(params=["llada", "dream", "tied"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LanguageModel, LanguageModel]:
    """The same checkpoint plain, and with the hooks of a spread model on every module."""
    folder = {"llada": tiny.LLADA, "dream": tiny.DREAM}.get(request.param) or tiny.folder(
        tmp_path / "tied", causal=False, tie=True
    )
    return loading.load(folder), loading.load(folder, device_map=ON_CPU)


def logits(model: LanguageModel) -> Tensor:
    with torch.inference_mode():
        return model.network(input_ids=tiny.ids(2, 10)).logits


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(spread, "_gpus", lambda: count)


def test_every_module_has_the_hook_of_its_device(pair: tuple[LanguageModel, LanguageModel]) -> None:
    plain, spread_out = pair
    for name in ALL:
        hook: Any = spread_out.network.get_submodule(name)._hf_hook
        assert str(hook.execution_device) == "cpu" and not hook.offload
    assert not any(hasattr(module, "_hf_hook") for module in plain.network.modules())
    assert not any(value.is_meta for value in spread_out.network.state_dict().values())
    assert spread_out.describe() == plain.describe() and spread_out.fingerprint == plain.fingerprint
    assert slow.same_state(spread_out, slow.state_of(plain)) and spread_out.device == torch.device("cpu")
    head, embedding = (each().weight for each in (  # type: ignore[operator]
        spread_out.network.get_output_embeddings, spread_out.network.get_input_embeddings))  # fmt: skip
    assert (head is embedding) is bool(plain.network.config.tie_word_embeddings)


def test_what_is_computed_with_it_is_equal(pair: tuple[LanguageModel, LanguageModel]) -> None:
    ids, windows = tiny.ids(3, 12), tiny.ids(2, 12, seed=1)
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, [1, 4]] = True
    assert torch.equal(*map(logits, pair))
    assert torch.equal(*(language_model.logits_at(each, ids, where) for each in pair))
    assert torch.equal(*(masses.sink_mass(each, ids) for each in pair))
    assert torch.equal(*(likelihood.nelbo(each, windows, draws=2, seed=0).per_window for each in pair))
    first, second = (sets.build(each, windows, weighting=Weighting(), seed=0).token_weight for each in pair)
    assert first is not None and second is not None and torch.equal(first, second)
    seen: list[list[Tensor]] = [[], []]
    for each, norms in zip(pair, seen, strict=True):
        statistics.stream(
            each,
            CalibrationSet(ids),
            lambda _, found, norms=norms: norms.extend(found[role].hessian() for role in found),
            hessian=True,
        )
    assert len(seen[0]) == 2 * 4 and all(torch.equal(*both) for both in zip(*seen, strict=True))


@pytest.mark.parametrize("name", METHODS_HERE)
def test_pruning_is_identical(pair: tuple[LanguageModel, LanguageModel], name: str) -> None:
    plain, spread_out = pair
    for model in pair:
        pruner.prune_(model, METHODS_HERE[name], Target(0.5), windows=tiny.ids(5, 20), seed=3)
    assert slow.same_state(spread_out, slow.state_of(plain)) and pruner.measured_sparsity(spread_out) >= 0.5
    assert torch.equal(*map(logits, pair))


def test_a_smaller_network_is_cut_out_of_it(pair: tuple[LanguageModel, LanguageModel]) -> None:
    cut = [shrink.shrunk(model, *shrink.choose(model, sparsity=0.5, input_norms=None)) for model in pair]
    assert torch.equal(*map(logits, cut)) and cut[0].num_parameters == cut[1].num_parameters < pair[0].num_parameters


def test_input_goes_to_the_weights_and_what_comes_out_goes_home() -> None:
    """The device without memory stands in for a second one: the CPU's tensors can go there, but none come back."""
    model = loading.load(tiny.LLADA)
    ends = {**ON_CPU, "model.norm": "meta", "lm_head": "meta"}
    spread.dispatch(model.network, ends)
    states: list[Tensor] = []
    norm: Any = model.network.get_submodule("model.norm")
    norm.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # on its way home
        language_model.network_body(model)(input_ids=tiny.ids(1, 6), use_cache=False)
    assert states[0].device.type == "cpu" and norm.weight.is_meta
    assert norm(states[0]).is_meta, "the hook sent the input to the weights"


def test_output_of_body_and_head_come_home() -> None:
    model = loading.load(tiny.LLADA)
    spread._bring_home(model.network, torch.device("meta"), None)
    found: Any = language_model.network_body(model)(input_ids=tiny.ids(1, 6), use_cache=False)
    assert found.last_hidden_state.is_meta
    head: Any = model.network.get_output_embeddings()
    assert head(torch.zeros(1, head.in_features)).is_meta


@pytest.mark.parametrize("kept", ["map", "argmax", "value_norm"])
def test_sums_of_all_layers_lie_where_the_first_ones_do(kept: Any) -> None:
    """A second layer on another device, for which the one without memory stands in: its parts go to the first layer's."""
    recorder = masses.MassRecorder(keep=(kept,))
    states = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    for device in ("meta", "cpu"):
        there = states.to(device)
        recorder.add(there, there, None, scaling=0.5, is_causal=False)
        recorder.add_values(there)
    parts = [recorder._sums, recorder._maps, recorder._favourites, recorder._value_norms]
    assert [len(part) for part in parts if part] == [2, 2]
    assert all(value.is_meta for part in parts for value in part)


def test_without_gpus_all_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    model = loading.load(tiny.DREAM, name="dream", dtype=torch.bfloat16, device_map="auto")
    assert hasattr(model.network, "hf_device_map")
    assert (model.name, model.network.dtype) == ("dream", torch.bfloat16)
    assert {value.device.type for value in model.network.state_dict().values()} == {"cpu"}
    assert torch.equal(logits(model), logits(loading.load(tiny.DREAM, dtype=torch.bfloat16)))


def test_gpus_are_filled_evenly_and_blocks_stay_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus(monkeypatch, 2)
    network = loading.load(tiny.folder(tmp_path / "deep", num_hidden_layers=8)).network
    block = sum(value.nbytes for value in network.get_submodule("model.layers.0").parameters())
    found = spread.automatic(network, {0: 100 * block, 1: 100 * block})
    spread.check(network, found)
    of_blocks = [found[f"model.layers.{number}"] for number in range(8)]
    assert of_blocks == sorted(of_blocks) and 3 <= of_blocks.count(0) <= 5
    with pytest.raises(
        InputError, match=r"must be cpu or a GPU of this machine .*, got 'disk': weights on disk cannot be pruned"
    ):
        spread.check(network, spread.automatic(network, {0: 3 * block, 1: 3 * block}))
    with pytest.raises(InputError, match=r"all on GPUs or all on the CPU, got a map with both, .*model.layers"):
        spread.check(network, spread.automatic(network, {0: 3 * block, 1: 3 * block, "cpu": 100 * block}))


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("balanced", "device_map must be auto, or devices by module, got 'balanced'"),
        ({}, "a device map must name modules, got an empty one"),
        ({**ON_CPU, "lm_head": "disk"}, "the device of lm_head must be .*, got 'disk': weights on disk cannot be pruned"),
        ({**ON_CPU, "lm_head": 2}, r"the device of lm_head must be cpu or a GPU of this machine \(it has 2\), got 2: name"),
        ({"": "mps"}, "the device of all modules must be .*, got 'mps'"),
        ({**ON_CPU, "lm_head": 1}, "all on GPUs or all on the CPU, got a map with both, model.embed_tokens, "),
        ({**ON_CPU, "model.layers.2": "cpu"}, "of the network, got 'model.layers.2': they are such as model.layers.0"),
        ({**ON_CPU, "model.layers.1.mlp": "cpu"}, "keep decoder blocks whole, got 'model.layers.1.mlp': give model.layers.1"),
        (dict.fromkeys(BODY, 0), r"must give every weight a device, got none for \['lm_head.weight'\]"),
    ],
)  # fmt: skip
def test_maps_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch, device_map: Any, message: str) -> None:
    gpus(monkeypatch, 2)
    with pytest.raises(InputError, match=message):
        loading.load(tiny.LLADA, device_map=device_map)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory": {3: "1GB"}, "device_map": "auto"}, "each device of max_memory must be .* got 3"),
        ({"max_memory": {"cpu": "1GB"}, "device_map": ON_CPU}, "max_memory must go with device_map auto"),
        ({"max_memory": {"cpu": "1GB"}}, "max_memory must go with device_map auto, got no device_map"),
        ({"device": "cuda", "device_map": "auto"}, "device must be left out where device_map says it, got cuda"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: Mapping[str, Any], message: str
) -> None:
    gpus(monkeypatch, 2)
    with pytest.raises(InputError, match=message):
        loading.load(tiny.LLADA, **options)


def test_a_tied_matrix_has_one_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus(monkeypatch, 2)
    network = loading.load(tiny.folder(tmp_path / "tied", tie=True)).network
    spread.check(network, dict.fromkeys(ALL, 0))
    with pytest.raises(InputError, match="are one matrix and must have one device, got 0, 1: give both"):
        spread.check(network, {**dict.fromkeys(ALL, 0), "lm_head": 1})


def test_the_smallest_module_around_a_weight_decides() -> None:
    found = {"": 0, "model": 1, "model.layers.1": 2}
    places = [
        spread._place(found, name) for name in ("lm_head.weight", "model.norm.weight", "model.layers.1.x", "model.layers.10.x")
    ]
    assert places == [0, 1, 2, 1] and spread._place({"model": 1}, "lm_head.weight") is None
