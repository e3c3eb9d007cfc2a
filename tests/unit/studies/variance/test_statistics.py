"""Statistics of traces and their tables, on traces made by hand: against loops over prompts, steps and keys."""

import dataclasses
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.attention import planted, stability
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion.traces import HeadTrace, SinkTrace, mark_steps
from lib.studies.variance import agreement_tables as at
from lib.studies.variance import noise_match
from lib.studies.variance import statistics as ts
from lib.studies.variance import tables as vt
from lib.studies.variance.noise_match import NoiseMatch
from tests.unit import slow_variance as slow

ROWS, STEPS, LAYERS, HEADS, KV, SIZE, PROMPT = 4, 8, 2, 4, 2, 14, 5
ATOL = 1e-5


def made(*, causal: bool = False, seed: int = 0, name: str = "") -> SinkTrace:
    """A trace with random skewed masses of mean 1 over the keys that exist, and random sets of heads."""
    stream = torch.Generator().manual_seed(seed)
    keys = torch.arange(SIZE - STEPS, SIZE) + 1 if causal else torch.full((STEPS,), SIZE)
    exists = torch.arange(SIZE)[None] < keys[:, None]
    raw = torch.rand(ROWS, STEPS, LAYERS, HEADS, SIZE, generator=stream).pow(6) * exists[:, None, None]
    sums = raw * keys[:, None, None, None] / raw.sum(-1, keepdim=True)
    masked = torch.arange(SIZE) >= PROMPT + torch.rand(ROWS, STEPS, SIZE, generator=stream) * torch.arange(STEPS)[:, None]
    marks = mark_steps(STEPS)

    def sets(share: float, *inner: int) -> Tensor:
        drawn = torch.rand(ROWS, STEPS, *inner, SIZE, generator=stream) < share
        return drawn & exists[:, *[None] * len(inner)]

    heads = HeadTrace(
        rulli_sets=sets(0.15, LAYERS, HEADS),
        sets=sets(0.2, LAYERS, HEADS),
        favourites=sets(0.3, LAYERS),
        first_score=torch.rand(ROWS, STEPS, LAYERS, generator=stream),
        value_norm=1 + torch.rand(ROWS, 3, LAYERS, KV, SIZE, generator=stream),
    )
    return SinkTrace(
        name=name or ("ar" if causal else "dlm"),
        prompt_tokens=PROMPT,
        ids=torch.zeros(ROWS, STEPS, SIZE, dtype=torch.long),
        is_masked=torch.zeros(ROWS, STEPS, SIZE, dtype=torch.bool) if causal else masked,
        keys=keys,
        mass=sums.mean((2, 3)),
        layer_mass=sums.mean(3),
        mark_steps=marks,
        head_mass=sums[:, list(marks)],
        gu_rate=torch.rand(ROWS, STEPS, generator=stream),
        gu_best=torch.rand(ROWS, STEPS, generator=stream),
        rulli=3 * torch.rand(ROWS, STEPS, generator=stream),
        texts=torch.zeros(ROWS, SIZE, dtype=torch.long),
        heads=heads,
    )


@pytest.fixture(params=[True, False], ids=["causal", "diffusion"])
def trace(request: pytest.FixtureRequest) -> SinkTrace:
    return made(causal=request.param)


def close(got: Tensor, expected: list, tolerance: float = ATOL) -> None:
    """Compare with what loops gave, NaN where NaN is expected."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance, equal_nan=True)


def released(mass: list[float], keys: int) -> list[bool]:
    """Mean + 2 population standard deviations over the keys that exist; the others are no sinks."""
    border = slow.average(mass[:keys]) + 2 * slow.variance(mass[:keys]) ** 0.5
    return [key < keys and value > border for key, value in enumerate(mass)]


def paths(trace: SinkTrace, rule: Any = released) -> list[list[float]]:
    """The centroid of every row and step."""
    return [
        [slow.centroid(mass, rule(mass, keys)) for mass, keys in zip(row, trace.keys.tolist(), strict=True)]
        for row in trace.mass.tolist()
    ]


def described(mass: list[float], keys: int) -> list[bool]:
    """Above the mean of the other keys plus 1."""
    total = sum(mass[:keys])
    return [key < keys and value > (total - value) / (keys - 1) + 1.0 for key, value in enumerate(mass)]


# --- from a trace to numbers ---------------------------------------------------------------------------------------------


def test_rows_of_all_seeds_of_a_prompt_are_averaged() -> None:
    """Rows are all prompts of the first seed, then all of the second; a missing one leaves the others."""
    values = torch.tensor([1.0, 10.0, 100.0, 3.0, math.nan, math.nan, 8.0, 20.0, math.nan])
    close(ts.per_prompt(values, prompts=3), [4.0, 15.0, 100.0])
    close(ts.per_prompt(torch.tensor([math.nan, 2.0]), prompts=2), [math.nan, 2.0])


def test_sets_follow_the_rule_at_each_level_over_the_keys_that_exist(trace: SinkTrace) -> None:
    keys = trace.keys.tolist()
    close(ts.sink_sets(trace), [[released(m, n) for m, n in zip(row, keys, strict=True)] for row in trace.mass.tolist()], 0)
    layers = ts.sink_sets(trace, level="layer")
    assert layers.shape == (ROWS, LAYERS, STEPS, SIZE)
    for row, layer, step in product(range(ROWS), range(LAYERS), range(STEPS)):
        expected = released(trace.layer_mass[row, step, layer].tolist(), keys[step])
        assert layers[row, layer, step].tolist() == expected
    heads = ts.sink_sets(trace, level="head")
    assert trace.heads is not None
    for row, layer, head, step in product(range(ROWS), range(LAYERS), range(HEADS), range(STEPS)):
        assert torch.equal(heads[row, layer, head, step], trace.heads.sets[row, step, layer, head])


def test_centroids_and_temporal_variances_equal_loops(trace: SinkTrace) -> None:
    usual, by_words = paths(trace), paths(trace, described)
    close(ts.centroids(trace), usual)
    close(ts.described_centroids(trace), by_words)
    close(ts.temporal_raw(trace), [slow.temporal_variance(path) for path in usual], 1e-4)
    close(ts.temporal(trace), [slow.temporal_variance(path, SIZE) for path in usual])
    close(ts.temporal_described(trace), [slow.temporal_variance(path, SIZE) for path in by_words])
    assert usual != by_words and any(math.isnan(value) for path in usual + by_words for value in path)


def test_spatial_variance_is_taken_at_full_length(trace: SinkTrace) -> None:
    """All steps of a diffusion model, the last of an autoregressive one; over all prefixes it is another number."""
    rows, keys = trace.mass.tolist(), trace.keys.tolist()
    full = [slow.spatial_variance(row[-1:] if trace.is_causal else row) for row in rows]
    close(ts.spatial(trace), full)
    close(ts.spatial_growing(trace), [slow.spatial_variance(row, keys) for row in rows])
    assert torch.equal(ts.spatial(trace), ts.spatial_growing(trace)) != trace.is_causal


@pytest.mark.parametrize("is_causal", [True, False])
def test_variance_without_preference_is_that_of_the_mask_alone(is_causal: bool) -> None:
    """Under the causal mask key k gets the sum over the queries q >= k of 1 / (q + 1)."""
    harmonic = [sum(1 / (query + 1) for query in range(key, SIZE)) for key in range(SIZE)]
    expected = slow.variance(harmonic) if is_causal else 0.0
    assert ts.variance_without_preference(SIZE, is_causal=is_causal) == pytest.approx(expected, abs=1e-6)


def test_measures_of_the_largest_keys_equal_loops(trace: SinkTrace) -> None:
    rows = trace.mass.tolist()
    top = [[row.index(max(row)) for row in steps] for steps in rows]
    close(ts.wander(trace), [1 - max(path.count(place) for place in path) / STEPS for path in top])
    close(ts.top_position_variance(trace), [slow.variance([float(place) for place in path]) for path in top])
    sets = [[sorted(slow.top_k(row, 3)) for row in steps] for steps in rows]
    close(ts.set_position_variance(trace, k=3, part="total"), [slow.position_variance_total(path) for path in sets])
    close(ts.set_position_variance(trace, k=3, part="between"), [slow.position_variance_between(path) for path in sets])
    marks = [[[key in found for key in range(SIZE)] for found in path] for path in sets]
    close(ts.top_k_frequency_variance(trace, k=3), [slow.sink_frequency_variance(path) for path in marks])


def mean(values: list[float]) -> float:
    return slow.average([value for value in values if not math.isnan(value)])


def test_measures_of_heads_equal_loops(trace: SinkTrace) -> None:
    heads = trace.heads
    assert heads is not None
    heads.rulli_sets[1, :, 0, 2] = False  # a head without any sink is left out
    heads.rulli_sets[3] = False  # and so is a row without any
    favourites = heads.favourites.tolist()
    close(
        ts.argmax_frequency_variance(trace),
        [mean([slow.sink_frequency_variance([step[layer] for step in row]) for layer in range(LAYERS)]) for row in favourites],
    )
    lives, signed, absolute = [], [], []
    for row in range(ROWS):
        sets = [heads.rulli_sets[row, :, layer, head].tolist() for layer in range(LAYERS) for head in range(HEADS)]
        lives.append(mean([slow.mean_lifetime(steps) for steps in sets]))
        drifts = [slow.drift([slow.centroid([1.0] * SIZE, marks) for marks in steps]) for steps in sets]
        signed.append(mean([drift[0] for drift in drifts]))
        absolute.append(mean([drift[1] for drift in drifts]))
    close(ts.lifetime(trace), lives)
    close(ts.head_drift(trace, signed=True), signed)
    close(ts.head_drift(trace, signed=False), absolute)
    assert math.isnan(lives[3]) and not math.isnan(lives[1])


def test_value_norms_of_sinks_are_compared_within_a_head_at_half_of_the_steps(trace: SinkTrace) -> None:
    """Query heads 0 and 1 read the first key-value head, 2 and 3 the second."""
    heads = trace.heads
    assert heads is not None
    step, expected = STEPS // 2, []
    keys = int(trace.keys[step])
    for row in range(ROWS):
        ratios = []
        for layer, head in product(range(LAYERS), range(HEADS)):
            norms = heads.value_norm[row, 1, layer, head // 2, :keys].tolist()
            ratios.append(
                slow.value_norm_ratio([[norm] for norm in norms], heads.rulli_sets[row, step, layer, head, :keys].tolist())
            )
        expected.append(mean(ratios))
    close(ts.value_norm_ratio(trace), expected)


def test_statistics_of_heads_need_a_trace_with_heads(trace: SinkTrace) -> None:
    bare = dataclasses.replace(trace, heads=None)
    for statistic in (ts.lifetime, ts.value_norm_ratio, ts.argmax_frequency_variance):
        with pytest.raises(InputError, match=r"trace\(..., heads=True\)"):
            statistic(bare)


@pytest.mark.parametrize("level", ts.LEVELS)
def test_overlap_is_averaged_over_layers_or_heads(trace: SinkTrace, level: str) -> None:
    sets, distances = ts.sink_sets(trace, level=level), [1, 3, 4]
    got = ts.overlap(trace, level=level, distances=distances, generator=generator(0))
    expected = [
        [mean([slow.overlap(steps, distance) for steps in row.reshape(-1, STEPS, SIZE).tolist()]) for distance in distances]
        for row in sets
    ]
    close(got, expected)


def test_the_nulls_keep_the_sizes_and_lose_the_order() -> None:
    """Sets that stay for half of the trajectory: steps in random order still overlap, positions in random order do not."""
    lasting = torch.zeros(ROWS, STEPS, SIZE)
    lasting[:, : STEPS // 2, :2], lasting[:, STEPS // 2 :, 3:5] = 1.0, 1.0
    stays = dataclasses.replace(made(), mass=lasting)
    rows = {
        null: ts.overlap(stays, level="aggregate", distances=[1, STEPS // 2], generator=generator(0), null=null).mean(0)
        for null in ("", "steps", "positions")
    }
    close(rows[""], [6 / 7, 0.0])
    assert 0.2 < rows["steps"][0] < 0.7 and rows["steps"][1] > 0.1
    assert (rows["positions"] < 0.3).all()
    again = ts.overlap(stays, level="aggregate", distances=[1], generator=generator(0), null="steps").mean()
    assert float(again) == pytest.approx(float(rows["steps"][0]))


@pytest.mark.parametrize("level", ts.LEVELS)
def test_shuffled_positions_stay_among_the_keys_that_exist(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, seen = made(causal=True), []
    compare = stability.overlap_by_distance
    monkeypatch.setattr(stability, "overlap_by_distance", lambda sets, far: (seen.append(sets), compare(sets, far))[1])
    ts.overlap(trace, level=level, distances=[1], generator=generator(0), null="positions")
    shuffled, sets = torch.stack(seen), ts.sink_sets(trace, level=level)
    assert torch.equal(shuffled.sum(-1), sets.sum(-1)) and not torch.equal(shuffled, sets)
    missing = torch.arange(SIZE)[None] >= trace.keys[:, None]
    assert not (shuffled & missing).any()


# --- tables --------------------------------------------------------------------------------------------------------------


def holds_its_mean(frame: Any, name: str = "mean", low: str = "low", high: str = "high") -> None:
    bounded = frame[frame[low].notna()]
    assert len(bounded) and (bounded[low] <= bounded[name]).all() and (bounded[name] <= bounded[high]).all()


def test_quantities_leave_out_prompts_without_a_value() -> None:
    """Rows 0 and 2 are seeds of prompt 0, rows 1 and 3 of prompt 1."""
    values = {"both": [1.0, 2.0, 3.0, 6.0], "one": [math.nan, 2.0, math.nan, 6.0], "none": [math.nan] * 4}
    asked = {name: (lambda trace, row=row: torch.tensor(row), "high", "low") for name, row in values.items()}
    table: Any = vt.quantities_table([made(), made(causal=True)], asked, prompts=2, seed=0)
    assert table["model"].tolist() == ["dlm", "ar"] * 3
    assert table["paper"].tolist() == ["low", "high"] * 3
    assert table["n"].tolist() == [2, 2, 1, 1, 0, 0]
    close(torch.tensor(table["mean"].tolist()), [3.0, 3.0, 4.0, 4.0, math.nan, math.nan])
    assert table["low"].isna().tolist() == table["high"].isna().tolist() == [False] * 2 + [True] * 4
    assert (table["low"][0], table["high"][0]) == (2.0, 4.0)  # the means of the two prompts are the ends


@pytest.mark.parametrize(
    "asked", [vt.PAPER_QUANTITIES, vt.digest_quantities(3), vt.head_quantities()], ids=["paper", "digest", "heads"]
)
def test_every_quantity_has_a_row_for_every_model(asked: Any) -> None:
    traces = [made(), made(causal=True)]
    table: Any = vt.quantities_table(traces, asked, prompts=2, seed=0)
    assert table["quantity"].tolist() == [name for name in asked for _ in traces]
    for (_, row), (statistic, trace) in zip(
        table.iterrows(), [(statistic, trace) for statistic, _, _ in asked.values() for trace in traces], strict=True
    ):
        values = statistic(trace).tolist()
        prompts = [mean([values[0], values[2]]), mean([values[1], values[3]])]
        assert row["mean"] == pytest.approx(mean(prompts), rel=1e-5)
    holds_its_mean(table)


def test_head_quantities_are_in_the_units_that_they_name() -> None:
    trace, asked = made(), vt.head_quantities()
    assert trace.heads is not None
    by_name = {name: statistic(trace) for name, (statistic, _, _) in asked.items()}
    close(by_name["Rulli sinks per head"], [slow.average(row) for row in trace.rulli.tolist()])
    close(by_name["lifetime, share of all steps"], (ts.lifetime(trace) / STEPS).tolist())
    close(by_name["Gu sink rate, first key, %"], [100 * row[-1] for row in trace.gu_rate.tolist()], 1e-4)
    close(by_name["Gu sink rate, best key, %"], [100 * row[-1] for row in trace.gu_best.tolist()], 1e-4)
    close(
        by_name["first-token score, % of attention"],
        [100 * slow.average(row[-1]) for row in trace.heads.first_score.tolist()],
        1e-4,
    )
    assert (by_name["absolute drift per step, tokens"] >= by_name["drift per step, tokens (right is positive)"].abs()).all()


def test_layers_have_their_own_variances() -> None:
    traces = [made(), made(causal=True)]
    table: Any = vt.layers_table(traces, prompts=2, seed=0)
    assert len(table) == 2 * LAYERS * 2
    assert table["depth"].tolist() == [0.0, 0.0, 1.0, 1.0] * 2 and table["layer"].tolist() == [0, 0, 1, 1] * 2
    for trace, layer in product(traces, range(LAYERS)):
        mass, keys = trace.layer_mass[:, :, layer].tolist(), trace.keys.tolist()
        spatial = [slow.spatial_variance(row[-1:] if trace.is_causal else row) for row in mass]
        layer_paths = [[slow.centroid(m, released(m, n)) for m, n in zip(row, keys, strict=True)] for row in mass]
        temporal = [slow.temporal_variance(path, SIZE) for path in layer_paths]
        for name, values in (("spatial variance", spatial), ("temporal variance", temporal)):
            cell = table[(table["model"] == trace.name) & (table["layer"] == layer) & (table["quantity"] == name)]
            assert cell["mean"].item() == pytest.approx(slow.average(values), rel=1e-4)
            assert cell["n"].item() == 2
    holds_its_mean(table)


@pytest.mark.parametrize(
    ("steps", "distances"), [(48, [1, 2, 4, 8, 12, 16, 24]), (8, [1, 2, 4]), (7, [1, 2, 3]), (2, [1]), (3, [1])]
)
def test_step_distances_double_up_to_half_of_the_steps(steps: int, distances: list[int]) -> None:
    assert at.step_distances(steps) == distances
    assert ts.quarter(steps) in distances and ts.quarter(steps) == max(1, steps // 4)


def test_overlaps_have_their_nulls_and_what_is_beyond_chance(trace: SinkTrace) -> None:
    found = {(trace.name, level): at.overlaps(trace, level=level, prompts=2, seed=3) for level in ts.LEVELS}
    kinds = ["overlap", "steps shuffled", "positions shuffled", "beyond chance"]
    for level in ts.LEVELS:
        kind = found[trace.name, level]
        assert list(kind) == kinds
        rows = ts.overlap(trace, level=level, distances=[1, 2, 4], generator=generator(0)).tolist()
        close(kind["overlap"], [[mean([rows[p][d], rows[p + 2][d]]) for d in range(3)] for p in range(2)])
        corrected = (kind["overlap"] - kind["positions shuffled"]) / (1 - kind["positions shuffled"])
        torch.testing.assert_close(kind["beyond chance"], corrected, equal_nan=True)
    table: Any = at.overlap_table(found, distances=[1, 2, 4], seed=0)
    wanted = [(level, kind, distance) for level in ts.LEVELS for kind in kinds for distance in (1, 2, 4)]
    assert list(zip(table["level"], table["kind"], table["step distance"], strict=True)) == wanted
    cell = table[(table["level"] == "head") & (table["kind"] == "overlap") & (table["step distance"] == 2)]
    assert cell["mean"].item() == pytest.approx(float(found[trace.name, "head"]["overlap"][:, 1].mean()), rel=1e-5)
    holds_its_mean(table)


def test_the_settings_of_a_generation_have_a_row_each() -> None:
    settings = {("block length", "8"): made(seed=1), ("remasking", "random"): made(seed=2)}
    table: Any = vt.factors_table(settings, seed=0)
    assert list(zip(table["factor"], table["setting"], strict=True)) == list(settings)
    assert table["steps"].tolist() == [STEPS] * 2 and table["n"].tolist() == [ROWS] * 2
    for index, trace in enumerate(settings.values()):
        values = {
            "spatial variance": [slow.spatial_variance(row) for row in trace.mass.tolist()],
            "temporal variance": [slow.temporal_variance(path, SIZE) for path in paths(trace)],
            "wander rate": ts.wander(trace).tolist(),
            "overlap": [slow.overlap(row, STEPS // 4) for row in ts.sink_sets(trace).tolist()],
        }
        for name, rows in values.items():
            assert table[name][index] == pytest.approx(mean(rows), rel=1e-4), name
    for name in ("spatial variance", "temporal variance", "wander rate", "overlap"):
        holds_its_mean(table, name, f"{name}, low", f"{name}, high")


def test_places_divide_all_positions_and_all_sinks() -> None:
    """Walk over every position: beside a border between masked and written it is the frontier, whatever else it is."""
    trace, k = made(), 3
    trace.is_masked[0, 0], trace.is_masked[0, 1] = False, True  # nothing masked, everything masked: no border at all
    trace.is_masked[1, 0, 0], trace.is_masked[1, 0, 1] = False, True  # the first position may lie at the border
    table: Any = vt.places_table(trace, k=k).set_index("positions")
    names = ["first position", "prompt", "frontier", "other masks", "other written text"]
    counts = {"sinks": dict.fromkeys(names, 0), "all positions": dict.fromkeys(names, 0)}
    for row, step in product(range(ROWS), range(STEPS)):
        masked, top = trace.is_masked[row, step].tolist(), slow.top_k(trace.mass[row, step].tolist(), k)
        for place in range(SIZE):
            beside = [masked[other] for other in (place - 1, place + 1) if 0 <= other < SIZE]
            if (not masked[place]) in beside:
                name = "frontier"
            elif place < PROMPT:
                name = "prompt" if place else "first position"
            else:
                name = "other masks" if masked[place] else "other written text"
            counts["all positions"][name] += 1
            counts["sinks"][name] += place in top
    for label, found in counts.items():
        got = [table.loc[label, f"{name}, %"] for name in names]
        assert got == pytest.approx([100 * count / sum(found.values()) for count in found.values()], rel=1e-5)
        assert sum(got) == pytest.approx(100)
    assert sum(counts["sinks"].values()) == ROWS * STEPS * k and all(counts["all positions"].values())


def test_value_norm_points_keep_every_sink(trace: SinkTrace) -> None:
    step = STEPS // 2
    keys = int(trace.keys[step])
    points: Any = vt.value_norm_points(trace, prompt=2)
    assert len(points) == LAYERS * HEADS * keys
    assert trace.heads is not None
    expected, sinks = [], 0
    for layer, head in product(range(LAYERS), range(HEADS)):
        mass = trace.head_mass[2, 1, layer, head, :keys].tolist()
        norms = trace.heads.value_norm[2, 1, layer, head // 2, :keys].tolist()
        for key in range(keys):
            others = [value for other, value in enumerate(mass) if other != key]
            is_sink = mass[key] > slow.average(others) + 3.0
            expected.append((round(mass[key], 4), round(norms[key] / slow.average(norms), 4), is_sink))
            sinks += is_sink
    got = zip(points["sink mass"].round(4), points["relative value norm"].round(4), points["is a sink"], strict=True)
    for one, other in zip(sorted(got), sorted(expected), strict=True):
        assert one == pytest.approx(other, abs=2e-4)
    thinned: Any = vt.value_norm_points(trace, prompt=2, limit=10)
    assert thinned["is a sink"].sum() == sinks > 0
    assert 5 <= (~thinned["is a sink"]).sum() <= 10


def matched() -> NoiseMatch:
    stream = torch.Generator().manual_seed(0)
    generation = torch.rand(ROWS, 2, SIZE, generator=stream).pow(6)
    noised = generation + 0.4 * torch.rand(2, ROWS, 2, SIZE, generator=stream)
    return NoiseMatch((1, 4), (0.75, 0.25), generation, noised, noised.flip(0) + 0.1 * generation, 8)


def test_noise_tables_have_a_row_a_ratio_and_one_of_averages() -> None:
    both = matched()
    table: Any = at.noise_table(both, model="dlm", prompts=2, seed=0)
    assert table["mask ratio"].fillna(-1).tolist() == [0.75, 0.25, -1.0] * 4
    first = table[table["pair"] == "generation, noised"].reset_index(drop=True)
    expected: dict[str, list[list[float]]] = {"mass": [], "score": [], "sets": []}
    for row in range(ROWS):
        pairs = [(both.generation[row, level], both.noised[0, row, level]) for level in range(2)]
        scored = [[noise_match.release_score(mass, depth=8) for mass in pair] for pair in pairs]
        rank = noise_match.rank_correlation
        # averaged over the ratios first, then compared
        masses = rank(both.generation[row].mean(0), both.noised[0, row].mean(0))
        scores = rank((scored[0][0] + scored[1][0]) / 2, (scored[0][1] + scored[1][1]) / 2)
        kept = [[slow.kept(released(mass.tolist(), SIZE)) for mass in pair] for pair in pairs]
        expected["mass"].append([*(float(rank(*pair)) for pair in pairs), float(masses)])
        expected["score"].append([*(float(rank(*pair)) for pair in scored), float(scores)])
        expected["sets"].append([slow.jaccard(*pair) for pair in kept])
    for name, values in expected.items():
        means = np.nanmean(np.array(values), axis=0)
        assert first[name].tolist()[: len(means)] == pytest.approx(means.tolist(), abs=1e-6, nan_ok=True)
        inside = first[name].notna()
        assert (first[f"{name}, low"] <= first[name])[inside].all() and (first[name] <= first[f"{name}, high"])[inside].all()
    assert first["sets"].isna().tolist() == [False, False, True]


def test_measures_of_made_up_attention_are_those_of_its_planted_sink() -> None:
    drifting = planted.planted_attention(planted.drifting(steps=6, start=2, per_step=3), keys=24, share=0.25)
    found = ts.measures_of(drifting)
    assert found["temporal variance"] == pytest.approx(3**2 * (6**2 - 1) / 12)
    assert found["position variance"] == pytest.approx(found["temporal variance"])
    assert found["frequency variance"] == found["argmax form"] == pytest.approx(5 / 6)
    assert (found["lifetime"], found["drift"], found["overlap, 1 step"], found["overlap, 2 steps"]) == (1.0, 3.0, 0.0, 0.0)
    # six visited keys have mass (6 + 5 b) / 6 on average, b being what a key gets beside the sink; the others have b
    beside = 0.75 / 23 * 24
    visited = (6.0 + 5 * beside) / 6
    assert found["spatial variance"] == pytest.approx((6 * (visited - 1) ** 2 + 18 * (beside - 1) ** 2) / 24)
    assert (found["Rulli sinks"], found["Gu sinks"]) == (1.0, 0.0)  # a share of 0.25: a column sum of 6, below Gu's 0.3
    assert found["first token"] == pytest.approx(0.75 / 23)
