"""Tables and per-prompt statistics of sink traces (notebook 01)."""

from collections.abc import Mapping, Sequence
from typing import cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.attention import sinks
from lib.attention.variance import existing
from lib.core.runtime import generator
from lib.diffusion.regions import movable, region_masses
from lib.diffusion.traces import MARKS, SinkTrace
from lib.report.claims import bootstrap_mean
from lib.report.figures import token_label
from lib.studies.traces.views import uniform_of

NO_VALUE = float("nan")  # the paper gives no number


def first_position_share(trace: SinkTrace) -> Float[Tensor, "prompt"]:
    """Return, per prompt, the share of steps at which the first position receives the most attention."""
    return (sinks.dominant_position(trace.mass) == 0).float().mean(1)


def wander(trace: SinkTrace) -> Float[Tensor, "prompt"]:
    """Return, per prompt, the share of steps at which the dominant sink is not where it most often is.

    Where a text is written by blocks, it is the dominant one of the current block, compared within the block.
    """
    if not trace.goes_by_blocks:
        return sinks.wander_rate(sinks.dominant_position(trace.mass))
    current = movable(trace)
    has_keys = current.any(-1)  # a first token that comes from the context is written before its block has keys
    positions = sinks.dominant_position(torch.where(current, trace.mass, -1.0)[:, has_keys])
    return sinks.wander_rate(positions, groups=cast(Tensor, trace.opened)[has_keys])


def block_notes(traces: Sequence[SinkTrace]) -> list[str]:
    """Say of each model that writes by blocks what its movement is about, with the mean mass of a key by region."""
    notes = []
    for trace in traces:
        if trace.goes_by_blocks:
            masses = ", ".join(f"{name} {float(mass.nanmean()):.3g}" for name, mass in region_masses(trace).items())
            said = "attention goes by blocks, and keys of finished blocks cannot move"
            notes.append(f"{trace.name}: {said}; that sinks move is said of the current block. Mean mass of a key: {masses}.")
    return notes


def concentration(trace: SinkTrace, *, k: int) -> Float[Tensor, "prompt"]:
    """Return, per prompt, the share of attention on the k largest keys, always out of the full length.

    A diffusion model sees all positions at every step, so its steps are averaged; where keys grow, all exist only at the last.
    """
    share = sinks.top_k_share(trace.mass, k=k)
    return share[:, -1] if trace.keys_grow else share.mean(1)


def concentration_without_preference(trace: SinkTrace, *, k: int) -> float:
    """Return the concentration of attention that is uniform over what a trace's own masks allow."""
    return float(sinks.top_k_share(uniform_of(trace, -1), k=k))


def with_interval(values: Float[Tensor, "prompt"], *, seed: int, stream: str, name: str, scale: float = 1.0) -> dict[str, float]:
    """Return mean and bootstrap interval over prompts as three columns."""
    mean, low, high = bootstrap_mean((values.double() * scale).tolist(), generator=generator(seed, "bootstrap", stream))
    return {name: mean, f"{name}, low": low, f"{name}, high": high}


def decode_one(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return what one token decodes to on its own."""
    return cast(str, tokenizer.decode([token]))


def top_sinks_table(
    traces: Sequence[SinkTrace], tokenizers: Mapping[str, PreTrainedTokenizerBase], *, k: int, seed: int
) -> pd.DataFrame:
    """Tabulate the k largest sinks of the first prompt, and their mean share of mass, at 25, 50 and 75 % of the generation.

    Args:
        traces: one per model.
        tokenizers: by model name.
        k: how many sinks.
        seed: of the bootstrap over prompts.

    Returns:
        One row per model and mark; `uniform` is the share that attention without preference would give there.
    """
    rows = []
    for trace in traces:
        for fraction, step in zip(MARKS, trace.mark_steps, strict=True):
            keys = int(trace.keys[step])
            top = sinks.top_k_positions(trace.mass[0, step, :keys], k=k)
            share = sinks.top_k_share(trace.mass[:, step, :keys], k=k)
            tokens = [token_label(decode_one(tokenizers[trace.name], int(token))) for token in trace.ids[0, step, top]]
            uniform = sinks.top_k_share(uniform_of(trace, step), k=k)
            rows.append(
                {
                    "model": trace.name,
                    "at": f"{fraction:.0%}",
                    "keys": keys,
                    f"top-{k} positions, prompt 1": " ".join(str(int(position)) for position in top),
                    "their tokens": " ".join(tokens),
                    **with_interval(share, seed=seed, stream=f"top-{trace.name}-{step}", name=f"top-{k} share, %", scale=100.0),
                    "uniform, %": 100.0 * float(uniform),
                    "paper, %": NO_VALUE,
                }
            )
    return pd.DataFrame(rows)


def token_kinds(trace: SinkTrace, tokenizer: PreTrainedTokenizerBase, *, k: int, mask_token_id: int | None) -> pd.DataFrame:
    """Tabulate which tokens the k largest sinks are, over all steps and prompts, beside what all positions are, in per cent.

    Args:
        trace: of one model.
        tokenizer: its tokenizer.
        k: sinks per step.
        mask_token_id: its mask token, if any.

    Returns:
        Two rows: `sinks` and `all positions`.
    """
    exists = existing(trace.keys, size=trace.mass.shape[-1])
    top = sinks.top_k_positions(torch.where(exists, trace.mass, -1.0), k=k)
    chosen = trace.ids.gather(2, top).flatten()
    present = trace.ids[exists.expand(trace.ids.shape)]
    kinds = {
        token: sinks.token_kind(
            decode_one(tokenizer, token),
            is_special=token in tokenizer.all_special_ids,
            is_mask=token == mask_token_id,
            is_bos=token == tokenizer.bos_token_id,
        )
        for token in present.unique().tolist()
    }
    rows = []
    for label, tokens in (("sinks", chosen), ("all positions", present)):
        found, counts = tokens.unique(return_counts=True)
        shares = sinks.shares([kinds[token] for token in found.tolist()], counts.tolist())
        rows.append({"model": trace.name, "positions": label, **{f"{kind}, %": value for kind, value in shares.items()}})
    return pd.DataFrame(rows)


def rates_table(traces: Sequence[SinkTrace], *, k: int, seed: int) -> pd.DataFrame:
    """Tabulate sink rates and movement, one row a model, each with its interval over prompts.

    Args:
        traces: one per model.
        k: sinks that the concentration counts.
        seed: of the bootstrap.

    Returns:
        Gu's sink rate of the first and of the best key (at the last step), Rulli's count per head (mean over steps), how often
        the first position dominates, how often the dominant sink is not at its usual place, and the top-k share at full length.
    """
    rows = []
    for trace in traces:
        quantities = {
            "Gu rate, first key, %": (trace.gu_rate[:, -1], 100.0),
            "Gu rate, best key, %": (trace.gu_best[:, -1], 100.0),
            "Rulli sinks per head": (trace.rulli.mean(1), 1.0),
            "first position dominates, % of steps": (first_position_share(trace), 100.0),
            "wander rate, % of steps": (wander(trace), 100.0),
            f"top-{k} share at full length, %": (concentration(trace, k=k), 100.0),
        }
        for name, (values, scale) in quantities.items():
            interval = with_interval(values, seed=seed, stream=f"{name}-{trace.name}", name="mean", scale=scale)
            rows.append({"quantity": name, "model": trace.name, **interval, "paper": NO_VALUE})
    order = {name: index for index, name in enumerate(dict.fromkeys(row["quantity"] for row in rows))}
    return pd.DataFrame(rows).sort_values("quantity", key=lambda column: column.map(order), kind="stable", ignore_index=True)


def mass_by_state(trace: SinkTrace) -> pd.DataFrame:
    """Tabulate the mean mass of a diffusion model's positions by state: written, masked beside a written one, other masks.

    Returns:
        One row per mark; mean-1 mass over the prompts that have such positions there, NaN where none has. Where attention goes
        by blocks, only the blocks so far are positions.
    """
    rows, exists = [], existing(trace.keys, size=trace.mass.shape[-1])
    for fraction, step in zip(MARKS, trace.mark_steps, strict=True):
        masked, written = trace.is_masked[:, step] & exists[step], ~trace.is_masked[:, step] & exists[step]
        around = torch.nn.functional.pad(written, (1, 1), value=False)
        beside = masked & (around[:, :-2] | around[:, 2:])
        states = {"written": written, "mask beside written": beside, "other masks": masked & ~beside}
        means = {name: float(trace.mass[:, step][where].mean()) for name, where in states.items()}
        rows.append({"model": trace.name, "at": f"{fraction:.0%}", "mask ratio": _mask_ratio(trace, step), **means})
    return pd.DataFrame(rows)


def _mask_ratio(trace: SinkTrace, step: int) -> float:
    return float(trace.is_masked[:, step, trace.prompt_tokens :].float().mean())
