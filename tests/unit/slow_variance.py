"""Variance and stability of sinks, written from the equations: plain Python loops over nested lists, in double precision.

Each function takes what one prompt, layer and head would have and knows no tensor; `each` walks over those leading dimensions.
Keys are counted from 0; `mass[t][i]` is what key i receives at step t; a set is a Python set of keys.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from math import comb, isnan, nan

import torch
from torch import Tensor

Vector = Sequence[float]
Matrix = Sequence[Vector]
Marks = Sequence[bool]


def each(function: Callable, batch: Sequence[int], *tensors: Tensor) -> Tensor:
    """Apply a loop to every entry of the leading dimensions and put the numbers together again."""
    found = [function(*(tensor[index].tolist() for tensor in tensors)) for index in product(*map(range, batch))]
    result = torch.tensor(found, dtype=torch.float64)
    return result.reshape(*batch, *result.shape[1:])


def average(values: Sequence[float]) -> float:
    """Σ x / n, and NaN of nothing."""
    return sum(values) / len(values) if values else nan


def variance(values: Sequence[float]) -> float:
    """Σ (x - x̄)² / n, the population variance."""
    centre = average(values)
    return average([(value - centre) ** 2 for value in values])


def kept(marks: Marks) -> set[int]:
    """The set that a row of marks stands for."""
    return {key for key, marked in enumerate(marks) if marked}


def trajectory_mean(mass: Matrix, keys: Sequence[int] | None = None) -> list[float]:
    """m̄(i) = (1/|T_i|) Σ_{t in T_i} m_t(i), T_i the steps at which key i exists: all of them, or those with more than i keys."""
    result = []
    for key in range(len(mass[0])):
        steps = [t for t in range(len(mass)) if keys is None or key < keys[t]]
        result.append(average([mass[t][key] for t in steps]))
    return result


def spatial_variance(mass: Matrix, keys: Sequence[int] | None = None) -> float:
    """σ²_spatial = Var_i( m̄(i) )."""
    return variance(trajectory_mean(mass, keys))


def centroid(mass: Vector, marks: Marks) -> float:
    """c = Σ_{i in S} m(i) i / Σ_{i in S} m(i)."""
    above = below = 0.0
    for key in kept(marks):
        above += mass[key] * key
        below += mass[key]
    return above / below if below else nan


def temporal_variance(centroids: Vector, length: int = 1) -> float:
    """σ²_temporal = Var_t( c_t / S ) over the steps that have a centroid."""
    return variance([c / length for c in centroids if not isnan(c)])


def position_variance_total(positions: Sequence[Sequence[int]]) -> float:
    """Var of all T k positions, each counted as often as it occurs."""
    return variance([float(position) for step in positions for position in step])


def position_variance_between(positions: Sequence[Sequence[int]]) -> float:
    """Var_t of the mean of the k positions of a step."""
    return variance([average([float(position) for position in step]) for step in positions])


def top_k(mass: Vector, k: int) -> set[int]:
    """The keys that fewer than k others beat; of equal masses the earlier one wins."""
    found = set()
    for key, value in enumerate(mass):
        better = [other for other, rival in enumerate(mass) if rival > value or (rival == value and other < key)]
        if len(better) < k:
            found.add(key)
    return found


def _frequency_variance(sets: Sequence[set[int]], size: int) -> list[float]:
    """1 - (steps whose set holds p) / T for every key p."""
    return [1.0 - len([t for t, found in enumerate(sets) if p in found]) / len(sets) for p in range(size)]


def frequency_variance_top_k(mass: Matrix, k: int) -> list[float]:
    """1 - f(p), f from the k largest masses of each step."""
    return _frequency_variance([top_k(row, k) for row in mass], len(mass[0]))


def argmax_sets(attention: Sequence[Sequence[Matrix]]) -> list[set[int]]:
    """The distinct favourite keys of each step's queries in the mean over heads, from `attention[t][head][query][key]`."""
    sets = []
    for heads in attention:
        queries, size = len(heads[0]), len(heads[0][0])
        found = set()
        for query in range(queries):
            mean = [average([head[query][key] for head in heads]) for key in range(size)]
            found.add(mean.index(max(mean)))
        sets.append(found)
    return sets


def frequency_variance_argmax(attention: Sequence[Sequence[Matrix]]) -> list[float]:
    """1 - f(p) in the batched form: a key counts once in each step in which some query prefers it."""
    return _frequency_variance(argmax_sets(attention), len(attention[0][0][0]))


def sink_frequency_variance(sets: Sequence[Marks]) -> float:
    """Mean of 1 - f(p) over the keys p with f(p) > 0."""
    values = _frequency_variance([kept(marks) for marks in sets], len(sets[0]))
    return average([value for value in values if value < 1.0])


def jaccard(first: set[int], second: set[int]) -> float:
    """|A ∩ B| / |A ∪ B|."""
    return len(first & second) / len(first | second) if first | second else nan


def overlap(sets: Sequence[Marks], distance: int) -> float:
    """Mean of J(S_s, S_t) over all pairs of steps with |s - t| = distance that do not both lack sinks."""
    pairs = [(s, t) for s in range(len(sets)) for t in range(len(sets)) if s - t == distance]
    values = [jaccard(kept(sets[s]), kept(sets[t])) for s, t in pairs]
    return average([value for value in values if not isnan(value)])


def lifetimes(sets: Sequence[Marks]) -> list[int]:
    """The length of every unbroken run, walking each key along the steps."""
    found = []
    for key in range(len(sets[0])):
        running = 0
        for marks in sets:
            if marks[key]:
                running += 1
            elif running:
                found.append(running)
                running = 0
        if running:
            found.append(running)
    return found


def mean_lifetime(sets: Sequence[Marks]) -> float:
    """Mean length of the runs, every run counted once."""
    return average(lifetimes(sets))


def movements(centroids: Vector) -> list[float]:
    """c_{t+1} - c_t where both exist."""
    return [after - before for before, after in pairwise(centroids) if not isnan(before + after)]


def drift(centroids: Vector) -> list[float]:
    """Mean of c_{t+1} - c_t and of |c_{t+1} - c_t|."""
    moved = movements(centroids)
    return [average(moved), average([abs(step) for step in moved])]


def rulli_sinks(attention: Matrix, epsilon: float) -> list[bool]:
    """Key j is a sink iff S Ā_j > mean_{k≠j} S Ā_k + ε with Ā_j = (1/S) Σ_i A_ij."""
    size = len(attention)
    received = [size * average([row[key] for row in attention]) for key in range(size)]
    return [received[j] > average([received[k] for k in range(size) if k != j]) + epsilon for j in range(size)]


def gu_rate(attention: Sequence[Sequence[Matrix]], key: int, *, causal: bool, epsilon: float) -> float:
    """Mean over layers and heads of 1[α_k > ε], α_k the mean of A_{i,k} over the queries i that see key k."""
    found = []
    for heads in attention:
        for rows in heads:
            queries = [i for i in range(len(rows)) if i >= key or not causal]
            found.append(1.0 if average([rows[i][key] for i in queries]) > epsilon else 0.0)
    return average(found)


def first_token_score(attention: Matrix) -> float:
    """(1/T) Σ_t α_{t,0}."""
    return average([row[0] for row in attention])


def value_norm_ratio(values: Matrix, marks: Marks) -> float:
    """Mean ‖v_j‖ over the sinks over mean ‖v_j‖ over the other keys, from the value vectors."""
    norms = [sum(component**2 for component in vector) ** 0.5 for vector in values]
    inside = [norms[key] for key in range(len(norms)) if key in kept(marks)]
    outside = [norms[key] for key in range(len(norms)) if key not in kept(marks)]
    return average(inside) / average(outside) if inside and outside else nan


def chance_moments(k: int, size: int) -> tuple[float, float]:
    """Mean and variance of J of two independent random k-sets: j shared keys have C(k, j) C(S-k, k-j) / C(S, k)."""
    shared = [(j / (2 * k - j), comb(k, j) * comb(size - k, k - j) / comb(size, k)) for j in range(k + 1)]
    mean = sum(value * share for value, share in shared)
    return mean, sum(value**2 * share for value, share in shared) - mean**2
