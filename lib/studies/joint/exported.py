"""Compressed models made ready for a checkpoint, and checkpoints that are read back without this project."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from lib.models import experts
from lib.models.export import QuantizedWeight
from lib.models.language_model import LanguageModel, linear_layers
from lib.models.layers import attention
from lib.pruning import pruner
from lib.studies.joint import runs
from lib.studies.joint.runs import Recipe
from lib.studies.pruning.runs import Calibrations


@dataclass(frozen=True)
class Ready:
    """A compressed model and the codes and scales of its matrices, as the writers of `export` and `containers` take them."""

    model: LanguageModel
    quantized: Mapping[str, QuantizedWeight]


def exportable(found: Calibrations, recipe: Recipe, *, dtype: torch.dtype) -> Ready:
    """Compress a copy of the bench's model, its weights in the dtype of the checkpoint.

    Args:
        found: calibrations of the model, which stays as it is.
        recipe: how; with 16 bits there are no codes.
        dtype: of everything that is stored as floats; rounded weights are codes times scales, computed in it.

    Returns:
        A model whose weights are exactly what a loader computes.
    """
    with pruner.restored(found.bench.model) as model:
        compressed = runs.compress_(found, recipe)
        network = copy.deepcopy(model.network)
    for parameter in network.parameters():  # buffers stay: rotary frequencies must not be rounded
        parameter.data = parameter.data.to(dtype)
    ready = replace(model, network=network, layers=linear_layers(network), fingerprint="")
    quantized = {}
    for layer in ready.layers:
        codes = compressed[layer.name].quantized
        if codes is not None:
            size = codes.codes.shape[1] // codes.scales.shape[1]
            quantized[layer.name] = QuantizedWeight(codes.codes, codes.scales, codes.grid.bits, size)
            layer.module.weight.data.copy_(codes.dequantize(dtype=dtype))
    return Ready(ready, quantized)


@torch.inference_mode()
def reloads(model: LanguageModel, folder: Path | str, ids: Tensor) -> bool:
    """Tell whether transformers alone, reading the checkpoint, gives the logits of the model bit for bit.

    Experts that it has read are summed as here: its own sums, in the dtype of the network, round otherwise.

    Args:
        model: what was written.
        folder: the checkpoint.
        ids: tokens to compare on, `[batch, position]`.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # bars of loading and unpacking would stand in the notebook
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    finally:
        if shown:
            logging.enable_progress_bar()
    experts.as_linears_(loaded)
    loaded.to(model.device)
    with attention.without_products(model.network):
        found, wanted = (network(input_ids=ids.to(model.device), use_cache=False).logits for network in (loaded, model.network))
    return torch.equal(found, wanted)
