"""A model whose attention goes by blocks computes under its own mask wherever the library runs it, or is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lib.attention import masses, sinks
from lib.attention.blocking import KeyBlocker, largest_keys
from lib.calibration import measured_weights, one_shot, sets
from lib.calibration.reads import Read, reading, statistics_of
from lib.calibration.sets import Inputs
from lib.calibration.statistics import CalibrationSet
from lib.core.errors import InputError
from lib.decoding import commit, late_steps, refresh
from lib.decoding.by_attention.commit import Independent
from lib.decoding.decoder import DecodingPlan, decode
from lib.decoding.remask import Edit, WhereFutureAgrees
from lib.decoding.systems import fast_plan
from lib.diffusion import block_reader, block_sampler, sampler
from lib.diffusion.block_rules import BlockRule
from lib.evaluation.harness import HarnessModel
from lib.evaluation.scoring import EvaluationSettings
from lib.models import language_model, visibility
from lib.models.language_model import LanguageModel
from lib.pruning import phases
from lib.studies.variance import sink_effect
from tests import tiny

SIZE = 12


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("own") / "model", causal=False)


@pytest.fixture
def model(plain: LanguageModel) -> LanguageModel:
    return replace(plain, attention="block-causal", block_length=4, block_origin="start")


@pytest.fixture
def context(plain: LanguageModel) -> LanguageModel:
    return replace(plain, attention="context-causal", block_length=4, block_origin="prompt")


def norm_of(found: Any, role: Any) -> Tensor:
    return statistics_of(found, role).input_norm("root_mean_square")


def blocks(size: int = SIZE) -> Tensor:
    return visibility.block_causal(visibility.block_numbers(size, block_length=4))


def maps(model: LanguageModel, run: Any) -> list[Tensor]:
    """Return the attention map of every layer in every pass that `run` makes through the network."""
    with masses.record(model, keep=("map",)) as recorder:
        run()
        return list(recorder._maps)


def test_nothing_looks_at_a_later_block(model: LanguageModel, context: LanguageModel) -> None:
    """Every way of running the network on whole texts: logits, calibration, weights, norms."""
    ids = tiny.ids(3, SIZE)
    where = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    noisy = ids.masked_fill(where, tiny.MASK)
    runs = [
        lambda: language_model.logits_at(model, noisy, where),
        lambda: sampler.guided_logits(model, noisy, where, ~where, cfg_scale=0.0),
        lambda: one_shot.dense_statistics(model, CalibrationSet(noisy), batch_size=2),
        lambda: one_shot.shared_statistics(model, noisy, [None], batch_size=2),
        lambda: measured_weights.activation_norms(model, noisy),
        lambda: sets.build(model, ids, inputs=Inputs("clean"), seed=0),
    ]
    for run in runs:
        for frame in maps(model, run):
            assert not frame[:, ~blocks()[0, 0]].any() and (frame[:, blocks()[0, 0]] > 0).all()
    causal = torch.ones(SIZE, SIZE, dtype=torch.bool).tril()
    last = sets.noised_windows(context, ids, Inputs("noised", levels=2), seed=0).flatten(0, 1)
    assert (last[:, :8] != tiny.MASK).all() and (last[:, 8:] == tiny.MASK).any()
    for frame in maps(context, lambda: one_shot.dense_statistics(context, CalibrationSet(last), batch_size=4)):
        assert not frame[:, :8][:, ~causal[:8]].any()
        assert (frame[:, 8:, 8:] > 0).all(-1).any(), "an open block sees itself whole"


def test_padding_is_taken_out_of_the_own_mask(model: LanguageModel) -> None:
    ids, real = tiny.ids(2, SIZE), torch.ones(2, SIZE, dtype=torch.long)
    real[1, 9:] = 0
    changed = ids.clone()
    changed[1, 9:] = (changed[1, 9:] + 5) % tiny.MASK
    where = real.bool()
    first = language_model.logits_at(model, ids, where, attention_mask=real)
    assert torch.equal(first, language_model.logits_at(model, changed, where, attention_mask=real))
    alone = language_model.logits_at(model, ids[1:, :9], torch.ones(1, 9, dtype=torch.bool))
    torch.testing.assert_close(first[SIZE:], alone, atol=1e-5, rtol=1e-5)
    mass = masses.sink_mass(model, ids, attention_mask=real)
    assert mass.isfinite().all() and not mass[:, 1, :, 9:].any()
    shorter = masses.sink_mass(model, ids[1:, :9])
    torch.testing.assert_close(mass[:, 1:, :, :9], shorter, atol=1e-5, rtol=1e-5)
    left = torch.ones(1, SIZE, dtype=torch.long)
    left[0, :5] = 0  # a whole block of padding, whose queries see nothing at all
    assert language_model.logits_at(model, ids[:1], left.bool(), attention_mask=left).isfinite().all()
    with masses.record(model, attention_mask=blocks() & left.bool()[:, None, None]) as recorder:
        language_model.network_body(model)(input_ids=ids[:1], attention_mask=left, use_cache=False)
        assert float(recorder.pop().sum(-1).mean()) == pytest.approx(7.0, abs=1e-4)  # seven real queries


def test_a_ready_mask_goes_before_the_own_one(model: LanguageModel, plain: LanguageModel) -> None:
    ids, everywhere = tiny.ids(1, SIZE), torch.ones(1, SIZE, dtype=torch.bool)
    full = torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool)
    got = language_model.logits_at(model, ids, everywhere, attention_mask=full)
    torch.testing.assert_close(got, language_model.logits_at(plain, ids, everywhere), atol=1e-5, rtol=1e-5)
    by_blocks = language_model.logits_at(plain, ids, everywhere, attention_mask=blocks())
    torch.testing.assert_close(by_blocks, language_model.logits_at(model, ids, everywhere), atol=0, rtol=0)
    with pytest.raises(InputError, match="a pass with kept keys must be given a ready mask"):
        language_model.network_body(model)(input_ids=ids, past_key_values=object())
    with pytest.raises(InputError, match="must say their length, got none for model"):
        language_model.logits_at(replace(model, block_length=None), ids, everywhere)


def test_masses_are_what_a_viewer_gives(model: LanguageModel, plain: LanguageModel) -> None:
    ids = tiny.ids(2, SIZE)
    raw = masses.sink_mass(model, ids, by_viewer=False)
    viewers = torch.tensor([12.0] * 4 + [8.0] * 4 + [4.0] * 4)
    mean = raw / viewers
    torch.testing.assert_close(masses.sink_mass(model, ids), mean * SIZE / mean.sum(-1, keepdim=True), atol=1e-5, rtol=1e-5)
    full = masses.sink_mass(plain, ids)
    assert torch.equal(masses.sink_mass(plain, ids, by_viewer=True), full)
    torch.testing.assert_close(sinks.per_viewer(full, torch.full((SIZE,), SIZE)), full, atol=1e-5, rtol=1e-5)
    found: list[Tensor] = []
    weigh = lambda mass: found.append(mass) or torch.ones(mass.shape[1], SIZE)  # noqa: E731
    one_shot.one_shot_statistics(model, ids, weigh)
    torch.testing.assert_close(found[0], masses.sink_mass(model, ids), atol=1e-5, rtol=1e-5)


def test_layerwise_calibration_equals_one_pass_for_masks_that_differ_by_batch(context: LanguageModel) -> None:
    """An open block is where the masks are, so each batch has its own mask."""
    ids = tiny.ids(3, SIZE)
    ids[1, 9], ids[2, 5] = tiny.MASK, tiny.MASK
    layerwise = one_shot.dense_statistics(context, CalibrationSet(ids), batch_size=1)
    (shared,) = one_shot.shared_statistics(context, ids, [None], batch_size=1)
    for first, second, layer in zip(layerwise, shared, range(2), strict=True):
        for role in ("q", "o", "gate", "down"):
            torch.testing.assert_close(norm_of(first, role), norm_of(second, role), atol=1e-4, rtol=1e-5, msg=f"{layer} {role}")


def test_pruning_a_block_model_reads_its_masks(model: LanguageModel, plain: LanguageModel, tmp_path: Path) -> None:
    """The same windows and settings, another mask: other input norms, so other weights go."""
    kept = []
    for attention in ("block-causal", "full"):
        own = tiny.model(tmp_path / attention, causal=False)
        own = replace(own, attention=attention, block_length=4, block_origin="start")
        calibration = sets.build(own, tiny.ids(4, SIZE), inputs=Inputs("noised", levels=3), seed=0)
        statistics = one_shot.dense_statistics(own, calibration)
        kept.append(norm_of(statistics[1], "o"))
    assert not torch.allclose(kept[0], kept[1], rtol=1e-3)


def test_keys_are_blocked_under_the_own_mask(model: LanguageModel) -> None:
    ids = tiny.ids(1, SIZE)
    blocker = KeyBlocker(lambda mass, _: largest_keys(mass, k=2), torch.Generator())
    everywhere = torch.ones(1, SIZE, dtype=torch.bool)
    with masses.blocking(model, blocker):
        blocked = language_model.logits_at(model, ids, everywhere)
        changed = ids.clone()
        changed[0, 8:] = (changed[0, 8:] + 3) % tiny.MASK
        again = language_model.logits_at(model, changed, everywhere)
    assert not torch.allclose(blocked, language_model.logits_at(model, ids, everywhere))
    assert again.isfinite().all() and blocker.keys_per_head == 2


PLANS = {
    "one a step": (fast_plan(steps_per_block=4), BlockRule(steps=4), False),
    "threshold": (fast_plan(threshold=0.3), BlockRule("above or best", threshold=0.3), False),
    "cache": (fast_plan(threshold=0.3, cache="prefix"), BlockRule("above or best", threshold=0.3), True),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_decoder_goes_through_the_block_sampler(model: LanguageModel, name: str) -> None:
    plan, rule, use_cache = PLANS[name]
    prompt = tiny.ids(2, 6)
    got = decode(model, prompt, new_tokens=10, block_length=4, plan=plan)
    text = block_sampler.generate(model, prompt, new_tokens=10, rule=rule, use_cache=use_cache)
    assert (got.ids.tolist(), got.forwards, got.computed_tokens) == (text.ids.tolist(), text.forwards, text.computed_tokens)
    stop = int(got.ids[0, 9])
    ended = decode(model, prompt, new_tokens=10, block_length=4, plan=replace(plan, early_stop=True), stop_token_id=stop)
    first = int((got.ids[0, 6:] == stop).int().argmax()) + 6
    assert ended.ids[0].tolist() == [*got.ids[0, : first + 1].tolist(), *[stop] * (15 - first)]


@pytest.mark.parametrize(
    ("rule", "same"),
    [
        (commit.LocalLeap(0.3, 1.0, 0), commit.Threshold(0.3)),
        (commit.Hierarchy(0.3, 1.0), commit.Threshold(0.3)),
        (commit.AdaptiveThreshold(0.3, 0.0), commit.Threshold(0.3)),
        (commit.EntropyBound(0.0), commit.Quota()),
        (commit.Factor(0.0), commit.Quota()),
        (commit.Klass(1.0), commit.Quota()),
    ],
)
def test_commit_rules_choose_in_the_block_sampler(model: LanguageModel, rule: commit.Commit, same: commit.Commit) -> None:
    prompt = tiny.ids(2, 6)
    sizes: dict[str, Any] = {"new_tokens": 10, "block_length": 4}
    got, wanted = (decode(model, prompt, plan=DecodingPlan(each), **sizes) for each in (rule, same))
    assert (got.ids.tolist(), got.forwards) == (wanted.ids.tolist(), wanted.forwards)


def test_still_predictions_are_written_together_by_blocks(model: LanguageModel) -> None:
    """Confident at once and still from the second pass on: fewer passes than one token a step, more than one a block."""
    plan = DecodingPlan(commit.Klass(0.0, 99.0, 1))
    got = decode(model, tiny.ids(1, 8), new_tokens=8, block_length=4, plan=plan)
    assert got.forwards == 4  # the best token of a block, then the rest


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (DecodingPlan(commit.Credit()), "commit=Credit"),
        (DecodingPlan(Independent()), "commit=Independent"),
        (DecodingPlan(remask=Edit()), "remask=Edit"),
        (DecodingPlan(ends=WhereFutureAgrees()), "ends=WhereFutureAgrees"),
        (fast_plan(threshold=0.5, cache="dual"), "recompute=Blockwise\\(refresh_every=None, kind='dual'\\)"),
        (fast_plan(threshold=0.5, cache="adaptive", refresh_ratio=0.5), "recompute=Adaptive"),
        (fast_plan(threshold=0.5, cache="prefix", refresh_every=2), "recompute=Blockwise\\(refresh_every=2"),
        (fast_plan(threshold=0.5, suffix_blocks=1), "visible=Visible\\(suffix_blocks=1"),
        (fast_plan(threshold=0.5, late_share=0.5), "late_share=0.5"),
    ],
)
def test_plans_without_sense_are_refused(model: LanguageModel, plan: DecodingPlan, message: str) -> None:
    with pytest.raises(InputError, match=f"a plan must fit a model whose attention goes by blocks, got {message}"):
        decode(model, tiny.ids(1, 4), new_tokens=8, block_length=4, plan=plan)
    with pytest.raises(InputError, match="block_length must be that of model, 4, got 8"):
        decode(model, tiny.ids(1, 4), new_tokens=8, block_length=8, plan=fast_plan(threshold=0.5))


def test_what_has_no_meaning_by_blocks_is_refused(model: LanguageModel, context: LanguageModel) -> None:
    prompt, windows = tiny.ids(1, 4), tiny.ids(1, SIZE)
    with pytest.raises(InputError, match="a cache of masked text must go with attention that is not by blocks"):
        refresh.adaptive_pass(model, ratio=0.5).__enter__()
    with pytest.raises(InputError, match="a late step must be fitted on a model whose attention is not by blocks"):
        late_steps.collect(model, prompt, new_tokens=8, block_length=4, share=0.5)
    with pytest.raises(InputError, match="phases must follow one mask ratio of the whole text"):
        phases.phased(model, [model, model], borders=[0.5])
    with pytest.raises(InputError, match="positions of a text must be blocked where attention is not by blocks"):
        sink_effect.digest_effects(model, windows, thresholds=[0.5], top_k=2, steps=2, draws=1, seed=0)
    for own in (model, context):
        with pytest.raises(InputError, match="so of one block, got 4 prompt tokens with model: give at least 8"):
            sets.trajectory_states(own, windows, prompt_tokens=4, steps=4, at=[0.0], seed=0)


def by_hand(model: LanguageModel, text: torch.Tensor, block: range) -> dict[tuple[int, str], torch.Tensor]:
    """Return what every layer reads of one block, alone behind the finished text before it."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    numbers = torch.arange(block.stop) // 4
    if model.attention == "block-causal":
        mask = numbers[:, None] >= numbers[None]
    else:
        mask = torch.ones(block.stop, block.stop, dtype=torch.bool).tril()
        mask[block.start :, block.start :] = True

    def keep(read: Read) -> None:
        """Remember what the block's own positions gave a layer to read."""
        found[read.block, read.role] = read.inputs[:, block.start :]

    with reading(model, range(2), keep), torch.no_grad():
        language_model.network_body(model)(input_ids=text[:, : block.stop], attention_mask=mask[None, None], use_cache=False)
    return found


@pytest.mark.parametrize("kind", ["noised", "trajectory"])
@pytest.mark.parametrize("length", [SIZE, SIZE - 2])
def test_calibration_reads_one_open_block_behind_finished_ones(
    model: LanguageModel, context: LanguageModel, kind: Literal["noised", "trajectory"], length: int
) -> None:
    """What is read of every block, finished or open, is what the block reads when the model writes it."""
    for own in (model, context):
        windows = tiny.ids(3, length)
        states = sets.read(own, windows, Inputs(kind, levels=3), seed=0)
        assert torch.equal(states[:, :, :8], windows[:, None, :8].expand(-1, 3, -1)), "finished blocks are clean"
        assert (states[:, :, 8:] == tiny.MASK).flatten(0, 1).any(0).all(), "all of the last block is written"
        for state in states.flatten(0, 1)[:, None]:
            reads: list[Read] = []
            with reading(own, range(2), reads.append), torch.no_grad():
                language_model.network_body(own)(input_ids=state, use_cache=False)
            kept = {(read.block, read.role): read.inputs for read in reads}
            for block in (range(4), range(4, 8), range(8, length)):
                if own.attention == "context-causal" and not (state[:, block] == tiny.MASK).any():
                    continue  # finished blocks are read causally: none is open
                for place, expected in by_hand(own, state, block).items():
                    got = kept[place][:, block.start : block.stop]
                    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, msg=f"{place} {block}")


def test_the_harness_generates_by_blocks(model: LanguageModel) -> None:
    own = replace(model, tokenizer=tiny.tokenizer())
    harness = HarnessModel(own, settings=EvaluationSettings(gen_length=8, steps=8, block_length=8))
    got = harness._generate([tiny.ids(1, 5)[0].tolist()], 8)  # pyright: ignore[reportPrivateUsage]
    expected = sampler.sample(own, tiny.ids(1, 5), new_tokens=8, steps=8)[:, 5:]
    assert got.tolist() == expected.tolist()


def test_a_key_is_blocked_in_both_copies_of_a_text(model: LanguageModel) -> None:
    """The bound reads noised blocks beside clean ones; a position is one key of both, as in a pass for each block alone."""
    window = tiny.ids(1, SIZE)
    noisy = window.clone()
    hidden = torch.arange(SIZE)[None] % 3 == 1
    noisy[hidden] = tiny.MASK

    def first(mass: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        assert mass.shape[-1] in (4, 8, SIZE)  # one key a position
        return torch.arange(mass.shape[-1]).expand(mass.shape) == 0

    both, alone = (KeyBlocker(first, torch.Generator(), copies=copies) for copies in (2, 1))
    with masses.blocking(model, both):
        found = block_reader.block_logits(model, window, noisy, hidden)
    wanted = []
    with masses.blocking(model, alone):
        for start in range(0, SIZE, 4):
            ids = torch.cat([window[:, :start], noisy[:, start : start + 4]], 1)
            where = torch.zeros_like(ids, dtype=torch.bool)
            where[:, start:] = hidden[:, start : start + 4]
            wanted.append(language_model.logits_at(model, ids, where))
    assert torch.allclose(found, torch.cat(wanted), atol=1e-4)
    assert both.keys_per_head == 1
    one_of_two = KeyBlocker(lambda mass, _: torch.arange(mass.shape[-1]).expand(mass.shape) == 0, torch.Generator())
    with masses.blocking(model, one_of_two):
        assert not torch.allclose(block_reader.block_logits(model, window, noisy, hidden), found, atol=1e-2)
