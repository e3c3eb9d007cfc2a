"""The analytical step: the last tokens of a block predicted from the last pass, by a correction fitted on past trajectories.

When few positions of a block are still masked, the sampler would go on a token at a time, so that each can see the others.
Instead all are written at once: the state that the last pass left at a position, together with its two neighbours as they would
then read, gives the state from which the sampler would have written its token, and the network's own head reads that out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import InputError, require
from lib.core.runtime import generator
from lib.decoding.analytical.closed_forms import by_leverage, centres, low_rank_ridge
from lib.decoding.caches import Hidden, read_out, run_whole, states_at
from lib.diffusion import sampler
from lib.diffusion.commits import DenoisingStep
from lib.models.language_model import LanguageModel

Method = Literal["ridge", "nearest"]
RADIUS = 4  # tokens on each side of a window of text
SMALLEST_SCALE = 1e-6  # of a feature: one that never varies must not be blown up


@dataclass(frozen=True)
class LateExamples:
    """Positions that were still masked late in a block, and what the full sampler made of them.

    Attributes:
        states: what the last computed pass left there for the head to read.
        left, right: tokens beside them, where masked the last pass' own guesses; at the end of a text the position itself.
        final: states from which the full sampler wrote the tokens, in later passes.
        tokens: what it wrote.
        prompt: which prompt each example belongs to.
        window: the text around it as it then reads, its own place in the middle; -1 beyond the ends.
        finished: the same window of the finished text.
    """

    states: Float[Tensor, "example feature"]
    left: Int[Tensor, "example"]
    right: Int[Tensor, "example"]
    final: Float[Tensor, "example feature"]
    tokens: Int[Tensor, "example"]
    prompt: Int[Tensor, "example"]
    window: Int[Tensor, "_ offset"] = field(default_factory=lambda: torch.empty((0, 2 * RADIUS + 1), dtype=torch.long))
    finished: Int[Tensor, "_ offset"] = field(default_factory=lambda: torch.empty((0, 2 * RADIUS + 1), dtype=torch.long))


@dataclass(frozen=True)
class LateStep:
    """A fitted correction of states: `offset + w @ outputs`, of standardised features z = (x - mean) / scale.

    Attributes:
        method: `"ridge"`: w = z @ inputs, a low-rank linear map; `"nearest"`: w averages the `neighbours` rows of `outputs` whose
            `inputs` lie nearest to z.
        mean, scale: of the features: a state, and the embeddings of the tokens to its left and right.
        inputs: [feature of z, rank], or the standardised features of the coreset [example, feature of z].
        outputs: [rank, feature], or the corrections of the coreset [example, feature].
        offset: mean correction (0 for `"nearest"`).
        neighbours: of `"nearest"`.
    """

    method: Method
    mean: Float[Tensor, "input"]
    scale: Float[Tensor, "input"]
    inputs: Float[Tensor, "_ _"]
    outputs: Float[Tensor, "_ feature"]
    offset: Float[Tensor, "feature"]
    neighbours: int

    def predict(
        self,
        model: LanguageModel,
        states: Float[Tensor, "example feature"],
        *,
        left: Int[Tensor, "example"],
        right: Int[Tensor, "example"],
    ) -> Int[Tensor, "example"]:
        """Return the tokens that the sampler would come to write, without a pass through the network."""
        z = (_features(model, states, left, right) - self.mean) / self.scale
        if self.method == "ridge":
            correction = z @ self.inputs @ self.outputs
        else:
            nearest = torch.cdist(z, self.inputs).topk(self.neighbours, largest=False).indices
            correction = self.outputs[nearest].mean(1)
        return read_out(model, (states.float() + self.offset + correction).to(states.dtype)).argmax(-1)

    def of_examples(self, model: LanguageModel, examples: LateExamples) -> Int[Tensor, "example"]:
        """Return the token of each example."""
        return self.predict(model, examples.states, left=examples.left, right=examples.right)

    def write(
        self, model: LanguageModel, hidden: Hidden, ids: Int[Tensor, "batch place"], late: Bool[Tensor, "batch place"]
    ) -> Int[Tensor, "selected"]:
        """Return the tokens of the places `late` of a text that holds the last pass' guesses there."""
        left, right = beside(ids, late)
        return self.predict(model, states_at(model, hidden, late), left=left, right=right)


@runtime_checkable
class Predictor(Protocol):
    """Predicts late tokens."""

    def of_examples(self, model: LanguageModel, examples: LateExamples) -> Int[Tensor, "example"]:
        """Return the token of each example."""
        ...

    def write(
        self, model: LanguageModel, hidden: Hidden, ids: Int[Tensor, "batch place"], late: Bool[Tensor, "batch place"]
    ) -> Int[Tensor, "selected"]:
        """Return the tokens of the places `late` of a text that holds the last pass' guesses there."""
        ...


@torch.inference_mode()
def collect(
    model: LanguageModel,
    prompts: Int[Tensor, "prompt position"],
    *,
    new_tokens: int,
    block_length: int,
    share: float,
    first_only: bool = False,
) -> LateExamples:
    """Run the plain sampler, one token a step, and keep what it knew and did late in every block.

    Args:
        model: a diffusion model.
        prompts: of equal length.
        new_tokens: tokens to generate.
        block_length: tokens of a block.
        share: a state is late when at most this share of its block is left masked by the tokens it has just committed.
        first_only: keep the first late state of a block only, the one at which decoding stops calling the network.

    Returns:
        One example for each position that a late state leaves masked.

    Raises:
        InputError: a share that leaves no position of a block, or what the sampler refuses.
    """
    rule = "a late step must be fitted on a model whose attention is not by blocks"
    require(not model.goes_by_blocks, rule, f"{model.attention} with {model.name}", "its own sampler is block_sampler.generate")
    sampler.check_masks(model)
    most = most_left(share, block_length=block_length)
    steps: list[DenoisingStep] = []
    keep = steps.append
    ids = sampler.sample(model, prompts, new_tokens=new_tokens, steps=new_tokens, block_length=block_length, on_step=keep)
    found = []
    for first in range(0, new_tokens, block_length):
        block = range(prompts.shape[1] + first, prompts.shape[1] + first + block_length)
        of_block = steps[first : first + block_length]
        found += _of_block(model, of_block, ids, block=block, most=most)[: 1 if first_only else None]
    if not found:
        raise InputError("late states must leave tokens to predict, got only mask tokens from the sampler: use another model")
    return LateExamples(**{name: torch.cat([part[name] for part in found]) for name in found[0]})


def late_count(share: float, *, block_length: int) -> int:
    """Return how many positions of a block are at most its share: none of a block that is too short.

    >>> late_count(0.29, block_length=100), late_count(0.25, block_length=3)
    (29, 0)
    """
    return int(share * block_length + 1e-9)  # 0.29 * 100 is a little less than 29


def most_left(share: float, *, block_length: int) -> int:
    """Return how many positions of a block a late state may leave masked.

    Raises:
        InputError: none of them, or all.

    >>> most_left(0.29, block_length=100)
    29
    """
    most = late_count(share, block_length=block_length)
    if not 1 <= most < block_length:
        rule = f"late_share must leave 1 to {block_length - 1} of {block_length} positions masked"
        raise InputError(f"{rule}, got {share}: use {1 / block_length:.3g} for one of them")
    return most


def _of_block(
    model: LanguageModel, steps: Sequence[DenoisingStep], ids: Tensor, *, block: range, most: int
) -> list[dict[str, Tensor]]:
    """Return the examples of one block by late state; `ids` is the finished text."""
    mask_id = cast(int, model.mask_token_id)
    in_block = torch.zeros_like(ids, dtype=torch.bool)
    in_block[:, block.start : block.stop] = True
    final, waiting = torch.empty(0), []
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        left_masked = in_block & (following.is_masked if following else False)
        if int(left_masked.sum(1).min()) > most:
            continue
        hidden = run_whole(model, step.input_ids)
        final = final if len(final) else torch.zeros_like(hidden.states)
        written = step.is_committed & in_block
        final[written] = states_at(model, hidden, written)
        # A position that ends as a mask token has no token to learn.
        where = left_masked & (left_masked.sum(1, keepdim=True) <= most) & (ids != mask_id)
        open_now = step.is_masked & in_block
        guesses = read_out(model, states_at(model, hidden, open_now)).argmax(-1)
        left, right = beside(step.input_ids.masked_scatter(open_now, guesses), where)
        after = ids if following is None else following.input_ids
        around = windows_at(after.masked_fill(where, mask_id), where)
        seen = {"states": states_at(model, hidden, where), "left": left, "right": right, "window": around}
        ends = {"tokens": ids[where], "finished": windows_at(ids, where), "prompt": where.nonzero()[:, 0]}
        waiting.append((where, seen | ends))
    return [{**known, "final": final[where]} for where, known in waiting if bool(where.any())]


def beside(
    ids: Int[Tensor, "batch position"], where: Bool[Tensor, "batch position"]
) -> tuple[Int[Tensor, "selected"], Int[Tensor, "selected"]]:
    """Return the tokens to the left and to the right of each chosen position, at an end of the text its own.

    >>> left, right = beside(torch.tensor([[5, 6, 7]]), torch.tensor([[False, True, True]]))
    >>> left.tolist(), right.tolist()
    ([5, 6], [7, 7])
    """
    rows, positions = where.nonzero(as_tuple=True)
    return ids[rows, (positions - 1).clamp(min=0)], ids[rows, (positions + 1).clamp(max=ids.shape[1] - 1)]


def windows_at(ids: Int[Tensor, "batch position"], where: Bool[Tensor, "batch position"]) -> Int[Tensor, "selected offset"]:
    """Return the tokens around each chosen position, `RADIUS` on each side, -1 beyond the ends.

    >>> windows_at(torch.tensor([[5, 6, 7]]), torch.tensor([[True, False, False]])).tolist()
    [[-1, -1, -1, -1, 5, 6, 7, -1, -1]]
    """
    padded = torch.nn.functional.pad(ids, (RADIUS, RADIUS), value=-1)
    return padded.unfold(1, 2 * RADIUS + 1, 1)[where]


@torch.inference_mode()
def fit(
    model: LanguageModel,
    examples: LateExamples,
    *,
    method: Method = "ridge",
    coreset: int = 2000,
    rank: int = 32,
    ridge: float = 0.1,
    neighbours: int = 4,
    seed: int = 0,
) -> LateStep:
    """Fit the correction of states on a coreset of examples, in closed form.

    Args:
        model: the model that the examples come from.
        examples: from training prompts.
        method: `"ridge"` on examples drawn by their leverage, or `"nearest"` on k centres.
        coreset: examples to keep; all of them where there are fewer.
        rank: of the linear map.
        ridge: penalty, in units of the mean eigenvalue of the features' Gram matrix.
        neighbours: corrections averaged by `"nearest"`.
        seed: of the coreset.

    Returns:
        The correction, in float32 on the model's device.

    Raises:
        InputError: an unknown method, or numbers out of range.

    Source: Izenman, Reduced-rank regression for the multivariate linear model (1975), here with a ridge penalty; Drineas, Mahoney
        and Muthukrishnan, Sampling algorithms for l2 regression (2006), for leverage; Gonzalez, Clustering to minimize the
        maximum intercluster distance (1985), for k centres.
    """
    if method not in get_args(Method):
        raise InputError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}: choose one")
    if min(coreset, rank, neighbours) < 1 or ridge <= 0:
        got = f"{coreset}, {rank}, {neighbours} and {ridge}"
        raise InputError(f"coreset, rank and neighbours must be at least 1 and ridge above 0, got {got}: raise them")
    features = _features(model, examples.states, examples.left, examples.right).double()
    targets = (examples.final - examples.states).double()
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=SMALLEST_SCALE)
    z, stream = (features - mean) / scale, generator(seed, "late step", method)
    if method == "ridge":
        offset = targets.mean(0)
        picked, weights = by_leverage(z, size=coreset, ridge=ridge, generator=stream)
        inputs, outputs = low_rank_ridge(z[picked], targets[picked] - offset, weights=weights, ridge=ridge, rank=rank)
    else:
        picked = centres(z, size=coreset, generator=stream)
        inputs, outputs, offset = z[picked], targets[picked], torch.zeros_like(targets[0])
    tensors = {"mean": mean, "scale": scale, "inputs": inputs, "outputs": outputs, "offset": offset}
    floats = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    return LateStep(method=method, neighbours=min(neighbours, len(picked)), **floats)


def agreement(model: LanguageModel, examples: LateExamples, step: Predictor | None) -> Float[Tensor, "prompt"]:
    """Return the share of examples of each prompt whose token is predicted as the full sampler wrote it.

    Args:
        model: the model that the examples come from.
        examples: from prompts that nothing was fitted on.
        step: what predicts; None is the control, the best token of the last pass.
    """
    predicted = read_out(model, examples.states).argmax(-1) if step is None else step.of_examples(model, examples)
    right = (predicted == examples.tokens).double()
    return torch.stack([right[examples.prompt == prompt].mean() for prompt in examples.prompt.unique()])


def _features(model: LanguageModel, states: Tensor, left: Tensor, right: Tensor) -> Float[Tensor, "example input"]:
    embed = cast(torch.nn.Module, model.network.get_input_embeddings())
    return torch.cat([states, embed(left), embed(right)], dim=1).float()
