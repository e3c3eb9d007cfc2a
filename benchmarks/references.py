"""Plain versions of what the library does, written straight from the equations: what a release does, one thing after another.

Every sample is read by itself, every matrix has its own sums, sorting chooses what goes, SparseGPT sweeps one column at a time.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lib.attention import sinks
from lib.calibration import sets
from lib.calibration.hidden_states import ReachedError
from lib.calibration.sets import Inputs
from lib.models.language_model import LanguageModel, LinearLayer

SPARSITY = 0.5
BLOCK = 128
DAMPING = 0.01


def token_weights(model: LanguageModel, sample: Tensor) -> Tensor:
    """Return omega of one sample, from a pass that keeps every attention matrix."""
    model.network.set_attn_implementation("eager")
    attentions = model.network(input_ids=sample, use_cache=False, output_attentions=True).attentions
    model.network.set_attn_implementation("sdpa")
    mass = torch.stack(attentions).sum((0, 2, 3))
    return sinks.token_weight(sinks.soft_score(mass, sinks.mean_std_threshold(mass)))[0]


@torch.no_grad()
def sink_wanda_(model: LanguageModel, windows: Tensor, inputs: Inputs) -> None:
    """Prune by |W| x the sum over samples of the norms of omega x: two passes a sample, every attention matrix kept."""
    norms = {layer.name: torch.zeros(layer.module.in_features, device=model.device) for layer in model.layers}
    for sample in sets.read(model, windows, inputs, seed=0).flatten(0, 1).to(model.device).split(1):
        omega = token_weights(model, sample)

        def add(layer: LinearLayer, read: Tensor, omega: Tensor = omega) -> None:
            """Add the norms of one layer's weighted input."""
            norms[layer.name].add_((read[0] * omega[:, None]).norm(dim=0))

        with _hooked(model.layers, add):
            model.network(input_ids=sample, use_cache=False)
    for layer in model.layers:
        _prune_rows_(layer, layer.module.weight.abs() * norms[layer.name])


@torch.no_grad()
def wanda_(model: LanguageModel, windows: Tensor) -> None:
    """Prune block after block by |W| x the norm of its inputs."""
    norms: dict[str, Tensor] = {}

    def start(layers: list[LinearLayer]) -> None:
        norms.update({layer.name: torch.zeros(layer.module.in_features, device=model.device) for layer in layers})

    def add(layer: LinearLayer, read: Tensor, _: int) -> None:
        norms[layer.name].add_(read[0].square().sum(0))

    def finish(layer: LinearLayer) -> None:
        _prune_rows_(layer, layer.module.weight.abs() * norms[layer.name].sqrt())

    _by_block_(model, windows, start, add, finish)


@torch.no_grad()
def sparsegpt_(model: LanguageModel, windows: Tensor, inputs: Inputs | None = None) -> None:
    """Prune block after block by SparseGPT; with noised inputs, tokens count by their sinks, averaged over the noise levels."""
    weights: list[Tensor] = [torch.ones(windows.shape[1], device=model.device)] * len(windows)
    if inputs is not None:
        noised = sets.read(model, windows, inputs, seed=0).to(model.device)
        weights = [torch.stack([token_weights(model, level[None]) for level in levels]).mean(0) for levels in noised]
    sums: dict[str, Tensor] = {}

    def start(layers: list[LinearLayer]) -> None:
        widths = {layer.name: layer.module.in_features for layer in layers}
        sums.update({name: torch.zeros(width, width, device=model.device) for name, width in widths.items()})

    def add(layer: LinearLayer, read: Tensor, number: int) -> None:
        weighted = read[0] * weights[number][:, None]
        sums[layer.name] += 2.0 / len(windows) * (weighted.T @ weighted)

    def finish(layer: LinearLayer) -> None:
        layer.module.weight.copy_(_swept(layer.module.weight, sums.pop(layer.name)))

    _by_block_(model, windows, start, add, finish)


def _swept(weight: Tensor, hessian: Tensor) -> Tensor:
    """Sweep over the columns one by one."""
    work, width = weight.clone(), weight.shape[1]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1.0
    work[:, dead] = 0.0
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(width, device=weight.device)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        part, local = work[:, start:stop].clone(), factor[start:stop, start:stop]
        cost = part.square() / local.diagonal().square()
        gone = cost <= cost.flatten().sort().values[int(cost.numel() * SPARSITY)]
        errors = torch.zeros_like(part)
        for column in range(stop - start):
            kept = torch.where(gone[:, column], 0.0, part[:, column])
            errors[:, column] = (part[:, column] - kept) / local[column, column]
            part[:, column:] -= errors[:, column, None] * local[column, column:][None]
            part[:, column] = kept
        work[:, start:stop] = part
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return work


@torch.no_grad()
def generate(model: LanguageModel, prompt: Tensor, *, new_tokens: int, steps: int) -> Tensor:
    """Denoise from all-masked to text, greedily: the head on all positions, the most confident tokens first."""
    mask_id = cast(int, model.mask_token_id)
    ids = torch.full((len(prompt), prompt.shape[1] + new_tokens), mask_id, device=model.device)
    ids[:, : prompt.shape[1]] = prompt
    for step in range(steps):
        masked = ids == mask_id
        logits = model.network(input_ids=ids, use_cache=False).logits
        chosen = logits.argmax(-1)
        confidence = logits.double().softmax(-1).gather(2, chosen[..., None])[..., 0]
        confidence = torch.where(masked, confidence, float("-inf"))
        for row in range(len(ids)):
            count = int(masked[row].sum()) // (steps - step)
            best = confidence[row].topk(count).indices
            ids[row, best] = chosen[row, best]
    return ids


def _by_block_(
    model: LanguageModel,
    windows: Tensor,
    start: Callable[[list[LinearLayer]], None],
    add: Callable[[LinearLayer, Tensor, int], None],
    finish: Callable[[LinearLayer], None],
) -> None:
    """Walk through the blocks: one sample at a time to collect, then to compute what the next block reads."""
    blocks = cast(Any, model.network.get_decoder()).layers
    hidden, options = _first_inputs(model, windows)
    for index, block in enumerate(blocks):
        layers = [layer for layer in model.layers if layer.block == index]
        start(layers)
        for number, states in enumerate(hidden):
            with _hooked(layers, partial(_numbered, add, number)):
                block(states, **options)
        for layer in layers:
            finish(layer)
        hidden = [block(states, **options) for states in hidden]


def _numbered(add: Callable[[LinearLayer, Tensor, int], None], number: int, layer: LinearLayer, read: Tensor) -> None:
    add(layer, read, number)


def _first_inputs(model: LanguageModel, windows: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """Return what the first block reads of each window, and its other arguments."""
    found: list[Tensor] = []
    options: dict[str, Any] = {}

    def keep(_: torch.nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        found.append(arguments[0])
        options.update(named)
        raise ReachedError

    handle = cast(Any, model.network.get_decoder()).layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    for window in windows.to(model.device).split(1):
        try:
            model.network(input_ids=window, use_cache=False)
        except ReachedError:
            continue
    handle.remove()
    return found, options


def _prune_rows_(layer: LinearLayer, importance: Tensor) -> None:
    """Set the least important half of every row to 0."""
    order = importance.sort(dim=1, stable=True).indices[:, : int(importance.shape[1] * SPARSITY)]
    layer.module.weight.scatter_(1, order, 0.0)


@contextmanager
def _hooked(layers: Any, use: Callable[[LinearLayer, Tensor], None]) -> Any:
    """Hand what layers read to `use` during the passes inside the context."""
    handles = [layer.module.register_forward_pre_hook(partial(_use, use, layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _use(use: Callable[[LinearLayer, Tensor], None], layer: LinearLayer, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    use(layer, inputs[0])
