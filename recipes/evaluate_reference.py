"""Measure the embedded models and write their model cards: `python -m recipes.evaluate_reference --hardware "..."`."""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from lib.core.config import ROOT
from lib.core.provenance import write_bytes, write_text
from lib.diffusion import likelihood
from lib.evaluation import sums
from lib.models import loading
from lib.models.language_model import LanguageModel, tokenizer_of
from lib.report.canvas import png_bytes
from lib.texts import articles
from recipes.train_reference import Recipe

REFERENCE = ROOT / "models" / "reference"
DRAWS = 16
CARD = ROOT / "recipes" / "model_card.md"


def held_out_loss(model: LanguageModel) -> likelihood.Estimate:
    """Return NELBO or exact NLL on windows of held-out articles, in nats per token."""
    windows = articles.article_windows(tokenizer_of(model), articles.read_rows("articles_evaluation"), length=256)
    return likelihood.next_token_nll(model, windows) if model.is_causal else likelihood.nelbo(model, windows, draws=DRAWS, seed=0)


def measure(model: LanguageModel) -> dict[str, Any]:
    """Return what the card reports about one model."""
    loss = held_out_loss(model)
    rows = articles.read_rows("sums_test")
    correct = sum(sums.is_correct(sums.answer_sums(model, rows), rows))
    low, high = sums.share_interval(correct, len(rows))
    commonest = max(sum(row["answer"] == answer for row in rows) for answer in {row["answer"] for row in rows})
    return {
        "held_out_nats_per_token": round(loss.mean, 4),
        "held_out_standard_error": round(loss.standard_error, 4),
        "held_out_windows": len(loss.per_window),
        "sums_correct": correct,
        "sums_total": len(rows),
        "sums_interval": [round(low, 4), round(high, 4)],
        "sums_chance": round(commonest / len(rows), 4),
        "parameters": model.num_parameters,
        "fingerprint": model.fingerprint,
    }


def training_curve(folder: Path) -> bytes:
    """Draw the held-out loss over tokens for one model."""
    with (folder / "training_log.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    tokens = [float(row["tokens"]) / 1e6 for row in rows]
    ax.plot(tokens, [float(row["held_out_loss_nats"]) for row in rows], color="black", marker="o", markersize=3)
    ax.set(xlabel="training tokens (millions)", ylabel="held-out loss (nats per token)", title=folder.name)
    ax.grid(alpha=0.3)
    image = png_bytes(figure, dpi=120)
    plt.close(figure)
    return image


def card(name: str, recipe: dict[str, Any], measured: dict[str, Any], *, hardware: str) -> str:
    """Fill the model card's template for one model."""
    is_diffusion = name == "dlm"
    steps = recipe["tokens"] // (recipe["batch_windows"] * recipe["length"])
    low, high = measured["sums_interval"]
    adds = measured["sums_correct"] / measured["sums_total"] > 0.5
    own = {
        "name": name,
        "kind": "masked diffusion language model (LLaDA's objective)" if is_diffusion else "autoregressive language model",
        "loading": " (`is_causal: false` makes attention bidirectional)" if is_diffusion else "",
        "loss_name": "NELBO (Monte-Carlo upper bound)" if is_diffusion else "exact negative log-likelihood",
        "steps": steps,
        "trained_tokens": steps * recipe["batch_windows"] * recipe["length"],
        "minutes": recipe["seconds"] / 60,
        "low": low,
        "high": high,
        "sums_limit": "" if adds else "It has not learnt to add: most of its answers to sums are wrong.",
        "hardware": hardware,
    }
    return CARD.read_text(encoding="utf-8").format(**{**recipe, **measured, **own})


def main() -> None:
    """Measure both models and write evaluation, curve and card into their folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hardware", required=True, help="what the models were trained on, for the card")
    args = parser.parse_args()
    for name in ("dlm", "ar"):
        folder = REFERENCE / name
        measured = measure(loading.load(folder, name=name))
        recipe = {**Recipe().__dict__, **json.loads((folder / "recipe.json").read_text())}
        write_text(folder / "evaluation.json", json.dumps(measured, indent=2) + "\n")
        write_bytes(folder / "training_curve.png", training_curve(folder))
        write_text(folder / "README.md", card(name, recipe, measured, hardware=args.hardware))
        print(f"{name}: {measured}")


if __name__ == "__main__":
    main()
