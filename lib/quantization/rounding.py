"""Weights rounded to a few bits, and the bytes they take when stored. Tensors in, tensors out.

A group of neighbours in a row shares one scale, and a weight is a whole number (its code) times that scale. Codes of b bits
run from -2^(b-1) to 2^(b-1) - 1, as in two's complement and in torchao: one more below zero than above it, so 2 bits say -2,
-1, 0 and 1. Zero is always a code and nothing is shifted, so a pruned weight stays exactly 0. Scales are kept in bfloat16,
because that is what is counted.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import BFloat16, Bool, Float, Int8
from torch import Tensor

from lib.core.errors import InputError
from lib.pruning.importances import UNSTRUCTURED, check_finite, check_removed, check_sparsity, parse_pattern, removed_count

BITS = (2, 3, 4, 8, 16)
SCALE_RULES = ("absmax", "unclipped", "search")
DENSE_BITS = 16
SCALE_BITS = 16
# what the search multiplies the scale of absmax with: steps of 5 %, down to less than a third for groups with outliers
CLIPPING = tuple(0.95**step for step in range(24))
TRIED_AT_ONCE = 2**19  # numbers: a scale for each group and try, on all weights


@dataclass(frozen=True)
class Grid:
    """A format of weights.

    Attributes:
        bits: of a code; 16 leaves weights as they are (stored as bfloat16).
        group_size: neighbours in a row that share a scale; it must divide the input features. None: the whole row.
        scale_rule: `"absmax"` sets the largest size of a group in the middle between the two ends of the codes, 2^(b-1) - 1/2, as
            torchao does by default: half a step is cut off above zero. `"unclipped"` cuts nothing off, so a group that is on such
            a grid already stays as it is. `"search"` takes the scale with the smallest squared error.
    """

    bits: int
    group_size: int | None = None
    scale_rule: str = "absmax"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"weight_bits must be among {', '.join(map(str, BITS))}, got {self.bits}: choose one of them")
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"group_size must be at least 1, got {self.group_size}: leave it out for one scale a row")
        if self.scale_rule not in SCALE_RULES:
            raise InputError(f"scale_rule must be among {', '.join(SCALE_RULES)}, got {self.scale_rule!r}: choose one of them")

    @property
    def rounds(self) -> bool:
        """Whether weights change at all."""
        return self.bits < DENSE_BITS

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def columns(self, width: int, *, name: str = "a layer") -> int:
        """Return how many columns share a scale in a matrix of `width` input features.

        Raises:
            InputError: the group does not divide the width.

        >>> Grid(4, group_size=32).columns(96), Grid(4).columns(96)
        (32, 96)
        """
        if not self.rounds or self.group_size is None:
            return width
        if width % self.group_size:
            raise InputError(
                f"group_size must divide the input features, got {self.group_size} for {width} of {name}: choose a divisor"
            )
        return self.group_size


@dataclass(frozen=True)
class Quantized:
    """A matrix as it is stored.

    Attributes:
        codes: whole numbers from the grid's lowest to its highest.
        scales: one for every group of a row, larger than 0.
        grid: the format.
    """

    codes: Int8[Tensor, "out in"]
    scales: BFloat16[Tensor, "out group"]
    grid: Grid

    def dequantize(self, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """Return codes times scales: exact in float32 and float64, rounded once more in a 16-bit dtype.

        >>> Quantized(torch.tensor([[3, -4]]).to(torch.int8), torch.tensor([[0.5]]).bfloat16(), Grid(3)).dequantize().tolist()
        [[1.5, -2.0]]
        """
        return self.codes.to(dtype) * _spread(self.scales.to(dtype), self.codes.shape[1])

    def masked(self, kept: Bool[Tensor, "out in"]) -> "Quantized":
        """Return it with the weights outside a mask set to 0 and all others on their grid: quantize, then prune."""
        return replace(self, codes=torch.where(kept, self.codes, 0))


def round_to_nearest(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    *,
    scales: Float[Tensor, "out group"] | None = None,
    importance: Float[Tensor, "in"] | None = None,
    name: str = "a layer",
) -> Quantized:
    """Round every weight to the nearest point of its group's grid; of two that are as near, to the even code.

    Args:
        weight: matrix of a linear layer; its zeros stay.
        grid: the format, of less than 16 bits.
        scales: use these (kept in bfloat16) instead of those of the grid's rule.
        importance: weight of each input feature in the search for scales; all equal by default.
        name: of the layer, for errors.

    Raises:
        InputError: 16 bits, a group that does not divide the width, or weights that are not finite.

    >>> round_to_nearest(torch.tensor([[0.2, -1.5, 0.0, 1.0]]), Grid(2)).codes.tolist()
    [[0, -2, 0, 1]]
    """
    if not grid.rounds:
        raise InputError(f"weight_bits must be below {DENSE_BITS} to round {name}, got {grid.bits}: leave the layer as it is")
    check_finite(weight, name=name, what="the weights")
    if scales is None:
        scales = group_scales(weight, grid, importance=importance, name=name)
    stored = scales.to(torch.bfloat16)
    codes = nearest_codes(_precise(weight), _spread(stored.to(_precise(weight).dtype), weight.shape[1]), grid)
    return Quantized(codes.to(torch.int8), stored, grid)


def nearest_codes(values: Float[Tensor, "*shape"], scale: Float[Tensor, "*shape"], grid: Grid) -> Float[Tensor, "*shape"]:
    """Return the codes of values under given scales, still in the dtype of the values.

    >>> nearest_codes(torch.tensor([0.4, 9.0, -9.0]), torch.ones(3), Grid(3)).tolist()
    [0.0, 3.0, -4.0]
    """
    return (values / scale).round_().clamp_(grid.lowest, grid.highest)


def group_scales(
    weight: Float[Tensor, "out in"], grid: Grid, *, importance: Float[Tensor, "in"] | None = None, name: str = "a layer"
) -> BFloat16[Tensor, "out group"]:
    """Return the scale of every group by the grid's rule.

    Args:
        weight: matrix of a linear layer; weights that will not be kept are best set to 0, which has no error on any grid.
        grid: the format.
        importance: weight of each input feature in the search, such as the Hessian's diagonal; all equal by default.
        name: of the layer, for errors.

    Returns:
        Scales rounded to bfloat16; a group of zeros has 1.

    >>> group_scales(torch.tensor([[3.0, -1.5, 0.0, 0.0]]), Grid(2, group_size=2)).tolist()
    [[2.0, 1.0]]
    """
    size = grid.columns(weight.shape[1], name=name)
    groups = _precise(weight).unflatten(1, (-1, size))
    largest = groups.abs().amax(2)
    if grid.scale_rule == "absmax":
        return _stored(largest / (grid.highest + 0.5))
    if grid.scale_rule == "unclipped":
        return _stored(_unclipped(groups, grid))
    weights = None if importance is None else importance.to(groups.dtype).unflatten(0, (-1, size))
    return _best(groups, largest, grid, weights)


def _best(groups: Tensor, largest: Tensor, grid: Grid, importance: Tensor | None) -> BFloat16[Tensor, "out group"]:
    """Try scales for all groups at one time and keep the best of each.

    The largest size is put on both ends of the codes too, which finds the grid of a group that is on one already.
    """
    tried = [largest * (factor / (grid.highest + 0.5)) for factor in CLIPPING]
    tried += [largest / grid.highest, largest / -grid.lowest, _unclipped(groups, grid)]
    scales = _stored(torch.stack(tried))
    best = torch.empty_like(scales[0])
    rows = max(1, TRIED_AT_ONCE // (len(tried) * groups[0].numel()))
    for part in torch.arange(len(groups)).split(rows):
        values = groups[part].expand(len(tried), -1, -1, -1)
        spread = scales[:, part, :, None].to(groups.dtype).expand_as(values)
        errors = nearest_codes(values, spread, grid).mul_(spread).sub_(values).square_()
        total = (errors if importance is None else errors * importance).sum(3)
        best[part] = scales[:, part].gather(0, total.argmin(0, keepdim=True))[0]  # the first of equals
    return best


def _unclipped(groups: Tensor, grid: Grid) -> Float[Tensor, "out group"]:
    """Return the smallest scales that cut nothing off."""
    return torch.maximum(groups.amin(2) / grid.lowest, groups.amax(2) / grid.highest)


def _stored(scales: Tensor) -> BFloat16[Tensor, "*tried out group"]:
    """Round scales as they are kept; where nothing is left of one, any will do."""
    rounded = scales.to(torch.bfloat16)
    return torch.where(rounded > 0, rounded, 1.0)


def _spread(scales: Float[Tensor, "out group"], width: int) -> Float[Tensor, "out in"]:
    return scales.repeat_interleave(width // scales.shape[1], dim=1)


def _precise(values: Tensor) -> Float[Tensor, "..."]:
    """Leave 16-bit dtypes, whose quotients are too coarse to be rounded."""
    return values if values.dtype == torch.float64 else values.float()


def stored_bytes(
    shape: tuple[int, int], *, grid: Grid, sparsity: float = 0.0, pattern: str = UNSTRUCTURED, kept: int | None = None
) -> int:
    """Count the bytes of a matrix, packed as tightly as its format allows.

    A dense matrix takes `bits` for every weight. A sparse one takes `bits` for every kept weight and the places of those:
    one bit for every weight (a mask), or for N:M an index of ceil(log2 M) bits for every kept one, where that is less. For
    2:4 that is 2 bits a kept weight, as sparse tensor cores read it, and 1 bit a weight, as much as the mask. (A table of
    the 6 cases of a group would need 3 bits instead of 4; no kernel reads that.) Below 16 bits each group adds a scale of 16
    bits, which is there even when all of its weights are pruned. Where the places cost more than the removed weights save,
    the matrix is stored dense, zeros and all.

    Containers often take more: 3-bit codes in 32-bit words are 10 to a word, which leaves 2 bits of 32 unused, and checkpoints of
    compressed-tensors hold a code for every weight, pruned or not. Neither is counted here, nor are headers.

    Args:
        shape: output and input features.
        grid: the format; 16 bits is bfloat16.
        sparsity: fraction removed.
        pattern: `"unstructured"` or `"N:M"`.
        kept: exact number of kept weights instead of what the sparsity says; unstructured only.

    Raises:
        InputError: bad sparsity, pattern or group.

    Source: design.md, section 2; the sparse layout of 2:4 is that of NVIDIA's sparse tensor cores.

    >>> stored_bytes((64, 64), grid=Grid(4, group_size=64)) - 64 * 2
    2048
    >>> stored_bytes((64, 64), grid=Grid(4, group_size=64), sparsity=0.5) - 64 * 2
    1536
    """
    check_sparsity(sparsity)
    rows, width = shape
    size = rows * width
    groups = parse_pattern(pattern, sparsity=sparsity, width=width)
    removed = removed_count(size, sparsity)
    if kept is not None and groups is None:
        check_removed(size - kept, size)
        removed = size - kept
    places = size
    if groups is not None:
        removed = size // groups[1] * (groups[1] - groups[0])
        places = min(size, (size - removed) * (groups[1] - 1).bit_length())
    scales = rows * (width // grid.columns(width)) * SCALE_BITS if grid.rounds else 0
    dense = _whole_bytes(size * grid.bits)
    sparse = _whole_bytes((size - removed) * grid.bits) + _whole_bytes(places)
    return min(dense, sparse) + _whole_bytes(scales)


def _whole_bytes(bits: int) -> int:
    return -(-bits // 8)
