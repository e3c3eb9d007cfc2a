"""What people do with a model of uniform or mixed noise: it works as with masks, or says in one line why not, before any work."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from lib.attention import masses
from lib.calibration import measured_weights, sets
from lib.calibration.token_weights import Weighting
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.decoding import decoder, late_steps, systems
from lib.diffusion import drawn_likelihood, likelihood, noise, sampler, traces
from lib.evaluation import pseudo_perplexity, sums
from lib.evaluation.harness import BatchedHarness, HarnessModel
from lib.evaluation.scoring import EvaluationSettings, Passage, score
from lib.models import export, loading
from lib.models.language_model import LanguageModel, logits_at
from lib.pruning import methods, phases, pruner
from lib.studies.joint import runs as joint_runs
from lib.studies.timing import runs as timing_runs
from lib.studies.traces import tables as trace_tables
from lib.studies.variance import noise_match, sink_effect
from lib.studies.variance import tables as variance_tables
from tests import tiny

LENGTH = 16
every_kind = pytest.mark.parametrize("kind", tiny.NOISES)


@pytest.fixture(params=list(tiny.NOISES))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> LanguageModel:
    return tiny.of_noise(tmp_path / "model", request.param)


@pytest.fixture
def speaking(model: LanguageModel) -> LanguageModel:
    """The same with a tokenizer."""
    return dataclasses.replace(model, tokenizer=tiny.tokenizer())


def windows(count: int = 2) -> Tensor:
    return tiny.ids(count, LENGTH)


def own_bound(model: LanguageModel, ids: Tensor, where: Tensor, stream: torch.Generator, *, draws: int) -> Tensor:
    """Minus the summed integrand of each noised copy, one copy and one time after the other."""
    process = noise.process_of(model)
    drawn = drawn_likelihood.draw(process, ids, where, draws=draws, generator=stream)
    found = []
    for noisy, count in zip(drawn.noisy, drawn.counts.tolist(), strict=True):
        logits = logits_at(model, noisy[None], where[None]).clone()
        logits[:, tiny.MASK] = float("-inf")
        times, weights = drawn_likelihood.times_given_count(count, int(where.sum()))
        terms = [
            float(process.loss(logits.log_softmax(-1), ids[where], noisy[where], time.float().expand(int(where.sum()))).sum())
            for time in times
        ]
        found.append(-sum(float(weight) * term for weight, term in zip(weights, terms, strict=True)))
    return torch.tensor(found, dtype=torch.float64)


def test_bounds_are_those_of_the_models_own_noise(model: LanguageModel) -> None:
    found = likelihood.nelbo(model, windows(), draws=3, seed=5)
    everywhere = torch.ones(LENGTH, dtype=torch.bool)
    for index, ids in enumerate(windows()):
        wanted = -own_bound(model, ids, everywhere, generator(5, "nelbo", index), draws=3).mean() / LENGTH
        assert float(found.per_window[index]) == pytest.approx(float(wanted), rel=1e-4)
    again = likelihood.nelbo(model, windows(), draws=3, seed=5, batch_size=4)
    torch.testing.assert_close(found.per_window, again.per_window, rtol=1e-5, atol=1e-6)


def test_choices_are_scored_behind_a_clean_prompt(model: LanguageModel) -> None:
    """The same bound whoever asks: the library, the harness's scorer, the loss of answers to sums; one token is noised too."""
    ids, settings = windows(1)[0], EvaluationSettings(draws=4, seed=2, batch_size=3)
    passages = [Passage(tuple(ids.tolist()), start, ("one", start)) for start in (12, 15)]
    for passage, (value, is_greedy) in zip(passages, score(model, passages, settings=settings), strict=True):
        where = torch.arange(LENGTH) >= passage.start
        wanted = own_bound(model, ids, where, generator(2, *passage.stream), draws=4)
        assert value == pytest.approx(float(wanted.mean()), rel=1e-4) and not is_greedy
    alone = score(model, passages[1:], settings=dataclasses.replace(settings, batch_size=1))
    assert alone[0][0] == pytest.approx(score(model, passages, settings=settings)[1][0], rel=1e-4)


def test_a_uniform_guess_costs_the_logarithm_of_the_clean_tokens(model: LanguageModel) -> None:
    """A network that says nothing has one bound under every noise: the log of the clean tokens that there are."""
    head: Any = model.network.get_output_embeddings()
    head.weight.zero_()
    found = likelihood.nelbo(model, windows(40), draws=16, seed=0)
    assert abs(found.mean - math.log(tiny.VOCAB - 1)) < 4 * found.standard_error + 0.01


def test_the_harness_asks_and_writes(speaking: LanguageModel) -> None:
    settings = EvaluationSettings(draws=3, gen_length=8, steps=4, block_length=8)
    made: Callable[..., Any] = lambda kind, args: [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in args]  # noqa: E731
    contexts = [("w1 w2", {"until": []}), ("w3 w4 w5", {"until": []}), ("w6 w7", {"until": []})]
    plain, batched = HarnessModel(speaking, settings=settings), BatchedHarness(speaking, settings=settings)
    texts = plain.generate_until(made("generate_until", contexts))
    assert texts == batched.generate_until(made("generate_until", contexts))  # lengths are mixed, rows are alone all the same
    assert texts == plain.generate_until(made("generate_until", contexts))
    values = plain.loglikelihood(made("loglikelihood", [("w1 w2", " w3"), ("w1 w2", " w4 w5")]))
    assert all(value < 0 for value, _ in values)
    assert plain.minus_nelbo(["w1 w2 w3 w4"])[0] < 0
    rows = [{"question": "w1 w2", "answer": "w3"}, {"question": "w4", "answer": "w5"}]
    assert len(sums.answer_sums(speaking, rows)) == 2
    assert (sums.answer_loss(speaking, rows, draws=3, seed=0) > 0).all()


def test_calibration_reads_text_with_the_models_own_noise(model: LanguageModel, tmp_path: Path) -> None:
    masked = tiny.of_noise(tmp_path / "masked", "masked")
    inputs = sets.Inputs("noised", levels=4)
    found, other = (sets.noised_windows(each, windows(60), inputs, seed=3) for each in (model, masked))
    changed, hidden = found != windows(60)[:, None], other == tiny.MASK
    assert not (changed & ~hidden).any()  # the same places, but for tokens drawn as they were
    assert float(changed.sum() / hidden.sum()) > 0.9
    share = float((found == tiny.MASK).sum() / hidden.sum())
    wanted = 0.0 if model.noise.kind == "uniform" else 0.9 + 0.1 / tiny.VOCAB
    assert share == pytest.approx(wanted, abs=0.02)
    states = sets.trajectory_states(model, windows(), prompt_tokens=4, steps=6, at=[0.0, 0.5], seed=0)
    assert torch.equal(states[:, :, :4], windows()[:, None, :4].expand(2, 2, 4))
    mass = masses.sink_mass(model, found[:2].flatten(0, 1))
    torch.testing.assert_close(mass.mean(-1), torch.ones(mass.shape[:-1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["Wanda", "sink-aware (Wanda)", "sink-aware (SparseGPT)"])
def test_pruned_exported_and_read_again(model: LanguageModel, method: str, tmp_path: Path) -> None:
    pruner.prune_(model, methods.METHODS[method], methods.Target(0.5), windows=windows(4), seed=0)
    for layer in model.layers:
        assert abs(float((layer.module.weight == 0).float().mean()) - 0.5) <= 0.5 / layer.module.in_features + 1e-6
    again = loading.load(export.save_plain(model, tmp_path / "pruned"))
    assert again.noise == model.noise
    bounds = [likelihood.nelbo(each, windows(), draws=2, seed=0).mean for each in (model, again)]
    assert bounds[0] == bounds[1]


def test_studies_of_sinks_take_it(speaking: LanguageModel) -> None:
    model = speaking
    trace = traces.trace(model, windows(3)[:, :6], positions=14, steps=4, heads=True)
    kinds = trace_tables.token_kinds(trace, tiny.tokenizer(), k=2, mask_token_id=model.mask_token_id)
    assert len(kinds) == 2
    assert len(trace_tables.mass_by_state(trace)) == 3
    assert len(variance_tables.places_table(trace, k=2)) == 2
    matched = noise_match.match(model, trace, ratios=[0.5], generator=generator(0))
    assert matched.noised.shape == (2, 3, 1, 14) and matched.noised.isfinite().all()
    effects = sink_effect.window_effects(model, windows(), counts=[1], draws=2, seed=0)
    assert all(effect.loss.isfinite().all() for effect in effects) and effects[1].removed_share > 0
    rows = [{"question": "w1 w2", "answer": "w3"}]
    assert len(sink_effect.sum_effects(model, rows, counts=[1], draws=2, seed=0)) == len(effects)
    assert len(sink_effect.digest_effects(model, windows(), thresholds=[0.1], top_k=2, steps=3, draws=2, seed=0)) > 1


def test_the_loss_by_noise_is_that_of_the_tokens_drawn_anew(model: LanguageModel) -> None:
    found = joint_runs.loss_by_noise(model, windows(4), ratios=[0.25, 1.0], seed=0)
    assert found.shape == (2, 4)
    assert torch.allclose(found, joint_runs.loss_by_noise(model, windows(4), ratios=[0.25, 1.0], seed=0, batch_size=3))
    head: Any = model.network.get_output_embeddings()
    head.weight.zero_()
    flat = joint_runs.loss_by_noise(model, windows(4), ratios=[0.25], seed=0)
    assert flat.flatten().tolist() == pytest.approx([math.log(tiny.VOCAB)] * 4, rel=1e-5)


def decoded(model: LanguageModel) -> object:
    plan = systems.fast_plan("prefix", threshold=0.9)
    return decoder.decode(model, windows()[:, :4], new_tokens=8, block_length=4, plan=plan)


def counted_as_released(model: LanguageModel) -> object:
    where, stream = torch.ones(LENGTH, dtype=torch.bool), generator(0)
    return likelihood.masked_log_likelihood(model, windows()[0], where, draws=2, generator=stream, count_rule="release")


REFUSED: dict[str, tuple[Callable[[LanguageModel], object], str]] = {
    "pseudo-perplexity": (
        lambda model: pseudo_perplexity.pseudo_perplexity(model, windows(), answer_tokens=4, draws=2, seed=0),
        "a pseudo-perplexity must use masked noise, got .* noise in model: use nelbo, the bound of its own noise",
    ),
    "decoding": (
        decoded,
        "sampling by denoising must use masked noise, got .*: use sampler.sample, in which any token may change",
    ),
    "late steps": (
        lambda model: late_steps.collect(model, windows()[:, :4], new_tokens=8, block_length=4, share=0.5),
        "sampling by denoising must use masked noise, got ",
    ),
    "a comparison of decoders": (
        lambda model: timing_runs.check(model, windows(), {"plain": timing_runs.PLAIN}, None),
        "sampling by denoising must use masked noise, got ",
    ),
    "phases": (
        lambda model: phases.phased(model, [model, model], borders=[0.5]),
        "phases must follow the mask ratio of masked diffusion, got .* diffusion with model: prune it with one mask for all",
    ),
    "guidance": (
        lambda model: sampler.sample(model, windows()[:, :4], new_tokens=8, steps=4, cfg_scale=1.0),
        r"guidance must go with masked noise \(it masks the prompt\), got 1 with .* noise in model: use cfg_scale=0",
    ),
    "guided scores": (
        lambda model: score(model, [Passage((1, 2, 3), 1, ("a",))], settings=EvaluationSettings(cfg_scale=0.5)),
        "guidance must go with masked noise",
    ),
    "a guided harness": (
        lambda model: HarnessModel(model, settings=EvaluationSettings(cfg_scale=0.5)),
        "guidance must go with masked noise",
    ),
    "counts of the release": (
        counted_as_released,
        "rules for counts and masks must go with masked noise, got .*: use stratified",
    ),
    "exact next tokens": (
        lambda model: likelihood.next_token_nll(model, windows()),
        "autoregressive model, got model: use nelbo",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_masks_is_refused_before_any_work(name: str, model: LanguageModel) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was run")

    handle = model.network.get_decoder().register_forward_pre_hook(fail)
    call, said = REFUSED[name]
    with pytest.raises(InputError, match=said) as caught:
        call(model)
    assert "\n" not in str(caught.value)
    handle.remove()


def test_the_control_of_mask_tokens_needs_masks(tmp_path: Path) -> None:
    weighting = Weighting("mask", margin=0.5)
    with pytest.raises(
        InputError, match="the control 'mask' must have mask tokens to weigh down, got none with uniform: use rand"
    ):
        measured_weights.measure(tiny.of_noise(tmp_path / "uniform", "uniform"), windows(), weighting)
    mixed = tiny.of_noise(tmp_path / "mixed", "mixed")
    noised = sets.noised_windows(mixed, windows(), sets.Inputs("noised", levels=4), seed=0).flatten(0, 1)
    assert measured_weights.measure(mixed, noised, weighting).shape == noised.shape
