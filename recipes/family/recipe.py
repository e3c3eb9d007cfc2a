"""Everything that decides the trained weights, the network, its optimizers and its state on disk."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch._dynamo.config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.core.errors import InputError
from lib.core.provenance import replacing
from recipes.family.objectives import Member, stated

# What a configuration says of the member beside its network.
STATED = ("is_causal", "mask_token_id", "attention_kind", "block_length", "block_origin", "noise")
COMPILED_SHAPES = 128  # of rows, of all networks of a process


class Course(Protocol):
    """What of a recipe the optimizers and their learning rate follow."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    @property
    def learning_rate(self) -> float:
        """Highest rate."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of the matrices inside the blocks."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Steps until the highest rate."""
        ...

    @property
    def decay_fraction(self) -> float:
        """Share of the steps in which the rate falls to zero."""
        ...


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights; the members differ in their objective alone.

    Steps are small: after the same 1.35 million tokens `dlm` was at 6.15 nats per held-out token with steps of 3,400 tokens, at
    6.43 with 6,600, at 6.55 with 13,300, and with the smallest alone had sinks begun to form.
    """

    steps: int = 3400
    text_rows: int = 7
    tasks_share: float = 0.25
    length: int = 256
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 896
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay_fraction: float = 0.35
    seed: int = 0
    eval_windows: int = 16
    eval_documents: int = 64


def build_model(recipe: Recipe, tok: PreTrainedTokenizerFast, *, member: Member) -> LlamaForCausalLM:
    """Make the Llama-type network with grouped-query attention; all members start from the same weights."""
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=cast(int, tok.bos_token_id),
        eos_token_id=cast(int, tok.eos_token_id),
        pad_token_id=cast(int, tok.pad_token_id),
    )
    # Materialised attention: at these lengths its backward pass is faster than SDPA's on the CPU.
    config._attn_implementation = "eager"
    for name, value in stated(member, mask_token_id=cast(int, tok.mask_token_id)).items():
        setattr(config, name, value)
    torch.manual_seed(recipe.seed)  # transformers initialises from the global stream
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM, recipe: Course) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, head and norms."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    outside = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    return [
        torch.optim.Muon(inside, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outside, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def compile_body(model: LlamaForCausalLM, *, backend: str | Callable[..., Any] = "inductor") -> Any:
    """Return the network without its head, compiled for each shape of rows that it reads.

    torch counts the shapes of all networks of a process together, and beyond its limit goes on without compiling, so that a
    second or third network would quietly be slower: the limit is raised out of the way.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)
    return torch.compile(model.model, dynamic=False, backend=backend)


def learning_rate(step: int, recipe: Course, *, since: int = 0) -> float:
    """Warm-up, plateau, linear decay to zero: the plateau does not depend on the budget, so a run can be lengthened.

    Args:
        step: number of the step, from 0.
        recipe: whose course it is.
        since: step at which the optimizers' moments were last empty, so that the rate warms up from there.
    """
    decay_steps = max(1, math.ceil(recipe.steps * recipe.decay_fraction))
    return recipe.learning_rate * min((step + 1 - since) / recipe.warmup_steps, (recipe.steps - step) / decay_steps, 1.0)


def update_(model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], *, rate: float) -> None:
    """Take one step of all optimizers with gradients of norm at most 1, and forget the gradients."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def save_state(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
    """Write weights, optimizer moments and progress to one safetensors file, in one step."""
    tensors = {f"model.{name}": tensor.detach().contiguous() for name, tensor in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, entry in optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                tensors[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value).contiguous()
    with replacing(path) as partial:
        save_file(tensors, str(partial), metadata={"state": json.dumps(state)})


def load_state(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Restore what `save_state` wrote; returns its `state`."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not iterable)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for number, optimizer in enumerate(optimizers):
        packed = optimizer.state_dict()
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                index, key = name.split(".")[2:]
                packed["state"].setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict(packed)
    return json.loads(metadata["state"])


def go_on_from(folder: Path, model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, recipe: Recipe) -> dict[str, Any]:
    """Load the weights of a model that was written along a run or at its end.

    Args:
        folder: what `recipes.family.train` wrote: weights in bfloat16, configuration, tokenizer, recipe and log.
        model: of the same member; takes the weights.
        tok: of the run that goes on.
        recipe: of that run: the one that the folder names, with more steps.

    Returns:
        The state to go on with, as a run keeps it: its step is among the `restarts`, at which moments are empty.

    Raises:
        InputError: the folder is of another member, tokenizer or recipe, or no step is left.
    """
    written, config = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("recipe.json", "config.json"))
    numbers = {name: value for name, value in asdict(recipe).items() if name != "steps"}
    said = {name: getattr(model.config, name, None) for name in STATED}
    for name, value in {**numbers, **said}.items():
        found = written[name] if name in numbers else config.get(name)
        if found != value:
            raise InputError(f"{name} must be {found} as in {folder}, got {value}: go on with the run that wrote it")
    if PreTrainedTokenizerFast.from_pretrained(folder).get_vocab() != tok.get_vocab():
        raise InputError(f"the tokenizer must be that of {folder}, got another: its weights mean nothing with other tokens")
    step = written.get("step", written["steps"])
    if step >= recipe.steps:
        raise InputError(f"steps must be more than the {step} of {folder}, got {recipe.steps}: nothing is left to do")
    weights = load_file(str(folder / "model.safetensors"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return {
        "step": step,
        "seconds": written["seconds"],
        "tokens": written["trained_tokens"],
        "restarts": [*written.get("restarts", []), step],
        "log": json.loads((folder / "training_log.json").read_text(encoding="utf-8")),
    }
