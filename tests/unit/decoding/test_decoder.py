"""Fast decoding: exact where it must be, the counts of what it computes, stops, and refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.decoding import commit as committing
from lib.decoding import decoder, recompute, refresh
from lib.decoding.decoder import Decoded
from lib.decoding.systems import fast_plan
from lib.diffusion import sampler
from lib.models import language_model
from lib.models.language_model import LanguageModel
from tests import tiny

PROMPT, NEW, BLOCK = 5, 12, 4
MIDDLE = 0.2  # a threshold that some predictions of a tiny network pass
ADAPTIVE: dict[str, Any] = {"cache": "adaptive", "refresh_ratio": 0.5}
CACHES: list[dict[str, Any]] = [{"cache": "none"}, {"cache": "prefix"}, {"cache": "dual"}, ADAPTIVE]
every_cache = pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache["cache"])


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    options: dict[str, Any] = {"llada": {"family": "llama"}, "dream": {"family": "qwen2", "logit_shift": 1}}[request.param]
    return tiny.model(tmp_path_factory.mktemp(request.param), causal=False, **options)


def run(model: LanguageModel, *, rows: int = 2, stop: int | None = None, prompt: Tensor | None = None, **plan: Any) -> Decoded:
    ids = tiny.ids(rows, PROMPT) if prompt is None else prompt
    return decoder.decode(model, ids, new_tokens=NEW, block_length=BLOCK, plan=fast_plan(**plan), stop_token_id=stop)


def test_an_adaptive_cache_knows_the_block_in_hand(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[range] = []

    def adaptive_pass(*arguments: Any, block: range, **options: Any) -> Any:
        blocks.append(block)
        return refresh.adaptive_pass(*arguments, block=block, **options)

    monkeypatch.setattr(recompute, "adaptive_pass", adaptive_pass)
    run(model, threshold=1.0, **ADAPTIVE)
    assert blocks == [range(5, 9), range(9, 13), range(13, 17)]


def ramp(input_ids: Tensor) -> Tensor:
    """Sure of token 1 everywhere, and the surer the further right."""
    logits = torch.zeros((*input_ids.shape, 4))
    logits[..., 1] = 1.0 + 0.1 * torch.arange(input_ids.shape[1])
    return logits


def slow_threshold(model: LanguageModel, prompt: Tensor, *, threshold: float) -> tuple[list[int], int]:
    """One row, one pass a step, plain lists."""
    ids, forwards = [*prompt.tolist(), *[tiny.MASK] * NEW], 0
    for first in range(PROMPT, PROMPT + NEW, BLOCK):
        for _ in range(BLOCK):
            masked = [i for i in range(first, first + BLOCK) if ids[i] == tiny.MASK]
            if not masked:
                break
            forwards += 1
            where = torch.tensor([[i in masked for i in range(len(ids))]])
            probabilities = language_model.logits_at(model, torch.tensor([ids]), where).double().softmax(-1)
            best = {i: (float(row.max()), int(row.argmax())) for i, row in zip(masked, probabilities, strict=True)}
            surest = max(best, key=lambda i, best=best: best[i][0])
            for i, (probability, token) in best.items():
                if probability > threshold or i == surest:
                    ids[i] = token
    return ids, forwards


@pytest.mark.parametrize(("block", "per_block"), [(12, 12), (12, 5), (4, 4), (4, 3), (3, 1), (1, 2)])
def test_without_a_cache_the_schedule_is_the_plain_sampler(model: LanguageModel, block: int, per_block: int) -> None:
    prompt = tiny.ids(3, PROMPT)
    plan = fast_plan(steps_per_block=per_block)
    got = decoder.decode(model, prompt, new_tokens=NEW, block_length=block, plan=plan)
    steps = per_block * (NEW // block)
    assert torch.equal(got.ids, sampler.sample(model, prompt, new_tokens=NEW, steps=steps, block_length=block))
    # where the network predicts the mask token itself a position is tried again, as in the sampler
    assert min(per_block, block) * (NEW // block) <= got.forwards <= steps
    assert got.computed_tokens == 3 * (PROMPT + NEW) * got.forwards


def test_a_window_hides_the_masks_beyond_it_and_nothing_else() -> None:
    stub = tiny.stub(ramp, vocab=4, mask_token_id=3)
    plan = fast_plan(steps_per_block=2, suffix_blocks=1)
    got = decoder.decode(stub, torch.zeros((2, 3), dtype=torch.long), new_tokens=8, block_length=2, plan=plan)
    inputs: list[Tensor] = stub.network.calls.inputs  # pyright: ignore
    assert [ids.shape[1] for ids in inputs] == [7, 7, 9, 9, 11, 11, 11, 11]
    assert inputs[1].tolist() == [[0, 0, 0, 3, 1, 3, 3]] * 2
    assert got.computed_tokens == 2 * 2 * (7 + 9 + 11 + 11)
    assert stub.network.calls.head_rows == 2 * 4 * (2 + 1)  # pyright: ignore


@every_cache
def test_a_window_over_everything_trims_nothing(model: LanguageModel, cache: dict[str, Any]) -> None:
    full, wide = run(model, threshold=MIDDLE, **cache), run(model, threshold=MIDDLE, suffix_blocks=2, **cache)
    assert torch.equal(full.ids, wide.ids)
    assert (full.forwards, full.computed_tokens) == (wide.forwards, wide.computed_tokens)
    narrow = run(model, threshold=1.0, suffix_blocks=0, **cache)
    assert not torch.equal(narrow.ids, run(model, threshold=1.0, **cache).ids)


@pytest.mark.parametrize("commit", [{"threshold": MIDDLE}, {"steps_per_block": 3}])
@pytest.mark.parametrize("suffix", [None, 0])
@pytest.mark.parametrize(
    "cache",
    [
        {"cache": "prefix", "refresh_every": 1},
        {"cache": "dual", "refresh_every": 1},
        {"cache": "adaptive", "refresh_every": 1, "refresh_ratio": 0.1},
        {"cache": "adaptive", "refresh_ratio": 1.0},
    ],
)
def test_a_cache_that_keeps_nothing_changes_nothing(
    model: LanguageModel, cache: dict[str, Any], suffix: int | None, commit: dict[str, Any]
) -> None:
    got, plain = run(model, suffix_blocks=suffix, **commit, **cache), run(model, suffix_blocks=suffix, **commit)
    assert torch.equal(got.ids, plain.ids)
    assert (got.forwards, got.computed_tokens) == (plain.forwards, plain.computed_tokens)


@every_cache
def test_threshold_one_is_one_token_a_step_and_zero_one_block_a_step(model: LanguageModel, cache: dict[str, Any]) -> None:
    one_by_one = run(model, threshold=1.0, **cache)
    assert one_by_one.forwards == NEW
    assert torch.equal(one_by_one.ids, run(model, steps_per_block=BLOCK, **cache).ids)
    at_once = run(model, threshold=0.0, **cache)
    assert at_once.forwards == NEW // BLOCK
    assert torch.equal(at_once.ids, run(model, steps_per_block=1, **cache).ids)


def test_a_threshold_must_be_exceeded() -> None:
    """So a threshold of 1 commits one token even where the network is certain of several."""
    sure = torch.tensor([[1.0, 1.0, 0.5], [0.2, 0.5, 0.5], [-torch.inf, -torch.inf, -torch.inf]], dtype=torch.float64)
    assert committing.confident_positions(sure, threshold=1.0).sum(1).tolist() == [1, 1, 0]
    assert committing.confident_positions(sure, threshold=0.5).sum(1).tolist() == [2, 1, 0]


@pytest.mark.parametrize("threshold", [0.15, 0.25, 0.4])
def test_the_threshold_equals_a_slow_loop(model: LanguageModel, threshold: float) -> None:
    prompt = tiny.ids(4, PROMPT, seed=3)
    for row in prompt:
        ids, forwards = slow_threshold(model, row, threshold=threshold)
        got = run(model, prompt=row[None], threshold=threshold)
        assert got.ids[0].tolist() == ids
        assert got.forwards == forwards


def test_a_threshold_between_commits_some_tokens_together(model: LanguageModel) -> None:
    assert NEW // BLOCK < run(model, rows=1, threshold=MIDDLE).forwards < NEW


@pytest.mark.parametrize(("refresh_every", "fresh"), [(None, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("kind", ["prefix", "dual", "adaptive"])
def test_computed_positions_are_counted(model: LanguageModel, kind: str, refresh_every: int | None, fresh: int) -> None:
    """3 blocks of 4 steps over 17 positions in 2 rows; a shift computes one position more."""
    ratio: dict[str, Any] = {"refresh_ratio": 0.3} if kind == "adaptive" else {}
    got = run(model, cache=kind, steps_per_block=BLOCK, refresh_every=refresh_every, **ratio)
    cached = {
        "prefix": [end + model.logit_shift for end in (12, 8, 4)],
        "dual": [4 + model.logit_shift] * 3,
        "adaptive": [5] * 3,
    }[kind]
    assert got.forwards == NEW
    assert got.computed_tokens == 2 * sum(fresh * 17 + (BLOCK - fresh) * part for part in cached)


@every_cache
def test_rows_do_not_see_each_other(model: LanguageModel, cache: dict[str, Any]) -> None:
    """Rows that need other numbers of steps, and that stop at other places."""
    prompt = tiny.ids(5, PROMPT, seed=4)
    stop = int(run(model, prompt=prompt, threshold=MIDDLE, **cache).ids[0, PROMPT + 5])
    options: dict[str, Any] = {"threshold": MIDDLE, "early_stop": True, "refresh_every": None, **cache}
    together = run(model, prompt=prompt, stop=stop, **options)
    alone = [run(model, prompt=row[None], stop=stop, **options) for row in prompt]
    assert torch.equal(together.ids, torch.cat([one.ids for one in alone]))
    assert len({one.forwards for one in alone}) > 1
    assert max(one.forwards for one in alone) <= together.forwards < sum(one.forwards for one in alone)


@every_cache
def test_an_early_stop_keeps_the_text_before_it(model: LanguageModel, cache: dict[str, Any]) -> None:
    checked = 0
    for seed in range(4):
        prompt = tiny.ids(1, PROMPT, seed=seed)
        plain = run(model, prompt=prompt, threshold=MIDDLE, **cache)
        generated = plain.ids[0, PROMPT:].tolist()
        stop = next(token for token in generated[3:] if token != tiny.MASK)
        at = generated.index(stop)
        got = run(model, prompt=prompt, stop=stop, threshold=MIDDLE, early_stop=True, **cache)
        if tiny.MASK in generated[:at]:  # then the text before it is never done
            continue
        assert got.ids[0, PROMPT:].tolist() == generated[:at] + [stop] * (NEW - at)
        assert got.forwards < plain.forwards or at >= NEW - BLOCK
        checked += 1
    assert checked > 1


def surest_last_but_one(input_ids: Tensor) -> Tensor:
    """Token 2 is the end; it is predicted at position 4, before the masks left of it are gone."""
    logits = torch.zeros((*input_ids.shape, 4))
    logits[..., 1] = 5.0 - torch.arange(input_ids.shape[1]) * 0.5
    logits[:, 4, 1:3] = torch.tensor([0.0, 9.0])
    return logits


def test_a_text_ends_when_all_before_the_end_token_is_done() -> None:
    """Order of commits: 4 (the end), 2, 3; then 5 is filled without a pass, and the second block is never begun."""
    stub = tiny.stub(surest_last_but_one, vocab=4, mask_token_id=3)
    prompt = torch.tensor([[0, 2]])  # an end token of the prompt ends nothing
    options: dict[str, Any] = {"new_tokens": 8, "block_length": 4, "stop_token_id": 2}
    plan = fast_plan(threshold=1.0, early_stop=True)
    got = decoder.decode(stub, prompt, plan=plan, **options)
    assert got.ids.tolist() == [[0, 2, 1, 1, 2, 2, 2, 2, 2, 2]]
    assert got.forwards == 3
    late = decoder.decode(stub, prompt, plan=fast_plan(threshold=1.0), **options)
    assert late.ids.tolist() == [[0, 2, 1, 1, 2, 1, 1, 1, 1, 1]]
    assert late.forwards == 8


def test_a_text_that_has_ended_is_computed_no_more() -> None:
    """The text after prompt 0 ends in its first block of two, that after prompt 1 never: 2 x 2 x 9 positions, then 9 a step."""

    def logits_of(input_ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(2 - input_ids[:, :1].expand(input_ids.shape), 4).float() * 9

    stub = tiny.stub(logits_of, vocab=4, mask_token_id=3)
    plan = fast_plan(steps_per_block=2, early_stop=True)
    got = decoder.decode(stub, torch.tensor([[0], [1]]), new_tokens=8, block_length=2, plan=plan, stop_token_id=2)
    assert got.ids.tolist() == [[0, *[2] * 8], [1, *[1] * 8]]
    assert [len(ids) for ids in stub.network.calls.inputs] == [2, 2, *[1] * 6]  # pyright: ignore
    assert (got.forwards, got.computed_tokens) == (8, 9 * (2 + 2 + 6))


def test_a_network_that_predicts_masks_ends_too() -> None:
    stub = tiny.stub(lambda ids: torch.nn.functional.one_hot(torch.full_like(ids, 3), 4).float(), vocab=4, mask_token_id=3)
    got = decoder.decode(stub, torch.zeros((1, 2), dtype=torch.long), new_tokens=4, block_length=2, plan=fast_plan(threshold=0.9))
    assert got.ids.tolist() == [[0, 0, 3, 3, 3, 3]]
    assert got.forwards == 4


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "either threshold or steps_per_block, got None and None"),
        ({"threshold": 0.5, "steps_per_block": 2}, "either threshold or steps_per_block, got 0.5 and 2"),
        ({"threshold": 90.0}, "threshold must be a probability, got 90.0"),
        ({"steps_per_block": 0}, "steps_per_block must be at least 1, got 0"),
        ({"threshold": 0.5, "suffix_blocks": -1}, "suffix_blocks must be at least 0, got -1"),
        ({"threshold": 0.5, "cache": "dual", "refresh_every": 0}, "refresh_every must be at least 1, got 0"),
        ({"threshold": 0.5, "refresh_every": 4}, "refresh_every must go with a cache, got 4"),
        ({"threshold": 0.5, "cache": "adaptive"}, "refresh_ratio must go with cache='adaptive', got None"),
        ({"threshold": 0.5, "cache": "dual", "refresh_ratio": 0.5}, "refresh_ratio must go with cache='adaptive', got 0.5"),
        ({"threshold": 0.5, "cache": "adaptive", "refresh_ratio": 25.0}, r"a share in \(0, 1\], got 25.0"),
        ({"threshold": 0.5, "late_share": 25.0}, r"late_share must be a share in \(0, 1\), got 25.0"),
    ],
)
def test_plans_that_make_no_sense_are_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fast_plan(**plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 10}, "block_length must divide new_tokens, got 4 and 10"),
        ({"new_tokens": 0}, "block_length must divide new_tokens"),
        ({"plan": fast_plan(threshold=0.5, early_stop=True)}, "must know an end token that is not the mask, got None"),
        ({"plan": fast_plan(threshold=0.5, early_stop=True), "stop_token_id": 3}, "that is not the mask, got 3"),
        ({"plan": fast_plan(threshold=0.5, late_share=0.2)}, "late_share must leave 1 to 3 of 4 positions masked, got 0.2"),
    ],
)
def test_bad_input_is_refused_before_any_forward_pass(options: dict[str, Any], message: str) -> None:
    stub = tiny.stub(ramp, vocab=4, mask_token_id=3)
    defaults: dict[str, Any] = {"new_tokens": 8, "block_length": 4, "plan": fast_plan(threshold=0.5)}
    with pytest.raises(InputError, match=message):
        decoder.decode(stub, torch.zeros((1, 2), dtype=torch.long), **{**defaults, **options})
    assert stub.network.calls.forwards == 0  # pyright: ignore


def test_an_autoregressive_model_is_refused() -> None:
    stub = tiny.stub(ramp, vocab=4, mask_token_id=None, is_causal=True)
    with pytest.raises(InputError, match="use continue_text"):
        decoder.decode(stub, torch.zeros((1, 2), dtype=torch.long), new_tokens=4, block_length=4, plan=fast_plan(threshold=1.0))
