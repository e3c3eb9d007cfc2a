"""What a calibration reads: noise levels, masks that depend on window and level alone, states of generations, and weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lib.calibration import measured_weights, sets
from lib.calibration.sets import CLEAN, NOISED, Inputs
from lib.calibration.token_weights import Weighting
from lib.core import runtime
from lib.core.errors import InputError
from lib.diffusion import noise
from lib.models.language_model import LanguageModel
from lib.models.layers import attention
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("model"), causal=False, seed=1)


WINDOWS = tiny.ids(3, 40)


def test_masks_of_a_window_do_not_depend_on_the_others(model: LanguageModel) -> None:
    noised = sets.noised_windows(model, WINDOWS, sets.Inputs("noised", levels=4), seed=3)
    assert noised.shape == (3, 4, 40)
    assert torch.equal(noised[:2], sets.noised_windows(model, WINDOWS[:2], sets.Inputs("noised", levels=4), seed=3))
    assert not torch.equal(noised, sets.noised_windows(model, WINDOWS, sets.Inputs("noised", levels=4), seed=4))
    masked = noised == tiny.MASK
    assert torch.equal(noised[~masked], WINDOWS[:, None].expand(3, 4, 40)[~masked])
    assert masked[:, 3].all()  # the grid ends at t = 1
    assert masked[:, 0].float().mean() == pytest.approx(0.25, abs=0.12)


def test_the_grid_below_one_never_masks_everything(model: LanguageModel) -> None:
    noised = sets.noised_windows(model, WINDOWS, sets.Inputs("noised", levels=4, times="grid_below_one"), seed=0)
    assert not (noised == tiny.MASK).all(-1).any()


def test_uniform_times_fall_into_every_part_and_differ_by_window() -> None:
    times = [sets.noise_times("uniform", levels=5, seed=0, window=window) for window in range(3)]
    assert all(sorted(int(time * 5) for time in row) == list(range(5)) for row in times)
    assert times[0] != times[1]


def test_dreams_schedule_keeps_both_ends(model: LanguageModel) -> None:
    noised = sets.noised_windows(model, WINDOWS, sets.Inputs("noised", levels=2, schedule="dream"), seed=0)
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


# --- reading and building ------------------------------------------------------------------------------------------------

READ: dict[str, Inputs] = {
    "clean": CLEAN,
    "grid": Inputs("noised", levels=4),
    "grid below one": Inputs("noised", times="grid_below_one", levels=4),
    "uniform": Inputs("noised", times="uniform", levels=4),
    "dream": Inputs("noised", levels=4, schedule="dream"),
    "trajectory": Inputs("trajectory", levels=4),
}


@pytest.mark.parametrize("name", READ)
def test_samples_keep_the_levels_of_a_window_together(model: LanguageModel, name: str) -> None:
    ids = sets.read(model, WINDOWS, READ[name], seed=0)
    assert ids.shape == (3, 1 if name == "clean" else 4, 40)
    built = sets.build(model, WINDOWS, inputs=READ[name], seed=0)
    assert torch.equal(built.input_ids, torch.cat(list(ids))) and built.token_weight is None


@pytest.mark.parametrize("name", [name for name in READ if name != "clean"])
def test_inputs_follow_the_seed(model: LanguageModel, name: str) -> None:
    first, again, other = (sets.read(model, WINDOWS, READ[name], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    for window in range(3):
        assert not torch.equal(first[window], other[window])


def test_clean_inputs_are_the_windows(model: LanguageModel) -> None:
    assert torch.equal(sets.read(model, WINDOWS, CLEAN, seed=0)[:, 0], WINDOWS)


def test_settings_reach_what_makes_the_inputs(model: LanguageModel) -> None:
    """A third of 40 is 13 tokens of prompt, so that 27 steps are left, of which quarters are rounded down."""
    got = sets.read(model, WINDOWS, Inputs("trajectory", levels=4, prompt_share=1 / 3), seed=5)
    at = [0.0, 0.25, 0.5, 0.75]
    assert torch.equal(got, sets.trajectory_states(model, WINDOWS, prompt_tokens=13, steps=27, at=at, seed=5))
    assert (got[:, 0] == tiny.MASK).sum(-1).tolist() == [27] * 3
    noised = sets.read(model, WINDOWS, READ["dream"], seed=5)
    assert torch.equal(noised, sets.noised_windows(model, WINDOWS, sets.Inputs("noised", levels=4, schedule="dream"), seed=5))


def test_uniform_times_decide_how_much_is_masked(model: LanguageModel) -> None:
    """Times come from their own stream, one draw a window, and the mask rate is that of the time."""
    windows = tiny.ids(20, 60)
    for seed in (0, 1):
        rate = (
            (sets.noised_windows(model, windows, sets.Inputs("noised", times="uniform", levels=5), seed=seed) == tiny.MASK)
            .double()
            .mean(-1)
        )
        times = torch.tensor([sets.noise_times("uniform", levels=5, seed=seed, window=window) for window in range(20)])
        assert (rate - times).abs().max() < 0.3 and abs(float((rate - times).mean())) < 0.03
    assert sets.noise_times("uniform", levels=5, seed=0, window=0) != sets.noise_times("uniform", levels=5, seed=1, window=0)
    assert sets.noise_times("uniform", levels=5, seed=0, window=2) == sets.noise_times("uniform", levels=5, seed=0, window=2)


def test_masks_come_from_the_stream_of_their_window_and_level(model: LanguageModel) -> None:
    noised = sets.noised_windows(model, WINDOWS, sets.Inputs("noised", levels=4), seed=3)
    stream = runtime.generator(3, "calibration", 1, 2)
    expected = noise.forward_noise(WINDOWS[1:2], mask_token_id=tiny.MASK, generator=stream, t=torch.tensor([0.75]))
    assert torch.equal(noised[1, 2], expected.input_ids[0])


@pytest.mark.parametrize("name", ["clean", "grid", "trajectory"])
def test_weights_are_measured_on_what_is_read(model: LanguageModel, name: str) -> None:
    weighting = Weighting(margin=1.0, alpha=0.5)
    built = sets.build(model, WINDOWS, inputs=READ[name], weighting=weighting, seed=0, batch_size=2)
    expected = measured_weights.measure(model, built.input_ids, weighting, batch_size=len(built.input_ids))
    torch.testing.assert_close(cast(Tensor, built.token_weight), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1


@pytest.mark.parametrize("level", ["layer", "head"])
def test_weights_by_layer_and_head_fit_the_samples(model: LanguageModel, level: Any) -> None:
    built = sets.build(model, WINDOWS, inputs=READ["grid"], weighting=Weighting("sinks_up", level=level), seed=0)
    assert cast(Tensor, built.token_weight).shape == ((2, 12, 40) if level == "layer" else (2, 12, 4, 40))
    assert built.by_head == (level == "head")


OVER = [Weighting(margin=1.0, alpha=0.5, averaged=True), Weighting("variance", margin=1.0), Weighting("presence", margin=1.0)]


@pytest.mark.parametrize("weighting", OVER, ids=lambda weighting: weighting.kind)
@pytest.mark.parametrize("name", ["clean", "grid", "trajectory"])
def test_weights_over_levels_are_the_same_for_all_levels_of_a_window(
    model: LanguageModel, name: str, weighting: Weighting
) -> None:
    """They are measured on noised text: the text that is read when that is noised, the release's grid when it is not."""
    built = sets.build(model, WINDOWS, inputs=READ[name], weighting=weighting, seed=0)
    by_window = cast(Tensor, built.token_weight).view(3, -1, 40)
    assert torch.equal(by_window, by_window[:, :1].expand_as(by_window))
    noised = sets.read(model, WINDOWS, READ["grid"] if name == "grid" else NOISED, seed=0)
    assert torch.equal(by_window[:, 0], measured_weights.measure_over_levels(model, noised, weighting))
    assert all(row.std() > 0 for row in by_window[:, 0])  # every window has its own
    assert not torch.equal(by_window[0], by_window[1])


def test_controls_follow_the_seed(model: LanguageModel) -> None:
    def weight(seed: int) -> Tensor:
        built = sets.build(model, WINDOWS, weighting=Weighting("random", margin=0.5), seed=seed)
        return cast(Tensor, built.token_weight)

    assert torch.equal(weight(0), weight(0)) and not torch.equal(weight(0), weight(1))
    assert torch.equal((weight(0) == 0).sum(1), (weight(1) == 0).sum(1))  # as many, because the sinks are the same


def test_building_leaves_the_model_and_the_windows_alone(model: LanguageModel) -> None:
    windows, before = WINDOWS.clone(), {name: value.clone() for name, value in model.network.state_dict().items()}
    for inputs in READ.values():
        sets.build(model, windows, inputs=inputs, weighting=Weighting("sinks_up"), seed=0)
    assert torch.equal(windows, WINDOWS)
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    assert model.network.config._attn_implementation == attention.NAME


# --- drawing windows -----------------------------------------------------------------------------------------------------


def test_windows_are_drawn_without_replacement() -> None:
    pool = torch.arange(30).view(30, 1) * torch.ones(1, 5).long()
    drawn = sets.draw_windows(pool, count=20, seed=0)
    assert len(set(drawn[:, 0].tolist())) == 20 and drawn.shape == (20, 5)
    assert torch.equal(drawn, sets.draw_windows(pool, count=20, seed=0))
    assert not torch.equal(drawn, sets.draw_windows(pool, count=20, seed=1))
    assert torch.equal(drawn[:7], sets.draw_windows(pool, count=7, seed=0))  # more windows keep those of fewer
    assert sorted(sets.draw_windows(pool, count=30, seed=2)[:, 0].tolist()) == list(range(30))


@pytest.mark.parametrize("count", [0, -1, 4])
def test_more_windows_than_there_are_cannot_be_drawn(count: int) -> None:
    with pytest.raises(InputError, match=rf"calibration windows must be in \[1, 3\] \(those there are\), got {count}: lower it"):
        sets.draw_windows(WINDOWS, count=count, seed=0)


# --- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 65])
def test_windows_must_fit_the_model(model: LanguageModel, length: int) -> None:
    with pytest.raises(InputError, match=f"calibration windows must have 2 to 64 tokens, got {length}: choose another length"):
        sets.build(model, tiny.ids(2, length), seed=0)
    assert len(sets.build(model, tiny.ids(2, 64), seed=0).input_ids) == 2


@pytest.mark.parametrize("inputs", [READ["clean"], READ["grid"], READ["trajectory"]], ids=lambda inputs: inputs.kind)
def test_no_windows_are_refused(model: LanguageModel, inputs: Inputs) -> None:
    with pytest.raises(InputError):
        sets.build(model, tiny.ids(0, 20), inputs=inputs, weighting=Weighting(), seed=0)


def test_an_autoregressive_model_reads_clean_text_only(tmp_path: Path) -> None:
    causal = tiny.model(tmp_path)
    assert sets.build(causal, WINDOWS, weighting=Weighting(), seed=0).token_weight is not None
    for inputs in (READ["grid"], READ["uniform"]):
        with pytest.raises(
            InputError, match=r"noised calibration must use a diffusion model, got .*: calibrate it on clean text"
        ):
            sets.build(causal, WINDOWS, inputs=inputs, seed=0)
    with pytest.raises(InputError, match="must use a diffusion model"):
        sets.build(causal, WINDOWS, inputs=READ["trajectory"], seed=0)
    for weighting in OVER:
        with pytest.raises(InputError, match="noised calibration must use a diffusion model"):
            sets.build(causal, WINDOWS, weighting=weighting, seed=0)


def test_bad_requests_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="noise levels must be at least 1, got 0"):
        sets.noised_windows(model, WINDOWS, sets.Inputs("noised", levels=0), seed=0)
    with pytest.raises(InputError, match="noised calibration must use a diffusion model"):
        sets.noised_windows(tiny.model(tmp_path), WINDOWS, seed=0)
    with pytest.raises(InputError, match=r"fractions of a trajectory must be in \[0, 1\), got \[1.0\]"):
        sets.trajectory_states(model, WINDOWS, prompt_tokens=8, steps=8, at=[1.0], seed=0)


def test_a_clean_prefix_is_never_masked_and_the_rest_is_noised_as_without_it(tmp_path: Path) -> None:
    model, windows = tiny.model(tmp_path, causal=False), tiny.ids(3, 18)
    whole, rest = (
        sets.noised_windows(model, windows, Inputs("noised", levels=4, clean_share=share), seed=2) for share in (0.0, 0.25)
    )
    assert torch.equal(rest[..., :4], windows[:, None, :4].expand(-1, 4, -1)) and torch.equal(rest[..., 4:], whole[..., 4:])
    assert bool((whole[..., :4] == tiny.MASK).any()) and bool((rest[:, -1, 4:] == tiny.MASK).all())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75])
def test_behind_a_causal_context_the_last_block_is_noised_but_for_a_clean_prefix(tmp_path: Path, share: float) -> None:
    plain, windows = tiny.model(tmp_path, causal=False), tiny.ids(3, 20)
    model = replace(plain, attention="context-causal", block_length=8, block_origin="start")
    whole = sets.noised_windows(plain, windows, Inputs("noised", levels=4), seed=2)
    got = sets.noised_windows(model, windows, Inputs("noised", levels=4, clean_share=share), seed=2)
    first = max(16, int(20 * share))  # the last block holds four tokens
    assert torch.equal(got[..., :first], windows[:, None, :first].expand(-1, 4, -1))
    assert torch.equal(got[..., first:], whole[..., first:]) and bool((got[:, -1, first:] == tiny.MASK).all())
    early = replace(model, block_length=15)
    got = sets.noised_windows(early, windows, Inputs("noised", levels=4, clean_share=0.9), seed=2)
    assert torch.equal(got[..., :18], windows[:, None, :18].expand(-1, 4, -1))
