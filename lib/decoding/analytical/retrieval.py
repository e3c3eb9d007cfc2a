"""The analytical step as published: an exact denoiser over a subset of the training windows that depends on the noise.

No network is asked. The windows of training text that agree best with what is written around a mask vote for its token. When few
masks are left few windows count; when many are left all do, since then any small subset is wrong about most of them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import require
from lib.core.runtime import generator
from lib.decoding.caches import Hidden
from lib.decoding.late_steps import RADIUS, LateExamples, windows_at
from lib.models.language_model import LanguageModel

QUERIES_AT_ONCE = 16


@dataclass(frozen=True)
class Retrieved:
    """A denoiser by retrieval.

    Window n weighs exp(-sharpness sum_o decay^(|o| - 1) [its token at offset o differs]), over the written offsets o.
    The prediction is the weighted histogram of the windows' middle tokens, plus `unigram` times that of all tokens.

    Attributes:
        windows: training windows of 2 `RADIUS` + 1 tokens, in random order; -1 beyond the end of a text.
        frequency: of tokens in the training text.
        least: windows that count when no mask is left around; all count when everything is masked.
        everything: use all windows always, the control of the subset.
        sharpness, decay, unigram: see above.
        duplicates: share of the test windows that stood in the training text, word for word.

    Source: Fast and Scalable Analytical Diffusion (arXiv 2602.16498), methods/ours.py at 4c0ba1d: k = k_max - (k_max - k_min)
        (1 - noise). Known deviations: tokens for pixels; noise is the masked share of the window; all distances are exact, the
        coarse search there is for speed only; k_max is everything.
    """

    windows: Int[Tensor, "window offset"]
    frequency: Float[Tensor, "vocab"]
    least: int = 200
    everything: bool = False
    sharpness: float = 8.0
    decay: float = 0.7
    unigram: float = 0.5
    duplicates: float = float("nan")

    def count(self, share: float) -> int:
        """Return how many windows count at a masked share of the surroundings."""
        whole = len(self.windows)
        return whole if self.everything else min(whole, round(whole - (whole - self.least) * (1 - share)))

    def probabilities(self, queries: Int[Tensor, "query offset"], *, mask_id: int) -> Float[Tensor, "query vocab"]:
        """Return the prediction for the token in the middle of each query.

        Args:
            queries: windows of a text; -1 beyond its ends.
            mask_id: the mask token.
        """
        return torch.cat([self._some(part, mask_id) for part in queries.split(QUERIES_AT_ONCE)])

    def _some(self, queries: Tensor, mask_id: int) -> Tensor:
        offset = torch.arange(-RADIUS, RADIUS + 1, device=queries.device)
        cost = self.decay ** (offset.abs() - 1).clamp(min=0).double()
        written = (queries != mask_id) & (queries >= 0) & (offset != 0)
        differs = torch.zeros((len(queries), len(self.windows)), dtype=torch.float64, device=queries.device)
        for at in (offset != 0).nonzero()[:, 0].tolist():
            differs += cost[at] * written[:, at, None] * (queries[:, at, None] != self.windows[None, :, at])
        share = ((queries == mask_id) & (offset != 0)).sum(1) / ((queries >= 0) & (offset != 0)).sum(1).clamp(min=1)
        found = self.unigram * self.frequency.double().expand(len(queries), -1)
        rows = []
        for row, base, part in zip(differs, found, share.tolist(), strict=True):
            nearest = row.topk(self.count(part), largest=False)
            weight = torch.exp(-self.sharpness * nearest.values)
            rows.append(base.clone().index_add(0, self.windows[nearest.indices, RADIUS], weight))
        votes = torch.stack(rows)
        return votes / votes.sum(1, keepdim=True)

    def of_examples(self, model: LanguageModel, examples: LateExamples) -> Int[Tensor, "example"]:
        """Return the token of each example."""
        assert model.mask_token_id is not None
        return self.probabilities(examples.window, mask_id=model.mask_token_id).argmax(-1)

    def write(
        self, model: LanguageModel, hidden: Hidden, ids: Int[Tensor, "batch place"], late: Bool[Tensor, "batch place"]
    ) -> Int[Tensor, "selected"]:
        """Return the tokens of the places `late` of a text that holds guesses there."""
        assert model.mask_token_id is not None
        windows = windows_at(ids.masked_fill(late, model.mask_token_id), late)
        return self.probabilities(windows, mask_id=model.mask_token_id).argmax(-1)


def retrieved(
    texts: Int[Tensor, "text position"],
    *,
    vocab: int,
    test: Int[Tensor, "test offset"] | None = None,
    seed: int = 0,
    least: int = 200,
    everything: bool = False,
) -> Retrieved:
    """Cut training texts into windows, and leave out those that are test windows: they would answer for themselves.

    Args:
        texts: of the training split only.
        vocab: tokens there are.
        test: finished windows whose tokens are to be predicted; the duplicates among them are counted.
        seed: of the windows' order, which decides between equally near ones.
        least, everything: as in `Retrieved`.

    Raises:
        InputError: `least` below 1, or no window that is not a test window.
    """
    require(least >= 1, "least must be at least 1 window", str(least), "raise it")
    windows, share = windows_at(texts, torch.ones_like(texts, dtype=torch.bool)), float("nan")
    if test is not None:
        share = float(among(test, windows).double().mean())
        windows = windows[~among(windows, test)]
        require(len(windows) > 0, "training windows must not all be test windows", "no other", "use the training split")
    order = torch.randperm(len(windows), generator=generator(seed, "windows")).to(texts.device)
    counts = torch.bincount(texts.flatten(), minlength=vocab).double()
    return Retrieved(windows[order], counts / counts.sum(), least, everything, duplicates=share)


def among(windows: Int[Tensor, "window offset"], others: Int[Tensor, "other offset"]) -> Bool[Tensor, "window"]:
    """Mark the windows that are equal to one of the others, token by token.

    >>> among(torch.tensor([[1, 2], [2, 1]]), torch.tensor([[1, 2], [3, 1]])).tolist()
    [True, False]
    """
    known = {row.tobytes() for row in others.long().cpu().numpy()}
    return torch.tensor([row.tobytes() in known for row in windows.long().cpu().numpy()], dtype=torch.bool, device=windows.device)
