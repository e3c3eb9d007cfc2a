"""The block sampler on stubs whose answers are known, and its options on tiny networks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.diffusion import block_sampler, ragged, sampler
from lib.diffusion.block_rules import BlockRule, block_ranges, committed_places, rule_of
from lib.diffusion.commits import DenoisingStep
from lib.models.language_model import LanguageModel
from tests import tiny

KINDS = {"block-causal": ("block-causal", "start", 0), "shifted": ("block-causal", "start", 1),
         "from the prompt": ("block-causal", "prompt", 0), "causal context": ("context-causal", "prompt", 0)}  # fmt: skip
MASK, PROMPT = 4, 3


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("blocks") / "model", causal=False)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, plain: LanguageModel) -> LanguageModel:
    attention, origin, shift = KINDS[request.param]
    return replace(plain, attention=attention, block_origin=origin, logit_shift=shift, block_length=4)


def editor(changes: dict[int, tuple[int, float]]) -> LanguageModel:
    """Make a model that wants (token, probability) where another token stands."""

    def logits_of(ids: Tensor) -> Tensor:
        rest = torch.full((*ids.shape, 5), 1e-9)
        for token, (wanted, probability) in changes.items():
            at = ids == token
            row = torch.full((5,), (1 - probability) / 4)
            row[wanted] = probability
            rest[at] = row
        return rest.log()

    made = tiny.stub(logits_of, vocab=5, mask_token_id=MASK)
    for name, value in {"attention": "block-causal", "block_length": 4, "block_origin": "start"}.items():
        object.__setattr__(made, name, value)
    return made


def edited(changes: dict[int, tuple[int, float]], *, edit: float | None, post: int = 16) -> tuple[list[int], int]:
    rule = BlockRule("threshold or quota", threshold=0.9, edit_threshold=edit, max_post_steps=post)
    prompt = torch.full((1, 2), PROMPT)
    text = block_sampler.generate(editor(changes), prompt, new_tokens=2, rule=rule, use_cache=False)
    return text.ids[0].tolist(), text.forwards


SURE = {MASK: (1, 0.99), PROMPT: (0, 0.99)}


def test_a_written_token_is_edited_above_the_threshold_only_and_a_prompt_never() -> None:
    wish = {**SURE, 1: (2, 0.8), 2: (2, 0.99)}
    assert edited(wish, edit=0.5) == ([PROMPT, PROMPT, 2, 2], 3)  # written, edited, nothing left to edit
    assert edited(wish, edit=0.9) == ([PROMPT, PROMPT, 1, 1], 2)  # written, nothing to edit
    assert edited(wish, edit=None) == ([PROMPT, PROMPT, 1, 1], 1)


@pytest.mark.parametrize("post", [0, 1, 2, 16])
def test_edits_that_never_settle_are_ended(post: int) -> None:
    tokens, forwards = edited({**SURE, 1: (2, 0.8), 2: (1, 0.8)}, edit=0.5, post=post)
    assert forwards == 1 + post
    assert tokens == [PROMPT, PROMPT, *[1 + post % 2] * 2]


def test_commits_of_the_rules_by_hand() -> None:
    probability = torch.tensor([[0.9, 0.5, 0.8, 0.7, float("-inf")]])

    def places(rule: BlockRule, quota: int = 1) -> list[int]:
        return committed_places(probability, rule, quota=quota)[0].nonzero()[:, 0].tolist()

    assert places(BlockRule(), 2) == [0, 2]
    assert places(BlockRule(order="sequential"), 2) == [0, 1]
    assert places(BlockRule("threshold or quota", threshold=0.6), 2) == [0, 2, 3]
    assert places(BlockRule("threshold or quota", threshold=0.85), 2) == [0, 2]  # one above it is less than the quota
    assert places(BlockRule("threshold or quota", threshold=0.85), 9) == [0, 1, 2, 3]  # no more than there are
    assert places(BlockRule("above or best", threshold=0.9)) == [0] == places(BlockRule("at least or best", threshold=0.95))
    assert places(BlockRule("above or best", threshold=0.8)) == [0]
    assert places(BlockRule("at least or best", threshold=0.8)) == [0, 2]


def test_the_grid_begins_at_position_0_or_at_the_prompts_end(plain: LanguageModel) -> None:
    """(d) of the known answers: a prompt of 5 and blocks of 4."""
    begin = replace(plain, attention="block-causal", block_length=4, block_origin="start")
    assert block_ranges(begin, start=5, end=14, cut_last=False) == [range(4, 8), range(8, 12), range(12, 16)]
    assert block_ranges(begin, start=5, end=14, cut_last=True)[-1] == range(12, 14)
    from_prompt = replace(begin, block_origin="prompt")
    assert block_ranges(from_prompt, start=5, end=14, cut_last=False) == [range(5, 9), range(9, 13), range(13, 17)]


RULES = [
    BlockRule(),
    BlockRule("threshold or quota", threshold=0.3, steps=2),
    BlockRule("above or best", threshold=0.2, sub_block_length=2, seeded=True),
    BlockRule("at least or best", threshold=0.2, cut_last=True),
    BlockRule("threshold or quota", threshold=0.3, edit_threshold=0.3, max_post_steps=3),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.rule}{', edits' if rule.edit_threshold else ''}")
@pytest.mark.parametrize("prompt_tokens", [3, 8])
def test_kept_keys_of_finished_blocks_change_nothing(model: LanguageModel, rule: BlockRule, prompt_tokens: int) -> None:
    """(b) of the known answers, with a temperature so that texts are not all alike."""
    prompt = tiny.ids(2, prompt_tokens, seed=prompt_tokens)
    texts = []
    for use_cache in (False, True):
        stream = torch.Generator().manual_seed(1)
        options: dict[str, Any] = {"rule": rule, "use_cache": use_cache, "temperature": 0.5, "generator": stream}
        texts.append(block_sampler.generate(model, prompt, new_tokens=13, **options))
    assert texts[0].ids.tolist() == texts[1].ids.tolist()
    assert texts[1].computed_tokens < texts[0].computed_tokens
    assert not (texts[0].ids == tiny.MASK).all(1).any() and texts[0].ids.shape == (2, prompt_tokens + 13)
    assert torch.equal(texts[0].ids[:, :prompt_tokens], prompt)


def test_a_temperature_follows_its_generator(model: LanguageModel) -> None:
    def drawn(seed: int) -> list[list[int]]:
        stream = torch.Generator().manual_seed(seed)
        return block_sampler.generate(model, tiny.ids(1, 3), new_tokens=9, temperature=2.0, generator=stream).ids.tolist()

    assert drawn(1) == drawn(1) != drawn(2)
    with pytest.raises(InputError, match="must be given a generator"):
        block_sampler.generate(model, tiny.ids(1, 3), new_tokens=9, temperature=2.0)


@pytest.mark.parametrize("steps", [11, 7, 4])
@pytest.mark.parametrize("prompt_tokens", [3, 4])
def test_the_plain_sampler_writes_by_blocks_in_as_many_steps(model: LanguageModel, steps: int, prompt_tokens: int) -> None:
    seen: list[DenoisingStep] = []
    prompt = tiny.ids(2, prompt_tokens)
    if steps == 4 and model.attention == "context-causal":  # its first tokens take steps of their own
        with pytest.raises(InputError, match="steps must be at least 6 for 3 blocks, got 4"):
            sampler.sample(model, prompt, new_tokens=11, steps=steps)
        return
    ids = sampler.sample(model, prompt, new_tokens=11, steps=steps, on_step=seen.append)
    assert [step.step for step in seen] == list(range(steps))
    total = prompt_tokens + 11
    open_later = [*(step.is_masked for step in seen[1:]), torch.zeros_like(seen[0].is_masked)]
    for step, after, still in zip(seen, [*(s.input_ids for s in seen[1:]), ids], open_later, strict=True):
        assert step.input_ids.shape == (2, total) and step.keys is not None
        assert torch.equal(step.is_masked & ~step.is_committed, still) and (after[still] == tiny.MASK).all()
        assert torch.equal(torch.where(step.is_committed, after, step.input_ids), after)
        written = step.is_committed[0].nonzero()[:, 0]
        assert len(written) and int(written.max()) <= step.keys  # a seed is written behind what is read
        earlier = step.is_masked[:, : int(written.min()) // 4 * 4] if model.block_origin == "start" else step.is_masked[:, :0]
        assert not earlier.any()
    assert seen[0].mask_ratio == 1.0
    by_rule = block_sampler.generate(model, prompt, new_tokens=11, steps=steps)
    assert by_rule.ids.tolist() == ids.tolist()


def test_one_token_a_step_is_the_rule_of_an_unknown_family(model: LanguageModel) -> None:
    assert rule_of(model) == BlockRule(seeded=model.attention == "context-causal")
    known = replace(model, family="llada2.1")
    assert rule_of(known).edit_threshold == 0.5


def test_texts_of_any_lengths_get_what_they_get_alone(model: LanguageModel) -> None:
    prompts = [tiny.ids(1, 3)[0].tolist(), tiny.ids(1, 6, seed=2)[0].tolist()]
    got = ragged.denoise(model, prompts, new_tokens=8, steps=8)
    alone = [sampler.sample(model, torch.tensor([prompt]), new_tokens=8, steps=8)[0, -8:].tolist() for prompt in prompts]
    assert got.tolist() == alone


def test_what_makes_no_sense_is_refused(model: LanguageModel, plain: LanguageModel) -> None:
    prompt = tiny.ids(1, 3)
    for options, message in (
        ({"block_length": 8}, "block_length must be that of model, 4, got 8"),
        ({"cfg_scale": 1.0}, "guidance must go with attention that is not by blocks, got 1.0"),
        ({"remasking": "random"}, "must be given a generator"),
    ):
        with pytest.raises(InputError, match=message):
            sampler.sample(model, prompt, new_tokens=8, steps=8, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="attention goes by blocks, got full in model: use"):
        block_sampler.generate(plain, prompt, new_tokens=8)
    with pytest.raises(InputError, match="must know the mask token and the length of blocks"):
        block_sampler.generate(replace(model, block_length=None), prompt, new_tokens=8)
    with pytest.raises(InputError, match="new_tokens must be at least 1"):
        block_sampler.generate(model, prompt, new_tokens=0)
    with pytest.raises(InputError, match="steps in all must go with"):
        block_sampler.generate(model, prompt, new_tokens=8, steps=8, rule=BlockRule(steps=2))
    with pytest.raises(InputError, match="edits must be of whole blocks"):
        block_sampler.generate(model, prompt, new_tokens=8, rule=BlockRule(edit_threshold=0.5, sub_block_length=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.9}, "a threshold must go with its rule"),
        ({"rule": "above or best"}, "a threshold must go with its rule"),
        ({"rule": "above or best", "threshold": 1.5}, "threshold must be a probability"),
        ({"edit_threshold": -0.1}, "edit_threshold must be a probability"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"sub_block_length": 0}, "sub_block_length must be at least 1"),
        ({"max_post_steps": -1}, "max_post_steps must not be negative"),
    ],
)
def test_a_rule_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BlockRule(**options)


def test_an_end_token_ends_a_text_once_nothing_before_it_is_open() -> None:
    """Token 2 ends; the stub writes it everywhere, most surely at the right, so that it waits for what stands before it."""

    def logits_of(ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1]).float()
        sure = 0.5 + place / 100
        token = torch.where(place == 5, 1, 2)
        rest = ((1 - sure) / 4)[:, None].repeat(1, 5).scatter(1, token[:, None], sure[:, None])
        return rest.log().expand(*ids.shape, 5)

    made = editor({})
    network: Any = tiny.stub(logits_of, vocab=5, mask_token_id=MASK).network
    object.__setattr__(made, "network", network)
    prompt = torch.full((1, 5), PROMPT)
    text = block_sampler.generate(made, prompt, new_tokens=9, stop_token_ids=[2], use_cache=False)
    assert text.ids[0].tolist() == [PROMPT] * 5 + [1, 2, 2] + [MASK] * 6
    assert (text.ends.tolist(), text.forwards) == ([7], 3)
