"""Revision: each rule against its formula on planted probabilities, shadows against passes without a token, ends of blocks."""

import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.decoding import commit, decoder, remask
from lib.decoding.decoder import DecodingPlan
from lib.decoding.recompute import Blockwise
from lib.decoding.view import View, guess
from lib.diffusion import sampler
from lib.models import language_model, loading
from lib.models.language_model import LanguageModel
from tests import tiny

PROMPT, NEW, BLOCK = 5, 12, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return loading.load(tiny.folder(tmp_path_factory.mktemp("plain"), causal=False), dtype=torch.float64)


def run(model: LanguageModel, plan: DecodingPlan, *, rows: int = 3, **options: Any) -> decoder.Decoded:
    return decoder.decode(model, tiny.ids(rows, PROMPT), new_tokens=NEW, block_length=BLOCK, plan=plan, **options)


def seen(ids: list[int], best: dict[int, tuple[int, float]], *, before: View | None = None, quota: int = 2) -> View:
    """A view of one row of 10 tokens of vocabulary, block 2 to 6: `best` is (token, its probability), the rest shared evenly."""
    text = torch.tensor([ids])
    view = View(text, torch.arange(len(ids)), range(2, 6), 2, 9, torch.full((1, 4), quota))
    if before is not None:
        view.memory, view.step = before.memory, before.step + 1
    where = torch.zeros_like(text, dtype=torch.bool)
    where[0, list(best)] = True
    logits = torch.stack(
        [torch.full((10,), (1 - p) / 9).index_fill(0, torch.tensor(token), p).log() for token, p in best.values()]
    )
    view.guess = guess(text, where, logits)
    view.committed = torch.zeros_like(where)
    return view


def test_low_probability_takes_back_the_least_probable_of_the_block_and_never_the_prompt() -> None:
    best = {1: (3, 0.9), 2: (1, 0.9), 3: (3, 0.6), 4: (4, 0.7), 5: (0, 0.8)}
    view = seen([0, 0, 1, 2, 2, 9], best)
    # 3 holds another token at .4 / 9 = .044, 4 at .3 / 9 = .033
    rule = remask.TokenToMask()
    committed = view.ids.clone()
    committed[0, 5] = 0
    assert rule(view, committed).tolist() == [[0, 0, 1, 2, 9, 0]]  # a quarter of a block of four is one
    view.memory.clear()
    assert remask.TokenToMask(most_share=0.5)(view, committed).tolist() == [[0, 0, 1, 9, 9, 0]]
    view.memory.clear()
    assert remask.TokenToMask(bound=0.04, most_share=0.5)(view, committed).tolist() == [[0, 0, 1, 2, 9, 0]]
    view.memory.clear()
    assert remask.TokenToMask("another token", 0.65, most_share=1.0)(view, committed).tolist() == [[0, 0, 1, 2, 9, 0]]


def test_a_place_is_taken_back_only_so_often() -> None:
    rule, view = remask.TokenToMask(most_times=2), None
    for wanted in (9, 9, 2):
        view = seen([0, 0, 2, 9, 9, 9], {2: (1, 0.9)}, before=view)
        assert rule(view, view.ids)[0, 2] == wanted


def test_a_drop_is_between_two_passes_and_either_way() -> None:
    rule = remask.TokenToMask("drop", 0.3, most_share=1.0)
    first = seen([0, 0, 1, 1, 1, 9], {2: (1, 0.95), 3: (1, 0.2), 4: (1, 0.5)})
    assert torch.equal(rule(first, first.ids), first.ids)
    second = seen([0, 0, 1, 1, 1, 1], {2: (1, 0.6), 3: (1, 0.6), 4: (1, 0.75), 5: (1, 0.1)}, before=first)
    assert rule(second, second.ids).tolist() == [[0, 0, 9, 9, 1, 1]]


def test_the_most_certain_of_written_and_open_are_kept() -> None:
    """Step 1 of 2 a step keeps four of four; step 0 keeps two, one of them written before."""
    best = {2: (1, 0.5), 3: (3, 0.6), 4: (4, 0.7), 5: (0, 0.3)}
    view = seen([0, 0, 1, 2, 9, 9], best)  # written: p(1) = .5 and p(2) = .044
    assert remask.TopOverAll()(view, view.ids).tolist() == [[0, 0, 1, 9, 4, 9]]
    later = seen([0, 0, 1, 2, 9, 9], best, before=view)
    assert remask.TopOverAll()(later, later.ids).tolist() == [[0, 0, 1, 2, 4, 0]]


def test_an_edit_overwrites_where_another_token_is_sure() -> None:
    view = seen([0, 0, 1, 2, 2, 9], {2: (1, 0.99), 3: (3, 0.95), 4: (4, 0.85), 5: (0, 0.99)})
    assert remask.Edit(0.9)(view, view.ids).tolist() == [[0, 0, 1, 3, 2, 9]]
    assert remask.Edit()(view, view.ids).tolist() == [[0, 0, 1, 3, 4, 9]], "published: above .5"


def test_an_edit_touches_neither_prompt_nor_open_places_and_writes_no_mask() -> None:
    """All predictions are sure; 1 belongs to the prompt, 5 is open, and at 3 the best token is the mask."""
    view = seen([0, 0, 1, 2, 2, 9], {1: (3, 0.99), 2: (4, 0.99), 3: (9, 0.99), 4: (5, 0.99), 5: (6, 0.99)})
    assert remask.Edit()(view, view.ids).tolist() == [[0, 0, 4, 2, 5, 9]]
    committed = view.ids.clone()
    committed[0, 5] = 6
    assert remask.Edit()(view, committed)[0, 5] == 6, "what the pass commits stays"


def test_fewer_go_out_than_came_in() -> None:
    best = {2: (1, 0.8), 3: (3, 0.6), 4: (4, 0.7), 5: (0, 0.95)}
    view = seen([0, 0, 1, 3, 4, 9], best)
    rule = remask.NarrowOut(0.9)
    for came, wanted in ((1, [1, 3, 4]), (2, [1, 9, 4]), (3, [1, 9, 9]), (9, [9, 9, 9])):
        view.committed = torch.ones((1, came), dtype=torch.bool)
        assert rule(view, view.ids)[0, 2:5].tolist() == wanted


def test_what_comes_in_is_capped() -> None:
    view = seen([0, 0, 9, 9, 9, 9], {2: (1, 0.8), 3: (3, 0.6), 4: (4, 0.75), 5: (0, 0.95)})
    counts = [int(remask.WideIn(0.5, share=share, least=least, most=most)(view).sum()) for share, least, most in
              ((0.5, 1, 20), (0.5, 3, 20), (1.0, 1, 20), (1.0, 5, 2))]  # fmt: skip
    assert counts == [2, 3, 4, 2]


def test_a_shadow_sees_all_but_its_token(model: LanguageModel) -> None:
    """Its state is that of a text in which the token is a mask; other states are those of the text."""
    ids = torch.cat([tiny.ids(1, 7), torch.full((1, 4), tiny.MASK)], dim=1)
    view = View(ids, torch.arange(11), range(5, 9), 5, tiny.MASK, torch.ones(1, 4, dtype=torch.long))
    with torch.inference_mode(), remask.Shadows().passes(model, view) as forward:
        states = forward(view).states
        body = language_model.network_body(model)
        for place in range(11):
            text = ids.clone()
            if place in (5, 6):
                text[0, place] = tiny.MASK
            wanted = body(input_ids=text, use_cache=False).last_hidden_state[0, place]
            close = torch.allclose(states[0, place], wanted, atol=1e-5)
            # a shadow's mask reads the token's place as the text itself does, keys of written tokens are of the unmasked text
            assert close if place not in (5, 6) else not torch.allclose(states[0, place], body(
                input_ids=ids, use_cache=False).last_hidden_state[0, place], atol=1e-3)  # fmt: skip


@torch.inference_mode()
def test_a_shadow_does_not_depend_on_its_token_through_its_own_key(model: LanguageModel) -> None:
    """In a network of one layer nothing else could tell it."""
    one = tiny.of_network(tiny.network(causal=False, num_hidden_layers=1))
    ids = torch.cat([tiny.ids(1, 7), torch.full((1, 4), tiny.MASK)], dim=1)
    states = []
    for token in (3, 11):
        ids[0, 6] = token
        view = View(ids.clone(), torch.arange(11), range(5, 9), 5, tiny.MASK, torch.ones(1, 4, dtype=torch.long))
        with remask.Shadows().passes(one, view) as forward:
            states.append(forward(view).states[0])
    assert torch.allclose(states[0][6], states[1][6], atol=1e-6) and not torch.allclose(states[0][5], states[1][5], atol=1e-3)
    masked = ids.clone()
    masked[0, 6] = tiny.MASK
    alone = language_model.network_body(one)(input_ids=masked, use_cache=False).last_hidden_state[0, 6]
    assert torch.allclose(states[0][6], alone, atol=1e-5)


NOTHING = {
    "never below 0": remask.TokenToMask(bound=0.0),
    "no times": remask.TokenToMask(bound=1.0, most_times=0),
    "never above 1": remask.Edit(1.0),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_rule_that_finds_nothing_is_the_plain_sampler(model: LanguageModel, name: str) -> None:
    got = run(model, DecodingPlan(remask=NOTHING[name]))
    plain = sampler.sample(model, tiny.ids(3, PROMPT), new_tokens=NEW, steps=NEW, block_length=BLOCK)
    assert torch.equal(got.ids, plain)


ACTIVE = {
    "low probability": DecodingPlan(commit.Quota(2), remask.TokenToMask()),
    "dual": DecodingPlan(commit.Quota(2), remask.TokenToMask(), Blockwise()),
    "another": DecodingPlan(commit.Quota(2), remask.TokenToMask("another token", 0.1)),
    "top over all": DecodingPlan(remask=remask.TopOverAll()),
    "edit": DecodingPlan(commit.Quota(2), remask.Edit(0.1)),
    "wino": DecodingPlan(remask.WideIn(0.1, least=2, share=0.5), remask.NarrowOut(0.5), remask.Shadows()),
}


@pytest.mark.parametrize("name", ACTIVE)
def test_revision_changes_the_text_and_ends(model: LanguageModel, name: str) -> None:
    """Blocks end, rows are independent, the prompt stays."""
    plan = ACTIVE[name]
    assert plan.remask is not None
    got = run(model, plan)
    without = run(model, DecodingPlan(plan.commit))
    assert not torch.equal(got.ids, without.ids)
    assert torch.equal(got.ids[:, :PROMPT], tiny.ids(3, PROMPT)) and got.forwards <= 3 * 2 * plan.remask.most_steps(BLOCK)
    alone = [decoder.decode(model, row[None], new_tokens=NEW, block_length=BLOCK, plan=plan) for row in tiny.ids(3, PROMPT)]
    assert torch.equal(got.ids, torch.cat([one.ids for one in alone]))


def test_edits_go_on_after_the_last_mask(model: LanguageModel) -> None:
    none, one, many = (run(model, DecodingPlan(commit.Threshold(0.0), remask.Edit(0.0, most)), rows=1) for most in (0, 1, 16))
    assert (none.forwards, one.forwards) == (NEW // BLOCK, 2 * (NEW // BLOCK)) and many.forwards >= one.forwards


def regretted(ids: Tensor) -> Tensor:
    """Ends the text (4) at place 2, regrets it once it is written, and would write 2 at all later places."""
    place, is_open = torch.arange(ids.shape[1]).expand(ids.shape), ids == 5
    wanted = torch.where(place == 2, torch.where(is_open, 4, 1), 2)
    return 20.0 * torch.nn.functional.one_hot(wanted, 6)


def test_a_text_goes_on_behind_an_end_that_is_edited_away() -> None:
    stub, prompt = tiny.stub(regretted, vocab=6, mask_token_id=5), torch.zeros((1, 2), dtype=torch.long)
    sizes: dict[str, Any] = {"new_tokens": 8, "block_length": 4, "stop_token_id": 4}
    plan = DecodingPlan(commit.Threshold(0.5), remask.Edit())
    for early in (False, True):
        got = decoder.decode(stub, prompt, plan=dataclasses.replace(plan, early_stop=early), **sizes)
        assert got.ids[0, 2:].tolist() == [1] + [2] * 7
    kept = DecodingPlan(commit.Threshold(0.5), early_stop=True)
    assert decoder.decode(stub, prompt, plan=kept, **sizes).ids[0, 2:].tolist() == [4] * 8


# Ends of blocks


def fixed(ids: Tensor) -> Tensor:
    """Surest of token 1 (a delimiter) at place 4, surer of token 2 (none) at 3, of 1 at 8, which is far."""
    logits = torch.zeros((*ids.shape, 4))
    logits[:, 4, 1], logits[:, 3, 2], logits[:, 8, 1], logits[:, 2, 1] = 2.0, 9.0, 9.0, 1.0
    return logits


@pytest.mark.parametrize(("threshold", "end"), [(0.3, 5), (0.8, 8)])
def test_a_block_ends_at_the_surest_delimiter(threshold: float, end: int) -> None:
    stub = tiny.stub(fixed, vocab=4, mask_token_id=3)
    rule = remask.AtDelimiter(delimiters=(1,), threshold=threshold, share=0.5)
    ids = torch.full((1, 10), 3)
    assert rule.end(stub, ids, range(2, 8), new_tokens=10) == (end, 1, 10)


def test_a_block_ends_where_the_future_begins_to_matter(model: LanguageModel) -> None:
    """Against sums of divergences of two passes, position by position."""
    ids = torch.cat([tiny.ids(1, 5), torch.full((1, 15), tiny.MASK)], dim=1)
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, 5:15] = True
    seen = language_model.logits_at(model, ids, where).double().softmax(-1)
    cut = language_model.logits_at(model, ids[:, :15], where[:, :15]).double().softmax(-1)
    sums = [sum(float((p * (p / q).log()).sum()) for p, q in zip(seen[:n], cut[:n], strict=True)) for n in range(1, 11)]
    with torch.inference_mode():
        for bound in (sums[2] + 1e-6, sums[6] + 1e-6):
            rule = remask.WhereFutureAgrees(bound=bound, least=1, share=0.67)
            wanted = 5 + max(n for n in range(1, 11) if sums[n - 1] <= bound)
            assert rule.end(model, ids, range(5, 9), new_tokens=15) == (wanted, 2, 20 + 15)


def test_blocks_of_chosen_ends_fill_the_text(model: LanguageModel) -> None:
    for ends in (remask.WhereFutureAgrees(bound=0.5, least=2), remask.AtDelimiter(tuple(range(15)), threshold=0.0)):
        got = run(model, DecodingPlan(commit.Threshold(0.2), ends=ends))
        assert (got.ids != tiny.MASK).all() and got.forwards > 3
    short = remask.AtDelimiter(tuple(range(15)), threshold=0.0)  # blocks of one token, of which no late share is left
    late = run(model, DecodingPlan(commit.Threshold(0.2), ends=short, late_share=0.5))
    assert (late.ids != tiny.MASK).all()
    same = run(model, DecodingPlan(ends=remask.AtDelimiter(())))
    plain = sampler.sample(model, tiny.ids(3, PROMPT), new_tokens=NEW, steps=NEW, block_length=BLOCK)
    assert torch.equal(same.ids, plain)


def test_what_does_not_go_together_is_refused() -> None:
    for options in cast(list[dict[str, Any]], [{"remask": remask.NarrowOut()}, {"recompute": remask.Shadows()}]):
        with pytest.raises(InputError, match="NarrowOut must go with Shadows"):
            DecodingPlan(**options)
    with pytest.raises(InputError, match="tokens that are written late must stay"):
        DecodingPlan(remask=remask.Edit(), late_share=0.5)


def test_shadows_need_their_own_place(tmp_path: Any) -> None:
    shifted = tiny.model(tmp_path, family="qwen2", causal=False, logit_shift=1)
    plan = DecodingPlan(remask.WideIn(), remask.NarrowOut(), remask.Shadows())
    with pytest.raises(InputError, match="shadows must stand where their token is predicted, got a logit shift"):
        run(shifted, plan)
