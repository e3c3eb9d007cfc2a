"""Train one member of the embedded family: `python -m recipes.family.train dlm` (or `ar`, `bd`, `udlm`, `xdlm`).

The members differ in noise and attention mask and in nothing else. A run stops and goes on at any time: its state is one file,
and every random draw is a function of (seed, stream, step). Where only a model was kept, `--begin FOLDER` goes on from its
weights with fresh moments of the optimizers, and the rate warms up anew.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lib.core import processor
from lib.core.provenance import write_json, write_text
from lib.core.runtime import generator, use_processor
from recipes import corpus as earlier
from recipes import tokenizer
from recipes.family import batches, progress, sources, tasks
from recipes.family.batches import Corpus
from recipes.family.objectives import MEMBERS, Member, row_losses
from recipes.family.recipe import (
    Recipe,
    build_model,
    compile_body,
    go_on_from,
    learning_rate,
    load_state,
    make_optimizers,
    save_state,
    update_,
)

TOKENIZER_TASKS = 4000  # documents of each task that the tokenizer is trained on, beside all text
SAVE_SECONDS = 200.0


@dataclass(frozen=True)
class Pace:
    """How a run goes, which changes no weight: compiled or not, and how many steps lie between two measurements."""

    compiled: bool = False
    measure_every: int = 100
    save_seconds: float = SAVE_SECONDS
    stop_after: int = 0  # steps of this call; 0 = all
    keep_every: int = 0  # steps between the models that are kept in `step-N` beside the state, and one where it stops; 0 = none


def tokenizer_texts(documents: dict[str, list[sources.Document]], articles: list[dict[str, str]]) -> list[str]:
    """Return what the tokenizer is trained on: all training text once, and documents of every task."""
    texts = [one.text for found in documents.values() for one in found if not sources.is_held_out(one.key)]
    texts += sources.article_texts(earlier.split_articles(articles, "train"), last=lambda _: False)
    made = (*tasks.MAKERS, "tiny_facts", "biographies")
    for task in made:
        numbers = range(TOKENIZER_TASKS)
        texts += ["".join(text for text, _ in tasks.training_document(task, number, seed=0)) for number in numbers]
    return texts


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time into the context."""
    import fcntl  # absent on Windows

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "prepare.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def prepare(folder: Path, recipe: Recipe) -> Corpus:
    """Return all that training reads, made in `folder` by the first call; members started beside it read the same files."""
    with _alone(folder):
        return _prepared(folder, recipe)


def _prepared(folder: Path, recipe: Recipe) -> Corpus:
    made = folder / f"windows-{recipe.vocab_size}-{recipe.length}-{recipe.steps * recipe.text_rows}.npy"
    held_out_file, articles_file, tok_folder = folder / "held_out.npz", folder / "articles.json", folder / "tokenizer"
    if not made.exists():
        documents, articles = sources.documents(folder / "packages"), sources.articles(folder / "packages")
        if not (tok_folder / "tokenizer.json").exists():
            texts = tokenizer_texts(documents, articles)
            tokenizer.train_tokenizer(texts, vocab_size=recipe.vocab_size).save_pretrained(tok_folder)
        tok = PreTrainedTokenizerFast.from_pretrained(tok_folder)
        options = {"length": recipe.length}
        held = batches.held_out_windows(tok, documents, articles, windows=recipe.eval_windows, **options)
        arrays: dict[str, Any] = {name: found.numpy() for name, found in held.items()}
        np.savez(held_out_file, **arrays)
        write_json(articles_file, [row for row in earlier.split_articles(articles, "train") if batches.asks_well(tok, row)])
        wanted = recipe.steps * recipe.text_rows
        windows, distinct = batches.build(tok, documents, articles, windows=wanted, seed=recipe.seed, **options)
        write_json(folder / "tokens.json", distinct)
        batches.save_windows(made, windows)
    tok = PreTrainedTokenizerFast.from_pretrained(tok_folder)
    with np.load(held_out_file) as file:
        held_out = {name: torch.from_numpy(file[name].astype(np.int64)) for name in file.files}
    return Corpus(tok, np.load(made, mmap_mode="r"), held_out, json.loads(articles_file.read_text()))


def step_loss(
    member: Member, model: LlamaForCausalLM, network: Any, corpus: Corpus, step: int, recipe: Recipe, *, bf16: bool
) -> tuple[float, float, int]:
    """Run one step forward and backward, a group of rows at a time.

    The loss is the mean over text rows plus the mean over task documents.

    Returns:
        Text loss and task loss, nats per answer token, and the number of real tokens read.
    """
    groups = batches.step_rows(corpus, step, text=recipe.text_rows, tasks_share=recipe.tasks_share, seed=recipe.seed)
    documents = sum(len(rows.ids) for rows in groups[1:])
    losses, tokens = [0.0, 0.0], 0
    for number, rows in enumerate(groups):
        tokens += int(rows.is_real.sum())
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
            stream = generator(recipe.seed, "noise", step, number)
            per_row = row_losses(member, model, network, rows.to(model.device), generator=stream)
            loss = per_row.sum() / (len(rows.ids) if number == 0 else documents)
        loss.backward()
        losses[min(number, 1)] += float(loss.detach())
    return losses[0], losses[1], tokens


def measure(member: Member, model: LlamaForCausalLM, corpus: Corpus, recipe: Recipe, *, bf16: bool) -> dict[str, Any]:
    """Return held-out losses, accuracies and sink statistics."""
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
        return {
            "held_out": progress.held_out_losses(member, model, corpus.held_out, seed=recipe.seed),
            "accuracy": progress.accuracies(member, model, corpus.tok, count=recipe.eval_documents, seed=recipe.seed),
            "sinks": progress.sink_statistics(member, model, corpus.held_out["encyclopaedia"][:8], seed=recipe.seed),
        }


def train(
    member: Member, recipe: Recipe, *, folder: Path, out: Path, pace: Pace = Pace(), begin_from: Path | None = None
) -> None:
    """Train until all steps are done, resuming from the state in `folder` when there is one; write the model to `out`.

    Args:
        member: of the family.
        recipe: everything that decides the weights.
        folder: of the corpus, the states and what is kept along the way.
        out: of the model.
        pace: how the run goes.
        begin_from: a model to go on from where no state is there; see `go_on_from`.

    Raises:
        InputError: `begin_from` is of another run, or has no step left.
    """
    corpus = prepare(folder, recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(recipe, corpus.tok, member=member)
    torch.nn.Module.to(model, device)
    optimizers = make_optimizers(model, recipe)
    state_file = folder / member / "state.safetensors"
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "tokens": 0, "restarts": [], "log": []}
    if state_file.exists():
        state = load_state(state_file, model, optimizers)
    elif begin_from is not None:
        state = go_on_from(begin_from, model, corpus.tok, recipe)
    bf16 = state.setdefault("bf16", device.type == "cuda" or processor.is_bfloat16_faster())
    since = max(state["restarts"], default=0)
    probe = progress.shadow(model)
    network = compile_body(model) if pace.compiled else model.model
    first, saved = state["step"], time.perf_counter()
    last = min(recipe.steps, first + pace.stop_after) if pace.stop_after else recipe.steps
    for step in tqdm(range(first, last), initial=first, total=recipe.steps, desc=member, mininterval=60):
        started = time.process_time()  # of the processor: a run beside other work, or halted, takes no longer
        text, task, tokens = step_loss(member, model, network, corpus, step, recipe, bf16=bf16)
        update_(model, optimizers, rate=learning_rate(step, recipe, since=since))
        state["step"], state["tokens"] = step + 1, state["tokens"] + tokens
        state["seconds"] += time.process_time() - started
        done = step + 1 == last
        measured = (step + 1) % pace.measure_every == 0 or step + 1 == recipe.steps or step == 0
        if measured:
            line = {
                "step": step + 1,
                "tokens": state["tokens"],
                "seconds": round(state["seconds"], 1),
                "text": text,
                "tasks": task,
            }
            state["log"].append(line | measure(member, probe, corpus, recipe, bf16=bf16))
            write_json(folder / member / "log.json", state["log"])
        if measured or done or time.perf_counter() - saved > pace.save_seconds:
            save_state(state_file, model, optimizers, state)
            saved = time.perf_counter()
        if pace.keep_every and ((step + 1) % pace.keep_every == 0 or done) and step + 1 < recipe.steps:
            kept = folder / member / f"step-{step + 1}"
            write_model(kept, copy.deepcopy(probe), corpus.tok, state=state, recipe=recipe)
    if state["step"] == recipe.steps:
        write_model(out, model, corpus.tok, state=state, recipe=recipe)


def write_model(
    out: Path, model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, *, state: dict[str, Any], recipe: Recipe
) -> None:
    """Write the folder that transformers loads: weights in bf16 storage, config, tokenizer, recipe and log."""
    torch.nn.Module.to(model, "cpu", torch.bfloat16)
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(out)
    tok.save_pretrained(out)
    numbers = {"seconds": round(state["seconds"]), "trained_tokens": state["tokens"]}
    numbers |= {"step": state["step"], "restarts": state["restarts"]}
    write_text(out / "recipe.json", json.dumps({**asdict(recipe), **numbers}, indent=2) + "\n")
    write_json(out / "training_log.json", state["log"])


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("member", choices=MEMBERS)
    parser.add_argument("--folder", type=Path, default=Path(".cache/family"), help="packages, corpus and states")
    parser.add_argument("--out", type=Path, help="model folder (default models/reference/<member>)")
    parser.add_argument("--begin", type=Path, help="model folder to go on from where the run has no state")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler)")
    parser.add_argument("--measure-every", type=int, default=Pace.measure_every, help="steps between measurements")
    parser.add_argument("--stop-after", type=int, default=0, help="steps of this call (0 = all)")
    parser.add_argument("--keep-every", type=int, default=0, help="steps between models kept along the way (0 = none)")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = vars(parser.parse_args())
    member, folder, out, begin_from = (args.pop(key) for key in ("member", "folder", "out", "begin"))
    pace = Pace(compiled=args.pop("compile"), **{name: args.pop(name) for name in ("measure_every", "stop_after", "keep_every")})
    use_processor()
    out = out or Path("models/reference") / member
    train(member, Recipe(**args), folder=folder, out=out, pace=pace, begin_from=begin_from)


if __name__ == "__main__":
    main()
