"""The bound of a masked diffusion model per character, so that models with different tokenizers compare."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.runtime import generator
from lib.diffusion.likelihood import exact_count_masks
from lib.texts.rows import Rows

Predict = Callable[[Int[Tensor, "row position"], Bool[Tensor, "row position"]], Float[Tensor, "selected word"]]


@dataclass(frozen=True)
class Bound:
    """What a text costs: nats for each of its tokens and of its characters, and the standard error of the latter over rows."""

    per_token: float
    per_char: float
    error: float
    chars_per_token: float


@torch.inference_mode()
def bound(predict: Predict, rows: Rows, *, mask_token_id: int, draws: int, seed: int, batch_size: int = 8) -> Bound:
    """Estimate the negative evidence lower bound of the text tokens of rows, given their special tokens.

    Args:
        predict: returns the logits at chosen positions of noised rows.
        rows: clean rows.
        mask_token_id: of the model.
        draws: masks of a row, their counts stratified; they depend on the seed and the row's number alone.
        seed: of the masks.
        batch_size: masks of a pass.

    Source: as `lib.diffusion.likelihood.nelbo`, but for special tokens, which are seen and not scored.
    """
    masks = torch.cat(
        [
            exact_count_masks(is_text, draws, generator=generator(seed, "bound", number))
            for number, is_text in enumerate(rows.is_text)
        ]
    )
    ids = rows.ids.repeat_interleave(draws, 0)
    tokens, chars = rows.is_text.sum(1), rows.chars.sum(1)
    sums = []
    for part, where in zip(ids.split(batch_size), masks.split(batch_size), strict=True):
        logits = predict(part.masked_fill(where, mask_token_id), where).float()
        losses = torch.zeros(where.shape)
        losses[where] = F.cross_entropy(logits, part[where], reduction="none").cpu()
        sums.append(losses.sum(1))
    counts = masks.sum(1)
    nats = (torch.cat(sums) / counts).view(len(rows.ids), draws).mean(1) * tokens
    per_char = float(nats.sum() / chars.sum())
    # of a ratio of sums, by its residuals
    error = float((nats - per_char * chars).std() * len(nats) ** 0.5 / chars.sum()) if len(nats) > 1 else float("nan")
    return Bound(float(nats.sum() / tokens.sum()), per_char, error, float(chars.sum() / tokens.sum()))
