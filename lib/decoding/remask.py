"""The second choice: what a pass takes back or changes of the tokens that are written in the block; and where a block ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import require
from lib.decoding.caches import Hidden, logits_from, run_whole
from lib.decoding.commit import Threshold, probability
from lib.decoding.recompute import Pass, Recompute
from lib.decoding.view import View
from lib.diffusion import commits
from lib.models.language_model import LanguageModel, network_body

Sign = Literal["low probability", "another token", "drop"]


@dataclass(frozen=True)
class Remask:
    """A rule. It is told the predictions of the pass at written tokens, too; those of the prompt are never touched.

    Rows are decoded one by one, since one that has no mask left may get some back.
    """

    @property
    def post_passes(self) -> int:
        """Return how many passes may follow a block's last mask, as long as they change something."""
        return 0

    def most_steps(self, block_length: int) -> int:
        """Return after how many passes a block ends in any case."""
        return 5 * block_length

    def __call__(self, view: View, ids: Int[Tensor, "batch place"]) -> Int[Tensor, "batch place"]:
        """Return the text after what is committed, with tokens taken back or changed.

        Args:
            view: of the pass; its `ids` are the text before it.
            ids: that text with what the pass commits.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TokenToMask(Remask):
    """Take a token back to the mask when the pass speaks against it.

    Attributes:
        sign: `"low probability"`: p(token) < bound; `"another token"`: another one has p > bound; `"drop"`: p(token) has changed
            by more than the bound since the last pass.
        bound: of the sign.
        most_times: that a place is taken back.
        most_share: of a block that one pass takes back, the least probable tokens first.

    Source: Remask, Don't Replace (arXiv 2604.18738), modeling_remask.py: bounds .5, .9 and .3.
    """

    sign: Sign = "low probability"
    bound: float = 0.5
    most_times: int = 3
    most_share: float = 0.25

    def __post_init__(self) -> None:
        require(self.sign in get_args(Sign), f"sign must be one of {', '.join(get_args(Sign))}", repr(self.sign), "choose one")
        probability("bound", self.bound)

    def __call__(self, view: View, ids: Int[Tensor, "batch place"]) -> Int[Tensor, "batch place"]:
        """Judge the tokens that the pass has read."""
        assert view.guess is not None
        now, other = view.guess.probability_of(view.ids), view.guess.tokens != view.ids
        if self.sign == "low probability":
            against = now < self.bound
        elif self.sign == "another token":
            against = other & (view.guess.confidence > self.bound)
        else:
            before: Tensor = view.memory.get("probability", torch.full_like(now, float("nan")))
            against = (now - before).abs() > self.bound  # NaN, of a place that was not written then, is not
            view.memory["probability"] = torch.where(view.written, now, float("nan"))
        times: Tensor = view.memory.get("taken back", torch.zeros_like(ids))
        against &= view.written & (times < self.most_times)
        most = torch.full_like(ids[:, 0], int(self.most_share * len(view.block)))
        back = commits.most_confident((-now).masked_fill(~against, float("-inf")), against.sum(1).minimum(most))
        view.memory["taken back"] = times + back
        return ids.masked_fill(back, view.mask_id)


@dataclass(frozen=True)
class TopOverAll(Remask):
    """Keep the most certain tokens over all places of the block, their number rising with the steps: written ones may fall out.

    Source: the inference of RemeDi in Don't Settle Too Early (arXiv 2509.23653), with the probability of a token in the place of
        the confidence that is learnt there; so it is not RemeDi. The number follows the schedule of `commit.Quota`.
    """

    def most_steps(self, block_length: int) -> int:
        """The schedule ends with everything kept."""
        return block_length

    def __call__(self, view: View, ids: Int[Tensor, "batch place"]) -> Int[Tensor, "batch place"]:
        """Rank written and predicted tokens together."""
        assert view.guess is not None
        own = view.in_block.expand(view.ids.shape)
        score = torch.where(view.is_open, view.confidence, view.guess.probability_of(view.ids))
        score = score.masked_fill(~own, float("-inf"))
        keep = view.quota[:, : view.step + 1].sum(1)
        kept = commits.most_confident(score, keep.minimum(score.isfinite().sum(1)))
        text = torch.where(view.is_open, view.guess.tokens, view.ids)
        return torch.where(own, torch.where(kept, text, view.mask_id), view.ids)


@dataclass(frozen=True)
class Edit(Remask):
    """Put another token in the place of one that is written when its probability is above a threshold.

    In the same pass as what is committed; tokens of this block alone, never the prompt's, and never by the mask.

    Source: LLaDA 2.1, quality mode as in diffusers' LLaDA2Pipeline: tokens are committed above .7 and edited above .5, with at
        most 16 passes after the last mask, until none changes anything. Its speed mode commits above .5 and edits always
        (SGLang's joint_threshold.py). A model whose attention goes by blocks does the same by `BlockRule.edit_threshold`.
    """

    threshold: float = 0.5
    most_after: int = 16

    @property
    def post_passes(self) -> int:
        """Return `most_after`."""
        return self.most_after

    def __post_init__(self) -> None:
        probability("threshold", self.threshold)

    def __call__(self, view: View, ids: Int[Tensor, "batch place"]) -> Int[Tensor, "batch place"]:
        """Overwrite."""
        assert view.guess is not None
        best = view.guess.tokens
        other = view.written & (best != view.ids) & (best != view.mask_id) & (view.guess.confidence > self.threshold)
        return torch.where(other, view.guess.tokens, ids)


@dataclass(frozen=True)
class WideIn(Threshold):
    """Every prediction above a threshold, at most min(max(least, share of the masks), most) of them, the best first.

    Source: WINO (arXiv 2507.18578), the wide-in step: .7 of the masks, at least 5, at most 20.
    """

    threshold: float = 0.7
    share: float = 0.7
    least: int = 5
    most: int = 20

    def __call__(self, view: View) -> Bool[Tensor, "batch place"]:
        """Cap what the threshold takes."""
        cap = (self.share * view.is_open.sum(1)).long().clamp(min=self.least).clamp(max=self.most)
        return commits.most_confident(view.confidence, super().__call__(view).sum(1).minimum(cap))


@dataclass(frozen=True)
class NarrowOut(Remask):
    """Take back the tokens whose probability in a pass that does not see them is below a bound, at most one fewer than came in.

    To go with `recompute=Shadows()`: else a token would be asked about itself.

    Source: WINO (arXiv 2507.18578), the narrow-out step: .9, lowest first.
    """

    bound: float = 0.9

    def __call__(self, view: View, ids: Int[Tensor, "batch place"]) -> Int[Tensor, "batch place"]:
        """Judge the tokens that were written before this pass."""
        assert view.guess is not None and view.committed is not None
        now = view.guess.probability_of(view.ids)
        against = view.written & (now < self.bound)
        most = (view.committed.sum(1) - 1).clamp(min=0)
        back = commits.most_confident((-now).masked_fill(~against, float("-inf")), against.sum(1).minimum(most))
        return ids.masked_fill(back, view.mask_id)


@dataclass(frozen=True)
class Shadows(Recompute):
    """Full passes that also predict each written token of the block without seeing it: a mask behind the text stands in for it.

    The block's shadows have its positions; text does not see them; each sees the text but for its own token, and itself.

    Source: WINO (arXiv 2507.18578), generate.py at 9549a1d, from its description here.
    """

    @contextmanager
    def passes(self, model: LanguageModel, view: View) -> Iterator[Pass]:
        """Open passes in which the states of written places are their shadows'."""
        require(model.logit_shift == 0, "shadows must stand where their token is predicted", "a logit shift", "use Recompute")

        def run(now: View) -> Hidden:
            """Read text and shadows, and put the shadows' states in the place of written tokens' own."""
            size, begin, end = now.ids.shape[1], now.block.start, now.block.stop
            count = end - begin
            allowed = torch.zeros((size + count, size + count), dtype=torch.bool, device=now.ids.device)
            allowed[:, :size] = True
            allowed[size:, begin:end].fill_diagonal_(False)
            allowed[size:, size:].fill_diagonal_(True)
            ids = torch.cat([now.ids, torch.full_like(now.ids[:, :count], now.mask_id)], dim=1)
            positions = torch.cat([now.places, now.places[begin:end]])[None]
            mask = allowed[None, None].expand(len(ids), -1, -1, -1)
            output = network_body(model)(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
            states = output.last_hidden_state
            inside = torch.where(now.written[:, begin:end, None], states[:, size:], states[:, begin:end])
            return Hidden(torch.cat([states[:, :begin], inside, states[:, end:size]], dim=1), None, ids.numel())

        yield run


@dataclass(frozen=True)
class BlockEnds:
    """Where the block that begins now ends. This one is of the given length."""

    alone = False

    def end(self, model: LanguageModel, ids: Tensor, block: range, *, new_tokens: int) -> tuple[int, int, int]:
        """Return the end of a block, and how many passes and query positions it took to find it.

        Args:
            model: a diffusion model.
            ids: the text, one row where `alone`.
            block: of the given length.
            new_tokens: of the whole text.
        """
        return block.stop, 0, 0


def predictions(model: LanguageModel, ids: Int[Tensor, "one position"], span: range) -> Float[Tensor, "chosen vocab"]:
    """Return float64 log-probabilities of a full pass at consecutive positions of one text."""
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, span.start : span.stop] = True
    return logits_from(model, run_whole(model, ids), where).double().log_softmax(-1)


@dataclass(frozen=True)
class AtDelimiter(BlockEnds):
    """After the surest delimiter that a full pass predicts among the next tokens, if it is sure enough.

    Attributes:
        delimiters: token ids, such as those of a newline, a comma and a full stop.
        threshold: probability from which the block ends there.
        share: of all new tokens that are searched.

    Source: AdaBlock (arXiv 2509.26432), generate_adablock.py; there the pass also serves as the block's first.
    """

    delimiters: tuple[int, ...] = ()
    threshold: float = 0.3
    share: float = 0.25
    alone = True

    def end(self, model: LanguageModel, ids: Tensor, block: range, *, new_tokens: int) -> tuple[int, int, int]:
        """Search for the delimiter."""
        span = range(block.start, min(ids.shape[1], block.start + max(1, int(self.share * new_tokens))))
        values, tokens = predictions(model, ids, span).exp().max(-1)
        values = values.masked_fill(~torch.isin(tokens, torch.tensor(self.delimiters, device=tokens.device)), -1.0)
        surest = int(values.argmax())
        return (block.start + surest + 1 if float(values[surest]) >= self.threshold else block.stop), 1, ids.numel()


@dataclass(frozen=True)
class WhereFutureAgrees(BlockEnds):
    """After the last token up to which predictions with and without the masks behind differ by little in all.

    Attributes:
        bound: of the sum of KL(with || without), in nats.
        least: tokens of a block in any case.
        share: of the new tokens that are searched.

    Source: When to Commit? (arXiv 2604.23994), after the paper's description; the statistic is ours.
    """

    bound: float = 0.5
    least: int = 4
    share: float = 0.25
    alone = True

    def end(self, model: LanguageModel, ids: Tensor, block: range, *, new_tokens: int) -> tuple[int, int, int]:
        """Compare a pass that sees the future with one that does not."""
        span = range(block.start, min(ids.shape[1], block.start + max(self.least, int(self.share * new_tokens))))
        seen, cut = predictions(model, ids, span), predictions(model, ids[:, : span.stop], span)
        differs = (seen.exp() * (seen - cut)).sum(-1).cumsum(0)
        agreed = max(self.least, int((differs <= self.bound).sum()))
        return min(span.stop, block.start + agreed), 2, ids.numel() + len(ids) * span.stop
