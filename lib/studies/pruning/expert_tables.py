"""What experts see of a calibration: tokens, matrices that fall back on their layer, and whether sinks go to other experts."""

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.calibration.routes import Routes, routes
from lib.core.errors import require
from lib.core.runtime import generator
from lib.pruning.methods import Method
from lib.studies.pruning.runs import Calibrations

NO_EXPERTS = "no experts in {}: nothing is routed"
SINK = 0.5  # tokens whose weight is below it are sinks


def note(found: Calibrations) -> str | None:
    """Return why there is nothing to tabulate; None for a mixture of experts."""
    model = found.bench.model
    return None if model.has_experts else NO_EXPERTS.format(model.name)


def expert_table(found: Calibrations, method: Method) -> pd.DataFrame:
    """Tabulate what each expert gets of a method's text.

    Args:
        found: calibrations of a model.
        method: with sink weights, which tell the sinks.

    Returns:
        One row a (layer, expert): `tokens`; `share` of all choices and `sink share` of those of sinks, in per cent; how many of
        its three matrices fall back on their layer with norms and with Hessians, for which tokens of weight 0 do not count. Empty
        without experts.

    Raises:
        InputError: a method without sink weights.
    """
    columns = ["layer", "expert", "tokens", "share, %", "sink share, %", "fallbacks, norms", "fallbacks, Hessians"]
    rows = []
    for block, (own, weight) in _routed(found, method).items():
        counts, of_sinks, weighed = own.counts(), own.counts(weight < SINK), own.counts(weight > 0)
        widths = [layer.module.in_features for layer in found.bench.model.by_block[block] if layer.expert == 0]
        for expert, tokens in enumerate(counts.tolist()):
            seen = int(weighed[expert])
            fallen = sum(seen < width for width in widths)
            share, sink = 100 * tokens / int(counts.sum()), 100 * int(of_sinks[expert]) / max(1, int(of_sinks.sum()))
            rows.append([block, expert, tokens, share, sink, 3 * (seen == 0), fallen])
    return pd.DataFrame(rows, columns=pd.Index(columns))


def sink_routing_table(found: Calibrations, method: Method, *, seed: int, permutations: int = 999) -> pd.DataFrame:
    """Test whether sinks go to other experts than tokens at large.

    Args:
        found: calibrations of a model.
        method: with sink weights, which tell the sinks.
        seed: of the permutations.
        permutations: of the marks.

    Returns:
        One row a layer: `sinks` and `tokens`; `distance`, the total variation between where choices of sinks and of all tokens
        go, in [0, 1]; `low` and `high`, 95 % of what it is when as many tokens of each sample are marked at random; `p`, the
        share of permutations with at least that distance, the observed one among them. NaN without sinks; empty without experts.

    Raises:
        InputError: a method without sink weights.

    Source: ours. Few sinks are far from all tokens by chance, so the distance means nothing without its null. The null does not
        know what tokens are: sinks that are all commas go where commas go.
    """
    columns = ["layer", "sinks", "tokens", "distance", "low", "high", "p"]
    rows = []
    for block, (own, weight) in _routed(found, method).items():
        sinks = weight < SINK
        marked = sinks.view(len(found.set_of(method).input_ids), -1)
        distance = low = high = p = float("nan")
        if bool(sinks.any()):
            distance, null = distances(own, marked, seed=seed, permutations=permutations)
            low, high = (float(each) for each in null.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)))
            p = (1 + int((null >= distance - 1e-12).sum())) / (1 + permutations)
        rows.append([block, int(sinks.sum()), len(sinks), distance, low, high, p])
    return pd.DataFrame(rows, columns=pd.Index(columns))


def distances(
    own: Routes, marked: Bool[Tensor, "sample position"], *, seed: int, permutations: int
) -> tuple[float, Float[Tensor, "permutation"]]:
    """Return the total variation between the choices of marked and of all tokens, and the same with the marks shuffled."""
    random, whole = generator(seed, "sink routing"), own.counts()
    observed = total_variation(own.counts(marked.flatten()), whole)
    null = []
    for _ in range(permutations):
        order = torch.rand(marked.shape, generator=random).argsort(1)
        null.append(total_variation(own.counts(marked.gather(1, order).flatten()), whole))
    return observed, torch.tensor(null, dtype=torch.float64)


def total_variation(first: Int[Tensor, "expert"], second: Int[Tensor, "expert"]) -> float:
    """Return half of the sum of differences between two distributions, given as counts.

    >>> total_variation(torch.tensor([3, 1]), torch.tensor([2, 2]))
    0.25
    """
    return float((first.double() / first.sum() - second.double() / second.sum()).abs().sum() / 2)


def _routed(found: Calibrations, method: Method) -> dict[int, tuple[Routes, Float[Tensor, "token"]]]:
    """Return the choices of every router on a method's text, and how much its tokens weigh there."""
    sinks = method.weighting is not None and method.weighting.kind == "sinks_down"
    require(sinks, "sinks must be told by a method with their weights", method.importance, "use a sink-aware one")
    if note(found) is not None:
        return {}
    built, model = found.set_of(method), found.bench.model
    assert built.token_weight is not None
    weight, ids = built.token_weight, built.input_ids
    by_layer = weight.mean(2) if weight.dim() == 4 else weight.expand(len(model.by_block), *weight.shape[-2:])
    chosen = routes(model, ids, batch_size=found.bench.batch_size)
    return {block: (own, by_layer[block].flatten().cpu()) for block, own in chosen.items()}
