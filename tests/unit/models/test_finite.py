"""Logits that are no numbers: refused wherever an answer is read off, with the layer that they come from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.core.errors import InputError
from lib.decoding.decoder import decode
from lib.decoding.late_steps import LateStep
from lib.decoding.systems import fast_plan
from lib.diffusion import ancestral, likelihood, noise, ragged, sampler
from lib.evaluation import sums
from lib.evaluation.pseudo_perplexity import pseudo_perplexity
from lib.evaluation.scoring import EvaluationSettings, Passage, score
from lib.models import language_model
from lib.models.finite import require_finite
from lib.models.language_model import LanguageModel
from lib.pruning.phases import phased
from tests import tiny

IDS = tiny.ids(2, 8)
PLAIN = EvaluationSettings(draws=2)
DIFFUSION: dict[str, Callable[[LanguageModel], object]] = {
    "logits_at": lambda model: language_model.logits_at(model, IDS, torch.ones_like(IDS).bool()),
    "padded": lambda model: language_model.logits_at(
        model, IDS, torch.ones_like(IDS).bool(), attention_mask=torch.ones_like(IDS)
    ),
    "nelbo": lambda model: likelihood.nelbo(model, IDS, draws=2, seed=0),
    "pseudo perplexity": lambda model: pseudo_perplexity(model, IDS, answer_tokens=2, seed=0),
    "choices": lambda model: score(model, [Passage((1, 5, 7), 2, ("x",))], settings=PLAIN),
    "guided choices": lambda model: score(
        model, [Passage((1, 5, 7), 2, ("x",))], settings=dataclasses.replace(PLAIN, cfg_scale=1.0)
    ),
    "sums": lambda model: sums.answer_loss(model, [{"question": "w1", "answer": "w2"}], draws=1, seed=0),
    "answers": lambda model: sums.answer_sums(model, [{"question": "w1", "answer": "w2"}]),
    "sample": lambda model: sampler.sample(model, IDS, new_tokens=4, steps=2),
    "ragged": lambda model: ragged.denoise(model, [[1, 4], [1, 4, 5]], new_tokens=4, steps=2),
    "threshold": lambda model: decode(model, IDS, new_tokens=4, block_length=2, plan=fast_plan(threshold=0.9)),
    "prefix": lambda model: decode(
        model, IDS, new_tokens=4, block_length=2, plan=fast_plan(threshold=1.0, cache="prefix")
    ),
    "dual": lambda model: decode(
        model, IDS, new_tokens=4, block_length=2, plan=fast_plan(steps_per_block=2, cache="dual")
    ),
    "adaptive": lambda model: decode(
        model, IDS, new_tokens=4, block_length=2, plan=fast_plan(threshold=1.0, cache="adaptive", refresh_ratio=0.5)
    ),
}  # fmt: skip
CAUSAL: dict[str, Callable[[LanguageModel], object]] = {
    "logits_at": DIFFUSION["logits_at"],
    "next token": lambda model: likelihood.next_token_nll(model, IDS),
    "choices": DIFFUSION["choices"],
    "sums": DIFFUSION["sums"],
    "answers": DIFFUSION["answers"],
    "continue": lambda model: sampler.continue_text(model, IDS, new_tokens=2),
    "continue without cache": lambda model: sampler.continue_text(model, IDS, new_tokens=2, use_cache=False),
    "ragged": lambda model: ragged.continue_texts(model, [[1, 4], [1, 4, 5]], new_tokens=3),
}


def made(folder: Path, **options: Any) -> LanguageModel:
    return dataclasses.replace(tiny.model(folder, **{"causal": False, **options}), tokenizer=tiny.tokenizer())


def spoil_(model: LanguageModel, name: str, value: float = float("nan")) -> LanguageModel:
    with torch.no_grad():
        dict(model.network.named_parameters())[name].view(-1)[0] = value
    return model


@pytest.mark.parametrize("way", DIFFUSION)
def test_no_answer_of_a_diffusion_model_is_read_off_nan(tmp_path: Path, way: str) -> None:
    model = made(tmp_path / "m", num_hidden_layers=3)
    DIFFUSION[way](model)
    spoil_(model, "model.layers.1.mlp.down_proj.weight")
    said = "logits of m must be finite, got NaN, first made by model.layers.1: mend model.layers.1.mlp.down_proj.weight, which"
    with pytest.raises(InputError, match=said) as caught:
        DIFFUSION[way](model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", CAUSAL)
def test_no_answer_of_an_autoregressive_model_is_read_off_nan(tmp_path: Path, way: str) -> None:
    model = made(tmp_path / "m", num_hidden_layers=3, causal=True)
    CAUSAL[way](model)
    spoil_(model, "model.layers.2.self_attn.o_proj.weight")
    with pytest.raises(InputError, match=r"got NaN, first made by model.layers.2: mend model.layers.2.self_attn.o_proj.weight"):
        CAUSAL[way](model)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model.embed_tokens.weight", float("nan"), "got NaN, first made by model.embed_tokens: mend model.embed_tokens.weight"),
        ("model.layers.0.input_layernorm.weight", float("inf"), "first made by model.layers.0: mend model.layers.0.input_l"),
        ("model.norm.weight", float("nan"), "got NaN, made behind the last decoder block: check the last norm and the LM head"),
        ("lm_head.weight", float("inf"), "got infinity, made behind the last decoder block"),
        ("lm_head.weight", float("nan"), "got NaN, made behind the last decoder block"),
    ],
)
def test_every_part_is_told_from_the_others(tmp_path: Path, name: str, value: float, said: str) -> None:
    model = spoil_(made(tmp_path / "m"), name, value)
    with pytest.raises(InputError, match=said):
        language_model.logits_at(model, torch.zeros_like(IDS), torch.ones_like(IDS).bool())


def test_an_overflow_of_finite_weights_is_told_from_weights_that_hold_nan(tmp_path: Path) -> None:
    model = made(tmp_path / "m")
    with torch.no_grad():
        for layer in model.layers:
            if layer.block == 1 and layer.role in ("up", "down"):
                layer.module.weight.mul_(1e25)
    with pytest.raises(InputError, match=r"first made by model.layers.1, whose weights are finite: load with dtype float32"):
        DIFFUSION["logits_at"](model)


def test_large_finite_logits_whose_sum_is_not_are_no_error() -> None:
    large = torch.full((4, 4), 3e38)
    require_finite(large, lambda: None, network=None, name="m")
    for wrong in (float("inf"), float("nan"), -float("inf")):
        spoiled = torch.zeros(4, 4)
        spoiled[1, 2] = wrong
        with pytest.raises(InputError):
            require_finite(spoiled, lambda: None, network=None, name="m")
    both = torch.zeros(4, 4)
    both[0, 0], both[1, 1] = float("inf"), -float("inf")
    with pytest.raises(InputError, match="got infinity"):
        require_finite(both, lambda: None, network=None, name="m")


def test_only_what_is_asked_for_is_looked_at(tmp_path: Path) -> None:
    """A token of another row may be spoiled: nothing is read off there."""
    model = made(tmp_path / "m")
    spoil_(model, "model.embed_tokens.weight")  # token 0
    ids = torch.tensor([[0, 5, 6], [4, 5, 6]])
    where = torch.zeros_like(ids).bool()
    where[1] = True
    assert language_model.logits_at(model, ids, where).isfinite().all()


def test_a_second_pass_leaves_no_hooks(tmp_path: Path) -> None:
    model = spoil_(made(tmp_path / "m"), "model.norm.weight")
    with pytest.raises(InputError):
        DIFFUSION["logits_at"](model)
    assert not [part for part in model.network.modules() if part._forward_hooks]


def test_phases_name_the_block_of_theirs(tmp_path: Path) -> None:
    dense, other = made(tmp_path / "m"), made(tmp_path / "n")
    spoil_(other, "model.layers.1.mlp.up_proj.weight")
    joined = phased(dense, [dense, other], borders=[0.5])
    language_model.logits_at(joined, torch.full_like(IDS, tiny.MASK), torch.ones_like(IDS).bool())
    with pytest.raises(InputError, match=r"first made by model.decoders.1.layers.1: mend model.decoders.1.layers.1.mlp.up_proj"):
        language_model.logits_at(joined, IDS, torch.ones_like(IDS).bool())


def test_a_correction_of_late_steps_that_is_no_number_writes_no_token(tmp_path: Path) -> None:
    model = made(tmp_path / "m")
    zero = torch.zeros(32)
    step = LateStep("ridge", torch.zeros(96), torch.ones(96), torch.zeros(96, 1), torch.zeros(1, 32), zero + float("nan"), 1)
    with pytest.raises(InputError, match="must be finite, got NaN"):
        step.predict(model, torch.zeros(2, 32), left=torch.tensor([1, 2]), right=torch.tensor([1, 2]))


@pytest.mark.parametrize("greedy", ["never", "last", "always", "confident"])
def test_probabilities_of_a_denoiser_are_looked_at_too(greedy: Any) -> None:
    def broken(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return torch.full((int(where.sum()), 5), float("nan"))

    given = {"steps": 2, "generator": torch.Generator(), "greedy": greedy}
    with pytest.raises(InputError, match="probabilities of a denoiser must be finite, got NaN"):
        ancestral.sample_back(broken, noise.uniform_noise(5), torch.zeros(1, 3).long(), torch.ones(1, 3).bool(), **given)
