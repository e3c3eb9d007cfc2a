"""Refuse logits that are no numbers, and say which layer they come from: the best of NaNs would be counted as an answer."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from lib.core.errors import InputError

ATTENTION = ("self_attn", "attention")  # what a block has, of a decoder or an encoder


def require_finite(logits: Float[Tensor, "*position vocab"], again: Callable[[], object], *, network: object, name: str) -> None:
    """Raise `InputError` unless all logits are finite.

    It costs one sum over the logits. Where that is not finite, they are looked at one by one, and the pass is repeated to find
    the first decoder block with such an output.

    Args:
        logits: what the LM head gave.
        again: repeats the pass that they come from, or one that shows the same fault.
        network: the one that was passed through; the layer of anything but transformers' own is not looked for.
        name: of the model, for the error.

    Raises:
        InputError: NaN or infinity; the message names the layer, and its weights where they hold it already.
    """
    if math.isfinite(float(logits.sum())) or bool(logits.isfinite().all()):
        return
    got = "NaN" if bool(logits.isnan().any()) else "infinity"
    raise InputError(f"logits of {name} must be finite, got {got}, {_origin(network, again)}")


def _origin(network: object, again: Callable[[], object]) -> str:
    """Name the first layer whose output is not finite, and what to do."""
    reached: list[tuple[str, torch.nn.Module]] = []

    def watched(name: str) -> Callable[..., None]:
        """Return a hook that notes a layer of this name when its output is not finite."""

        def look(module: torch.nn.Module, _: object, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not bool(cast(Tensor, value).isfinite().all()):
                reached.append((name, module))

        return look

    handles = [module.register_forward_hook(watched(name)) for name, module in _layers(network)]
    try:
        again()
    finally:
        for handle in handles:
            handle.remove()
    if not reached:
        return "made behind the last decoder block: check the last norm and the LM head, or load with dtype float32"
    name, module = reached[0]
    spoiled = [f"{name}.{own}" for own, weight in module.named_parameters() if not _is_finite(weight)]
    if spoiled:
        return f"first made by {name}: mend {spoiled[0]}, which holds such numbers itself"
    return f"first made by {name}, whose weights are finite: load with dtype float32, or look at how this layer was compressed"


def _layers(network: object) -> list[tuple[str, torch.nn.Module]]:
    """List the embedding and the decoder blocks by name."""
    if not isinstance(network, PreTrainedModel):
        return []
    embedding = network.get_input_embeddings()
    return [
        (name, part)
        for name, part in network.named_modules()
        if part is embedding or any(hasattr(part, name) for name in ATTENTION)
    ]


def _is_finite(weight: Tensor) -> bool:
    return weight.is_meta or bool(weight.isfinite().all())
