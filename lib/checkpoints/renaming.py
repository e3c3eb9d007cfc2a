"""From a checkpoint's tensors to the network's: other names, parts of a fused matrix, and experts put together.

A plan says of every tensor of the network which stored ones it is made of. Loading and streaming follow the same plan.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lib.checkpoints.families import Family
from lib.core.errors import InputError

# LLaDA's names inside a block -> Llama's. The block's ff_out and the head share a name and differ by prefix.
LLADA_BLOCK = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
LLADA_TOP = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
LLADA2_NAMES = (
    (r"^model\.word_embeddings\.", "model.embed_tokens."),
    (r"\.attention\.dense\.", ".self_attn.o_proj."),
    (r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
    (r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
    (r"\.mlp\.gate\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
)
NEMOTRON_NAMES = ((r"^encoder\.", "model."), (r"^diffusion_head\.", "lm_head."))
VISION = re.compile(r"model\.(vision_tower\.|mm_projector\.|image_newline$)")
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
MERGED = re.compile(r"(.*\.mlp\.experts)\.(gate|up|down)_proj(\.weight)?")
STACKED = re.compile(r".*\.mlp\.experts\.(gate|up|down|gate_up)_proj(\.weight)?")
STACKS = {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "down": ("down_proj", 0)}  # name, place in the rows


@dataclass(frozen=True, order=True)
class Piece:
    """A stored tensor, or some rows of one, in its place in a tensor of the network."""

    expert: int  # -1 where experts are not put together
    half: int  # which rows of an expert
    key: str = field(compare=False)
    rows: tuple[int, int] | None = field(default=None, compare=False)  # all when None


Plan = dict[str, list[Piece]]


def plan(keys: Iterable[str], family: Family, config: Any, *, folder: object) -> Plan:
    """Say which stored tensors each tensor of the network is made of.

    Args:
        keys: names of the stored tensors.
        family: of the checkpoint.
        config: the network's.
        folder: of the checkpoint, for errors.

    Raises:
        InputError: a tensor has a name outside the layout, or an expert is incomplete.
    """
    made: Plan = {}
    rename = RENAMINGS.get(family.layout, _same)
    for key in keys:
        for name, piece in rename(key, config, folder):
            made.setdefault(name, []).append(piece)
    for name, pieces in made.items():
        pieces.sort()
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            _check_experts(name, pieces, config)
    return made


def unstacked(made: Plan) -> Plan:
    """Return a plan in which every matrix of an expert has a name of its own, as checkpoints and lists of linear layers have it.

    Args:
        made: a plan. Stacks that are stored merged stay as they are.
    """
    found: Plan = {}
    for name, pieces in made.items():
        experts, _, kind = name.rpartition(".")
        for piece in pieces:
            if piece.expert < 0:
                found.setdefault(name, []).append(piece)
                continue
            role = next(role for role, place in STACKS.items() if place == (kind, piece.half))
            found[f"{experts}.{piece.expert}.{role}_proj.weight"] = [replace(piece, expert=-1, half=0)]
    return found


def shape(pieces: list[Piece], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of a tensor that is made of pieces.

    Args:
        pieces: from a plan.
        shapes: of the stored tensors by name.
    """
    parts = [
        shapes[piece.key] if piece.rows is None else (piece.rows[1] - piece.rows[0], *shapes[piece.key][1:]) for piece in pieces
    ]
    first, experts = parts[0], len({piece.expert for piece in pieces})
    if len(pieces) == 1 and pieces[0].expert < 0:
        return first
    rows = sum(part[-2] for part in parts) // experts
    return (experts, rows, first[-1]) if pieces[0].expert >= 0 else (*first[:-2], rows, first[-1])


def join(pieces: list[Piece], take: Callable[[str], Tensor]) -> Tensor:
    """Put the tensor of a network together; one that is stored whole is returned as it is.

    Args:
        pieces: from a plan, in order.
        take: returns a stored tensor by name.
    """
    # some rows get memory of their own, so that no two weights of a network share theirs
    parts = [take(piece.key) if piece.rows is None else take(piece.key)[slice(*piece.rows)].clone() for piece in pieces]
    if pieces[0].expert < 0:
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
    halves = len(parts) // (pieces[-1].expert + 1)
    if halves == 1:
        return torch.stack(parts)
    whole = parts[0].new_empty((len(parts) // halves, sum(part.shape[0] for part in parts[:halves]), parts[0].shape[1]))
    for expert, target in enumerate(whole):
        torch.cat(parts[expert * halves : (expert + 1) * halves], out=target)
    return whole


def _check_experts(name: str, pieces: list[Piece], config: Any) -> None:
    """Refuse experts that lack a matrix, or that are more than the configuration says."""
    halves = 2 if name.endswith("gate_up_proj") else 1
    count = int(getattr(config, "num_local_experts", None) or config.num_experts)
    merged = pieces[0].expert < 0
    needed = {(-1, half) for half in range(halves)} if merged else {(e, h) for e in range(count) for h in range(halves)}
    found = {(piece.expert, piece.half) for piece in pieces}
    if merged and len(pieces) == 1 and pieces[0].key.endswith("gate_up_proj"):  # stored as the network has it
        return
    if found != needed or len(pieces) != len(needed):
        odd = sorted(found ^ needed)[:1]
        problem = f"{'no' if odd and odd[0] in needed else 'a surplus'} matrix of expert {odd[0][0]}" if odd else "a matrix twice"
        raise InputError(
            f"weights must match config.json, got {problem} in {name}: the checkpoint is incomplete or of another layout"
        )


def _same(key: str, config: Any, folder: object) -> list[tuple[str, Piece]]:
    return [(key, Piece(-1, 0, key))]


def _named(key: str, names: Iterable[tuple[str, str]]) -> str:
    """Apply the first pattern that fits."""
    for pattern, replacement in names:
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed
    return key


def _nemotron(key: str, config: Any, folder: object) -> list[tuple[str, Piece]]:
    return [(_named(key, NEMOTRON_NAMES), Piece(-1, 0, key))]


def _text_trunk(key: str, config: Any, folder: object) -> list[tuple[str, Piece]]:
    """Leave out what reads images."""
    return [] if VISION.match(key) else [(key, Piece(-1, 0, key))]


def _experts(key: str, config: Any, folder: object, *, stored: str | None = None) -> list[tuple[str, Piece]]:
    """Put matrices of experts into the network's stacks, whether stored one by one or merged as dFactory does."""
    stored = stored or key
    one, merged = EXPERT.fullmatch(key), MERGED.fullmatch(key)
    if one:
        name, half = STACKS[one[3]]
        return [(f"{one[1]}.{name}", Piece(int(one[2]), half, stored))]
    if merged:
        name, half = STACKS[merged[2]]
        return [(f"{merged[1]}.{name}", Piece(-1, half, stored))]
    return [(key, Piece(-1, 0, stored))]


def _llada2(key: str, config: Any, folder: object) -> list[tuple[str, Piece]]:
    """Split the fused projection by rows, then as a mixture of experts."""
    fused = re.fullmatch(r"(.*)\.attention\.query_key_value\.weight", key)
    if not fused:
        return _experts(_named(key, LLADA2_NAMES), config, folder, stored=key)
    rows = [heads * config.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    ends = [sum(rows[: index + 1]) for index in range(3)]
    return [
        (f"{fused[1]}.self_attn.{role}_proj.weight", Piece(-1, 0, key, (end - count, end)))
        for role, count, end in zip("qkv", rows, ends, strict=True)
    ]


def _llada(key: str, config: Any, folder: object) -> list[tuple[str, Piece]]:
    return [(llada_name(key, folder), Piece(-1, 0, key))]


def llada_name(name: str, folder: object) -> str:
    """Return Llama's name for a tensor of the LLaDA layout.

    Args:
        name: LLaDA's.
        folder: of the checkpoint, for the error.

    Raises:
        InputError: a name outside the layout.

    >>> llada_name("model.transformer.blocks.3.attn_out.weight", "LLaDA")
    'model.layers.3.self_attn.o_proj.weight'
    """
    parts = name.removeprefix("model.transformer.").removesuffix(".weight").split(".")
    if parts[0] == "blocks" and len(parts) == 3 and parts[2] in LLADA_BLOCK:
        return f"model.layers.{parts[1]}.{LLADA_BLOCK[parts[2]]}.weight"
    if len(parts) == 1 and parts[0] in LLADA_TOP:
        return f"{LLADA_TOP[parts[0]]}.weight"
    raise InputError(f"a LLaDA layout must hold only known tensors, got {name!r} in {folder}: not a LLaDA text trunk")


RENAMINGS: dict[str, Callable[[str, Any, object], list[tuple[str, Piece]]]] = {
    "llada": _llada,
    "llava": _text_trunk,
    "nemotron": _nemotron,
    "plain": _experts,
    "llada-moe": _experts,
    "qwen3-moe": _experts,
    "llada2": _llada2,
}
