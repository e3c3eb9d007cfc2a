"""Decoders side by side: the texts are the decoders' own, counts and likelihoods by hand, answers through lm_eval."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.decoding import decoder
from lib.decoding.decoder import Decoded
from lib.decoding.systems import fast_plan
from lib.diffusion import sampler
from lib.models import language_model
from lib.models.language_model import LanguageModel
from lib.studies.timing import runs as decoding_runs
from lib.studies.timing.runs import PLAIN, Plan, Workload
from lib.timing import clock as timing
from tests import tiny

PROMPT, NEW, BLOCK = 5, 8, 4
SIZES: dict[str, Any] = {"new_tokens": NEW, "block_length": BLOCK}
DUAL = fast_plan(cache="dual", threshold=0.2)
PLANS: dict[str, Plan] = {"fast": DUAL, "slow": PLAIN, "schedule": fast_plan(steps_per_block=2)}


@pytest.fixture(scope="module")
def dlm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("dlm"), causal=False)


@pytest.fixture(scope="module")
def ar(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("ar"), causal=True, seed=1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Seconds 1, 2, 3 for the first call of a round, 2, 4, 6 for the second and so on; collects what is timed."""
    seen: list[list[str]] = []

    def interleaved(calls: Mapping[str, Any], *, repeats: int, warm_up: int, device: torch.device) -> dict[str, Tensor]:
        seen.append([*calls])
        for call in calls.values():
            call()
        rounds = torch.arange(1, repeats + 1, dtype=torch.float64)
        return {name: number * rounds for number, name in enumerate(calls, 1)}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    return seen


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_texts_and_counts_are_those_of_the_decoders(dlm: LanguageModel, clock: list[list[str]], batch_size: int) -> None:
    prompts = tiny.ids(3, PROMPT, seed=2)
    runs = decoding_runs.compare(dlm, prompts, PLANS, Workload(NEW, BLOCK, repeats=3, batch_size=batch_size, timed_prompts=2))
    assert clock == [[" + fast", " + slow", " + schedule"]]  # one set of rounds for all
    fast, slow, schedule = runs
    assert [run.decoder for run in runs] == list(PLANS) and [run.plan for run in runs] == list(PLANS.values())
    parts = prompts.split(batch_size)
    alone = [decoder.decode(dlm, part, **SIZES, plan=DUAL) for part in parts]
    assert torch.equal(fast.new, torch.cat([part.ids for part in alone])[:, PROMPT:])
    assert (fast.forwards, fast.computed_tokens) == (sum(p.forwards for p in alone), sum(p.computed_tokens for p in alone))
    assert torch.equal(slow.new, sampler.sample(dlm, prompts, **SIZES, steps=NEW)[:, PROMPT:])
    assert (slow.forwards, slow.computed_tokens) == (NEW * len(parts), 3 * NEW * (PROMPT + NEW))
    assert torch.equal(schedule.new, sampler.sample(dlm, prompts, **SIZES, steps=4)[:, PROMPT:])
    assert slow.seconds.tolist() == [2.0, 4.0, 6.0] and slow.timed_tokens == 2 * NEW and slow.nats is None
    assert all(bool(run.is_text.all()) for run in runs)  # no tokenizer, no end tokens


def test_a_grid_runs_every_decoder_on_every_format_in_one_set_of_rounds(dlm: LanguageModel, clock: list[list[str]]) -> None:
    other = tiny.network(causal=False, seed=5)
    changed = dataclasses.replace(dlm, network=other, layers=language_model.linear_layers(other))
    prompts, plans = tiny.ids(2, PROMPT), {"slow": PLAIN, "fast": DUAL}
    runs = decoding_runs.grid({"dense": dlm, "other": changed}, prompts, plans, Workload(NEW, BLOCK, repeats=2))
    assert list(runs) == [("dense", "slow"), ("dense", "fast"), ("other", "slow"), ("other", "fast")]
    assert [runs[key].seconds[0] for key in runs] == [1, 2, 3, 4] and len(clock) == 1 and len(clock[0]) == 4
    for (kind, name), run in runs.items():
        model = {"dense": dlm, "other": changed}[kind]
        expected = decoding_runs.run_decoder(model, prompts, plans[name], **SIZES, batch_size=1)
        assert torch.equal(run.new, expected.ids[:, PROMPT:])
    assert not torch.equal(runs["dense", "slow"].new, runs["other", "slow"].new)


def test_a_text_is_judged_up_to_its_end_by_what_follows_what(ar: LanguageModel) -> None:
    """Against one pass a token: position i is predicted from the tokens before it."""
    ids = tiny.ids(3, PROMPT + NEW, seed=3)
    is_text = torch.arange(NEW)[None] < torch.tensor([[NEW], [3], [1]])
    got = decoding_runs.judged(ar, ids, is_text)
    for row, count in enumerate((NEW, 3, 1)):
        total = 0.0
        for position in range(PROMPT, PROMPT + count):
            with torch.inference_mode():
                logits = ar.network(input_ids=ids[row : row + 1, :position]).logits[0, -1]
            total -= float(logits.double().log_softmax(-1)[ids[row, position]])
        assert float(got[row]) == pytest.approx(total / count, rel=1e-4)
    many = torch.cat([ids] * 12)  # more rows than are read at one time
    assert torch.allclose(decoding_runs.judged(ar, many, torch.cat([is_text] * 12)), torch.cat([got] * 12), rtol=1e-5)


def test_compare_judges_new_tokens_and_stops_texts_at_the_end_token(
    dlm: LanguageModel, ar: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "[EOS]"
    own, judge = (dataclasses.replace(model, tokenizer=tokenizer) for model in (dlm, ar))
    prompts = tiny.ids(2, PROMPT)
    texts = torch.tensor([[7, 8, 7, 2, 7, 7, 7, 7], [4, 5, 6, 7, 8, 9, 10, 11]])
    made = Decoded(torch.cat([prompts, texts], dim=1), 1, 1)
    monkeypatch.setattr(decoding_runs, "run_decoder", lambda *_, **__: made)
    (run,) = decoding_runs.compare(own, prompts, {"slow": PLAIN}, Workload(NEW, BLOCK, repeats=1), judge=judge)
    assert run.is_text.sum(1).tolist() == [4, 8]
    assert run.distinct.tolist() == [0.75, 1.0]
    assert run.nats is not None and torch.equal(run.nats, decoding_runs.judged(judge, made.ids, run.is_text))


def test_an_early_stop_knows_the_tokenizers_end(dlm: LanguageModel) -> None:
    tokenizer = tiny.tokenizer()
    plain = decoder.decode(dlm, tiny.ids(1, PROMPT), **SIZES, plan=fast_plan(threshold=1.0)).ids[0, PROMPT:]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(plain[1]))
    own = dataclasses.replace(dlm, tokenizer=tokenizer)
    plan = fast_plan(threshold=1.0, early_stop=True)
    got = decoding_runs.run_decoder(own, tiny.ids(1, PROMPT), plan, **SIZES, batch_size=1).ids[0, PROMPT:]
    assert got[1:].tolist() == [int(plain[1])] * (NEW - 1)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plans": {"fast": DUAL}}, "must hold the plain sampler once, to compare with, got 0"),
        ({"plans": {"a": PLAIN, "b": PLAIN}}, "got 2 of them"),
        ({"prompts": tiny.ids(1, PROMPT)}, "prompts must be two or more, as intervals are over prompts, got 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(dlm: LanguageModel, changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"prompts": tiny.ids(2, PROMPT), "plans": PLANS, **changes}
    prompts, plans = given["prompts"], given["plans"]
    with pytest.raises(InputError, match=message):
        decoding_runs.compare(dlm, prompts, plans, Workload(NEW, BLOCK, repeats=1))
    with pytest.raises(InputError, match=message):
        decoding_runs.grid({"dense": dlm}, prompts, plans, Workload(NEW, BLOCK, repeats=1))


def test_judges_that_cannot_judge_are_refused(dlm: LanguageModel, ar: LanguageModel, tmp_path: Path) -> None:
    prompts = tiny.ids(2, PROMPT)
    with pytest.raises(InputError, match="a judge must be autoregressive"):
        decoding_runs.compare(dlm, prompts, PLANS, Workload(NEW, BLOCK, repeats=1), judge=dlm)
    own = dataclasses.replace(dlm, tokenizer=tiny.tokenizer())
    foreign = dataclasses.replace(ar, tokenizer=tiny.words())
    with pytest.raises(InputError, match="a judge must have the tokens of"):
        decoding_runs.compare(own, prompts, PLANS, Workload(NEW, BLOCK, repeats=1), judge=foreign)
    with pytest.raises(InputError, match="at least one model"):
        decoding_runs.grid({}, prompts, PLANS, Workload(NEW, BLOCK, repeats=1))
