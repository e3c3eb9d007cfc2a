"""Sums over what linear layers read: norms and Hessians, of all tokens or of those that went to an expert."""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.core.errors import InputError, require
from lib.models.language_model import ExpertNumber

Aggregate = Literal["root_mean_square", "sum_of_norms"]


class InputStatistics:
    """Sums over calibration tokens of one linear layer's input, in float32.

    Attributes:
        by_group: whether rows of the matrix come in groups (key-value heads) that weigh tokens differently.
        squares: sum of (omega x)^2 by group and feature; one group when not.
        norms: sum over samples of the sample's L2 norm by group and feature.
        samples: samples seen.
        products: sum of (omega x)(omega x)^T, when asked for.
        experts: of a block with experts, the statistics of each over the tokens that went to it; those here are over all tokens
            of the layer (of what `down` reads: over all experts together).
        tokens: rows of an expert that count, their weight not 0.
        least: tokens below which an expert's statistics are not used, see `is_short`.
    """

    def __init__(self, features: int, *, hessian: bool, device: torch.device, groups: int | None = None) -> None:
        self.by_group = groups is not None
        self.squares = torch.zeros(groups or 1, features, device=device)
        self.norms = torch.zeros(groups or 1, features, device=device)
        self.samples = 0.0
        self.products = torch.zeros(features, features, device=device) if hessian else None
        self.experts: Mapping[ExpertNumber, InputStatistics] = {}
        self.tokens, self.least = 0, features if hessian else 1

    @property
    def is_short(self) -> bool:
        """Whether an expert saw too few tokens: none for norms, fewer than features for a Hessian, which is then singular."""
        return self.tokens < self.least

    def add(self, inputs: Float[Tensor, "sample position feature"], weight: Tensor | None) -> None:
        """Add a batch.

        Args:
            inputs: what the layer read.
            weight: `[sample, position]`; or `[sample, head, position]`: by group its heads in equal parts, otherwise the heads
                whose outputs the input features are.
        """
        if self.products is None and (weight is None or weight.dim() == 2):
            add_shared([self], inputs, [weight])
            return
        self.samples += len(inputs)
        if weight is not None and weight.dim() == 3 and self.by_group:
            by_group = weight.unflatten(1, (len(self.squares), -1)).mean(2)
            for group in range(len(self.squares)):
                self._add(group, inputs.float() * by_group[:, group, :, None].to(inputs.device))
        elif weight is None:
            self._add(0, inputs.float())
        else:
            self._add(0, inputs.float() * spread(weight, inputs.shape[-1]).to(inputs.device))

    def add_rows(
        self,
        rows: Float[Tensor, "row feature"],
        weight: Float[Tensor, "row"] | None,
        sample: Int[Tensor, "row"],
        *,
        shape: tuple[int, int],
    ) -> None:
        """Add what an expert read of a batch.

        Args:
            rows: of the tokens that went to it.
            weight: of the same tokens.
            sample: which sample of the batch each belongs to.
            shape: samples and positions of the batch. As many rows as positions count as one sample, so that norms and Hessians
                are per token, like those of other layers.
        """
        values = weighted_rows(rows, weight)
        squares = torch.zeros(shape[0], rows.shape[1], device=self.squares.device)
        self._add_squares(0, squares.index_add_(0, sample, values * values))
        self.samples += len(rows) / shape[1]
        self.tokens += len(rows) if weight is None else int((weight > 0).sum())

    def add_products(self, values: Float[Tensor, "row feature"]) -> None:
        """Add outer products of weighted rows.

        Raises:
            InputError: outer products were not asked for.
        """
        require(self.products is not None, "a Hessian must be collected", "norms only", "ask for hessian=True")
        cast(Tensor, self.products).addmm_(values.T, values)

    def _add(self, group: int, values: Tensor) -> None:
        self._add_squares(group, (values * values).sum(1))
        if self.products is not None:
            self.add_products(values.flatten(0, 1))

    def _add_squares(self, group: int, squares: Float[Tensor, "sample feature"]) -> None:
        self.squares[group] += squares.sum(0)
        self.norms[group] += squares.sqrt().sum(0)

    def input_norm(self, aggregate: Aggregate) -> Float[Tensor, "group feature"]:
        """Return the norm of each feature: over all tokens (up to a common factor), or summed over samples.

        Source: Wanda's root mean square over samples; the sum of norms of the authors' sink variant.
        """
        return (self.squares / self.samples).sqrt() if aggregate == "root_mean_square" else self.norms

    def hessian(self) -> Float[Tensor, "feature feature"]:
        """Return 2 / samples times the sum of outer products.

        Raises:
            InputError: outer products were not asked for.
        """
        if self.products is None:
            raise InputError("a Hessian must be collected, got norms only: ask for hessian=True")
        return self.products * (2.0 / self.samples)


class OneHessian(InputStatistics):
    """Statistics whose Hessian takes the place of their outer products, and is given away to the last layer that reads it.

    SparseGPT works on a copy: the matrix itself is then gone while the copy is inverted, which is the peak of a block.
    """

    def __init__(self, features: int, *, device: torch.device, readers: int) -> None:
        super().__init__(features, hessian=True, device=device)
        self._readers, self._is_hessian = readers, False

    def hessian(self) -> Float[Tensor, "feature feature"]:
        """Return the Hessian, as often as there are readers; nothing may be added afterwards."""
        found = cast(Tensor, self.products)
        if not self._is_hessian:
            found.mul_(2.0 / self.samples)
            self._is_hessian = True
        self._readers -= 1
        if not self._readers:
            self.products = None
        return found


def with_products(norms: InputStatistics, *, readers: int | None) -> InputStatistics:
    """Return statistics with the norms that were collected and room for outer products.

    Args:
        norms: of the same rows; their tensors are shared.
        readers: layers that read the Hessian, which goes with the last of them; None keeps it.
    """
    features, device = norms.squares.shape[1], norms.squares.device
    if readers is None:
        made = InputStatistics(features, hessian=True, device=device)
    else:
        made = OneHessian(features, device=device, readers=readers)
    made.squares, made.norms, made.samples, made.tokens = norms.squares, norms.norms, norms.samples, norms.tokens
    return made


def add_shared(
    statistics: Sequence[InputStatistics],
    inputs: Float[Tensor, "sample position feature"],
    weights: Sequence[Float[Tensor, "sample position"] | None],
) -> None:
    """Add a batch to the norms of several statistics that weigh its tokens differently, squaring it once.

    Args:
        statistics: without outer products and without groups.
        inputs: what the layer read.
        weights: of its tokens, one for each of the statistics.
    """
    ones = torch.ones(inputs.shape[:2], device=inputs.device)
    of_each = [ones if weight is None else weight.to(inputs.device).float().square() for weight in weights]
    squares = torch.stack(of_each, 1) @ inputs.float().square()
    for number, found in enumerate(statistics):
        found.samples += len(inputs)
        found._add_squares(0, squares[:, number])


def weighted_rows(rows: Float[Tensor, "row feature"], weight: Float[Tensor, "row"] | None) -> Float[Tensor, "row feature"]:
    """Return rows in float32, each times its weight."""
    return rows.float() if weight is None else rows.float() * weight[:, None].to(rows.device)


def spread(weight: Tensor, features: int) -> Float[Tensor, "sample position feature_or_one"]:
    """Bring token weights to the shape of a layer's input: alike for all features, or its heads one after another."""
    return (
        weight[..., None] if weight.dim() == 2 else weight.transpose(1, 2).repeat_interleave(features // weight.shape[1], dim=2)
    )
