"""Where hidden states lie and how many Hessians are together: the same weights bit for bit, and nothing left on disk."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor

from lib.calibration import one_shot, sets
from lib.calibration import statistics as calibration
from lib.calibration.hidden_states import HiddenStates, States
from lib.calibration.sums import InputStatistics, OneHessian
from lib.calibration.token_weights import Weighting
from lib.core.errors import InputError
from lib.models import loading, streaming
from lib.models.language_model import LanguageModel
from lib.pruning import pruner
from lib.pruning.methods import METHODS, Method, Target, pattern_target, without_noise
from tests import tiny
from tests.unit import slow_pruning as slow

HALF, PAIRS = Target(0.5), pattern_target("2:4")
PLACES: tuple[States, ...] = get_args(States)
HERE: dict[str, Method] = {
    **{name: METHODS[name] for name in ("Wanda", "SparseGPT", "sink-aware (SparseGPT)", "AR sink-preserve")},
    "DWANDA": METHODS["DWANDA"],
    "one-shot Wanda": replace(METHODS["Wanda"], sequential=False),
    "one-shot SparseGPT": replace(METHODS["SparseGPT"], sequential=False),
    "by head": Method("wanda", weighting=Weighting("sinks_up", level="head")),
    "by layer": Method("sparsegpt", weighting=Weighting(level="layer")),
}
MAIN = ("Wanda", "SparseGPT", "sink-aware (SparseGPT)", "AR sink-preserve")
DELEGATED = ("random", "magnitude", "magnitude per row", "sink-aware (Wanda)")
Loader = Callable[..., LanguageModel]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("networks")
    return {
        "llada": tiny.LLADA,
        "dream": tiny.DREAM,
        "ar": tiny.folder(path / "ar", num_hidden_layers=3),
        "deep": tiny.folder(path / "deep", causal=False, num_hidden_layers=3, seed=1),
    }


def pruned(load: Loader, folder: Path, method: Method, target: Target = HALF, **options: Any) -> dict[str, Tensor]:
    """The weights after pruning; without options those of the default, states on the device and all Hessians together."""
    model = load(folder)
    method = without_noise(method) if model.is_causal else method
    # 7 windows: the last batch is smaller than the others
    pruner.prune_(model, method, target, windows=tiny.ids(7, 20), **{"seed": 3, "batch_size": 3, **options})
    return slow.state_of(model)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def bf16(folder: Path) -> LanguageModel:
    return loading.load(folder, dtype=torch.bfloat16)


def streamed_bf16(folder: Path) -> LanguageModel:
    return streaming.load(folder, dtype=torch.bfloat16, budget=0)


def of_scratch(states: States, path: Path) -> dict[str, Any]:
    return {"states": states, "scratch": path if states == "disk" else None}


# --- the same weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [HALF, PAIRS], ids=["unstructured", "2:4"])
@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("network", ["llada", "dream", "ar"])
def test_the_weights_are_those_of_the_default(
    network: str, name: str, target: Target, folders: dict[str, Path], tmp_path: Path
) -> None:
    expected = pruned(loading.load, folders[network], HERE[name], target)
    assert not same(expected, slow.state_of(loading.load(folders[network])))
    for states in PLACES:
        for by_role in (True, False):
            options = {"by_role": by_role, **of_scratch(states, tmp_path)}
            assert same(pruned(loading.load, folders[network], HERE[name], target, **options), expected), options
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("states", ["cpu", "disk"])
@pytest.mark.parametrize("by_role", [True, False])
def test_weights_in_bf16_that_are_streamed(
    by_role: bool, states: States, name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    expected = pruned(bf16, folders["deep"], HERE[name])
    got = pruned(streamed_bf16, folders["deep"], HERE[name], by_role=by_role, **of_scratch(states, tmp_path))
    assert same(got, expected) and got["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", DELEGATED)
def test_methods_that_keep_no_states_take_the_options(name: str, folders: dict[str, Path]) -> None:
    expected = pruned(loading.load, folders["llada"], METHODS[name])
    assert same(pruned(loading.load, folders["llada"], METHODS[name], states="disk", by_role=True, memory_budget=0), expected)


def test_exact_numbers_and_another_seed(folders: dict[str, Path]) -> None:
    target = pruner.exact_target(loading.load(folders["deep"]), 0.37)
    method = METHODS["DWANDA"]
    expected = pruned(loading.load, folders["deep"], method, target, seed=4, states="cpu", by_role=True)
    assert not same(expected, pruned(loading.load, folders["deep"], method, target))
    model = loading.load(folders["deep"])
    pruner.prune_(model, method, target, windows=tiny.ids(7, 20), seed=4, batch_size=3)
    assert same(slow.state_of(model), expected)


# --- a wrong order gives other weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [True, False])
def test_these_inputs_tell_when_a_matrix_is_written_before_later_statistics(
    sequential: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first tensor to the last, each behind already pruned matrices: another algorithm, and other weights."""
    method = replace(METHODS["SparseGPT"], sequential=sequential)
    expected = pruned(loading.load, folders["deep"], method)
    assert same(pruned(loading.load, folders["deep"], method, by_role=True), expected)
    monkeypatch.setattr(calibration, "LAST_FIRST", ("q", "o", "gate", "down"))
    wrong = pruned(loading.load, folders["deep"], method, by_role=True)
    first, second = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(wrong[first], expected[first]) and not torch.equal(wrong[second], expected[second])


def test_these_inputs_tell_what_the_next_block_reads(folders: dict[str, Path]) -> None:
    method = METHODS["SparseGPT"]
    first = pruned(loading.load, folders["deep"], method, states="disk", by_role=True)
    second = pruned(loading.load, folders["deep"], replace(method, sequential=False), states="disk", by_role=True)
    names = [f"model.layers.{block}.self_attn.q_proj.weight" for block in range(3)]
    assert [torch.equal(first[name], second[name]) for name in names] == [True, False, False]


def test_a_model_of_one_block(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "one", causal=False, num_hidden_layers=1)
    for sequential in (True, False):
        method = replace(METHODS["SparseGPT"], sequential=sequential)
        assert same(pruned(loading.load, folder, method, states="disk", by_role=True), pruned(loading.load, folder, method))


# --- what exists at one time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", PLACES)
@pytest.mark.parametrize("weighting", [None, Weighting(), Weighting("sinks_up", level="head")], ids=["none", "tokens", "heads"])
def test_norms_of_the_dense_model_are_those_with_states_on_the_device(
    states: States, weighting: Weighting | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = loading.load(folders["deep"])
    built = sets.build(model, tiny.ids(7, 20), weighting=weighting, seed=3, batch_size=3)
    wanted = one_shot.dense_statistics(model, built, batch_size=3)
    found = one_shot.dense_statistics(model, built, batch_size=3, **of_scratch(states, tmp_path))
    assert [list(block) for block in found] == [list(block) for block in wanted] and len(found) == 3
    for ours, theirs in zip(found, wanted, strict=True):
        for role in theirs:
            for aggregate in ("root_mean_square", "sum_of_norms"):
                assert torch.equal(ours[role].input_norm(aggregate), theirs[role].input_norm(aggregate))
    assert not list(tmp_path.iterdir())


def test_norms_of_the_dense_model_keep_a_batch_on_the_device(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kinds = loading.load(folders["deep"]), []
    put = HiddenStates.put
    monkeypatch.setattr(HiddenStates, "put", lambda self, *given: (kinds.append(self.kind), put(self, *given))[1])
    built = sets.build(model, tiny.ids(4, 20), seed=0)
    one_shot.dense_statistics(model, built, batch_size=2, states="disk", scratch=tmp_path)
    assert kinds == ["disk"] * 2 * 3  # two batches, before three blocks
    with pytest.raises(InputError, match="scratch must be a folder"):
        one_shot.dense_statistics(model, built, states="disk", scratch=tmp_path / "none")


def watched_hessians(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices of outer products are alive whenever one is made."""
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    make = InputStatistics.__init__

    def spy(self: InputStatistics, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        if self.products is not None:
            alive.append(weakref.ref(self.products))
            counts.append(sum(each() is not None for each in alive))

    monkeypatch.setattr(InputStatistics, "__init__", spy)
    return counts


@pytest.mark.parametrize("sequential", [True, False])
def test_one_hessian_exists_at_a_time(sequential: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    method = replace(METHODS["SparseGPT"], sequential=sequential)
    gc.disable()  # a circle would keep one alive
    try:
        counts = watched_hessians(monkeypatch)
        pruned(loading.load, folders["deep"], method, by_role=True)
        assert counts == [1] * 4 * 3
        counts.clear()
        pruned(loading.load, folders["deep"], method)
        assert counts == [1, 2, 3, 4] * 3
    finally:
        gc.enable()


def test_the_hessian_takes_the_place_of_its_products_and_goes_with_its_last_reader() -> None:
    here = torch.device("cpu")
    one, usual = OneHessian(5, device=here, readers=2), InputStatistics(5, hessian=True, device=here)
    for statistics in (one, usual):
        statistics.add(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), None)
    address = cast(Tensor, one.products).data_ptr()
    for _ in range(2):
        assert one.products is not None
        hessian = one.hessian()
        assert hessian.data_ptr() == address and torch.equal(hessian, usual.hessian())
    assert one.products is None


def states_alive(batch: int, positions: int, width: int) -> int:
    """Tensors that look like the hidden states of a batch, or of the last one, by distinct memory."""
    found = {
        each.data_ptr()
        for each in gc.get_objects()
        if type(each) is Tensor and each.dim() == 3 and each.shape[1:] == (positions, width) and each.shape[0] <= batch
    }
    return len(found)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("by_role", [True, False])
def test_states_on_disk_are_in_memory_a_batch_at_a_time(
    by_role: bool, sequential: bool, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, alive, files = HiddenStates.put, [], []

    def spy(self: HiddenStates, *arguments: Any) -> None:
        put(self, *arguments)
        alive.append(states_alive(2, 19, 32))
        files.append(len(list(tmp_path.glob("*/*.safetensors"))))

    monkeypatch.setattr(HiddenStates, "put", spy)
    method = replace(METHODS["SparseGPT"], sequential=sequential)
    model = loading.load(folders["deep"])
    for states in ("device", "disk"):
        given = {"windows": tiny.ids(17, 19), "batch_size": 2, "by_role": by_role}
        pruner.prune_(model, method, HALF, **given, **of_scratch(cast(States, states), tmp_path))
        assert len(alive) == 3 * 9  # a batch a block
        if states == "device":
            assert max(alive) >= 9 and max(files) == 0
        else:  # what a block read, what it gives, and what comes to `put`
            assert max(alive) <= 3 and max(files) == (2 * 9 if by_role and not sequential else 9 + 1)
        alive.clear()
        files.clear()
    assert not list(tmp_path.iterdir())


def test_states_keep_their_dtype_and_are_forgotten(tmp_path: Path) -> None:
    hidden = torch.randn(2, 3, 4).bfloat16().transpose(0, 1)
    for kind in PLACES:
        states = HiddenStates(kind, torch.device("cpu"), tmp_path if kind == "disk" else None)
        states.put(0, 1, hidden)
        got = states.get(0, 1)
        assert torch.equal(got, hidden) and got.dtype == hidden.dtype
        assert len(list(tmp_path.iterdir())) == (kind == "disk")
        states.drop(0, 1)
        with pytest.raises(KeyError):
            states.get(0, 1)
    assert not list(tmp_path.iterdir())


# --- what is refused, and what is left behind ----------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [1, 5, 9])
def test_a_failure_in_the_middle_leaves_no_states_and_no_hooks(
    fails_at: int, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, prune_block_ = [], pruner.prune_block_

    def failing(*arguments: Any, **options: Any) -> list[str]:
        calls.append(len(list(tmp_path.glob("*/*.safetensors"))))
        if len(calls) == fails_at:
            raise RuntimeError("out of memory")
        return prune_block_(*arguments, **options)

    monkeypatch.setattr(pruner, "prune_block_", failing)
    model = loading.load(folders["deep"])
    with pytest.raises(RuntimeError, match="out of memory"):
        given: dict[str, Any] = {"windows": tiny.ids(7, 20), "states": "disk", "by_role": True, "scratch": tmp_path}
        pruner.prune_(model, METHODS["SparseGPT"], HALF, **given)
    assert calls[-1] == 2 and not list(tmp_path.iterdir())
    assert not any(module._forward_pre_hooks for module in model.network.modules())


def spoil(model: LanguageModel, block: int, role: str) -> None:
    """Let what a layer reads overflow, with finite weights."""
    layer = next(each for each in model.layers if (each.block, each.role) == (block, role))
    with torch.no_grad():
        layer.module.weight.fill_(3e38)


@pytest.mark.parametrize("where", [(0, "v"), (1, "gate"), (0, "down")])
@pytest.mark.parametrize("name", ["Wanda", "SparseGPT"])
def test_inputs_that_are_not_finite_are_refused_in_the_same_words(
    name: str, where: tuple[int, str], folders: dict[str, Path]
) -> None:
    messages = []
    for by_role in (False, True):
        model = loading.load(folders["deep"])
        spoil(model, *where)
        with pytest.raises(InputError, match=r"inputs of model\.layers\.\S+ must be finite") as raised:
            pruner.prune_(model, METHODS[name], HALF, windows=tiny.ids(5, 20), by_role=by_role)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


REFUSED: dict[str, tuple[Method, Target, Tensor | None]] = {
    "no windows": (METHODS["SparseGPT"], HALF, None),
    "short windows": (METHODS["Wanda"], HALF, tiny.ids(3, 1)),
    "long windows": (METHODS["SparseGPT"], HALF, tiny.ids(3, 65)),
    "no sample": (METHODS["Wanda"], HALF, tiny.ids(0, 20)),
    "pattern": (METHODS["SparseGPT"], pattern_target("3:7"), tiny.ids(3, 20)),
    "other layers": (METHODS["Wanda"], Target(0.5, removed={"a": 1}), tiny.ids(3, 20)),
    "by head": (Method("sparsegpt", weighting=Weighting("sinks_up", level="head")), HALF, tiny.ids(3, 20)),
    "damping": (replace(METHODS["SparseGPT"], damping=-1.0), HALF, tiny.ids(3, 20)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_default_refuses_is_refused_in_the_same_words(what: str, folders: dict[str, Path], tmp_path: Path) -> None:
    method, target, windows = REFUSED[what]
    with pytest.raises(InputError) as expected:
        pruner.prune_(loading.load(folders["deep"]), method, target, windows=windows)
    with pytest.raises(InputError) as got:
        given: dict[str, Any] = {"windows": windows, "states": "disk", "scratch": tmp_path}
        pruner.prune_(loading.load(folders["deep"]), method, target, **given)
    assert str(got.value) == str(expected.value) and not list(tmp_path.iterdir())


def test_noise_for_an_autoregressive_model_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="noised calibration must use a diffusion model"):
        pruner.prune_(loading.load(folders["ar"]), METHODS["DWANDA"], HALF, windows=tiny.ids(3, 20))


def test_places_that_are_not_there_are_refused_before_any_work(folders: dict[str, Path], tmp_path: Path) -> None:
    model = loading.load(folders["deep"])
    before = slow.state_of(model)
    with pytest.raises(InputError, match=r"states must be one of \('device', 'cpu', 'disk'\), got 'tape'"):
        # the checker of shapes in tests would refuse it first
        cast(Any, pruner.prune_).__wrapped__(model, METHODS["Wanda"], HALF, windows=tiny.ids(3, 20), states="tape")
    with pytest.raises(InputError, match=r"scratch must be a folder, got .*nowhere: make it"):
        given: dict[str, Any] = {"states": "disk", "scratch": tmp_path / "nowhere"}
        pruner.prune_(model, METHODS["Wanda"], HALF, windows=tiny.ids(3, 20), **given)
    assert slow.same_state(model, before)
