"""Traces of models that write block after block: masses by viewer, regions apart, movement within the block."""

import copy
import itertools
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from lib.attention import masses, sinks
from lib.core.errors import InputError
from lib.diffusion import regions, traces
from lib.diffusion.traces import SinkTrace
from lib.models import visibility
from lib.models.language_model import LanguageModel
from lib.studies.traces import tables, views
from lib.studies.variance import noise_match, statistics
from lib.studies.variance import tables as variance_tables
from tests import tiny

PROMPT, POSITIONS, STEPS = 6, 20, 10


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("regions") / "model", causal=False)


@pytest.fixture(scope="module", params=["block-causal", "context-causal"])
def model(request: pytest.FixtureRequest, plain: LanguageModel) -> LanguageModel:
    origin = "start" if request.param == "block-causal" else "prompt"
    return replace(plain, attention=request.param, block_length=4, block_origin=origin)


@pytest.fixture(scope="module")
def trace(model: LanguageModel) -> SinkTrace:
    return traces.trace(model, tiny.ids(2, PROMPT), positions=POSITIONS, steps=STEPS, heads=True)


def test_a_trace_by_blocks_keeps_the_rules_of_a_trace(trace: SinkTrace) -> None:
    assert trace.mass.shape == (2, STEPS, POSITIONS) and trace.goes_by_blocks and not trace.is_causal
    torch.testing.assert_close(trace.mass.sum(-1), trace.keys.float().expand(2, STEPS), rtol=1e-4, atol=0)
    assert trace.is_masked.sum(-1).diff(dim=1).lt(0).all()
    absent = torch.arange(POSITIONS) >= trace.keys[:, None]
    assert not trace.mass[:, absent].any() and not statistics.heads_of(trace).sets.any((2, 3))[:, absent].any()
    assert trace.keys_grow and int(trace.keys[-1]) == POSITIONS
    assert trace.head_mass.shape[-1] == statistics.heads_of(trace).value_norm.shape[-1] == POSITIONS


def test_masses_of_a_step_are_those_of_its_pass_by_viewer(model: LanguageModel, trace: SinkTrace) -> None:
    for step in (0, 4, STEPS - 1):
        keys = int(trace.keys[step])
        ids = trace.ids[:, step, :keys]
        mask = views._mask_of(trace, step, torch.device("cpu"))  # pyright: ignore[reportPrivateUsage]
        assert mask is not None
        raw = masses.sink_mass(model, ids, attention_mask=mask, by_viewer=False)
        mean = raw / mask[:, 0].sum(1)[None, :, None]
        expected = (mean / mean.mean(-1, keepdim=True)).mean((0, 2))
        torch.testing.assert_close(trace.mass[:, step, :keys], expected, atol=1e-5, rtol=1e-5)
        assert (trace.mass[:, step, :keys] - raw.mean((0, 2))).abs().max() > 0.05  # sums are another thing
        gu = (raw / mask[:, 0].sum(1)[None, :, None] > sinks.GU_EPSILON).float().mean((0, 2))
        torch.testing.assert_close(trace.gu_rate[:, step], gu[:, 0])


def test_regions_by_hand(trace: SinkTrace) -> None:
    found = regions.regions(trace)
    for step in range(STEPS):
        keys, opened = int(trace.keys[step]), int(cast(Tensor, trace.opened)[step])
        first = opened * 4 if trace.attention == "block-causal" else PROMPT + opened * 4
        for place in range(POSITIONS):
            expected = None
            if place < keys:
                expected = "current" if first <= place < first + 4 else "prompt" if place < PROMPT else "finished"
            assert {name for name, where in found.items() if where[step, place]} == ({expected} if expected else set())
    by_region = regions.region_masses(trace)
    step = STEPS - 1
    for name, where in found.items():
        torch.testing.assert_close(by_region[name][:, step], trace.mass[:, step, where[step]].mean(1))
    assert by_region["finished"][:, 0].isnan().all()  # nothing is finished yet


def test_keys_of_finished_blocks_do_not_move(model: LanguageModel, trace: SinkTrace) -> None:
    """What a finished block gives its keys is the same at every later step; the sums over later queries are not."""
    block = int(cast(Tensor, trace.opened)[0])
    later = [step for step in range(STEPS) if int(cast(Tensor, trace.opened)[step]) > block + 1]
    end = int(regions.regions(trace)["finished"][later[0]].nonzero()[:, 0].max()) + 1 - 4
    kept = []
    with masses.record(model, keep=("map",)) as recorder:
        for step in later:
            ids = trace.ids[:1, step, : int(trace.keys[step])]
            mask = views._mask_of(trace, step, torch.device("cpu"))  # pyright: ignore[reportPrivateUsage]
            model.network.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)  # type: ignore[operator]
            kept.append(recorder.pop_map()[0, :end, :end])
    for other in kept[1:]:
        torch.testing.assert_close(other, kept[0], atol=1e-6, rtol=0)


def made(mass: Tensor, opened: list[int], keys: list[int]) -> SinkTrace:
    """Make a trace by blocks of 4 without a prompt from masses `[step, position]`."""
    steps, size = mass.shape
    masked = torch.arange(size) >= torch.tensor(keys)[:, None] - 4
    empty = torch.zeros(1, steps)
    return SinkTrace("made", 0, torch.zeros(1, steps, size, dtype=torch.long), masked[None], torch.tensor(keys), mass[None],
                     mass[None, :, None], (0, 0, 0), torch.zeros(1, 3, 1, 1, size), empty, empty, empty,
                     torch.zeros(1, size, dtype=torch.long), None, "block-causal", torch.arange(size) // 4,
                     torch.tensor(opened))  # fmt: skip


def test_movement_is_within_the_current_block() -> None:
    """One sink in a finished block for good; in the blocks, one that stays and one that moves by two places."""
    mass = torch.full((6, 12), 0.1)
    mass[:, 1] = 9.0  # block 0, and finished from step 2 on
    for step, place in enumerate([1, 1, 6, 6, 8, 10]):
        mass[step, place] = 5.0
    trace = made(mass, [0, 0, 1, 1, 2, 2], [4, 4, 8, 8, 12, 12])
    assert tables.wander(trace).tolist() == [pytest.approx(1 / 6)]  # one step of two in block 2 is not at its usual place
    assert float(sinks.wander_rate(sinks.dominant_position(mass[None]))) == 0  # the finished sink would hide it
    sets = torch.zeros(1, 6, 12, dtype=torch.bool)
    for step, place in enumerate([1, 1, 6, 6, 8, 10]):
        sets[0, step, [1, place]] = True
    centroid = statistics.variance.centroid(trace.mass, sets & regions.movable(trace))
    assert centroid.tolist() == [[1, 1, 6, 6, 8, 10]]
    within = statistics.variance.temporal_variance(centroid, groups=trace.opened)
    assert within.tolist() == [pytest.approx(2 / 6)]  # (0 0 0 0 1 1) / 6
    assert statistics.variance.temporal_variance(centroid)[0] > 10


def test_temporal_variance_of_a_recorded_trace_is_that_within_blocks(trace: SinkTrace) -> None:
    paths = statistics.centroids(trace)
    for row in range(2):
        deviations = []
        for block in cast(Tensor, trace.opened).unique():
            part = paths[row, trace.opened == block]
            part = part[part.isfinite()]
            deviations += ((part - part.mean()) ** 2).tolist()
        got = float(statistics.temporal_raw(trace)[row])
        assert got == pytest.approx(sum(deviations) / len(deviations), abs=1e-5) if deviations else got != got


def test_a_sentence_says_what_moves(trace: SinkTrace, plain: LanguageModel) -> None:
    full = traces.trace(plain, tiny.ids(1, PROMPT), positions=POSITIONS, steps=7)
    (note,) = tables.block_notes([full, trace])
    assert note.startswith("model: attention goes by blocks") and "said of the current block" in note
    assert all(name in note for name in regions.REGIONS)
    with pytest.raises(InputError, match="regions must be of a model that writes by blocks"):
        regions.regions(full)
    assert torch.equal(regions.movable(full), torch.ones(7, POSITIONS, dtype=torch.bool))
    with pytest.raises(InputError, match="without blocks"):
        noise_match.matching_steps(trace, [0.5])


def test_attention_without_preference_has_mass_one_under_full_attention_only(trace: SinkTrace) -> None:
    uniform = views.uniform_of(trace, STEPS - 1)
    assert uniform.shape == (POSITIONS,) and float(uniform.mean()) == pytest.approx(1.0)
    assert float(uniform[0]) > float(uniform[-1])  # few keys share what an early query gives
    assert tables.concentration(trace, k=3).shape == (2,)


def test_maps_of_a_step_are_read_under_its_mask(model: LanguageModel, trace: SinkTrace) -> None:
    (frame,) = views.attention_maps(model, trace, prompt=0, steps=[STEPS - 1])
    mask = visibility.block_causal(cast(Tensor, trace.blocks)[None])[0, 0]
    if trace.attention == "context-causal":
        last = int(cast(Tensor, trace.opened)[-1])
        mask = visibility.open_block(cast(Tensor, trace.blocks)[None] == last)[0, 0]
    assert not frame[~mask].any() and (frame[mask] > 0).all()


def test_single_heads_of_any_step_are_those_of_the_trace(model: LanguageModel, trace: SinkTrace) -> None:
    heads = views.head_masses(model, trace, prompt=1, steps=list(trace.mark_steps))
    torch.testing.assert_close(heads, trace.head_mass[1], rtol=1e-4, atol=1e-5)


def test_tables_by_place_count_the_blocks_so_far_alone(trace: SinkTrace) -> None:
    """The text behind the block that is written has no keys yet: its masses of 0 are none."""
    table = tables.mass_by_state(trace)
    counts = {"frontier": 0, "other masks": 0, "all": 0}
    for row, step in itertools.product(range(2), range(STEPS)):
        masked, keys = trace.is_masked[row, step].tolist(), int(trace.keys[step])
        for place in range(keys):
            beside = [masked[other] for other in (place - 1, place + 1) if 0 <= other < POSITIONS]
            is_border = (not masked[place]) in beside
            counts["all"] += 1
            counts["frontier"] += is_border
            counts["other masks"] += masked[place] and not is_border
    for mark, step in enumerate(trace.mark_steps):
        keys = int(trace.keys[step])
        mass, masked = trace.mass[:, step, :keys], trace.is_masked[:, step, :keys]
        states = table.loc[mark, ["written", "mask beside written", "other masks"]].astype(float)
        assert states["written"] == pytest.approx(float(mass[~masked].mean()))
        hidden = {float(value) for value in mass[masked]}
        assert all(min(hidden) <= value <= max(hidden) for value in states[1:].dropna())
    shares = variance_tables.places_table(trace, k=2).set_index("positions").loc["all positions"]
    for name in ("frontier", "other masks"):
        assert shares[f"{name}, %"] == pytest.approx(100 * counts[name] / counts["all"])


def test_without_preference_a_trace_is_what_its_own_mask_gives(model: LanguageModel) -> None:
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.mul_(0.0 if "q_proj" in name else 1.0)
    silent = replace(model, network=network)
    trace = traces.trace(silent, tiny.ids(2, PROMPT), positions=POSITIONS, steps=STEPS)
    share, spread = tables.concentration_without_preference(trace, k=3), statistics.spatial_without_preference(trace)
    assert tables.concentration(trace, k=3).tolist() == pytest.approx([share] * 2, rel=1e-4)
    assert statistics.spatial(trace).tolist() == pytest.approx([spread] * 2, rel=1e-3)
    assert share > 1.2 * 3 / POSITIONS and spread > 0.02  # what full attention would give is 3 / POSITIONS and 0
