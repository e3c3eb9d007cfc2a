"""Timestep-adaptive models: one pruned weight set per range of mask ratios, switched row by row inside the forward pass."""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from lib.attention import masses
from lib.core.errors import InputError, require
from lib.models.language_model import LanguageModel, linear_layers
from lib.models.layers.anatomy import require_decoder
from lib.pruning.importances import check_sparsity

AttentionMask = Int[Tensor, "batch position"] | Bool[Tensor, "batch position"] | None
GentleAt = Literal["high_noise", "low_noise"]
ROUNDING = 1e-9  # a sum of shares that misses its value by less is that value


def mask_ratio(
    input_ids: Int[Tensor, "batch position"], *, mask_token_id: int, attention_mask: AttentionMask = None
) -> Float[Tensor, "batch"]:
    """Return the share of mask tokens among the real positions of each row, the prompt included.

    Args:
        input_ids: token ids, masks included.
        mask_token_id: its id.
        attention_mask: nonzero for real tokens, 0 for padding.

    Returns:
        Shares on the CPU in float64, so that 3 of 10 equals a border written 0.3; 0 for a row without real positions.

    >>> mask_ratio(torch.tensor([[5, 9, 9, 9]]), mask_token_id=9, attention_mask=torch.tensor([[1, 1, 1, 0]])).tolist()
    [0.6666666666666666]
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    masked = ((input_ids == mask_token_id) & real).sum(1)
    return masked.cpu().double() / real.sum(1).clamp(min=1).cpu().double()


class PhasedDecoder(torch.nn.Module):
    """The body of a network with one decoder per phase; each row goes through the decoder of its own mask ratio.

    Attributes:
        decoders: from high noise to low.
        borders: falling mask ratios between the phases; a row exactly on a border belongs to the noisier phase.
        mask_token_id: id of the mask token.
    """

    def __init__(self, decoders: Sequence[torch.nn.Module], *, borders: Sequence[float], mask_token_id: int) -> None:
        phase_widths(borders, phases=len(decoders))  # refuses bad ones
        super().__init__()
        self.decoders = torch.nn.ModuleList(decoders)
        self.borders = tuple(borders)
        self.mask_token_id = mask_token_id

    @property
    def config(self) -> Any:
        """Configuration, one object for all phases, so that setting the attention function reaches each of them."""
        return self.decoders[0].config

    @property
    def embed_tokens(self) -> torch.nn.Module:
        """The embedding that all phases share."""
        return cast(torch.nn.Module, self.decoders[0].embed_tokens)

    @property
    def layers(self) -> torch.nn.ModuleList:
        """Refuse: there is no single list of blocks to walk through."""
        raise InputError(f"blocks must belong to one network, got {len(self.decoders)} phases: prune each before phased()")

    def get_decoder(self) -> "PhasedDecoder":
        """Return itself, as the base models of transformers do."""
        return self

    def phase_of(self, input_ids: Int[Tensor, "batch position"], attention_mask: AttentionMask = None) -> Int[Tensor, "batch"]:
        """Return the phase of each row, 0 = most noise."""
        ratios = mask_ratio(input_ids, mask_token_id=self.mask_token_id, attention_mask=attention_mask)
        return (ratios[:, None] < torch.tensor(self.borders, dtype=torch.float64)).sum(1)

    def forward(
        self,
        input_ids: Int[Tensor, "batch position"] | None = None,
        attention_mask: AttentionMask = None,
        use_cache: bool | None = False,
        **others: Any,
    ) -> ModelOutput:
        """Run each row through its phase's decoder and put the hidden states back in order.

        Args:
            input_ids: token ids, masks included.
            attention_mask: nonzero for real tokens, 0 for padding.
            use_cache: must not be True, because keys of one phase mean nothing to another.
            others: further options of a decoder; must be None or False.

        Returns:
            Output with `last_hidden_state`.

        Raises:
            InputError: no ids, a cache or another option, or rows of several phases while masses are recorded or keys blocked.
        """
        given = [name for name, value in {"use_cache": use_cache, **others}.items() if value is not None and value is not False]
        if input_ids is None or given:
            got = ", ".join(given) or "no input_ids"
            raise InputError(f"a phased network must read input_ids in full passes, got {got}: leave everything else out")
        phase = self.phase_of(input_ids, attention_mask)
        present = phase.unique().tolist() or [0]
        if len(present) > 1 and self.config._attn_implementation == masses.NAME:
            rule = "rows recorded or blocked together must be of one phase"
            raise InputError(f"{rule}, got phases {present}: run rows of equal mask ratio together, without guidance")
        if len(present) == 1:
            return self.decoders[present[0]](input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        rows = [(phase == number).nonzero()[:, 0].to(input_ids.device) for number in present]
        parts: list[Tensor] = []
        output: Any = None
        for number, chosen in zip(present, rows, strict=True):
            mask = None if attention_mask is None else attention_mask[chosen]
            output = self.decoders[number](input_ids=input_ids[chosen], attention_mask=mask, use_cache=False)
            parts.append(output.last_hidden_state)
        return type(output)(last_hidden_state=torch.cat(parts)[torch.cat(rows).argsort()])  # a mixture has its own kind


def phased(model: LanguageModel, phases: Sequence[LanguageModel | PreTrainedModel], *, borders: Sequence[float]) -> LanguageModel:
    """Join differently pruned copies of one model into a model that switches between them by mask ratio.

    Args:
        model: the dense model, left as it is; embeddings, norms and LM head are its own tensors.
        phases: its pruned copies from high noise to low; the matrices in their blocks are used, not copied.
        borders: strictly falling mask ratios in (0, 1) between the phases; a ratio equal to a border belongs to the noisier one.

    Returns:
        A model for `logits_at`, `nelbo`, `sample` and, with rows of one phase at a time, `record` and `blocking`. The ratio is
        taken over the whole row, so a prompt lowers it, and the unguided rows of guided sampling may be in a noisier phase. Its
        table of layers lists those of every phase. It is an experiment, not a checkpoint: no plain class could load it.

    Raises:
        InputError: an autoregressive model, an encoder, noise that is not all mask, bad borders, or phases of other models.

    Source: extension (A) of the digest, pruning adapted to the timestep; the paper has one mask for all timesteps.
    """
    instead = "prune it with one mask for all"
    if model.mask_token_id is None or not model.noise.is_masked:
        raise InputError(f"phases must follow the mask ratio of masked diffusion, got {model.kind} with {model.name}: {instead}")
    rule, got = "phases must follow one mask ratio of the whole text", f"{model.attention} with {model.name}"
    require(not model.goes_by_blocks, rule, got, instead)
    require_decoder(model.network, "a model of phases", name=model.name, instead=instead)
    phase_widths(borders, phases=len(phases))  # refuses bad ones before the work
    networks = [phase.network if isinstance(phase, LanguageModel) else phase for phase in phases]
    config = copy.deepcopy(model.network.config)
    decoders = [_decoder_like(model.network, other, number=number, config=config) for number, other in enumerate(networks)]
    body = PhasedDecoder(decoders, borders=borders, mask_token_id=model.mask_token_id).eval()
    # deepcopy takes what it finds in the memo instead of copying it: the new network gets the new body and the same tensors.
    known: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(model.network).values()}
    known |= {id(model.network.config): config, id(model.network.get_decoder()): body}
    network = copy.deepcopy(model.network, known)
    layers = [
        replace(layer, name=layer.name.replace("model.", f"model.decoders.{number}.", 1))
        for number, decoder in enumerate(decoders)
        for layer in linear_layers(decoder)
    ]
    return replace(model, network=network, layers=tuple(layers), fingerprint="")


def _decoder_like(dense: PreTrainedModel, other: PreTrainedModel, *, number: int, config: Any) -> PreTrainedModel:
    """Return a new decoder with the prunable matrices of `other` and all other tensors of the dense network."""
    own = {id(layer.module.weight) for layer in linear_layers(other)}
    body = cast(PreTrainedModel, other.get_decoder())
    wanted, got = _tensors(cast(PreTrainedModel, dense.get_decoder())), _tensors(body)
    known: dict[int, Any] = {id(module.config): config for module in body.modules() if hasattr(module, "config")}
    for name in sorted(wanted.keys() | got.keys()):
        ours, theirs = wanted.get(name), got.get(name)
        if ours is None or theirs is None or not _fits(ours, theirs, by_value=id(theirs) not in own):
            rule = "phases must differ from the dense model in pruned matrices only"
            raise InputError(f"{rule}, got another {name} in phase {number}: prune copies of that model")
        known[id(theirs)] = theirs if id(theirs) in own else ours
    return copy.deepcopy(body, known)


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _fits(ours: Tensor, theirs: Tensor, *, by_value: bool) -> bool:
    """Tell whether a tensor may stand in a phase: alike in kind, and equal where phases must not differ."""
    alike = (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    return ours is theirs or (alike and (not by_value or torch.equal(ours, theirs)))


def phase_widths(borders: Sequence[float], *, phases: int | None = None) -> list[float]:
    """Return the share of the mask ratios that each phase covers, refusing borders that are not ordered or too few or many.

    >>> phase_widths([0.75])
    [0.25, 0.75]
    """
    widths = [before - after for before, after in itertools.pairwise([1.0, *borders, 0.0])]
    rule = "borders must fall strictly inside (0, 1)"
    require(all(width > 0 for width in widths), rule, str(list(borders)), "order the mask ratios from high to low")
    if phases is not None and phases != len(widths):
        raise InputError(f"phases must be one more than borders, got {phases} and {len(borders)}: add or drop a border")
    return widths


def mean_sparsity(sparsities: Sequence[float], borders: Sequence[float]) -> float:
    """Return the sparsity that an input of uniform mask ratio meets on average.

    Args:
        sparsities: of the phases, from high noise to low.
        borders: falling mask ratios between them.

    Raises:
        InputError: a sparsity out of range, or borders that do not fit.

    >>> mean_sparsity([0.25, 0.75], [0.75])
    0.625
    """
    for sparsity in sparsities:
        check_sparsity(sparsity)
    return _weighted(sparsities, phase_widths(borders, phases=len(sparsities)))


def _weighted(values: Sequence[float], widths: Sequence[float]) -> float:
    return math.fsum(width * value for width, value in zip(widths, values, strict=True))


def phase_sparsities(
    mean: float, *, spread: float, borders: Sequence[float], gentle_at: GentleAt = "high_noise"
) -> tuple[float, ...]:
    """Choose evenly spaced sparsities for the phases whose mean over uniform mask ratios is the one asked for.

    Args:
        mean: mean sparsity, each phase weighted by the width of its range of mask ratios.
        spread: half of the distance between the gentlest and the most aggressive phase, as a fraction of weights; 0 = all equal.
        borders: falling mask ratios between the phases.
        gentle_at: where less is removed.

    Returns:
        Sparsities from high noise to low.

    Raises:
        InputError: bad borders, a negative spread, or a phase whose sparsity would leave [0, 1).

    Source: gentle at high noise is extension (A) of the digest; the reverse is its control.

    >>> phase_sparsities(0.5, spread=0.1, borders=(0.5,))
    (0.4, 0.6)
    """
    check_sparsity(mean)
    widths = phase_widths(borders)
    require(spread >= 0, "spread must not be negative", f"{spread:g}", "turn the order round with gentle_at")
    sign = 1 if gentle_at == "high_noise" else -1
    offsets = [sign * spread * (2 * phase / max(len(borders), 1) - 1) for phase in range(len(widths))]
    centre = _weighted(offsets, widths)
    chosen = [mean + (offset - centre) for offset in offsets]
    chosen = [0.0 if abs(sparsity) < ROUNDING else sparsity for sparsity in chosen]
    rule, got = "the sparsity of every phase must be in [0, 1)", str([round(sparsity, 3) for sparsity in chosen])
    require(all(0 <= sparsity < 1 for sparsity in chosen), rule, got, "lower the spread")
    return tuple(chosen)


@dataclass(frozen=True)
class StoredBytes:
    """What pruned matrices cost in store, in bytes, masks included.

    Attributes:
        all_phases: kept weights and one mask per phase.
        one_mask: one mask of the same mean sparsity for all timesteps.
        dense: every weight, no mask.
        mean_sparsity: over uniform mask ratios, measured on the masks.
    """

    all_phases: int
    one_mask: int
    dense: int
    mean_sparsity: float


def stored_bytes(
    masks: Sequence[Mapping[str, Bool[Tensor, "_out _in"]]],
    *,
    borders: Sequence[float],
    bytes_per_weight: float,
    shared_values: bool = True,
) -> StoredBytes:
    """Count what keeping all phases costs, beside one mask of the same mean sparsity, and the dense matrices.

    Args:
        masks: per phase from high noise to low, the keep mask of each matrix.
        borders: falling mask ratios between the phases.
        bytes_per_weight: bytes of a stored weight, 2 for bfloat16 and 0.5 for 4 bits.
        shared_values: True when phases keep the dense values (magnitude, Wanda): the union of the kept weights is stored once.
            False when a method changes values (SparseGPT): each phase stores its own.

    Returns:
        The bytes: values plus a bit per weight and mask, each rounded up to whole bytes per matrix.

    Raises:
        InputError: no matrices, phases with different ones, or `bytes_per_weight` not positive.

    >>> mask = torch.tensor([[True, False, False, True]])
    >>> stored_bytes([{"q": mask}, {"q": ~mask}], borders=[0.5], bytes_per_weight=2)
    StoredBytes(all_phases=10, one_mask=5, dense=8, mean_sparsity=0.5)
    """
    widths = phase_widths(borders, phases=len(masks))
    require(bytes_per_weight > 0, "bytes_per_weight must be positive", f"{bytes_per_weight:g}", "use 2 for bfloat16")
    shapes = [{name: mask.shape for name, mask in phase.items()} for phase in masks]
    same = bool(shapes[0]) and all(other == shapes[0] for other in shapes)
    require(same, "phases must have masks for the same matrices", "none or different ones", "prune all phases alike")
    total, single, dense, size, left = 0, 0, 0, 0, 0.0
    for name, shape in shapes[0].items():
        of_name, bits = torch.stack([phase[name] for phase in masks]), math.ceil(shape.numel() / 8)
        kept = of_name.sum((1, 2)).tolist()
        mean_kept = _weighted(kept, widths)
        values = [int(of_name.any(0).sum())] if shared_values else kept
        total += sum(_whole_bytes(count, bytes_per_weight) for count in values) + len(masks) * bits
        single += _whole_bytes(mean_kept, bytes_per_weight) + bits
        dense += _whole_bytes(shape.numel(), bytes_per_weight)
        size, left = size + shape.numel(), left + mean_kept
    return StoredBytes(total, single, dense, 1 - left / size)


def _whole_bytes(weights: float, bytes_per_weight: float) -> int:
    return math.ceil(weights * bytes_per_weight - ROUNDING)
