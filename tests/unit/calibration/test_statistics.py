"""Statistics of what layers read: against transformers' own pass and slow sums, in both orders, whatever the batch size.

Also with token weights by layer and by head, and with weights that the same forward pass decides.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lib.calibration import one_shot
from lib.calibration import reads as calibration_reads
from lib.calibration.reads import READS, statistics_of
from lib.calibration.statistics import CalibrationSet, stream
from lib.calibration.sums import InputStatistics
from lib.core.errors import InputError
from lib.models import loading
from lib.models.language_model import LanguageModel, Role
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
    return loading.load(folder)


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
    """Compare with slow sums, to a share of the largest of each kind; one group of rows need not be named."""
    for name, given in expected.items():
        values = given[None] if name != "products" and given.dim() == 1 else given
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


# --- weights by layer and by head ----------------------------------------------------------------------------------------


def drawn_weights(*shape: int, seed: int = 0) -> Tensor:
    """ω of very different size for every layer (and head), some 0."""
    weight = 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).pow(3)
    return weight.masked_fill(weight < 0.02, 0.0)


@pytest.mark.parametrize("sequential", [True, False])
def test_each_layer_uses_its_own_weights(model: LanguageModel, sequential: bool) -> None:
    """Batches of 3 and 2 samples: the weights are cut along the samples, not along the layers (3 of them too)."""
    ids, weight = tiny.ids(SAMPLES, LENGTH), drawn_weights(BLOCKS, SAMPLES, LENGTH)
    inputs = slow.captured(model, ids)
    found = collected(model, CalibrationSet(ids, weight), hessian=True, sequential=sequential, batch_size=3)
    for block, statistics in found.items():
        for role, got in statistics.items():
            equal(got, slow.statistics(inputs[reads(model, role, block)], weight[block]))
        other = slow.statistics(inputs[reads(model, "o", block)], weight[(block + 1) % BLOCKS], products=False)
        assert not torch.allclose(statistics["o"].squares[0].double(), other["squares"], rtol=0.05)


def head_inputs(model: LanguageModel, weight: Tensor, ids: Tensor, block: int, role: Role) -> dict[str, Tensor]:
    kv_heads = model.network.config.num_key_value_heads
    inputs = slow.captured(model, ids)[reads(model, role, block)]
    return slow.statistics_by_head(inputs, weight[block], role, kv_heads=kv_heads)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["own keys", "grouped queries"])
def test_each_head_uses_its_own_weights(tmp_path: Path, heads: tuple[int, int]) -> None:
    """`o` by feature, `v` by key-value head, all others with the mean over heads: one sum a token in double precision."""
    model = tiny.model(tmp_path, causal=False, kv_heads=heads[1])
    ids, weight = tiny.ids(SAMPLES, LENGTH), drawn_weights(2, SAMPLES, 4, LENGTH)
    found = collected(model, CalibrationSet(ids, weight), batch_size=2)
    for block, statistics in found.items():
        assert set(statistics) == {"q", "v", "o", "gate", "down"}
        assert len(statistics["v"].squares) == heads[1]
        for role, got in statistics.items():
            equal(got, head_inputs(model, weight, ids, block, role))
            assert torch.equal(statistics_of(statistics, role).squares, got.squares)
        assert statistics_of(statistics, "k") is statistics["q"]
        assert statistics_of(statistics, "up") is statistics["gate"]
    got = found[0]["v"].squares
    assert not torch.allclose(got[0], got[1], rtol=0.05)
    by_mean = collected(model, CalibrationSet(ids, weight.mean(2)))[0]
    assert not torch.allclose(found[0]["o"].squares, by_mean["o"].squares, rtol=0.05)


def test_one_key_value_head_uses_the_mean_of_all_query_heads(tmp_path: Path) -> None:
    model = tiny.model(tmp_path, causal=False, kv_heads=1)
    ids, weight = tiny.ids(SAMPLES, LENGTH), drawn_weights(2, SAMPLES, 4, LENGTH)
    found = collected(model, CalibrationSet(ids, weight))
    for block in (0, 1):
        for role in ("v", "o", "q"):
            equal(found[block][role], head_inputs(model, weight, ids, block, role))


def test_weights_that_agree_over_heads_and_layers_are_weights_by_token(small: LanguageModel) -> None:
    ids, weight = tiny.ids(SAMPLES, LENGTH), token_weights()
    plain = collected(small, CalibrationSet(ids, weight))
    for shape in ((BLOCKS, SAMPLES, LENGTH), (BLOCKS, SAMPLES, 4, LENGTH)):
        given = weight[None].expand(shape) if len(shape) == 3 else weight[None, :, None].expand(shape)
        found = collected(small, CalibrationSet(ids, given))
        for block in range(BLOCKS):
            for role in plain[block]:
                torch.testing.assert_close(found[block][role].squares, plain[block][role].squares, atol=0, rtol=1e-5)
            if len(shape) == 4:
                torch.testing.assert_close(found[block]["v"].norms, plain[block]["q"].norms.expand(2, -1), atol=0, rtol=1e-5)


# --- weights that the same pass decides ----------------------------------------------------------------------------------


def of_mass(mass: Tensor) -> Tensor:
    """Weights by token that depend on every layer and head of the masses."""
    by = torch.arange(1.0, mass.shape[0] * mass.shape[2] + 1).view(mass.shape[0], 1, mass.shape[2], 1)
    return (by * mass).sum((0, 2)) / by.sum()


WEIGH: dict[str, Callable[[Tensor], Tensor]] = {
    "token": of_mass,
    "layer": lambda mass: mass.mean(2) * torch.arange(1.0, BLOCKS + 1)[:, None, None],
    "head": lambda mass: mass**2,
}


@pytest.mark.parametrize("budget", [0, 2**30], ids=["two passes", "one pass"])
@pytest.mark.parametrize("level", WEIGH)
def test_statistics_of_the_pass_that_decides_the_weights(model: LanguageModel, level: str, budget: int) -> None:
    """Weights from eager attention, inputs from transformers' own pass, sums token by token."""
    ids = tiny.ids(SAMPLES, LENGTH)
    found = one_shot.one_shot_statistics(model, ids, WEIGH[level], batch_size=2, memory_budget=budget)
    inputs, weight = slow.captured(model, ids), WEIGH[level](slow.masses(model, ids))
    assert len(found) == BLOCKS
    for block, statistics in enumerate(found):
        for role, got in statistics.items():
            read = inputs[reads(model, role, block)]
            if level == "head":
                expected = slow.statistics_by_head(read, weight[block], role, kv_heads=2)
            else:
                expected = slow.statistics(read, weight[block] if level == "layer" else weight, products=False)
            equal(got, expected)


class Forwards:
    """Counts passes through a network: whole ones, and those that a hook stopped at the first block."""

    def __init__(self, model: LanguageModel) -> None:
        body = cast(Any, model.network.get_decoder())
        self.begun = self.through = 0
        self.handles = [
            body.register_forward_pre_hook(lambda *_: setattr(self, "begun", self.begun + 1)),
            body.layers[-1].register_forward_hook(lambda *_: setattr(self, "through", self.through + 1)),
        ]

    def __enter__(self) -> "Forwards":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("level", WEIGH)
def test_a_batch_takes_one_pass_or_two_when_memory_is_short(small: LanguageModel, level: str) -> None:
    ids, found = tiny.ids(7, LENGTH), []
    need = one_shot.input_bytes(small, samples=2, positions=LENGTH)
    # in pairs; one by one; and twice in pairs, because not even one fits
    for budget, passes in ((need, 4), (need - 1, 7), (need // 2 - 1, 8)):
        with Forwards(small) as count:
            found.append(one_shot.one_shot_statistics(small, ids, WEIGH[level], batch_size=2, memory_budget=budget))
        assert count.begun == count.through == passes
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            for role in first:
                torch.testing.assert_close(second[role].squares, first[role].squares, atol=0, rtol=1e-5)
                torch.testing.assert_close(second[role].norms, first[role].norms, atol=0, rtol=1e-5)
                assert second[role].samples == first[role].samples == 7


def test_inputs_of_all_layers_are_counted_once_and_in_their_dtype(small: LanguageModel, tmp_path: Path) -> None:
    """q (that k and v share), o, gate (that up shares): 32 features each; down 40."""
    assert one_shot.input_bytes(small, samples=3, positions=5) == BLOCKS * (32 + 32 + 32 + 40) * 3 * 5 * 4
    half = loading.load(tiny.folder(tmp_path, causal=False), dtype=torch.bfloat16)
    assert one_shot.input_bytes(half, samples=1, positions=1) == 2 * 136 * 2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_of_the_fused_path_changes_only_the_rounding(model: LanguageModel, batch_size: int) -> None:
    ids = tiny.ids(SAMPLES, LENGTH)
    whole = one_shot.one_shot_statistics(model, ids, WEIGH["head"], batch_size=SAMPLES)
    parts = one_shot.one_shot_statistics(model, ids, WEIGH["head"], batch_size=batch_size)
    for first, second in zip(whole, parts, strict=True):
        for role, got in second.items():
            equal(got, {name: getattr(first[role], name).double() for name in ("squares", "norms")})


@pytest.mark.parametrize("sequential", [True, False])
def test_streaming_passes_the_first_block_once_a_batch_and_again_only_when_it_changed(
    small: LanguageModel, sequential: bool
) -> None:
    """The last block is never read again, and no pass goes through the whole network at once.

    A pass that only collects ends at the last input that a block reads; the first block is begun once more, for its inputs.
    """
    begun, ended = [0] * BLOCKS, [0] * BLOCKS
    blocks = cast(Any, small.network.get_decoder()).layers

    def count(counts: list[int], index: int) -> Callable[..., None]:
        return lambda *_: counts.__setitem__(index, counts[index] + 1)

    handles = [block.register_forward_pre_hook(count(begun, index)) for index, block in enumerate(blocks)]
    handles += [block.register_forward_hook(count(ended, index)) for index, block in enumerate(blocks)]
    with Forwards(small) as passes:
        stream(small, CalibrationSet(tiny.ids(5, LENGTH)), lambda *_: None, sequential=sequential, batch_size=2)
    for handle in handles:
        handle.remove()
    assert passes.begun == 3 and begun == ([3 + 6, 6, 3] if sequential else [3 + 3, 3, 3]) and ended == [3, 3, 0]


def test_statistics_of_the_dense_model_are_those_of_one_shot_streaming(small: LanguageModel) -> None:
    given = CalibrationSet(tiny.ids(SAMPLES, LENGTH), token_weights())
    dense = one_shot.dense_statistics(small, given, hessian=True, batch_size=2)
    streamed = collected(small, given, hessian=True, sequential=False, batch_size=2)
    for block, statistics in enumerate(dense):
        for role, got in statistics.items():
            assert torch.equal(got.squares, streamed[block][role].squares)
            assert torch.equal(got.hessian(), streamed[block][role].hessian())
    assert one_shot.dense_statistics(small, given)[0]["q"].products is None


@pytest.mark.parametrize("batch_size", [2, 3])
def test_weights_that_share_a_pass_have_the_statistics_of_their_own(model: LanguageModel, batch_size: int) -> None:
    """Against sums token by token, each weight by itself: none, by token, by layer and by head."""
    ids = tiny.ids(SAMPLES, LENGTH)
    inputs, mass = slow.captured(model, ids), slow.masses(model, ids)
    weights = {"none": None} | {level: weigh(mass) for level, weigh in WEIGH.items()}
    with Forwards(model) as count:
        shared = one_shot.shared_statistics(model, ids, list(weights.values()), batch_size=batch_size)
    assert count.begun == count.through == -(-SAMPLES // batch_size)
    for (level, weight), found in zip(weights.items(), shared, strict=True):
        assert [set(found[0]), len(found)] == [{"q", "o", "gate", "down"} | ({"v"} if level == "head" else set()), BLOCKS]
        for block, statistics in enumerate(found):
            for role, got in statistics.items():
                read = inputs[reads(model, role, block)]
                assert got.samples == SAMPLES
                if level == "head":
                    expected = slow.statistics_by_head(read, cast(Tensor, weight)[block], role, kv_heads=2)
                else:
                    of_block = cast(Tensor, weight)[block] if level == "layer" else weight
                    omega = torch.ones(ids.shape) if of_block is None else of_block
                    expected = slow.statistics(read, omega, products=False)
                equal(got, expected)


def test_weights_of_another_model_are_refused(small: LanguageModel) -> None:
    with pytest.raises(InputError, match="token weights must be for"):
        one_shot.shared_statistics(small, tiny.ids(2, LENGTH), [None, torch.ones(BLOCKS + 1, 2, LENGTH)])


def test_the_usual_budget_is_small_beside_the_model(small: LanguageModel) -> None:
    assert one_shot.default_budget(small) == one_shot.LEAST_BUDGET
    wide = dataclasses.replace(small, layers=small.layers * 20_000)
    bytes_of_all = sum(4 * layer.module.weight.numel() for layer in small.layers) * 20_000
    assert one_shot.default_budget(wide) == bytes_of_all // 2


class Sizes(TorchDispatchMode):
    """Remembers the shape of everything that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for part in made if isinstance(made, tuple | list) else (made,):
            if isinstance(part, Tensor):
                self.shapes.add(tuple(part.shape))
        return made


@pytest.mark.parametrize("causal", [False, True])
def test_no_square_of_positions_is_ever_made(tmp_path: Path, causal: bool) -> None:
    """A length that is no size of the network, and that several chunks of queries are needed for."""
    length = 300
    long, ids = tiny.model(tmp_path, causal=causal, max_position_embeddings=512), tiny.ids(2, length)
    runs: tuple[Callable[[], object], ...] = (
        lambda: one_shot.one_shot_statistics(long, ids, lambda mass: mass),
        lambda: one_shot.one_shot_statistics(long, ids, lambda mass: mass, memory_budget=0),
        lambda: one_shot.dense_statistics(long, CalibrationSet(ids, torch.ones(2, length)), hessian=True),
    )
    for run in runs:
        with Sizes() as sizes:
            run()
        assert (2, length, 32) in sizes.shapes  # it does see what the layers read
        assert not [shape for shape in sizes.shapes if sum(side >= length for side in shape) > 1]


# --- the two orders ------------------------------------------------------------------------------------------------------


def test_sequential_statistics_are_those_behind_the_changed_blocks(folder: Path) -> None:
    model, other, ids = loading.load(folder), loading.load(folder), tiny.ids(SAMPLES, LENGTH)
    found = collected(model, CalibrationSet(ids), lambda block: halved(model, block), hessian=True, batch_size=2)
    for block in range(BLOCKS):  # `other` is now changed in all blocks before this one
        inputs = slow.captured(other, ids)
        for role, got in found[block].items():
            equal(got, slow.statistics(inputs[reads(other, role, block)]))
        halved(other, block)


def test_one_shot_statistics_are_those_of_the_dense_model(folder: Path) -> None:
    model, dense, ids = loading.load(folder), loading.load(folder), tiny.ids(SAMPLES, LENGTH)
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
        model = loading.load(folder)
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
        model = loading.load(folder)
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
        torch.testing.assert_close(whole.input_norm("sum_of_norms")[0].double(), expected["norms"], atol=0, rtol=1e-5)
        torch.testing.assert_close(
            whole.input_norm("root_mean_square")[0].double(), (expected["squares"] / 4).sqrt(), atol=0, rtol=1e-5
        )
        torch.testing.assert_close(whole.hessian().double(), expected["products"] / 2, atol=1e-4, rtol=1e-5)
        ratio = whole.input_norm("sum_of_norms") / whole.input_norm("root_mean_square")
        assert ratio.max() / ratio.min() > 1.02  # another ranking, not only another unit


def test_sums_are_kept_in_single_precision() -> None:
    """In bfloat16 a sum of ones stops at 256."""
    statistics = InputStatistics(2, hessian=True, device=torch.device("cpu"))
    for _ in range(300):
        statistics.add(torch.ones(1, 1, 2, dtype=torch.bfloat16), None)
    assert statistics.squares.tolist() == [[300.0, 300.0]] and statistics.norms.tolist() == [[300.0, 300.0]]
    assert statistics.hessian().tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert statistics.squares.dtype == torch.float32


def test_a_bfloat16_model_is_read_in_its_dtype(tmp_path: Path) -> None:
    model = loading.load(tiny.folder(tmp_path, causal=False), dtype=torch.bfloat16)
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

    monkeypatch.setattr(calibration_reads, "InputStatistics", Counted)
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
    with pytest.raises(
        InputError, match="token weights must be finite, not negative and not all 0, got others: check the sink scores"
    ):
        CalibrationSet(tiny.ids(2, LENGTH), weight)


def test_token_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(InputError, match="not all 0"):
        CalibrationSet(tiny.ids(2, LENGTH), torch.zeros(2, LENGTH))


@pytest.mark.parametrize(
    "shape", [(1, 9), (2, 8), (2, 1), (9,), (3, 1, 9), (3, 9, 2), (3, 4, 2, 9), (3, 2, 9, 4), (1, 3, 2, 4, 9)]
)
def test_token_weights_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    """Also those that would broadcast. The rule is asked directly: under test the constructor's types catch some first."""
    given = SimpleNamespace(input_ids=tiny.ids(2, LENGTH), token_weight=torch.ones(shape))
    with pytest.raises(InputError, match=r"the shape of the ids, \(2, 9\), or one more by layer, got \(.*\): give one a token"):
        CalibrationSet.__post_init__(cast(Any, given))


@pytest.mark.parametrize("layers", [1, BLOCKS + 1])
def test_token_weights_for_another_number_of_layers_are_refused_before_any_visit(small: LanguageModel, layers: int) -> None:
    visited: list[int] = []
    with pytest.raises(InputError, match="token weights"):
        collected(small, CalibrationSet(tiny.ids(2, LENGTH), torch.ones(layers, 2, LENGTH)), visited.append)
    assert not visited


def test_token_weights_for_another_number_of_heads_are_refused(small: LanguageModel) -> None:
    with pytest.raises(InputError, match="token weights"):
        collected(small, CalibrationSet(tiny.ids(2, LENGTH), torch.ones(BLOCKS, 2, 3, LENGTH)))


def test_weights_by_head_do_not_go_with_a_hessian(small: LanguageModel) -> None:
    given = CalibrationSet(tiny.ids(2, LENGTH), torch.ones(BLOCKS, 2, 4, LENGTH))
    assert given.by_head and not CalibrationSet(given.input_ids, torch.ones(BLOCKS, 2, LENGTH)).by_head
    with pytest.raises(InputError, match="token weights by head must go with norms, got a Hessian: use weights by layer"):
        collected(small, given, lambda block: pytest.fail("visited"), hessian=True)


def test_a_hessian_that_was_not_collected_is_refused(small: LanguageModel) -> None:
    found = collected(small, CalibrationSet(tiny.ids(2, LENGTH)))
    assert found[0]["q"].products is None
    with pytest.raises(InputError, match="a Hessian must be collected, got norms only: ask for hessian=True"):
        found[0]["q"].hessian()
