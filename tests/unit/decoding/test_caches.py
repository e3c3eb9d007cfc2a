"""Block-wise caches against full passes in which the keys and values outside the block are put back by hand."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.decoding import caches
from lib.decoding.recompute import BlockCache, Blockwise
from lib.decoding.view import View
from lib.models import language_model, loading
from lib.models.language_model import LanguageModel
from tests import tiny

LENGTH, BLOCK = 14, range(6, 10)
EXACT = 1e-5  # the networks normalise in float32 whatever their dtype; a wrong key moves states by tenths


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Both kinds of network in float64: without and with bias and logit shift."""
    options: dict[str, Any] = {"llada": {"family": "llama"}, "dream": {"family": "qwen2", "logit_shift": 1}}[request.param]
    folder = tiny.folder(tmp_path_factory.mktemp(request.param), causal=False, **options)
    made = loading.load(folder, dtype=torch.float64)
    assert made.logit_shift == (request.param == "dream")
    return made


@contextmanager
def hooks(model: LanguageModel, make: Any) -> Iterator[None]:
    """Put `make(name)` as forward hook on every key and value projection."""
    with ExitStack() as stack:
        for layer in model.layers:
            if layer.role in ("k", "v"):
                stack.callback(layer.module.register_forward_hook(make(layer.name)).remove)
        yield


@torch.inference_mode()
def states(model: LanguageModel, ids: Tensor) -> Tensor:
    return language_model.network_body(model)(input_ids=ids, use_cache=False).last_hidden_state


def stale_states(model: LanguageModel, *, before: Tensor, now: Tensor, renewed: range) -> Tensor:
    """A full pass over `now` whose keys and values outside `renewed` are those of a full pass over `before`."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, __, output: kept.update({name: output.clone()})

    def put_back(name: str) -> Any:
        def hook(_: Any, __: Any, output: Tensor) -> Tensor:
            mixed = kept[name].clone()
            mixed[:, renewed.start : renewed.stop] = output[:, renewed.start : renewed.stop]
            return mixed

        return hook

    with hooks(model, keep):
        states(model, before)
    with hooks(model, put_back):
        return states(model, now)


def block_pass(model: LanguageModel, *, kind: BlockCache, block: range) -> Any:
    """Passes by (ids, whether nothing kept may be used), and the first place that each computes."""
    stack = ExitStack()
    view = View(tiny.ids(1, 1), torch.arange(1), block, 0, tiny.MASK, tiny.ids(1, 1))
    forward = stack.enter_context(Blockwise(kind=kind).passes(model, view))

    def run(ids: Tensor, fresh: bool) -> SimpleNamespace:
        view.ids, view.places, view.step = ids, torch.arange(ids.shape[1]), 0 if fresh else 1
        hidden = forward(view)
        first = 0 if hidden.rows is None else int(hidden.rows[0, 0])
        return SimpleNamespace(states=hidden.states, first=first, computed=hidden.computed, hidden=hidden)

    return run


def renewed_by(kind: BlockCache, shift: int) -> range:
    return range(BLOCK.start - shift, BLOCK.stop if kind == "dual" else LENGTH)


def changed(ids: Tensor, *, seed: int) -> Tensor:
    """Other tokens in the block."""
    result = ids.clone()
    result[:, BLOCK.start : BLOCK.stop] = tiny.ids(len(ids), len(BLOCK), seed=seed)
    return result


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_fresh_pass_is_a_plain_one(model: LanguageModel, kind: BlockCache) -> None:
    ids = tiny.ids(2, LENGTH)
    with torch.inference_mode():
        run = block_pass(model, kind=kind, block=BLOCK)
        for seed in (1, 2):  # a later fresh pass keeps nothing of an earlier one
            hidden = run(changed(ids, seed=seed), True)
            assert torch.equal(hidden.states, states(model, changed(ids, seed=seed)))
            assert (hidden.first, hidden.computed) == (0, 2 * LENGTH)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_cached_pass_sees_stale_keys_outside_and_new_ones_inside_on_both_sides(model: LanguageModel, kind: BlockCache) -> None:
    before = tiny.ids(2, LENGTH)
    renewed = renewed_by(kind, model.logit_shift)
    with torch.inference_mode():
        run = block_pass(model, kind=kind, block=BLOCK)
        run(before, True)
        for seed in (1, 2):  # the second pass must replace the keys of the first, not follow them
            now = changed(before, seed=seed)
            hidden = run(now, False)
            expected = stale_states(model, before=before, now=now, renewed=renewed)[:, renewed.start : renewed.stop]
            assert (hidden.first, hidden.computed) == (renewed.start, 2 * len(renewed))
            assert float((hidden.states - expected).abs().max()) < EXACT
            exact = states(model, now)[:, renewed.start : renewed.stop]
            assert float((exact - expected).abs().max()) > 1e-2  # so the oracle tells stale from exact


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_cached_pass_over_unchanged_ids_is_exact(model: LanguageModel, kind: BlockCache) -> None:
    ids = tiny.ids(3, LENGTH)
    with torch.inference_mode():
        run = block_pass(model, kind=kind, block=BLOCK)
        run(ids, True)
        hidden = run(ids, False)
        full = states(model, ids)[:, hidden.first : hidden.first + hidden.states.shape[1]]
    assert float((hidden.states - full).abs().max()) < EXACT


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_block_at_the_very_start_has_nothing_before_it(model: LanguageModel, kind: BlockCache) -> None:
    ids = tiny.ids(1, 8)
    with torch.inference_mode():
        run = block_pass(model, kind=kind, block=range(4))
        run(ids, True)
        hidden = run(ids, False)
    assert hidden.first == 0
    assert hidden.states.shape[1] == (4 if kind == "dual" else 8)


def test_logits_are_read_where_logits_at_reads_them(model: LanguageModel) -> None:
    """Position 0 included, which keeps its own output under a shift."""
    ids = tiny.ids(2, LENGTH)
    where = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    where[:, 0] = True
    with torch.inference_mode():
        got = caches.logits_from(model, caches.run_whole(model, ids), where)
    assert torch.equal(got, language_model.logits_at(model, ids, where))


def test_logits_of_a_cached_pass_belong_to_the_block(model: LanguageModel) -> None:
    ids = tiny.ids(2, LENGTH)
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[0, BLOCK.start] = where[1, BLOCK.stop - 1] = True
    with torch.inference_mode():
        run = block_pass(model, kind="dual", block=BLOCK)
        run(ids, True)
        got = caches.logits_from(model, run(ids, False).hidden, where)
    assert torch.allclose(got, language_model.logits_at(model, ids, where), atol=1e-6)


@pytest.mark.parametrize("evicted", [False, True])
@torch.inference_mode()
def test_places_side_by_side_are_those_that_an_index_names(model: LanguageModel, evicted: bool) -> None:
    """They are copied without an index, but for a store that has forgotten some and keeps the others elsewhere."""
    ids, kept, found = tiny.ids(2, LENGTH), torch.tensor([[0, 2, *BLOCK, 12]] * 2), []
    for rows in (BLOCK, torch.tensor([[*BLOCK]] * 2)):
        store = caches.new_store(model)
        caches.run_whole(model, ids, store=store)
        for layer in range(model.network.config.num_hidden_layers) if evicted else ():
            store.keep(layer, kept)
        found.append(caches.run_rows(model, ids.flip(1), rows, store=store))
    assert torch.equal(found[0].states, found[1].states)
    assert all(each.rows is not None and each.rows.tolist() == [[*BLOCK]] * 2 for each in found)


def test_sliding_windows_are_refused(tmp_path: Any) -> None:
    sliding = tiny.model(tmp_path, family="qwen2", causal=False, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(InputError, match="must see all positions in every layer, got sliding windows"):
        caches.new_store(sliding)
