"""Generate with a model and follow its attention sinks: a figure, an animation, and a table of sinks by step."""

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.commands.words import MODEL, add_common, whole

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Int
    from torch import Tensor

    from lib.diffusion.traces import SinkTrace
    from lib.models.language_model import LanguageModel

EPILOG = (
    "Without --prompt, the openings of articles that ship with this project are continued; the figure shows the first of them."
)
FIGURE, MOVIE, STILL, TABLE, PAGE = "sinks_by_step.png", "attention.gif", "attention.png", "sinks_by_step.csv", "sinks.html"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the words of this command."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--prompt", metavar="TEXT", help="continue this text")
    texts.add_argument("--articles", type=whole(1), default=4, metavar="N", help="continue N articles (default 4)")
    parser.add_argument("--tokens", type=whole(2), default=64, metavar="N", help="new tokens (default 64)")
    parser.add_argument("--steps", type=whole(1), metavar="N", help="denoising steps (default: half as many as tokens)")
    parser.add_argument("--top", type=whole(1), default=5, metavar="K", help="sinks of a step in the table (default 5)")
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", help="default: runs/sinks-trace-NAME in the project or in SINKS_OUTPUT"
    )
    add_common(parser)


def run(chosen: argparse.Namespace) -> None:
    """Trace, draw, tabulate."""
    from lib.commands import session
    from lib.core import config, provenance
    from lib.core.runtime import generator
    from lib.diffusion import traces
    from lib.report import animation, canvas, explorer, tables
    from lib.studies.traces import figures, views

    begun = time.monotonic()
    model = session.open_model(chosen.model, chosen)
    default = config.output_root() / "runs" / f"sinks-trace-{model.name}"
    folder = default if chosen.output is None else session.typed(chosen.output)
    prompts = _prompts(model, chosen)
    _check_room(model, chosen, prompts.shape[1])
    steps = chosen.steps or max(1, chosen.tokens // 2)
    with session.blocks_counted(model, "tracing", passes=chosen.tokens + steps if model.is_causal else steps):
        positions, random = prompts.shape[1] + chosen.tokens, generator(chosen.seed, "sampling")
        trace = traces.trace(model, prompts, positions=positions, steps=steps, generator=random)
    figure, numbers = figures.position_by_step([trace])
    footer = f"sinks trace  |  model {model.name}  |  seed {chosen.seed}  |  {len(prompts)} prompts, the first is shown"
    canvas.add_footer(figure, footer)
    provenance.write_bytes(folder / FIGURE, canvas.png_bytes(figure))
    provenance.write_text(folder / "mass_by_step.csv", tables.csv_text(numbers))
    movie = animation.gif_bytes(_movie(model, trace), footer=footer)
    provenance.write_bytes(folder / MOVIE, movie)
    provenance.write_bytes(folder / STILL, animation.still(movie))
    title = f"Attention sinks of {model.name}, step by step"
    provenance.write_text(folder / PAGE, explorer.render([views.scene(model, trace)], title=title, footer=footer))
    found = sinks_by_step(trace, model, k=chosen.top)
    provenance.write_text(folder / TABLE, tables.csv_text(found))
    rows: Any = found.to_dict("records")
    of_first = [row for row in rows if row["prompt"] == 0]
    facts = {
        "model": session.facts_of(model), "output": str(folder), "prompts": len(prompts), "steps": steps,
        "text": _text(model, trace.texts[0]), "files": [PAGE, FIGURE, "mass_by_step.csv", MOVIE, STILL, TABLE],
        "sinks": of_first,
    }  # fmt: skip
    shown = [row for row in of_first if row["step"] in {0, *trace.mark_steps, steps - 1}]
    lines = [_text(model, trace.texts[0]), *_table_lines(shown), *(f"wrote {folder / name}" for name in facts["files"])]
    session.finish(chosen, facts, lines, begun=begun)


def sinks_by_step(trace: "SinkTrace", model: "LanguageModel", *, k: int) -> "pd.DataFrame":
    """Tabulate the k largest sinks of every step and prompt: position, token, mass (1 = mean over keys), masked or not."""
    import pandas as pd

    from lib.attention import sinks
    from lib.models.language_model import tokenizer_of
    from lib.report.figures import token_label
    from lib.studies.traces.tables import decode_one

    tokenizer, rows = tokenizer_of(model), []
    for prompt, masses in enumerate(trace.mass):
        for step, mass in enumerate(masses):
            keys = int(trace.keys[step])
            for rank, position in enumerate(sinks.top_k_positions(mass[:keys], k=min(k, keys)).tolist(), 1):
                token = token_label(decode_one(tokenizer, int(trace.ids[prompt, step, position])))
                is_masked, value = bool(trace.is_masked[prompt, step, position]), float(mass[position])
                rows.append((prompt, step, rank, position, token, is_masked, value))
    return pd.DataFrame(rows, columns=pd.Index(["prompt", "step", "rank", "position", "token", "masked", "mass"]))


def _check_room(model: "LanguageModel", chosen: argparse.Namespace, given: int) -> None:
    """Refuse a text without a token, one that leaves no room for an answer, and answers longer than the room."""
    from lib.core.errors import require

    longest = int(getattr(model.network.config, "max_position_embeddings", given + chosen.tokens))
    rule = f"--prompt must have 1 to {longest - 2} tokens for {model.name}"
    require(1 <= given <= longest - 2, rule, str(given), "shorten it" if given else "write some words")
    rule = f"--tokens must be at most {longest - given} for {model.name} and this prompt"
    require(chosen.tokens <= longest - given, rule, str(chosen.tokens), "lower it, or shorten the prompt")


def _prompts(model: "LanguageModel", chosen: argparse.Namespace) -> "Int[Tensor, 'prompt position']":
    """Return what is continued."""
    import torch

    from lib.models.language_model import tokenizer_of
    from lib.texts import articles
    from lib.texts.encoding import encode

    tokenizer = tokenizer_of(model)
    if chosen.prompt is None:
        return articles.article_prompts(tokenizer, articles.read_rows("articles_evaluation"), count=chosen.articles, length=16)
    return torch.tensor([encode(tokenizer, chosen.prompt)])


def _movie(model: "LanguageModel", trace: "SinkTrace") -> Any:
    """Describe the animation: the mean attention map of the first prompt, at most 20 frames."""
    import numpy as np

    from lib.report.animation import Movie
    from lib.studies.traces import views

    steps = np.unique(np.linspace(0, trace.mass.shape[1] - 1, 20).round().astype(int)).tolist()
    frames = views.attention_maps(model, trace, prompt=0, steps=steps)
    shown = np.where(frames.numpy() > 0, frames.numpy(), np.nan)
    titles = [f"{model.name}, step {step + 1} of {trace.mass.shape[1]}" for step in steps]
    masked = None if trace.is_causal else trace.is_masked[0, steps].numpy()
    return Movie(shown, titles, "key position", "query position", "attention", masked)


def _text(model: "LanguageModel", ids: "Tensor") -> str:
    from lib.models.language_model import tokenizer_of

    return str(tokenizer_of(model).decode(ids.tolist(), skip_special_tokens=True))


def _table_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write the sinks of some steps for people, a step a line."""
    said: dict[int, list[str]] = {}
    for row in found:
        said.setdefault(row["step"], []).append(f"{row['position']} {row['token']} {row['mass']:.3g}")
    return ["step  largest sinks: position token mass", *(f"{step:>4}  {'   '.join(sinks)}" for step, sinks in said.items())]
