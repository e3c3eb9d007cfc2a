"""Likelihoods and generation for lm_eval: against slow loops over single masks, single tokens and single requests."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lib.core.config import ROOT
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion import likelihood, sampler
from lib.evaluation import harness, scoring, sums
from lib.evaluation.harness import HarnessModel, denoising_plan
from lib.evaluation.scoring import EvaluationSettings, Passage, score
from lib.models.language_model import LanguageModel
from lib.texts.encoding import encode_pair
from tests import tiny

PAIRS = [
    ("w1 w2 w3", " w4 w5"),
    ("w1 w2 w3", " w6"),
    ("w9", " w8 w7 w6 w5"),
    ("w1 w2", " w4 w5 w0"),
    ("w3 w3", " w3 w3 w3"),
]
PLAIN = EvaluationSettings(draws=3)
LENGTH = 64  # of the tiny networks


@pytest.fixture(scope="module")
def reference_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "models" / "reference" / "dlm")


def requests(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


def likelihoods(model: LanguageModel, pairs: Sequence[tuple[str, str]], options: EvaluationSettings = PLAIN) -> list[float]:
    found = HarnessModel(model, settings=options).loglikelihood(requests("loglikelihood", pairs))
    return [value for value, _ in found]


def generations(model: LanguageModel, contexts: Sequence[tuple[str, Any]], options: EvaluationSettings) -> list[str]:
    return HarnessModel(model, settings=options).generate_until(requests("generate_until", contexts))


def words(text: str) -> list[int]:
    return [3 + int(word[1:]) for word in text.split()]


def log_probs(model: LanguageModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.network(input_ids=ids[None], use_cache=False).logits[0].double()


def slow_bound(model: LanguageModel, context: str, continuation: str, *, draws: int, seed: int = 0, cfg: float = 0.0) -> float:
    """LLaDA's estimator token by token: one mask, one forward pass, one target after the other."""
    head, tail = [1, *words(context)], words(continuation)
    ids = torch.tensor(head + tail)
    target = torch.arange(len(ids)) >= len(head)
    stream = generator(seed, "likelihood", context, continuation)
    values = []
    for mask in likelihood.exact_count_masks(target, draws, generator=stream):
        noised = torch.where(mask, tiny.MASK, ids)
        logits = log_probs(model, noised)
        if cfg:
            blind = log_probs(model, torch.where(target, noised, tiny.MASK))
            logits = blind + (1 + cfg) * (logits - blind)
        hidden = [position for position in range(len(ids)) if mask[position]]
        total = sum(float(logits[position].log_softmax(0)[ids[position]]) for position in hidden)
        values.append(total * len(tail) / len(hidden))
    return sum(values) / draws


# Likelihood of a diffusion model


@pytest.mark.parametrize("cfg", [0.0, 0.5, 2.0])
def test_the_bound_equals_a_slow_loop(dlm: LanguageModel, cfg: float) -> None:
    got = likelihoods(dlm, PAIRS, EvaluationSettings(draws=3, cfg_scale=cfg))
    expected = [slow_bound(dlm, *pair, draws=1 if pair[1] == " w6" else 3, cfg=cfg) for pair in PAIRS]
    assert got == pytest.approx(expected, abs=1e-4)


def test_guidance_moves_the_likelihood(dlm: LanguageModel) -> None:
    plain, guided = (likelihoods(dlm, PAIRS, EvaluationSettings(draws=3, cfg_scale=scale)) for scale in (0.0, 0.5))
    assert max(abs(a - b) for a, b in zip(plain, guided, strict=True)) > 0.1


def test_one_token_is_exact_whatever_the_draws(dlm: LanguageModel) -> None:
    logits = log_probs(dlm, torch.tensor([1, *words("w1 w2 w3"), tiny.MASK]))
    expected = float(logits[-1].log_softmax(0)[9])
    for draws in (1, 7):
        assert likelihoods(dlm, [PAIRS[1]], EvaluationSettings(draws=draws)) == pytest.approx([expected])


def test_it_is_the_estimator_of_the_library(dlm: LanguageModel) -> None:
    context, continuation = PAIRS[2]
    ids = torch.tensor([1, *words(context), *words(continuation)])
    stream = generator(5, "likelihood", context, continuation)
    expected = likelihood.masked_log_likelihood(dlm, ids, torch.arange(len(ids)) >= 2, draws=8, generator=stream)
    got = likelihoods(dlm, [PAIRS[2]], EvaluationSettings(draws=8, seed=5))
    assert got == pytest.approx([float(expected.mean())], abs=1e-5)


@pytest.mark.parametrize("kind", ["dlm", "causal"])
@pytest.mark.parametrize("cfg", [0.0, 0.5])
def test_neither_batch_size_nor_order_nor_company_changes_a_result(request: pytest.FixtureRequest, kind: str, cfg: float) -> None:
    model = request.getfixturevalue(kind)
    if model.is_causal:
        cfg = 0.0
    options = EvaluationSettings(draws=5, batch_size=64, cfg_scale=cfg)
    whole = likelihoods(model, PAIRS, options)
    for size in (1, 2, 3):
        assert likelihoods(model, PAIRS, dataclasses.replace(options, batch_size=size)) == pytest.approx(whole, abs=1e-5)
    assert likelihoods(model, PAIRS[::-1], options)[::-1] == pytest.approx(whole, abs=1e-5)
    assert likelihoods(model, PAIRS[2:3], options) == pytest.approx(whole[2:3], abs=1e-5)


def test_masks_depend_on_seed_and_texts(dlm: LanguageModel) -> None:
    first, second = (likelihoods(dlm, PAIRS, EvaluationSettings(draws=2, seed=seed)) for seed in (0, 1))
    assert first[1] == second[1]  # one token
    assert all(abs(a - b) > 1e-3 for index, (a, b) in enumerate(zip(first, second, strict=True)) if index != 1)


def test_a_diffusion_model_never_claims_greediness() -> None:
    """Even where every masked token is the likeliest one."""
    table = torch.nn.functional.one_hot(torch.full((tiny.VOCAB,), 7), tiny.VOCAB).double()
    model = tiny.stub(lambda ids: table[ids], vocab=tiny.VOCAB, mask_token_id=tiny.MASK)
    passages = [Passage((1, 5, 7, 7), start, (start,)) for start in (2, 3)]
    assert [greedy for _, greedy in score(model, passages, settings=PLAIN)] == [False, False]
    causal = tiny.stub(lambda ids: table[ids], vocab=tiny.VOCAB, mask_token_id=None, is_causal=True)
    assert [greedy for _, greedy in score(causal, passages, settings=PLAIN)] == [True, True]


def test_rows_that_read_the_same_go_through_the_network_once() -> None:
    table = torch.randn(tiny.VOCAB, tiny.VOCAB, generator=generator(0), dtype=torch.float64)
    model = tiny.stub(lambda ids: table[ids], vocab=tiny.VOCAB, mask_token_id=tiny.MASK)
    choices = [Passage((1, 5, 6, token), 3, ("a", token)) for token in (7, 8, 9, 10)]
    other = Passage((1, 5, 7, 10), 3, ("b", 10))
    found = score(model, [*choices, other], settings=PLAIN)
    assert [tuple(ids.shape) for ids in model.network.calls.inputs] == [(2, 4)]  # pyright: ignore
    expected = table[tiny.MASK].log_softmax(0)
    assert [value for value, _ in found] == pytest.approx([float(expected[token]) for token in (7, 8, 9, 10, 10)], abs=1e-6)


def test_rows_that_differ_in_what_counts_as_prompt_are_kept_apart(dlm: LanguageModel) -> None:
    """Same tokens, same mask, but guidance blinds another part."""
    ids = (1, *words("w1 w2 w3 w4"))
    options = EvaluationSettings(draws=1, cfg_scale=1.0)
    short, long = Passage(ids, 4, ("x",)), Passage(ids, 3, ("y",))
    seeds = [seed for seed in range(40) if _masks_last_only(long, seed)]
    options = dataclasses.replace(options, seed=seeds[0])
    together = [value for value, _ in score(dlm, [short, long], settings=options)]
    alone = [score(dlm, [passage], settings=options)[0][0] for passage in (short, long)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert together[1] != pytest.approx(2 * together[0], abs=1e-3)


def _masks_last_only(passage: Passage, seed: int) -> bool:
    target = torch.arange(len(passage.ids)) >= passage.start
    mask = likelihood.exact_count_masks(target, 1, generator=generator(seed, *passage.stream))[0]
    return mask.tolist() == [False, False, False, False, True]


# Likelihood of an autoregressive model


def test_an_autoregressive_likelihood_is_exact(causal: LanguageModel) -> None:
    expected = []
    for context, continuation in PAIRS:
        ids = torch.tensor([1, *words(context), *words(continuation)])
        logits = log_probs(causal, ids)
        first = 1 + len(words(context))
        expected.append(sum(float(logits[at - 1].log_softmax(0)[ids[at]]) for at in range(first, len(ids))))
    assert likelihoods(causal, PAIRS) == pytest.approx(expected, abs=1e-4)


def test_greediness_is_exact_for_an_autoregressive_model(causal: LanguageModel) -> None:
    prompt = (1, *words("w1 w2"))
    best = sampler.continue_text(causal, torch.tensor([prompt]), new_tokens=3)[0].tolist()
    spoiled = [*best[:-1], (best[-1] + 1) % tiny.MASK]
    passages = [Passage(tuple(ids), 3, ()) for ids in (best, spoiled)]
    assert [greedy for _, greedy in score(causal, passages, settings=PLAIN)] == [True, False]


# Tokens


def test_white_space_goes_to_the_continuation(reference_tokenizer: Any) -> None:
    split = encode_pair(reference_tokenizer, "Topic:", " Geography")
    assert encode_pair(reference_tokenizer, "Topic: ", "Geography") == split
    assert encode_pair(reference_tokenizer, "Topic:\n ", "Geography")[0] == split[0]
    assert split[0] == reference_tokenizer("Topic:")["input_ids"]
    assert split[0][0] == reference_tokenizer.bos_token_id
    assert reference_tokenizer.decode(split[1]) == " Geography"
    separate = reference_tokenizer("Geography", add_special_tokens=False)["input_ids"]
    assert separate != split[1]


@pytest.mark.parametrize("context", ["", " "])
def test_an_empty_context_is_the_beginning_of_a_text(reference_tokenizer: Any, context: str) -> None:
    head, tail = encode_pair(reference_tokenizer, context, "Geography")
    assert head == [reference_tokenizer.bos_token_id]
    assert reference_tokenizer.decode(tail) == context + "Geography"


def test_a_tokenizer_without_bos_begins_with_the_end_of_text() -> None:
    made = tiny.words()
    made.backend_tokenizer.post_processor = None  # pyright: ignore
    made.bos_token = None  # pyright: ignore
    assert encode_pair(made, "", "w1 w2") == ([2], [4, 5])


def ending() -> Any:
    """The words, by a tokenizer that also puts an end behind every text."""
    made = tiny.tokenizer()
    template = TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)])
    made.backend_tokenizer.post_processor = template  # pyright: ignore
    return made


@pytest.mark.parametrize("kind", ["dlm", "causal"])
def test_an_end_that_the_tokenizer_appends_changes_no_likelihood_and_no_answer(request: pytest.FixtureRequest, kind: str) -> None:
    plain = request.getfixturevalue(kind)
    other = dataclasses.replace(plain, tokenizer=ending())
    assert ending()("w1")["input_ids"] == [1, 4, 2]
    assert likelihoods(other, PAIRS) == likelihoods(plain, PAIRS)
    contexts = [("w1 w2", {}), ("w3", {}), ("", {})]
    assert generations(other, contexts, SHORT) == generations(plain, contexts, SHORT)
    found = [HarnessModel(model, settings=PLAIN).minus_nelbo(["w1 w2 w3", "w4"]) for model in (other, plain)]
    assert found[0] == found[1]
    rows = [{"question": "w1 w2", "answer": "w3 w4"}, {"question": "w5", "answer": "w6"}]
    losses = [sums.answer_loss(model, rows, draws=3, seed=0) for model in (other, plain)]
    assert torch.equal(losses[0], losses[1])
    assert sums.answer_sums(other, rows) == sums.answer_sums(plain, rows)


def test_tokens_of_context_and_continuation_are_counted(causal: LanguageModel) -> None:
    """Letters of which "bc" is one token: the answer c of "b" is scored as "bc", and the result says so."""
    vocab = {"[UNK]": 0, "[BOS]": 1, "[EOS]": 2, "a": 3, "b": 4, "c": 5, "bc": 6}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocab, [("b", "c")], unk_token="[UNK]")), bos_token="[BOS]", eos_token="[EOS]"
    )
    adapter = HarnessModel(dataclasses.replace(causal, tokenizer=made), settings=PLAIN)
    got = adapter.loglikelihood(requests("loglikelihood", [("ab", "c"), ("ab", "a")]))
    assert adapter.merged == 1
    assert [value for value, _ in got] == pytest.approx(
        [score(causal, [Passage(ids, start, ())], settings=PLAIN)[0][0] for ids, start in (((3, 6), 1), ((3, 4, 3), 2))]
    )


@pytest.mark.parametrize("kind", ["dlm", "causal"])
def test_a_context_that_is_too_long_loses_its_beginning(request: pytest.FixtureRequest, kind: str) -> None:
    model = request.getfixturevalue(kind)
    adapter = HarnessModel(model, settings=PLAIN)
    context = " ".join(f"w{number % 10}" for number in range(80))
    got = adapter.loglikelihood(requests("loglikelihood", [(context, " w4"), ("w1", " w4")]))
    assert adapter.truncated == 1
    kept = (*words(context)[-(LENGTH - 1) :], 7)
    assert got[0] == pytest.approx(score(model, [Passage(kept, LENGTH - 1, ("x",))], settings=PLAIN)[0], abs=1e-5)


@pytest.mark.parametrize(("kind", "longest"), [("dlm", LENGTH), ("causal", LENGTH - 1)])
def test_a_continuation_must_fit(request: pytest.FixtureRequest, kind: str, longest: int) -> None:
    model = request.getfixturevalue(kind)
    fits, too_long = (" " + " ".join(["w1"] * count) for count in (longest, longest + 1))
    assert len(likelihoods(model, [("w5", fits)])) == 1
    with pytest.raises(InputError, match=f"fit into the model's {LENGTH} tokens.*got {longest + 1} tokens: shorten"):
        likelihoods(model, [("w5", too_long)])


def test_a_shorter_length_can_be_asked_for(dlm: LanguageModel) -> None:
    adapter = HarnessModel(dlm, settings=EvaluationSettings(max_length=4))
    assert adapter.max_length == 4
    assert HarnessModel(dlm, settings=EvaluationSettings(max_length=400)).max_length == LENGTH
    adapter.loglikelihood(requests("loglikelihood", [("w1 w2 w3 w4", " w4 w5")]))
    assert adapter.truncated == 1


def test_an_empty_continuation_is_refused(dlm: LanguageModel) -> None:
    with pytest.raises(InputError, match="at least one token, got ''"):
        likelihoods(dlm, [("w1", "")])


# Whole texts


@pytest.mark.parametrize("count", [5, LENGTH - 1])
def test_a_short_text_is_one_window_behind_bos(dlm: LanguageModel, count: int) -> None:
    text = " ".join(f"w{number % 7}" for number in range(count))
    ids = torch.tensor([1, *words(text)])
    stream = generator(0, "rolling", text, 0)
    expected = likelihood.masked_log_likelihood(dlm, ids, torch.arange(len(ids)) > 0, draws=3, generator=stream).mean()
    adapter = HarnessModel(dlm, settings=PLAIN)
    assert adapter.minus_nelbo([text]) == pytest.approx([float(expected)], abs=1e-3)
    rolled = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,), ("w1",)]))
    assert rolled[0] == pytest.approx(float(expected), abs=1e-3)


def test_long_texts_of_an_autoregressive_model_are_exact_and_kept_apart(causal: LanguageModel) -> None:
    """Windows of 64 tokens: 63 behind BOS, 63 behind the last of them, and the rest with as much past as fits."""
    long = " ".join(f"w{number * number % 10}" for number in range(150))
    ids = words(long)
    windows = [([1], ids[:63]), ([ids[62]], ids[63:126]), (ids[150 - 64 : 126], ids[126:])]
    expected = 0.0
    for past, target in windows:
        both = torch.tensor(past + target)
        logits = log_probs(causal, both)
        expected += sum(float(logits[at - 1].log_softmax(0)[both[at]]) for at in range(len(past), len(both)))
    adapter = HarnessModel(causal, settings=PLAIN)
    both = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", [(long,), ("w3 w1",)]))
    assert both[0] == pytest.approx(expected, abs=1e-3)
    assert both[1] == pytest.approx(adapter.minus_nelbo(["w3 w1"])[0], abs=1e-5)
    assert adapter.minus_nelbo([""]) == [0.0]
    assert adapter.truncated == 0


# Generation


CONTEXTS = ["w1 w2 w3", "w4", "w5 w6 w7", "w8 w9", "w0"]
SHORT = EvaluationSettings(gen_length=6, steps=3, block_length=2)


def raw(model: LanguageModel, context: str, *, new: int = 6, **options: Any) -> list[int]:
    prompt = torch.tensor([[1, *words(context)]])
    if model.is_causal:
        return sampler.continue_text(model, prompt, new_tokens=new)[0, prompt.shape[1] :].tolist()
    return sampler.sample(model, prompt, new_tokens=new, **options)[0, prompt.shape[1] :].tolist()


def decoded(ids: list[int]) -> str:
    made = tiny.tokenizer()
    kept = ids[: ids.index(2)] if 2 in ids else ids
    return cast(str, made.decode([token for token in kept if token not in made.all_special_ids]))


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_generation_equals_the_sampler_one_at_a_time(dlm: LanguageModel, size: int, cfg: float) -> None:
    options = dataclasses.replace(SHORT, batch_size=size, cfg_scale=cfg)
    got = generations(dlm, [(context, {"until": []}) for context in CONTEXTS], options)
    each = [raw(dlm, context, steps=3, block_length=2, cfg_scale=cfg) for context in CONTEXTS]
    assert [text.split() for text in got] == [decoded(ids).split() for ids in each]


@pytest.mark.parametrize("size", [1, 16])
def test_autoregressive_generation_is_greedy_continuation(causal: LanguageModel, size: int) -> None:
    got = generations(causal, [(context, {}) for context in CONTEXTS], dataclasses.replace(SHORT, batch_size=size))
    assert [text.split() for text in got] == [decoded(raw(causal, context)).split() for context in CONTEXTS]


def test_requests_of_one_length_share_forward_passes(dlm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    keep = sampler.sample

    def watch(model: LanguageModel, prompt: Tensor, **options: Any) -> Tensor:
        shapes.append((tuple(prompt.shape), options["new_tokens"]))
        return keep(model, prompt, **options)

    monkeypatch.setattr(harness.sampler, "sample", watch)
    generations(dlm, [*((context, {}) for context in CONTEXTS), ("w3", {"max_gen_toks": 2})], SHORT)
    assert sorted(shapes) == [((1, 2), 2), ((1, 3), 6), ((2, 2), 6), ((2, 4), 6)]


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: str) -> None:
    """Let every generation be the same words."""
    row = torch.tensor([tiny.tokenizer()(tokens, add_special_tokens=False)["input_ids"]])
    monkeypatch.setattr(harness.sampler, "sample", lambda model, prompt, **_: torch.cat([prompt, row.expand(len(prompt), -1)], 1))


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        ([], "w1 w2 w3 w4"),
        (["w3"], "w1 w2"),
        ("w2", "w1"),
        (["w4", "w2 w3"], "w1"),
        (["w"], ""),
        (["", "w9"], "w1 w2 w3 w4"),
        (["[MASK]"], "w1 w2"),
    ],
)
def test_texts_end_at_the_first_stop_string(
    dlm: LanguageModel, monkeypatch: pytest.MonkeyPatch, until: Any, expected: str
) -> None:
    scripted(monkeypatch, "w1 w2 [MASK] w3 w4 [EOS]" if "[MASK]" in until else "w1 w2 w3 w4 [EOS] w5")
    assert generations(dlm, [("w1", {"until": until})], SHORT)[0].strip() == expected


def test_texts_end_at_the_configured_end_token_too(dlm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "w1 w2 w3 w4 w5 w6")
    assert dlm.network.config.eos_token_id == 2
    monkeypatch.setattr(dlm.network.config, "eos_token_id", [2, 3 + 4])
    assert generations(dlm, [("w1", {})], SHORT)[0].split() == ["w1", "w2", "w3"]


@pytest.mark.parametrize(("asked", "expected"), [(2, 2), (5, 5), (6, 6), (600, 6)])
@pytest.mark.parametrize("kind", ["dlm", "causal"])
def test_a_request_gets_the_tokens_it_asks_for_up_to_the_most(
    request: pytest.FixtureRequest, kind: str, asked: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(kind)
    seen = []
    monkeypatch.setattr(HarnessModel, "_text", lambda self, ids, until: seen.append(ids) or "")
    generations(model, [("w1 w2", {"max_gen_toks": asked})], SHORT)
    assert len(seen[0]) == expected
    length, steps, block = denoising_plan(expected, SHORT)
    whole = raw(model, "w1 w2", new=length, **({} if model.is_causal else {"steps": steps, "block_length": block}))
    assert seen[0] == whole[:expected]


@pytest.mark.parametrize("kind", ["dlm", "causal"])
def test_a_prompt_keeps_its_end_when_too_long(request: pytest.FixtureRequest, kind: str) -> None:
    model = request.getfixturevalue(kind)
    adapter = HarnessModel(model, settings=SHORT)
    context = " ".join(f"w{number % 10}" for number in range(90))
    prompt = torch.tensor([words(context)[-(LENGTH - 6) :]])
    if model.is_causal:
        whole = sampler.continue_text(model, prompt, new_tokens=6)
    else:
        whole = sampler.sample(model, prompt, new_tokens=6, steps=3, block_length=2)
    got = adapter.generate_until(requests("generate_until", [(context, {})]))[0]
    assert got.split() == decoded(whole[0, -6:].tolist()).split()
    assert adapter.truncated == 1


def test_what_cannot_be_generated_is_refused(dlm: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"greedy, got do_sample True, temperature 0\.7: set do_sample: false"):
        generations(dlm, [("w1", {"do_sample": True, "temperature": 0.7})], SHORT)
    assert len(generations(dlm, [("w1", {"do_sample": True, "temperature": 0.0})], SHORT)) == 1
    too_long = EvaluationSettings(gen_length=64)
    with pytest.raises(InputError, match="leave room in the model's 64 tokens, got 64"):
        generations(dlm, [("w1", {})], too_long)


@given(new=st.integers(1, 100), block=st.sampled_from([1, 2, 4, 8, 16]), blocks=st.integers(1, 6), per_block=st.integers(1, 16))
@settings(max_examples=100, deadline=None)
def test_a_plan_fits_the_sampler(new: int, block: int, blocks: int, per_block: int) -> None:
    options = EvaluationSettings(gen_length=block * blocks, steps=blocks * per_block, block_length=block)
    length, steps, used = denoising_plan(new, options)
    assert length >= new
    assert length - new < length // used, "the least surplus of so many equal blocks"
    assert used <= block
    most = min(block, new)
    if any(new % own == 0 for own in range(most // 2 + 1, most + 1)):
        assert length == new, "an answer is written in as many tokens as it has"
    assert length % used == 0
    assert steps % (length // used) == 0
    assert denoising_plan(block * blocks, options) == (block * blocks, blocks * per_block, block)


# The adapter as lm_eval sees it


def test_it_is_one_process_on_the_models_device(dlm: LanguageModel) -> None:
    adapter: LM = HarnessModel(dlm, settings=PLAIN)
    assert (adapter.rank, adapter.world_size, adapter.device) == (0, 1, torch.device("cpu"))


def test_models_that_cannot_be_asked_are_refused(causal: LanguageModel, dlm: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"guidance must go with a diffusion model, got cfg_scale 0\.5"):
        HarnessModel(causal, settings=EvaluationSettings(cfg_scale=0.5))
    with pytest.raises(InputError, match="tokenizer"):
        HarnessModel(dataclasses.replace(dlm, tokenizer=None), settings=PLAIN)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"draws": 0}, "draws must be at least 1"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"cfg_scale": -0.5}, "must not be negative"),
        ({"gen_length": 64, "block_length": 48}, "block_length must divide"),
        ({"gen_length": 64, "block_length": 16, "steps": 6}, "multiple of the 4 blocks"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        EvaluationSettings(**change)


def test_batches_are_as_large_as_allowed(dlm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    keep: Callable[..., Any] = scoring.log_likelihoods
    monkeypatch.setattr(scoring, "log_likelihoods", lambda m, rows, **o: sizes.append(len(rows)) or keep(m, rows, **o))
    likelihoods(dlm, PAIRS, EvaluationSettings(draws=5, batch_size=4))
    # By length: the pair with one target token alone, then four pairs of five draws each.
    assert sizes == [1, *[4] * 5]
