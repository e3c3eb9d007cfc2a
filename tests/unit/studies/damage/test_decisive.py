"""The five decisive claims: planted parts come back as shares, with the paper's bounds, on models with noise and without."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.calibration.sets import Inputs
from lib.pruning import methods
from lib.pruning.methods import Target
from lib.report.results import EVIDENCE
from lib.studies.damage import decisive, shares
from lib.studies.damage.decisive import QUESTIONS, RANDOM, SINKS_OVER_RANDOM, WHOLE
from lib.studies.pruning import attribution, runs
from lib.studies.pruning.attribution import FACTORS
from lib.studies.pruning.bench import Bench
from lib.studies.pruning.runs import Outcome
from tests import tiny

SEEDS, WINDOWS, DAMAGE = 3, 12, 0.4
KEYS = [question.key for question in QUESTIONS]
YES, NO, NONE = "reproduced", "not reproduced", "no effect of that size"


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(
    effects: Mapping[str, float], *, of_random: float = 0.0, model: str = "m", noised: bool = True, spread: float = 0.0005
) -> list[Outcome]:
    """Outcomes in which each change recovers a share of Wanda's damage wherever it is on; masks differ between calibrations."""
    masks, found = 4.0 + noise(SEEDS, WINDOWS, seed=1), []
    rows = {"dense": (masks, 0.0)}
    for cell in attribution.cells(noised=noised):
        share = sum(effects.get(name, 0.0) for name, on in zip(FACTORS, cell, strict=True) if on)
        rows[attribution.name_of(cell)] = (masks + DAMAGE * (1 - share), 0.5)
    whole = sum(size for name, size in effects.items() if noised or name != FACTORS[0])
    rows[RANDOM] = (masks + DAMAGE * (1 - whole + effects.get(FACTORS[1], 0.0) - of_random), 0.5)
    for index, (name, (values, sparsity)) in enumerate(rows.items()):
        values = values + (spread * noise(SEEDS, WINDOWS, seed=50 + index) if sparsity else 0.0)
        found += [Outcome(model, name, sparsity, "unstructured", 7 + seed, sparsity, row) for seed, row in enumerate(values)]
    return found


def verdicts(outcomes: Mapping[str, list[Outcome]]) -> dict[tuple[str, str], str]:
    answered = decisive.answers(outcomes, seed=0)
    judged = shares.judge([found for _, found in answered])
    keys = [(question.key, found.comparison.model) for question, found in answered]
    return {key: one.verdict for key, one in zip(keys, judged, strict=True)}


def test_planted_parts_come_back_as_shares_of_wandas_damage() -> None:
    table = decisive.table({"m": planted({FACTORS[0]: 0.08, FACTORS[1]: 0.02, FACTORS[3]: -0.03}, of_random=0.01)}, seed=0)
    found = table.set_index("part")
    expected = {
        WHOLE: 7.0,
        FACTORS[0]: 8.0,
        FACTORS[1]: 2.0,
        FACTORS[2]: 0.0,
        FACTORS[3]: -3.0,
        RANDOM: 6.0,
        SINKS_OVER_RANDOM: 1.0,
    }
    assert list(found.index) == list(expected)
    assert found[shares.SHARE].to_dict() == pytest.approx(expected, abs=0.1)
    assert found["gain"].to_dict() == pytest.approx({part: DAMAGE * share / 100 for part, share in expected.items()}, abs=4e-4)
    assert bool(((found["share, high"] - found["share, low"]) < 0.5).all())  # masks that move all losses alike cancel
    assert found[shares.PAPER].to_dict()[WHOLE] == pytest.approx(9.178, abs=1e-3)
    assert (
        bool(found.drop(WHOLE)[shares.PAPER].isna().all())
        and set(found["windows"]) == {WINDOWS}
        and set(found["seeds"]) == {SEEDS}
    )


def test_the_share_of_an_effect_is_of_wandas_damage_and_not_of_the_mean_cell() -> None:
    """Half of all cells recover half of the damage: as a share of what the average cell loses it would be more."""
    found = decisive.gain_of(planted({FACTORS[0]: 0.5}), FACTORS[0], seed=0)
    assert found is not None and found.share is not None and found.share.estimate == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize(
    ("effects", "of_random", "expected"),
    [
        ({FACTORS[0]: 0.09}, 0.0, [YES, YES, NONE, YES, NONE]),  # the paper's number, with another cause
        ({FACTORS[1]: 0.09}, 0.0, [YES, YES, YES, NONE, YES]),  # the paper's number and cause
        ({FACTORS[0]: 0.03}, 0.02, [YES, NONE, NONE, NONE, NO]),  # a sure gain, too small; taking out sinks harms
        ({FACTORS[0]: -0.2}, 0.0, [NO, NO, NONE, NO, NONE]),  # harm beyond the bounds
    ],
)
def test_verdicts_of_planted_causes(effects: Mapping[str, float], of_random: float, expected: list[str]) -> None:
    found = verdicts({"m": planted(effects, of_random=of_random)})
    assert [found[key, "m"] for key in KEYS] == expected


def test_noise_as_large_as_the_bounds_decides_nothing() -> None:
    assert set(verdicts({"m": planted({FACTORS[0]: 0.05}, spread=0.6)}).values()) == {"inconclusive"}


def test_a_model_that_cannot_read_noised_text_is_asked_four_of_the_five() -> None:
    both = {"m": planted({FACTORS[0]: 0.09}), "ar": planted({FACTORS[1]: 0.09}, model="ar", noised=False)}
    found = verdicts(both)
    assert [key for key, name in found if name == "ar"] == [key for key in KEYS if key != "noised-text-gives-half"]
    assert [key for key, name in found if name == "m"] == KEYS
    assert found["sink-weights-give-half", "ar"] == found["sinks-beat-random", "ar"] == "reproduced"
    table = decisive.table(both, seed=0)
    assert FACTORS[0] not in set(table[table["model"] == "ar"]["part"])
    assert table[(table["model"] == "ar") & (table["part"] == WHOLE)][shares.SHARE].item() == pytest.approx(9.0, abs=0.2)


def test_the_family_is_all_claims_of_all_models() -> None:
    """p-values that hold in a family of five are not enough in one of twenty."""
    models = {f"m{at}": planted({FACTORS[0]: 0.09}, model=f"m{at}") for at in range(4)}
    answered = decisive.answers(models, seed=0)
    judged = shares.judge([found for _, found in answered])
    alone = shares.judge([found for _, found in answered[:5]])
    assert len(judged) == 20 and judged[0].adjusted >= 3 * alone[0].adjusted


def test_rules_name_their_bounds() -> None:
    rules = [decisive.rule(question, sparsity=0.5) for question in QUESTIONS]
    assert pytest.approx(0.48 / 5.23) == decisive.PAPER
    for question, rule in zip(QUESTIONS, rules, strict=True):
        assert rule.startswith(f"{question.part}: share of what Wanda loses at 50 %") and "within ± 4.59 %" in rule
        assert f"above {'4.59' if question.at else '0'} %" in rule
    patterns = [pattern for pattern, table, figure in EVIDENCE["04"] if (table, figure) == ("shares", "shares")]
    assert len(patterns) == 4


@pytest.mark.parametrize("causal", [False, True])
def test_everything_is_measured_under_the_masks_of_its_calibration(causal: bool, tmp_path: Path) -> None:
    """Each calibration has another dense loss where there are masks; every cell's loss is that of its own bench."""
    model = tiny.model(tmp_path, causal=causal)
    bench = Bench(model, tiny.ids(8, 12), tiny.ids(3, 12, seed=1), 3, 2, 0, own_masks=True)
    few = Inputs("noised", levels=2)
    found = decisive.measure(bench, sparsity=0.5, seeds=[4, 9], noised=few)
    dense = [one for one in found if one.method == "dense"]
    assert [one.seed for one in dense] == ([4] if causal else [4, 9])
    assert len(found) == len(dense) + 2 * (len(attribution.cells(noised=not causal)) + 1)
    if not causal:
        assert not torch.equal(dense[0].loss, dense[1].loss)
    for seed in (4, 9):
        own = Bench(model, bench.pool, bench.windows, 3, 2, seed)
        wanted = runs.compare(own, {"x": methods.RELEASE["wanda"]}, [Target(0.5)], seeds=[seed])[0].loss
        assert torch.equal(
            wanted, next(o.loss for o in found if (o.method, o.seed) == (attribution.name_of(attribution.WANDA), seed))
        )
    gain = decisive.gain_of(found, WHOLE, seed=0)
    assert gain is not None and gain.comparison.seeds == 2 and math.isfinite(gain.comparison.result.estimate)
    names = {one.method for one in found}
    assert RANDOM in names and (decisive.gain_of(found, FACTORS[0], seed=0) is None) == causal
