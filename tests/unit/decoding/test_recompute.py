"""What is recomputed: exact where nothing is kept, and against passes in which stale keys and values are put back by hand."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.decoding import commit, decoder, recompute
from lib.decoding.by_attention import recompute as by_attention
from lib.decoding.by_attention.commit import Independent
from lib.decoding.by_attention.control import SETTINGS, Control
from lib.decoding.by_attention.evict import Evict
from lib.decoding.decoder import DecodingPlan
from lib.decoding.recompute import Blockwise, Recompute
from lib.decoding.view import View, guess
from lib.decoding.visible import Visible
from lib.diffusion import sampler
from lib.models import language_model, loading
from lib.models.language_model import LanguageModel
from tests import tiny

PROMPT, NEW, BLOCK = 5, 12, 6
EVERYTHING = 99


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    options: dict[str, Any] = {"llada": {"family": "llama"}, "dream": {"family": "qwen2", "logit_shift": 1}}[request.param]
    folder = tiny.folder(tmp_path_factory.mktemp(request.param), causal=False, num_hidden_layers=4, **options)
    return loading.load(folder, dtype=torch.float64)


def run(model: LanguageModel, plan: DecodingPlan, *, seed: int = 0, rows: int = 2) -> decoder.Decoded:
    return decoder.decode(model, tiny.ids(rows, PROMPT, seed=seed), new_tokens=NEW, block_length=BLOCK, plan=plan)


EXACT: dict[str, dict[str, Any]] = {
    "whole, windows over everything": {"recompute": recompute.Vicinity(radius=EVERYTHING, warm_up=0)},
    "warm-up without end": {"recompute": recompute.Vicinity(radius=0, warm_up=EVERYTHING)},
    "dual, refreshed": {"recompute": Blockwise(refresh_every=1)},
    "vicinity, refreshed": {"recompute": recompute.Vicinity(refresh_every=1, radius=0)},
    "delayed, refreshed": {"recompute": recompute.Delayed(refresh_every=1)},
    "predicted, refreshed": {"recompute": recompute.Predicted(refresh_every=1, count=1, radius=0)},
    "d2Cache, refreshed": {"recompute": by_attention.D2Cache(refresh_every=1)},
    "d2Cache, everything": {"recompute": by_attention.D2Cache(share=1.0)},
    "FOCUS, refreshed": {"recompute": by_attention.Focus(refresh_every=1)},
    "Elastic, refreshed": {"recompute": by_attention.Elastic(refresh_every=1)},
    "suffix of everything": {"visible": Visible(suffix_tokens=EVERYTHING)},
}


@pytest.mark.parametrize("name", EXACT)
def test_what_keeps_nothing_is_the_plain_sampler(model: LanguageModel, name: str) -> None:
    got = run(model, DecodingPlan(**EXACT[name]))
    plain = sampler.sample(model, tiny.ids(2, PROMPT), new_tokens=NEW, steps=NEW, block_length=BLOCK)
    assert torch.equal(got.ids, plain)


DUAL: dict[str, dict[str, Any]] = {
    "FOCUS that keeps all masks": {"recompute": by_attention.Focus(factor=EVERYTHING)},
    "Elastic that never widens": {"recompute": by_attention.Elastic(threshold=-2.0)},
    "nothing evicted": {"recompute": Blockwise(), "visible": Evict(keep=1.0)},
    "nothing evicted at once": {"recompute": Blockwise(), "visible": Evict(keep=1.0, delay=0, score="attention")},
    "vicinity of none": {"recompute": recompute.Vicinity(radius=0, warm_up=0)},
}


@pytest.mark.parametrize("name", DUAL)
def test_what_adds_nothing_is_a_dual_cache(model: LanguageModel, name: str) -> None:
    """FOCUS leaves frozen tokens out, so with it texts may differ where one is frozen early: one token is written a pass."""
    commits: dict[str, Any] = {"commit": commit.Quota(2)}
    got = run(model, DecodingPlan(**commits, **DUAL[name]))
    dual = run(model, DecodingPlan(**commits, recompute=Blockwise()))
    if "FOCUS" not in name:
        assert torch.equal(got.ids, dual.ids)
    assert got.computed_tokens <= 2 * dual.computed_tokens


@torch.inference_mode()
def stale(model: LanguageModel, before: Tensor, now: Tensor, renewed: Tensor) -> Tensor:
    """States of a pass over `now` whose keys and values are those of a pass over `before`, except at `renewed`."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, __, output: kept.update({name: output.clone()})

    def put(name: str) -> Any:
        return lambda _, __, output: torch.where(renewed[None, :, None], output, kept[name])

    body = language_model.network_body(model)
    for make, ids in ((keep, before), (put, now)):
        with ExitStack() as stack:
            for layer in model.layers:
                if layer.role in ("k", "v"):
                    stack.callback(layer.module.register_forward_hook(make(layer.name)).remove)
            states = body(input_ids=ids, use_cache=False).last_hidden_state
    return states


def opened(model: LanguageModel, ids: Tensor, *, length: int = BLOCK) -> View:
    size = ids.shape[1]
    return View(ids, torch.arange(size), range(PROMPT, PROMPT + length), PROMPT, tiny.MASK, torch.ones(1, length).long())


@pytest.mark.parametrize(("delay", "neighbour"), [(1, False), (2, False), (1, True)])
def test_a_token_is_frozen_so_many_passes_after_it_was_written(model: LanguageModel, delay: int, neighbour: bool) -> None:
    """By hand: places 6, 8, 7 are written in passes 0, 1, 2, then 9; text before the block is kept from the start."""
    rule = recompute.Delayed(delay=delay, right_neighbour=neighbour)
    view = opened(model, torch.cat([tiny.ids(1, PROMPT), torch.full((1, 8), tiny.MASK)], dim=1))
    order, born, found = [6, 8, 7, 9], {}, []
    for step, place in enumerate(order):
        view.step, view.committed = step, torch.zeros_like(view.ids, dtype=torch.bool)
        view.ids, view.committed = view.ids.clone(), view.committed
        view.ids[0, place], view.committed[0, place], born[place] = 1, True, step
        found.append(set(rule.unfrozen(view)[0].nonzero()[:, 0].tolist()))
        # the pass to come is number step + 1: it reads the token for the (step + 1 - born)-th time
        young = {p for p in range(PROMPT, 13) if p not in born or step + 1 - born[p] <= delay}
        if neighbour:
            young |= {p for p in born if p + 1 in young}
        assert found[-1] == young
    assert len({frozenset(each) for each in found}) > 1


def test_a_delayed_pass_sees_stale_keys_of_frozen_tokens_only(model: LanguageModel) -> None:
    ids = torch.cat([tiny.ids(1, PROMPT), torch.full((1, 8), tiny.MASK)], dim=1)
    view = opened(model, ids)
    with torch.inference_mode(), recompute.Delayed().passes(model, view) as forward:
        view.hidden = forward(view)
        view.ids = ids.clone()
        view.ids[0, 7] = 3
        view.committed, view.step = view.ids != ids, 1
        hidden = forward(view)
    renewed = torch.zeros(13, dtype=torch.bool)
    renewed[PROMPT - model.logit_shift :] = True
    wanted = stale(model, ids, view.ids, renewed)
    assert hidden.rows is not None
    assert torch.allclose(hidden.states[0], wanted[0, hidden.rows[0]], atol=1e-6)
    exact = stale(model, ids, view.ids, torch.ones(13, dtype=torch.bool))
    assert not torch.allclose(hidden.states[0], exact[0, hidden.rows[0]], atol=1e-3)


def test_a_window_lies_around_the_surest_masks(model: LanguageModel) -> None:
    view = opened(model, torch.full((1, 13), tiny.MASK))
    logits = torch.zeros((6, 5))
    logits[4, 2], logits[1, 3] = 5.0, 9.0

    view.guess, view.committed = guess(view.ids, view.is_open, logits), None
    rows = recompute.Predicted(count=2, radius=0).rows(model, view)[0].tolist()
    assert rows == sorted({6, 9} | ({5, 8} if model.logit_shift else set()))
    rows = recompute.Predicted(count=1, radius=1).rows(model, view)[0].tolist()
    assert rows == [*([4] if model.logit_shift else []), 5, 6, 7]


def test_a_tail_keeps_its_own_position(model: LanguageModel) -> None:
    """The pass is that of a mask which hides what is cut off."""
    shown: list[View] = []
    for tail, place in (("last", 16), ("middle", 14)):
        plan = DecodingPlan(commit.Threshold(0.0), visible=Visible(suffix_tokens=2, tail=tail))
        decoder.decode(
            model,
            tiny.ids(1, PROMPT),
            new_tokens=NEW,
            block_length=BLOCK,
            plan=plan,
            on_pass=lambda view: shown.append(replace(view)),
        )
        first = next(view for view in reversed(shown) if view.passes == 0)
        assert first.places.tolist() == [*range(13), place] and first.hidden is not None
        ids = torch.full((1, 17), tiny.MASK)
        ids[:, :PROMPT] = tiny.ids(1, PROMPT)
        seen = torch.isin(torch.arange(17), first.places)[None, None, None].expand(1, 1, 17, 17)
        with torch.inference_mode():
            whole = language_model.network_body(model)(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
        assert torch.allclose(first.hidden.states[0], whole[0, first.places], atol=1e-6)


def test_refusals() -> None:
    for make, message in (
        (lambda: recompute.Vicinity(refresh_every=0), "refresh_every must be at least 1, got 0"),
        (lambda: Visible(suffix_blocks=1, suffix_tokens=1), "a suffix must be counted in blocks or in tokens, got both"),
        (lambda: Visible(tail="first"), "tail must be last or middle, got 'first'"),
        (lambda: Evict(keep=0.0), r"keep must be a share in \(0, 1\], got 0.0"),
        (lambda: Evict(pool=2), "pool must be an odd number of keys, got 2"),
        (lambda: DecodingPlan(visible=Evict()), "eviction must go with a dual cache without refresh"),
    ):
        with pytest.raises(InputError, match=message):
            make()


RANKED: dict[str, Any] = {
    "FOCUS": lambda control: {"recompute": by_attention.Focus(factor=1.0, control=control)},
    "d2Cache": lambda control: {"recompute": by_attention.D2Cache(candidates=2, gap=0, share=0.3, control=control)},
    "Elastic-Cache": lambda control: {"recompute": by_attention.Elastic(threshold=0.97, control=control)},
    "Sparse-dLLM": lambda control: {"recompute": Blockwise(), "visible": Evict(keep=0.4, control=control)},
    "Focus-dLLM": lambda control: {
        "recompute": Blockwise(),
        "visible": Evict(keep=0.5, score="attention", span=2, delay=0, pool=1, prompt_only=True, control=control),
    },
    "DAPD": lambda control: {"commit": Independent(0.1, 1.0, control)},
}


@pytest.mark.parametrize("name", RANKED)
def test_every_ranking_runs_under_every_control(model: LanguageModel, name: str) -> None:
    """The control does something; two runs are the same; eviction costs the same under each."""
    texts, costs = {}, set()
    for setting in SETTINGS:
        plan = DecodingPlan(**RANKED[name](Control(setting)))
        got = run(model, plan, rows=3)
        assert torch.equal(got.ids, run(model, plan, rows=3).ids)
        texts[setting] = tuple(got.ids.flatten().tolist())
        costs.add((got.forwards, got.computed_tokens))
    assert len(set(texts.values())) > 1
    if "dLLM" in name:
        assert len(costs) == 1


def test_whole_is_the_default() -> None:
    assert DecodingPlan().recompute == Recompute() and not DecodingPlan().alone


FEW: dict[str, Recompute] = {
    "predicted": recompute.Predicted(count=1, radius=0),
    "d2Cache": by_attention.D2Cache(candidates=1, share=0.0, gap=0),
}


@pytest.mark.parametrize("rule", [commit.Quota(2), commit.CertaintyPrior(per_block=2)], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_a_schedule_that_asks_for_more_than_is_predicted_still_fills_the_block(
    model: LanguageModel, name: str, rule: commit.Commit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every place is committed once, though the schedule has two passes a block."""
    counts, own = list[int](), type(rule).__call__

    def counted(self: Any, view: View) -> Tensor:
        """Count what the rule commits."""
        marked = own(self, view)
        counts.append(int(marked.sum()))
        return marked

    monkeypatch.setattr(type(rule), "__call__", counted)
    got = run(model, DecodingPlan(rule, recompute=FEW[name]), rows=1)
    assert sum(counts) == NEW and got.forwards == len(counts)
    assert len(counts) > 4 or model.logit_shift, "a computed place also predicts the one behind it under a shift"
