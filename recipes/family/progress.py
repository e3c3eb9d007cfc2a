"""What is measured along training: held-out loss by source, exact answers by task, and sinks."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lib.attention import masses, sinks
from lib.core.config import ModelSource
from lib.core.runtime import generator
from lib.diffusion.ancestral import sample_back
from lib.models.language_model import LanguageModel
from recipes.family import batches, tasks
from recipes.family.batches import Rows
from recipes.family.objectives import BLOCK, Member, attention_bias, noise_of, row_losses

TASKS = ("tiny_add", "tiny_sort", "tiny_sudoku", "tiny_recall", "tiny_facts")
NOISE_STEPS = 8
PROBE_TIME = 0.5


def shadow(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a network that shares the weights, with SDPA, so that measuring never touches the one that is compiled."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    twin = LlamaForCausalLM(config)
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return twin.eval()


@torch.no_grad()
def held_out_losses(
    member: Member, model: LlamaForCausalLM, held_out: dict[str, Int[Tensor, "window position"]], *, seed: int
) -> dict[str, float]:
    """Return the member's own loss on held-out windows by source, with the same noise at every call (a bound but for `ar`)."""
    found = {}
    for name, windows in held_out.items():
        rows = batches.text_rows(windows).to(model.device)
        losses = row_losses(member, model, model.model, rows, generator=generator(seed, "held-out", name))
        found[name] = round(float(losses.mean()), 4)
    return found


def _logits(
    member: Member, model: LlamaForCausalLM, ids: Int[Tensor, "row position"], rows: Rows
) -> Float[Tensor, "row position state"]:
    bias = attention_bias(member, rows.is_real)
    return model(input_ids=ids, attention_mask=bias).logits.float()


def answer_greedily(member: Member, model: LlamaForCausalLM, rows: Rows, *, mask_token_id: int, rng: torch.Generator) -> Tensor:
    """Fill answers in as the member generates: left to right, most confident first (`bd` by blocks), or by steps back."""
    ids = rows.ids.clone()
    if member == "ar":
        for position in range(1, ids.shape[1]):
            wanted = rows.is_answer[:, position]
            if bool(wanted.any()):
                ids[wanted, position] = _logits(member, model, ids, rows)[wanted, position - 1].argmax(-1)
        return ids
    if member in ("udlm", "xdlm"):
        process = noise_of(member, vocab_size=model.config.vocab_size, mask_token_id=mask_token_id)

        def denoiser(noised: Tensor, where: Tensor) -> Tensor:
            return _logits(member, model, noised, rows)[where].softmax(-1)

        return sample_back(denoiser, process, ids, rows.is_answer, steps=NOISE_STEPS, generator=rng)
    ids[rows.is_answer] = mask_token_id
    block = BLOCK if member == "bd" else ids.shape[1]
    for start in range(0, ids.shape[1], block):
        inside = torch.zeros_like(rows.is_answer)
        inside[:, start : start + block] = rows.is_answer[:, start : start + block]
        while bool((left := (ids == mask_token_id) & inside).any()):
            logits = _logits(member, model, ids, rows)
            logits[..., mask_token_id] = float("-inf")  # or a place might stay masked for ever
            ids = _commit_best(logits, ids, left)
    return ids


def _commit_best(logits: Tensor, ids: Tensor, left: Bool[Tensor, "row position"]) -> Tensor:
    """Commit the most confident eighth (at least one) of the places left in each row."""
    confidence, tokens = logits.softmax(-1).max(-1)
    confidence = confidence.masked_fill(~left, -1.0)
    quota = (left.sum(1, keepdim=True) / 8).ceil()
    rank = confidence.argsort(1, descending=True).argsort(1)
    return torch.where(left & (rank < quota), tokens, ids)


@torch.no_grad()
def accuracies(
    member: Member, model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, *, count: int, seed: int
) -> dict[str, float]:
    """Return the share of exact answers to the first test documents of each task."""
    found = {}
    for task in TASKS:
        encoded = [batches.fitting(tok, task, document) for document in tasks.test_documents(task, count)]
        rows = batches.stack(tok, encoded, width=batches.WIDTHS[task]).to(model.device)
        mask = cast(int, tok.mask_token_id)
        ids = answer_greedily(member, model, rows, mask_token_id=mask, rng=generator(seed, "answers", task))
        right = ((ids == rows.ids) | ~rows.is_answer).all(1)
        found[task] = round(float(right.float().mean()), 4)
    return found


@torch.no_grad()
def sink_statistics(
    member: Member, model: LlamaForCausalLM, windows: Int[Tensor, "window position"], *, seed: int
) -> dict[str, float]:
    """Return how far sinks have formed, on clean windows and, for diffusion members, on noised ones of time 1/2.

    Returns:
        For each of the two: the attention that the first token receives (mean over layers, heads and queries), the share of all
        mass on the top key of the mass averaged over layers and heads, and the value norm there over the other keys'. Masses of
        later keys are not corrected for the fewer queries that see them under a causal mask.
    """
    rows = batches.text_rows(windows).to(model.device)
    seen = {"clean": rows.ids}
    if member != "ar":
        process = noise_of(member, vocab_size=model.config.vocab_size, mask_token_id=model.config.mask_token_id)
        t = torch.full(windows.shape, PROBE_TIME)
        seen["noised"] = process.corrupt(rows.ids, t, generator=generator(seed, "sinks")).input_ids
    language_model = LanguageModel(member, ModelSource(member), model, None, None, 0, member == "ar", (), "")
    found: dict[str, float] = {}
    for name, ids in seen.items():
        with masses.record(language_model, keep=("value_norm",)) as recorder:
            network = cast(Callable[..., Any], model.model)
            network(input_ids=ids, attention_mask=attention_bias(member, rows.is_real), use_cache=False)
            mass, norms = recorder.pop()[:, :, :, 0], recorder.pop_value_norms()
        found |= {f"{name}_{key}": value for key, value in _summary(mass, norms).items()}
    return found


def _summary(mass: Float[Tensor, "layer batch head key"], norms: Float[Tensor, "layer batch kv_head key"]) -> dict[str, float]:
    together = mass.mean((0, 2))
    marked = torch.zeros_like(together, dtype=torch.bool).scatter_(1, together.argmax(1, keepdim=True), True)
    ratio = sinks.value_norm_ratio(norms.mean((0, 2)), marked)
    return {
        "first_token": round(float(sinks.first_token_score(mass, queries=mass.shape[-1]).mean()), 5),
        "top_share": round(float(sinks.top_k_share(together, k=1).mean()), 5),
        "top_share_by_head": round(float(sinks.top_k_share(mass, k=1).mean()), 5),
        "value_norm_ratio": round(float(ratio.mean()), 4),
    }
