"""What a calibration reads: noise levels, masks that depend on window and level alone, states of generations."""

from pathlib import Path

import pytest
import torch

from lib import calibration_sets as sets
from lib.config import InputError
from lib.models import LanguageModel
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("model"), causal=False, seed=1)


WINDOWS = tiny.ids(3, 40)


def test_masks_of_a_window_do_not_depend_on_the_others(model: LanguageModel) -> None:
    noised = sets.noised_windows(model, WINDOWS, seed=3, levels=4)
    assert noised.shape == (3, 4, 40)
    assert torch.equal(noised[:2], sets.noised_windows(model, WINDOWS[:2], seed=3, levels=4))
    assert not torch.equal(noised, sets.noised_windows(model, WINDOWS, seed=4, levels=4))
    masked = noised == tiny.MASK
    assert torch.equal(noised[~masked], WINDOWS[:, None].expand(3, 4, 40)[~masked])
    assert masked[:, 3].all()  # the grid ends at t = 1
    assert masked[:, 0].float().mean() == pytest.approx(0.25, abs=0.12)


def test_the_grid_below_one_never_masks_everything(model: LanguageModel) -> None:
    noised = sets.noised_windows(model, WINDOWS, seed=0, levels=4, times="grid_below_one")
    assert not (noised == tiny.MASK).all(-1).any()


def test_uniform_times_fall_into_every_part_and_differ_by_window() -> None:
    times = [sets.noise_times("uniform", levels=5, seed=0, window=window) for window in range(3)]
    assert all(sorted(int(time * 5) for time in row) == list(range(5)) for row in times)
    assert times[0] != times[1]


def test_dreams_schedule_keeps_both_ends(model: LanguageModel) -> None:
    noised = sets.noised_windows(model, WINDOWS, seed=0, levels=2, schedule="dream")
    assert torch.equal(noised[..., [0, -1]], WINDOWS[:, None, [0, -1]].expand(3, 2, 2))


def test_states_of_a_generation_hold_the_prompt_and_fewer_and_fewer_masks(model: LanguageModel) -> None:
    states = sets.trajectory_states(model, WINDOWS, prompt_tokens=8, steps=8, at=[0.0, 0.25, 0.75], seed=0)
    assert states.shape == (3, 3, 40)
    assert torch.equal(states[:, :, :8], WINDOWS[:, None, :8].expand(3, 3, 8))
    masks = (states == tiny.MASK).sum(-1)
    # a random network may also write a mask token, so that more are left than the schedule says
    assert (masks[:, 0] == 32).all() and (masks >= torch.tensor([32, 24, 8])).all() and (masks.diff(dim=1) < 0).all()
    again = sets.trajectory_states(model, WINDOWS, prompt_tokens=8, steps=8, at=[0.0, 0.25, 0.75], seed=0)
    assert torch.equal(states, again)


def test_samples_keep_the_levels_of_a_window_together(model: LanguageModel) -> None:
    noised = sets.noised_windows(model, WINDOWS, seed=0, levels=2)
    assert torch.equal(sets.as_samples(noised)[3], noised[1, 1])


def test_bad_requests_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="noise levels must be at least 1, got 0"):
        sets.noised_windows(model, WINDOWS, seed=0, levels=0)
    with pytest.raises(InputError, match="noised calibration must use a diffusion model"):
        sets.noised_windows(tiny.model(tmp_path), WINDOWS, seed=0)
    with pytest.raises(InputError, match=r"fractions of a trajectory must be in \[0, 1\), got \[1.0\]"):
        sets.trajectory_states(model, WINDOWS, prompt_tokens=8, steps=8, at=[1.0], seed=0)
