"""Measure the embedded family and write its model cards: `python -m recipes.family.cards --hardware "..." [MEMBER ...]`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Int
from torch import Tensor

from lib.core.config import ROOT
from lib.core.provenance import write_bytes, write_json, write_text
from lib.core.runtime import generator, use_processor
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.tasks import evaluate
from lib.models import loading
from lib.models.language_model import LanguageModel, tokenizer_of
from lib.report.canvas import png_bytes
from lib.report.claims import bootstrap_mean
from lib.studies.traces import training
from lib.studies.variance import sink_effect
from lib.texts import articles
from recipes.family.objectives import BLOCK, MEMBERS, blocks_seen

REFERENCE = ROOT / "models" / "reference"
CARD = Path(__file__).parent / "card.md"
SCALING = REFERENCE / "scaling.json"
TASKS = ("tiny_add", "tiny_sort", "tiny_sudoku", "tiny_recall", "tiny_facts", "tiny_description", "tiny_topic")
LENGTH = 256
DRAWS = 16  # masks of a held-out window
CHOICE_DRAWS = 4  # masks of an answer to choose from
SINK_WINDOWS, SINK_DRAWS = 32, 4
KINDS = {
    "ar": ("autoregressive language model", "causal", "none", "exact negative log-likelihood"),
    "bd": (
        "block diffusion language model",
        f"block-causal, blocks of {BLOCK} counted from the first position",
        "masks, in one block given the clean blocks before it",
        "NELBO (Monte-Carlo upper bound)",
    ),
    "dlm": ("masked diffusion language model (LLaDA's objective)", "full", "masks", "NELBO (Monte-Carlo upper bound)"),
    "udlm": ("uniform-state diffusion language model", "full", "uniform: any token", "NELBO (Monte-Carlo upper bound)"),
    "xdlm": ("diffusion language model of mixed noise", "full", "a tenth uniform, else masks", "NELBO (Monte-Carlo upper bound)"),
}


def held_out(model: LanguageModel) -> dict[str, float]:
    """Return NELBO or exact NLL on windows of held-out articles, per token and per character."""
    tok = tokenizer_of(model)
    windows = articles.article_windows(tok, articles.read_rows("articles_evaluation"), length=LENGTH)
    loss = sink_effect.text_loss(model, windows, draws=DRAWS, seed=0)
    characters = sum(len(text) for text in tok.batch_decode(windows.tolist(), skip_special_tokens=True))
    return {
        "held_out_nats": round(float(loss.mean()), 4),
        "held_out_standard_error": round(float(loss.std() / len(loss) ** 0.5), 4),
        "held_out_windows": len(loss),
        "held_out_nats_per_character": round(float(loss.sum()) * LENGTH / characters, 4),
    }


def answers(model: LanguageModel, *, limit: int | None) -> dict[str, dict[str, Any]]:
    """Return accuracies with Wilson intervals, by task."""
    found = evaluate(model, TASKS, settings=EvaluationSettings(batch_size=128, draws=CHOICE_DRAWS), limit=limit)
    return {
        name: {
            "correct": sum(result.correct),
            "documents": len(result.correct),
            "interval": [round(end, 4) for end in result.interval],
            "chance": result.chance,
        }
        for name, result in found.items()
    }


def sink_numbers(model: LanguageModel, windows: Int[Tensor, "window position"], *, last: dict[str, float]) -> dict[str, float]:
    """Return the top key's share and value norm as last measured in training, and what blocking it costs.

    Args:
        model: the member.
        windows: of held-out articles.
        last: statistics of the last line of its training log.
    """
    effects = sink_effect.window_effects(model, windows, counts=[1], draws=SINK_DRAWS, seed=0)
    by_name = {effect.blocked: effect.loss for effect in effects}
    dense = by_name[sink_effect.NOTHING]
    mean, low, high = bootstrap_mean((by_name["sinks"] - dense).tolist(), generator=generator(0, "bootstrap", "card"))
    return {
        "top_share": last["clean_top_share_by_head"],
        "uniform_share": round(uniform_share(model), 4),
        "value_norm_ratio": last["clean_value_norm_ratio"],
        "blocked_sinks": round(mean, 4),
        "blocked_low": round(low, 4),
        "blocked_high": round(high, 4),
        "blocked_random": round(float((by_name["random keys"] - dense).mean()), 4),
        "sink_windows": len(windows),
    }


def uniform_share(model: LanguageModel) -> float:
    """Return the share of attention that the top key of a window gets from queries without any preference."""
    seen = torch.ones((LENGTH, LENGTH), dtype=torch.bool)
    if model.is_causal:
        seen = seen.tril()
    elif model.goes_by_blocks:
        seen = blocks_seen(LENGTH)
    return float((seen / seen.sum(1, keepdim=True)).sum(0).max() / LENGTH)


def measure(folder: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Return what the card reports about one member.

    Args:
        folder: what `recipes.family.train` wrote.
        limit: only the first documents of a task.
    """
    model = loading.load(folder, name=folder.name)
    rows = articles.read_rows("articles_evaluation")
    windows = articles.article_windows(tokenizer_of(model), rows, length=LENGTH)[:SINK_WINDOWS]
    return {
        "parameters": model.num_parameters,
        "fingerprint": model.fingerprint,
        **held_out(model),
        **sink_numbers(model, windows, last=training.read_log(model)[-1]["sinks"]),
        "choice_draws": CHOICE_DRAWS,
        "tasks": answers(model, limit=limit),
    }


def tasks_table(found: dict[str, dict[str, Any]]) -> str:
    """Write accuracies as a table in markdown."""
    lines = ["| task | right | accuracy | 95 % interval | guessing |", "|---|---|---|---|---|"]
    for name, row in found.items():
        low, high = row["interval"]
        share = f"**{row['correct'] / row['documents']:.1%}** | {low:.1%} to {high:.1%}"
        lines.append(f"| `{name}` | {row['correct']} of {row['documents']} | {share} | {row['chance']:.1%} |")
    return "\n".join(lines)


def scaling_words(path: Path = SCALING) -> str:
    """Say what the scaling run found, or that none is on record."""
    if not path.is_file():
        return "No scaling run is on record."
    rows = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| width x blocks | parameters | minutes of one thread | tokens | held-out nats per token |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        shape, last = f"{row['width']} x {row['blocks']}", row["curve"][-1]
        lines.append(
            f"| {shape} | {row['parameters']:,} | {last['seconds'] / 60:.0f} | {last['tokens']:,} | {last['loss']:.3f} |"
        )
    return "\n".join(["`dlm` at three sizes for equal time, at the highest learning rate (no decay):", "", *lines])


def restart_words(steps: Sequence[int]) -> str:
    """Say at which steps a run went on from its weights alone; nothing where it never did.

    >>> restart_words([1000, 3400])
    ', at steps 1,000 and 3,400 from weights in bfloat16 with fresh moments of the optimizers'
    """
    if not steps:
        return ""
    at = " and ".join(f"{step:,}" for step in steps)
    return f", at step{'s' if len(steps) > 1 else ''} {at} from weights in bfloat16 with fresh moments of the optimizers"


def card(name: str, recipe: dict[str, Any], measured: dict[str, Any], *, hardware: str) -> str:
    """Fill the model card's template for one member."""
    kind, attention, noise, loss_name = KINDS[name]
    loads = "`AutoModelForCausalLM` loads the folder without this project's code"
    own = {
        "name": name, "kind": kind, "attention": attention, "noise": noise, "loss_name": loss_name, "hardware": hardware,
        "loading": f"{loads}." if name == "ar" else f"{loads} (`is_causal: false`: attention looks both ways"
        + ("; the mask of its blocks must be given)." if name == "bd" else ")."),
        "mask_note": ", because every query sees the first one" if name == "ar" else "",
        "hours": recipe["seconds"] / 3600,
        "million_tokens": recipe["trained_tokens"] / 1e6,
        "tasks": tasks_table(measured["tasks"]),
        "scaling": scaling_words(),
        "restarted": restart_words(recipe.get("restarts", [])),
    }  # fmt: skip
    return CARD.read_text(encoding="utf-8").format(**{**recipe, **measured, **own})


def main() -> None:
    """Measure members and write evaluation, curves and card into their folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("members", nargs="*", default=MEMBERS, metavar="MEMBER", help="which (default: all that are there)")
    parser.add_argument("--hardware", required=True, help="what they were trained on, for the card")
    parser.add_argument("--limit", type=int, help="documents of each task, at most (default: all)")
    parser.add_argument(
        "--measured", action="store_true", help="measure nothing: write the cards of the evaluations that are there"
    )
    parser.add_argument("--models", type=Path, default=REFERENCE, help="folder of the members' folders")
    args = parser.parse_args()
    use_processor()
    for folder in (args.models / name for name in args.members if (args.models / name).is_dir()):
        if not args.measured:
            write_json(folder / "evaluation.json", measure(folder, limit=args.limit))
        measured = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        figure, _ = training.sinks_along_training(training.training_table([loading.load(folder, name=folder.name)]))
        write_bytes(folder / "training.png", png_bytes(figure, dpi=120))
        plt.close(figure)
        recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        write_text(folder / "README.md", card(folder.name, recipe, measured, hardware=args.hardware))


if __name__ == "__main__":
    main()
