"""The block sampler against the recorded generations of the families' own samplers, token for token."""

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from lib.diffusion import block_sampler
from lib.diffusion.block_rules import BlockRule
from lib.models.language_model import LanguageModel
from tests.parity.blockwise import recorded

SDAR, FAST, CODER, NEMOTRON = "threshold or quota", "above or best", "at least or best", "at least or best"
FAST_RULE = BlockRule(FAST, threshold=0.9, sub_block_length=4, seeded=True)
CODER_RULE = BlockRule(CODER, threshold=0.9, cut_last=True)
NEMOTRON_RULE = BlockRule(NEMOTRON, threshold=0.9, seeded=True)
EDIT_RULE = BlockRule(SDAR, threshold=0.95, edit_threshold=0.9)
# (folder, run): rule, and tokens that the family returns for 24 asked ones (whole blocks; Fast-dLLM v2: and one token)
RUNS: dict[tuple[str, str], tuple[BlockRule, int]] = {
    ("sdar", "dynamic"): (BlockRule(SDAR, steps=4, threshold=0.9), 26),
    ("sdar", "dynamic_low"): (BlockRule(SDAR, steps=4, threshold=0.4), 26),
    ("sdar", "dynamic_quota2"): (BlockRule(SDAR, steps=2, threshold=0.9), 26),
    ("sdar", "static"): (BlockRule(steps=4), 26),
    ("sdar", "sequential"): (BlockRule(steps=4, order="sequential"), 26),
    ("sdar", "block12"): (BlockRule(SDAR, steps=12, threshold=0.9), 26),
    ("sdar", "top_k1"): (BlockRule(SDAR, steps=4, threshold=0.0), 26),  # of one candidate every probability is 1
    ("sdar", "stop"): (BlockRule(SDAR, steps=4, threshold=0.9), 26),
    ("fast_dllm_v2", "threshold"): (FAST_RULE, 23),
    ("fast_dllm_v2", "low_threshold"): (replace(FAST_RULE, threshold=0.4), 23),
    ("fast_dllm_v2", "one_by_one"): (replace(FAST_RULE, threshold=1.0), 23),
    ("fast_dllm_v2", "whole_block"): (replace(FAST_RULE, sub_block_length=None), 23),
    ("fast_dllm_v2", "aligned"): (FAST_RULE, 25),
    ("fast_dllm_v2", "long"): (FAST_RULE, 22),
    ("fast_dllm_v2", "stop"): (FAST_RULE, 23),
    ("stable_diffcoder", "threshold"): (CODER_RULE, 24),
    ("stable_diffcoder", "low_threshold"): (replace(CODER_RULE, threshold=0.4), 24),
    ("stable_diffcoder", "one_by_one"): (BlockRule(steps=4, cut_last=True), 24),
    ("stable_diffcoder", "quota2"): (BlockRule(steps=2, cut_last=True), 24),
    ("stable_diffcoder", "block8"): (CODER_RULE, 24),
    ("stable_diffcoder", "aligned"): (CODER_RULE, 24),
    ("stable_diffcoder", "short"): (CODER_RULE, 24),
    ("stable_diffcoder", "stop"): (CODER_RULE, 24),
    ("llada2_moe", "threshold"): (BlockRule(SDAR, steps=8, threshold=0.9), 24),
    ("llada2_moe", "low_threshold"): (BlockRule(SDAR, steps=8, threshold=0.4), 24),
    ("llada2_moe", "quota2"): (BlockRule(SDAR, steps=4, threshold=0.9), 24),
    ("llada2_moe", "block16"): (BlockRule(SDAR, steps=16, threshold=0.9), 24),
    ("llada2_moe", "stop"): (BlockRule(SDAR, steps=8, threshold=0.9), 24),
    ("llada2_moe", "stop_early"): (BlockRule(SDAR, steps=8, threshold=0.9), 24),
    ("llada2_moe", "edit"): (BlockRule(SDAR, threshold=0.7, edit_threshold=0.5), 24),
    ("llada2_moe", "edit_default"): (EDIT_RULE, 24),
    ("llada2_moe", "edit_no_post"): (BlockRule(SDAR, threshold=0.5, edit_threshold=0.5, max_post_steps=0), 24),
    ("llada2_moe", "edit_stop"): (EDIT_RULE, 24),
    ("llada2_moe", "edit_stop_early"): (EDIT_RULE, 24),
    ("nemotron_labs_diffusion", "threshold"): (NEMOTRON_RULE, 24),
    ("nemotron_labs_diffusion", "low_threshold"): (replace(NEMOTRON_RULE, threshold=0.4), 24),
    ("nemotron_labs_diffusion", "one_by_one"): (BlockRule(seeded=True), 24),
    ("nemotron_labs_diffusion", "block12"): (NEMOTRON_RULE, 24),
    ("nemotron_labs_diffusion", "full_context"): (BlockRule(NEMOTRON, threshold=0.9), 24),
    ("nemotron_labs_diffusion", "stop"): (NEMOTRON_RULE, 24),
}
STOPS = {"sdar": [16], "fast_dllm_v2": [24], "stable_diffcoder": [121], "llada2_moe": [95, 121], "nemotron_labs_diffusion": [90]}
# What LLaDA 2 made of 24 tokens with the edits and quotas takes one pass a step: the recorded number, without a cache.
PASSES = {("llada2_moe", "edit"), ("llada2_moe", "edit_default"), ("llada2_moe", "edit_no_post"), ("llada2_moe", "quota2")}


def as_run(name: str, run: str) -> tuple[LanguageModel, Tensor, list[int], dict[str, Any]]:
    """Return the model with the run's blocks, its prompt, the recorded tokens with the prompt before them, and its settings."""
    case = recorded(name)
    settings = case.settings[f"generate.{run}"]
    prompt = case.expected[f"generate.{settings.get('prompt') or 'prompt'}"]
    model = replace(case.model, block_length=settings.get("block_length") or settings["block_size"])
    if run == "full_context":  # the prompt is one block that sees itself whole, so are the finished ones
        model = replace(model, attention="block-causal")
    tokens = case.expected[f"generate.{run}"][0].tolist()
    return model, prompt, [*prompt[0].tolist(), *tokens] if name == "llada2_moe" else tokens, settings


@pytest.mark.parametrize("use_cache", [False, True], ids=["read anew", "kept"])
@pytest.mark.parametrize(("name", "run"), RUNS)
def test_generation_equals_the_recorded_tokens(name: str, run: str, use_cache: bool) -> None:
    model, prompt, expected, settings = as_run(name, run)
    rule, new_tokens = RUNS[name, run]
    stops = [token for token in STOPS[name] if token in expected] if "stop" in run else []
    text = block_sampler.generate(model, prompt, new_tokens=new_tokens, rule=rule, stop_token_ids=stops, use_cache=use_cache)
    end = int(text.ends[0])
    assert not stops or expected[end - 1] in stops
    assert text.ids[0, : len(expected)].tolist() == expected
    assert len(expected) in (text.ids.shape[1], end)
    if (name, run) in PASSES and not use_cache:
        assert text.forwards == settings["forwards"]


def test_recorded_runs_differ_so_that_the_rules_are_told_apart() -> None:
    for family in {name for name, _ in RUNS}:
        runs = [run for name, run in RUNS if name == family and "stop" not in run]
        assert len({tuple(as_run(family, run)[2]) for run in runs}) == len(runs)


def test_a_written_place_is_not_overwritten() -> None:
    """The one recorded quirk that is not followed: with fewer masks than its quota, SDAR's sampler overwrites written places."""
    model, prompt, expected, _ = as_run("sdar", "quirk_overwrites")
    text = block_sampler.generate(model, prompt, new_tokens=26, rule=BlockRule(SDAR, steps=2, threshold=0.9))
    different = [place for place, (ours, theirs) in enumerate(zip(text.ids[0].tolist(), expected, strict=True)) if ours != theirs]
    assert different == [30]


@pytest.mark.parametrize("run", ["linear_spec", "linear_spec_threshold"])
def test_blocks_of_one_seeded_token_are_greedy_autoregression(run: str) -> None:
    """What Nemotron's self-speculation returns, one way or another."""
    case = recorded("nemotron_labs_diffusion")
    expected = case.expected[f"generate.{run}"][0].tolist()
    prompt = case.expected["generate.prompt"]
    model = replace(case.model, block_length=1)
    text = block_sampler.generate(model, prompt, new_tokens=len(expected) - 10, rule=BlockRule(seeded=True))
    assert text.ids[0].tolist() == expected


def test_a_row_of_a_batch_gets_what_it_gets_alone() -> None:
    case = recorded("sdar")
    prompt = case.expected["generate.prompt"]
    rule, stops = BlockRule(SDAR, steps=4, threshold=0.4), [61]
    rows = [prompt, (prompt * 3 + 1) % 127, (prompt * 5 + 2) % 127]
    for use_cache in (False, True):
        options: dict[str, Any] = {"new_tokens": 26, "rule": rule, "stop_token_ids": stops, "use_cache": use_cache}
        together = block_sampler.generate(case.model, Tensor.new_tensor(prompt, [row[0].tolist() for row in rows]), **options)
        alone = [block_sampler.generate(case.model, row, **options) for row in rows]
        assert together.ids.tolist() == [text.ids[0].tolist() for text in alone]
        assert together.ends.tolist() == [int(text.ends[0]) for text in alone]
        assert len(set(together.ends.tolist())) > 1, "rows that end at different places"
