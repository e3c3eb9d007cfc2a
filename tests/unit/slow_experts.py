"""Routing and what experts read, written from the equations: one token at a time, in double precision.

Only the input of each mixture comes from a pass; nothing here shares code with the lists of experts or their statistics.
"""

from collections import defaultdict
from typing import Any, cast

import torch
from torch import Tensor

from lib.models.language_model import LanguageModel

Sums = dict[str, Any]


def mixture_inputs(model: LanguageModel, ids: Tensor) -> dict[int, Tensor]:
    """What the mixture of every block reads, `[sample, position, feature]`, by block."""
    found: dict[int, Tensor] = {}
    handles = []
    for number, block in enumerate(cast(Any, model.network.get_decoder()).layers):
        if hasattr(block.mlp, "experts"):
            handles.append(block.mlp.register_forward_hook(lambda _, i, __, n=number: found.__setitem__(n, i[0].double())))
    with torch.no_grad():
        cast(Any, model.network)(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def routed(mlp: Any, token: Tensor, config: Any) -> dict[int, float]:
    """Weight of each chosen expert of one token, by the rule of the family."""
    scores = [float(row @ token) for row in mlp.gate.weight.double()]
    if config.model_type == "qwen3_moe":
        total = sum(torch.tensor(scores).double().exp().tolist())
        shares = [float(torch.tensor(score).double().exp()) / total for score in scores]
        return {expert: shares[expert] for expert in best(shares, config.num_experts_per_tok)}
    shares = [1 / (1 + float(torch.tensor(-score).double().exp())) for score in scores]
    biased = [share + float(bias) for share, bias in zip(shares, mlp.gate.e_score_correction_bias, strict=True)]
    size = len(shares) // config.n_group
    groups = [sum(sorted(biased[start : start + size])[-2:]) for start in range(0, len(shares), size)]
    admitted = best(groups, config.topk_group)
    open_ones = [value if index // size in admitted else float("-inf") for index, value in enumerate(biased)]
    chosen = best(open_ones, config.num_experts_per_tok)
    total = sum(shares[expert] for expert in chosen)
    return {expert: shares[expert] / total * config.routed_scaling_factor for expert in chosen}


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda index: -values[index])[:count]


def middle(mlp: Any, token: Tensor) -> Tensor:
    """What `down` reads of one token."""
    gate, up = mlp.gate_proj.weight.double() @ token, mlp.up_proj.weight.double() @ token
    return gate / (1 + (-gate).exp()) * up


def sums(rows: list[tuple[int, float, Tensor]], *, width: int, samples: int) -> Sums:
    """Squares, norms by sample, products and counts of (sample, weight, row)."""
    found: Sums = {"squares": torch.zeros(width).double(), "products": torch.zeros(width, width).double()}
    by_sample = torch.zeros(samples, width).double()
    for sample, omega, row in rows:
        value = omega * row
        found["squares"] += value**2
        found["products"] += torch.outer(value, value)
        by_sample[sample] += value**2
    found["norms"] = by_sample.sqrt().sum(0)
    found["tokens"], found["rows"] = sum(omega > 0 for _, omega, _ in rows), len(rows)
    return found


def statistics(model: LanguageModel, ids: Tensor, weight: Tensor | None = None) -> dict[tuple[int, str, object], Sums]:
    """Sums by (block, role that reads first, expert); expert None is over all of the layer.

    `weight`: `[sample, position]`, or one more by layer.
    """
    config, samples, found = model.network.config, len(ids), {}
    for block, inputs in mixture_inputs(model, ids).items():
        mlp = cast(Any, model.network.get_decoder()).layers[block].mlp
        rows: dict[tuple[str, object], list[tuple[int, float, Tensor]]] = defaultdict(list)
        for sample in range(samples):
            for position in range(ids.shape[1]):
                token = inputs[sample, position]
                given = None if weight is None else weight if weight.dim() == 2 else weight[block]
                omega = 1.0 if given is None else float(given[sample, position])
                rows["gate", None].append((sample, omega, token))
                for expert in routed(mlp, token, config):
                    rows["gate", expert].append((sample, omega, token))
                    rows["down", expert].append((sample, omega, middle(mlp.experts[expert], token)))
                    rows["down", None].append((sample, omega, middle(mlp.experts[expert], token)))
                if hasattr(mlp, "shared_experts"):
                    rows["down", "shared"].append((sample, omega, middle(mlp.shared_experts, token)))
        for expert in (None, "shared", *range(len(mlp.experts))):
            for role, width in (("gate", config.hidden_size), ("down", config.moe_intermediate_size)):
                if expert != "shared" or (role == "down" and hasattr(mlp, "shared_experts")):
                    found[block, role, expert] = sums(rows[role, expert], width=width, samples=samples)
    return found
