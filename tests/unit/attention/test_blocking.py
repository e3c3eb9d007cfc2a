"""Blocked keys: against transformers' eager attention under a mask written by hand, and the rules that choose them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lib.attention import blocking, masses, sinks
from lib.attention.blocking import KeyBlocker
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.models.language_model import LanguageModel, network_body
from lib.models.layers import attention
from tests import tiny
from tests.unit import slow_variance as slow

ATOL = 2e-5  # float32 in another order of summation, hidden states up to about 4
LAYERS, HEADS, ROWS, KEYS = 2, 4, 3, 11


@pytest.fixture(scope="module", params=[True, False], ids=["causal", "bidirectional"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("model"), causal=request.param, kv_heads=2)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("causal"), causal=True, kv_heads=2)


def hidden(model: LanguageModel, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        return network_body(model)(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def slow_mask(blocked: Tensor, *, is_causal: bool, real: Tensor | None = None) -> Tensor:
    """The additive mask `[batch, head, query, key]`, one entry at a time."""
    batch, heads, keys = blocked.shape
    mask = torch.full((batch, heads, keys, keys), float("-inf"))
    for row in range(batch):
        for head in range(heads):
            for query in range(keys):
                last = query + 1 if is_causal else keys
                seen = [key for key in range(last) if not blocked[row, head, key] and (real is None or bool(real[row, key]))]
                mask[row, head, query, seen or [query]] = 0.0
    return mask


@contextmanager
def layer_masks(model: LanguageModel, masks: Sequence[Tensor | None]) -> Iterator[None]:
    """Give single layers their own mask, whatever the network made."""

    def swap(mask: Tensor) -> Callable:
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask})

    layers = cast(Any, model.network.get_decoder()).layers
    hooks = [
        layer.self_attn.register_forward_pre_hook(swap(mask), with_kwargs=True)
        for layer, mask in zip(layers, masks, strict=True)
        if mask is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def eager(model: LanguageModel, ids: Tensor, masks: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Hidden states, and maps `[layer, batch, head, query, key]`, of transformers' eager path under the masks."""
    model.network.set_attn_implementation("eager")
    try:
        with torch.inference_mode(), layer_masks(model, masks):
            out = network_body(model)(input_ids=ids, output_attentions=True, use_cache=False)
    finally:
        model.network.set_attn_implementation(attention.NAME)
    return out.last_hidden_state, torch.stack(out.attentions)


def drawn_keys(share: float, *, seed: int = 0, first: bool = False) -> Tensor:
    """Keys to block, other ones in every layer, row and head; `first` blocks the first key of the even heads as well."""
    blocked = torch.rand(LAYERS, ROWS, HEADS, KEYS, generator=torch.Generator().manual_seed(seed)) < share
    blocked[..., 0] = False
    blocked[:, :, ::2, 0] = first
    return blocked


# --- the network under a block -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True], ids=["first key free", "first key blocked"])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_blocking_equals_eager_attention_under_a_mask_written_by_hand(model: LanguageModel, share: float, first: bool) -> None:
    ids, blocked = tiny.ids(ROWS, KEYS), drawn_keys(share, first=first)
    with masses.blocking(model, lambda layer, mass: blocked[layer]):
        got = hidden(model, ids)
    expected, maps = eager(model, ids, [slow_mask(layer, is_causal=model.is_causal) for layer in blocked])
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
    assert (got - hidden(model, ids)).abs().max() > 0.1  # the block does something
    # nobody looks at a blocked key, but for a query that has nothing else
    received = maps * blocked[:, :, :, None, :]
    alone = torch.eye(KEYS, dtype=torch.bool)
    assert (received[..., ~alone] == 0).all()
    # such are the queries of a causal model up to the first free key
    assert float(received[..., alone].sum()) == (int(blocked.int().cumprod(-1).sum()) if model.is_causal else 0)


def test_every_axis_of_the_block_counts(model: LanguageModel) -> None:
    """The same keys given to other layers, rows or heads, or to key heads instead of query heads, give another result."""
    ids, blocked = tiny.ids(1, KEYS).expand(ROWS, -1), drawn_keys(0.4, seed=1)
    expected, _ = eager(model, ids, [slow_mask(layer, is_causal=model.is_causal) for layer in blocked])
    wrong = [blocked.flip(0), blocked.roll(1, 1), blocked.roll(1, 2), blocked[:, :, [0, 0, 2, 2]], blocked.flip(3)]
    for other in wrong:
        with masses.blocking(model, lambda layer, mass, other=other: other[layer]):
            assert (hidden(model, ids) - expected).abs().max() > 0.1


def test_a_query_without_any_key_sees_itself(causal: LanguageModel) -> None:
    blocked = torch.zeros(LAYERS, 1, HEADS, KEYS, dtype=torch.bool)
    blocked[..., :3] = True  # queries 0, 1 and 2 of every head are left with nothing
    ids = tiny.ids(1, KEYS)
    with masses.blocking(causal, lambda layer, mass: blocked[layer]):
        got = hidden(causal, ids)
    assert torch.isfinite(got).all()
    for position in range(3):  # such a query reads its own token alone, as a text of one token does
        torch.testing.assert_close(got[:, position], hidden(causal, ids[:, [position]])[:, 0], atol=ATOL, rtol=0)
    allowed = masses.allowed_keys(None, blocked[0], queries=KEYS, is_causal=True)
    assert torch.equal(allowed, slow_mask(blocked[0], is_causal=True) == 0)


def test_blocking_together_with_padding(model: LanguageModel) -> None:
    ids, blocked = tiny.ids(ROWS, KEYS), drawn_keys(0.3, seed=2, first=True)
    real = torch.ones_like(ids)
    real[1, 7:], real[2, 4:] = 0, 0
    with masses.blocking(model, lambda layer, mass: blocked[layer]):
        got = hidden(model, ids, real)
    masks: list[Tensor | None] = [slow_mask(layer, is_causal=model.is_causal, real=real) for layer in blocked]
    torch.testing.assert_close(got[real.bool()], eager(model, ids, masks)[0][real.bool()], atol=ATOL, rtol=0)


def test_blocking_nothing_changes_nothing(model: LanguageModel) -> None:
    ids = tiny.ids(ROWS, KEYS)
    plain = hidden(model, ids)
    with masses.blocking(model, lambda layer, mass: None):
        assert torch.equal(hidden(model, ids), plain)
    with masses.blocking(model, lambda layer, mass: torch.zeros_like(mass, dtype=torch.bool)):
        torch.testing.assert_close(hidden(model, ids), plain, atol=ATOL, rtol=0)


def test_the_network_is_as_before_after_the_context_and_after_an_error(model: LanguageModel) -> None:
    ids, blocked = tiny.ids(ROWS, KEYS), drawn_keys(0.5)
    plain = hidden(model, ids)
    with masses.blocking(model, lambda layer, mass: blocked[layer]):
        assert model.network.config._attn_implementation == masses.NAME
        hidden(model, ids)
    assert torch.equal(hidden(model, ids), plain)

    def fail(layer: int, mass: Tensor) -> Tensor:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), masses.blocking(model, fail):
        hidden(model, ids)
    assert model.network.config._attn_implementation == attention.NAME
    assert masses._CHOOSER.get() is None
    assert torch.equal(hidden(model, ids), plain)


@pytest.mark.parametrize("recorder_outside", [True, False])
def test_recorded_masses_are_those_without_the_block_of_their_own_layer(model: LanguageModel, recorder_outside: bool) -> None:
    ids, blocked = tiny.ids(ROWS, KEYS), drawn_keys(0.4, seed=3)
    given: dict[int, Tensor] = {}

    def choose(layer: int, mass: Tensor) -> Tensor:
        given[layer] = mass
        return blocked[layer]

    if recorder_outside:
        with masses.record(model) as recorder, masses.blocking(model, choose):
            hidden(model, ids)
            mass = recorder.pop()[:, :, :, 0]
    else:
        with masses.blocking(model, choose), masses.record(model) as recorder:
            hidden(model, ids)
            mass = recorder.pop()[:, :, :, 0]
    assert model.network.config._attn_implementation == attention.NAME
    first = eager(model, ids, [None, None])[1][0].sum(2)
    # what layer 1 sees depends on the block of layer 0, but its own is not there yet
    second = eager(model, ids, [slow_mask(blocked[0], is_causal=model.is_causal), None])[1][1].sum(2)
    torch.testing.assert_close(mass, torch.stack([first, second]), atol=ATOL, rtol=0)
    torch.testing.assert_close(torch.stack([given[0], given[1]]), mass, atol=ATOL, rtol=0)
    assert (second - eager(model, ids, [None, None])[1][1].sum(2)).abs().max() > 0.1


def test_a_pass_with_a_cache_is_refused(causal: LanguageModel) -> None:
    ids = tiny.ids(1, 6)
    with torch.inference_mode(), masses.blocking(causal, lambda layer, mass: mass > 1):
        past = causal.network(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(InputError, match="got 1 queries, 7 keys, no mask: no cache"):
            causal.network(input_ids=ids[:, -1:], past_key_values=past, use_cache=True)


def test_an_additive_mask_is_refused(model: LanguageModel) -> None:
    additive = torch.zeros(ROWS, 1, KEYS, KEYS)
    with (
        pytest.raises(InputError, match=r"boolean masks, got 11 queries, 11 keys, torch\.float32"),
        masses.blocking(model, lambda layer, mass: mass > 1),
        layer_masks(model, [additive, additive]),
    ):
        hidden(model, tiny.ids(ROWS, KEYS))


# --- choosing keys -------------------------------------------------------------------------------------------------------


def largest(k: int) -> Callable[[Tensor, torch.Generator], Tensor]:
    return lambda mass, generator: blocking.largest_keys(mass, k=k)


def slow_largest(mass: Tensor, k: int) -> Tensor:
    """The k largest keys of every row and head, by counting who beats whom."""
    marked = torch.zeros(mass.shape, dtype=torch.bool)
    for row in range(mass.shape[0]):
        for head in range(mass.shape[1]):
            marked[row, head, list(slow.top_k(mass[row, head].tolist(), k))] = True
    return marked


def test_the_same_pass_blocks_its_own_largest_keys_and_counts_them(model: LanguageModel) -> None:
    """Layer by layer by hand: read, choose, block, read the next layer under that block."""
    ids, k = tiny.ids(ROWS, KEYS), 2
    blocker = KeyBlocker(largest(k), generator(0))
    with masses.blocking(model, blocker):
        got = hidden(model, ids)
    masks: list[Tensor | None] = [None, None]
    removed = []
    for layer in range(LAYERS):
        mass = eager(model, ids, masks)[1][layer].sum(2)
        chosen = slow_largest(mass, k)
        removed.append(float(mass[chosen].sum()) / (ROWS * HEADS * KEYS))  # each query gives 1
        masks[layer] = slow_mask(chosen, is_causal=model.is_causal)
    torch.testing.assert_close(got, eager(model, ids, masks)[0], atol=ATOL, rtol=0)
    assert blocker.keys_per_head == k
    assert blocker.removed_share == pytest.approx(sum(removed) / LAYERS, abs=1e-5)
    assert abs(removed[0] - removed[1]) > 0.01


def test_counts_are_averages_over_heads_and_rows_of_passes_of_different_size() -> None:
    """Keys above the mean: their number differs between heads, and a large batch counts more than a small one."""
    stream = torch.Generator().manual_seed(4)
    passes = [4 * torch.rand(3, 2, 6, generator=stream).softmax(-1), 9 * torch.rand(1, 2, 9, generator=stream).pow(3)]
    passes[1] *= 9 / passes[1].sum(-1, keepdim=True)
    passes[0] *= 6 / passes[0].sum(-1, keepdim=True)
    blocker = KeyBlocker(lambda mass, generator: mass > 1.0, generator(0))
    for mass in passes:
        blocker(0, mass)
    heads = [head.tolist() for mass in passes for row in mass for head in row]
    assert blocker.keys_per_head == pytest.approx(slow.average([sum(value > 1 for value in head) for head in heads]))
    shares = [sum(value for value in head if value > 1) / sum(head) for head in heads]
    assert blocker.removed_share == pytest.approx(slow.average(shares), abs=1e-6)


def test_without_any_pass_the_counts_are_zero() -> None:
    blocker = KeyBlocker(largest(1), generator(0), step_before=True)
    assert blocker(0, torch.ones(1, 2, 4)) is None  # the first pass blocks nothing and does not count
    assert (blocker.keys_per_head, blocker.removed_share) == (0.0, 0.0)


def test_the_step_before_decides_layer_by_layer_until_reset() -> None:
    """Six keys at the first step, eight at the second: the two new ones stay free, though the last one is the largest."""
    first = torch.stack([torch.eye(6)[2] + 0.1, torch.eye(6)[4] + 0.1])[:, None, None]  # [layer, row, head, key]
    second = torch.stack([torch.eye(8)[7] + 0.1, torch.eye(8)[0] + 0.1])[:, None, None]
    blocker = KeyBlocker(largest(1), generator(0), step_before=True)
    assert [blocker(layer, first[layer]) for layer in (0, 1)] == [None, None]
    chosen = [cast(Tensor, blocker(layer, second[layer])) for layer in (0, 1)]
    assert [keys[0, 0].nonzero().flatten().tolist() for keys in chosen] == [[2], [4]]
    assert all(keys.shape == (1, 1, 8) for keys in chosen)
    # what is removed is the present mass of those keys, 0.1 of 1.8, and not that of the step before
    assert blocker.removed_share == pytest.approx(0.1 / 1.8)
    third = cast(Tensor, blocker(0, torch.ones(1, 1, 8)))
    assert third[0, 0].nonzero().flatten().tolist() == [7]
    blocker.reset()
    assert blocker(0, second[0]) is None
    assert blocker.keys_per_head == 1.0


def test_the_step_before_in_a_network_that_reads_a_growing_text(causal: LanguageModel) -> None:
    ids = tiny.ids(1, 9)
    blocker = KeyBlocker(largest(2), generator(0), step_before=True)
    with masses.blocking(causal, blocker):
        first = hidden(causal, ids[:, :7])
        got = hidden(causal, ids)
    assert torch.equal(first, hidden(causal, ids[:, :7]))
    mass = eager(causal, ids[:, :7], [None, None])[1].sum(3)
    padded = [torch.nn.functional.pad(slow_largest(layer, 2), (0, 2)) for layer in mass]
    expected, _ = eager(causal, ids, [slow_mask(keys, is_causal=True) for keys in padded])
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)


# --- rules ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 6, 9])
def test_largest_and_random_keys_are_exactly_k_or_all(k: int) -> None:
    mass = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(5))
    assert torch.equal(blocking.largest_keys(mass, k=k), slow_largest(mass, k))
    drawn = blocking.random_keys(mass, k=k, generator=generator(0))
    assert (drawn.sum(-1) == min(k, 6)).all()
    if k < 6:
        assert len({tuple(row) for row in drawn.flatten(0, 1).tolist()}) > 1  # anew in every head
    assert torch.equal(drawn, blocking.random_keys(mass, k=k, generator=generator(0)))
    assert k > 5 or not torch.equal(drawn, blocking.random_keys(mass, k=k, generator=generator(1)))


def test_random_keys_are_drawn_evenly_whatever_their_mass() -> None:
    """Chi-square with 7 degrees of freedom, 0.1 % point 24.3; without replacement the counts spread less than that."""
    mass = torch.arange(8.0).pow(3).expand(4000, 8)
    drawn = blocking.random_keys(mass, k=3, generator=generator(7))
    expected = 4000 * 3 / 8
    assert ((drawn.sum(0) - expected) ** 2 / expected).sum() < 24.3


def test_large_other_keys_are_the_largest_that_are_no_sinks() -> None:
    mass = torch.rand(5, 4, 12, generator=torch.Generator().manual_seed(6)).pow(8) * 20
    mass[0, 0] = torch.tensor([40.0, 30.0, *[0.5] * 9, 0.6])  # two sinks
    mass[0, 1] = torch.tensor([5.0] * 6 + [0.0] * 6)  # no sink though large
    for k in (1, 4, 20):
        marked = blocking.large_other_keys(mass, k=k)
        for row in range(5):
            for head in range(4):
                values = mass[row, head].tolist()
                others = [i for i, v in enumerate(values) if not v > (sum(values) - v) / (len(values) - 1) + 3.0]
                best = sorted(others, key=lambda i, values=values: (-values[i], i))[:k]
                assert marked[row, head].nonzero().flatten().tolist() == sorted(best)
    assert sinks.sinks_leave_one_out(mass).any(-1).sum() > 5  # there was something to leave out
    assert blocking.large_other_keys(mass, k=1)[0, 0].nonzero().flatten().tolist() == [11]


def test_rules_are_the_three_conditions_of_one_size() -> None:
    mass = torch.tensor([[30.0, 1.0, 2.0, 0.5, 0.2, 0.1, 0.1, 0.1]])
    named = blocking.rules(1)
    assert list(named) == ["sinks", "random keys", "large non-sinks"]
    marked = {name: rule(mass, generator(1)) for name, rule in named.items()}
    assert marked["sinks"][0].nonzero().flatten().tolist() == [0]
    assert marked["large non-sinks"][0].nonzero().flatten().tolist() == [2]
    assert torch.equal(marked["random keys"], blocking.random_keys(mass, k=1, generator=generator(1)))
    assert all(int(rule(mass, generator(0)).sum()) == 3 for rule in blocking.rules(3).values())


def test_unstable_keys_by_both_readings() -> None:
    value = torch.tensor([[0.0, 0.5, 0.75, 0.9, 1.0], [1.0, 1.0, 0.25, 0.6, 0.5]])
    literal, former = (blocking.unstable_keys(value, threshold=0.5, only_sinks=only) for only in (False, True))
    assert literal.tolist() == [[False, False, True, True, True], [True, True, False, True, False]]
    assert former.tolist() == [[False, False, True, True, False], [False, False, False, True, False]]
    assert blocking.READINGS == {"literal": False, "only former sinks": True}
