"""What a calibration reads: clean windows, windows masked at several noise levels, or the states of real generations."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from lib import diffusion, sampler
from lib.config import InputError
from lib.models import LanguageModel
from lib.runtime import generator
from lib.sampler import DenoisingStep

Times = Literal["grid", "grid_below_one", "uniform"]
GRID_STEPS = 10  # the release takes every fifth of 50 steps


def noise_times(kind: Times, *, levels: int, seed: int, window: int) -> list[float]:
    """Return the diffusion times at which one window is noised.

    Args:
        kind: `"grid"` is 1 / levels, ..., 1 as in the release, whose last level masks everything; `"grid_below_one"` leaves that
            level out and spreads as many over (0, 1); `"uniform"` draws one time in each of `levels` equal parts of [0, 1).
        levels: how many.
        seed: of the calibration stream, for `"uniform"`.
        window: index of the window, for `"uniform"`.

    Raises:
        InputError: fewer than one level.

    >>> noise_times("grid", levels=4, seed=0, window=0), noise_times("grid_below_one", levels=3, seed=0, window=0)
    ([0.25, 0.5, 0.75, 1.0], [0.25, 0.5, 0.75])
    """
    if levels < 1:
        raise InputError(f"noise levels must be at least 1, got {levels}: the release uses {GRID_STEPS}")
    if kind == "uniform":
        return diffusion.stratified_times(levels, generator=generator(seed, "calibration times", window)).tolist()
    steps = levels if kind == "grid" else levels + 1
    return [(level + 1) / steps for level in range(levels)]


def noised_windows(
    model: LanguageModel,
    windows: Int[Tensor, "window position"],
    *,
    seed: int,
    times: Times = "grid",
    levels: int = GRID_STEPS,
    schedule: diffusion.Schedule = "llada",
) -> Int[Tensor, "window level position"]:
    """Mask every window at several noise levels.

    Args:
        model: a diffusion model.
        windows: clean token windows.
        seed: the masks of (window, level) depend on it and on these two numbers alone, whatever the batch.
        times: how the noise levels are spread.
        levels: noise levels per window.
        schedule: `"llada"` masks any position, `"dream"` never the first and the last.

    Raises:
        InputError: an autoregressive model.

    Source: the release's calibration; it draws all masks from one global stream, so that they depend on the batch size.
    """
    if model.mask_token_id is None:
        raise InputError(f"noised calibration must use a diffusion model, got {model.name}: calibrate it on clean text")
    rows = []
    for index, window in enumerate(windows):
        for level, time in enumerate(noise_times(times, levels=levels, seed=seed, window=index)):
            stream = generator(seed, "calibration", index, level)
            at = torch.tensor([time])
            noised = diffusion.forward_noise(
                window[None], mask_token_id=model.mask_token_id, generator=stream, t=at, schedule=schedule
            )
            rows.append(noised.input_ids[0])
    return torch.stack(rows).view(len(windows), levels, windows.shape[1])


def trajectory_states(
    model: LanguageModel,
    windows: Int[Tensor, "window position"],
    *,
    prompt_tokens: int,
    steps: int,
    at: Sequence[float],
    seed: int,
    temperature: float = 1.0,
) -> Int[Tensor, "window level position"]:
    """Return what the model reads along generations that continue the windows' beginnings.

    Args:
        model: a diffusion model.
        windows: clean token windows; only their first `prompt_tokens` tokens are used.
        prompt_tokens: length of the prompt.
        steps: denoising steps.
        at: fractions of the steps, in [0, 1), at which the state is kept.
        seed: of the sampling stream.
        temperature: 0 is greedy.

    Raises:
        InputError: a fraction out of range, or settings that the sampler refuses.

    Source: "rollout" calibration of Traj-MC (Zishan-Shao/traj-mc).
    """
    if not at or not all(0 <= fraction < 1 for fraction in at):
        raise InputError(f"fractions of a trajectory must be in [0, 1), got {list(at)}: 0 is the all-masked state")
    wanted = [int(fraction * steps) for fraction in at]
    kept: dict[int, Tensor] = {}

    def on_step(step: DenoisingStep) -> None:
        """Keep the states that are wanted."""
        if step.step in wanted:
            kept[step.step] = step.input_ids.cpu()

    sampler.sample(
        model,
        windows[:, :prompt_tokens],
        new_tokens=windows.shape[1] - prompt_tokens,
        steps=steps,
        temperature=temperature,
        generator=generator(seed, "calibration trajectory"),
        on_step=on_step,
    )
    return torch.stack([kept[step] for step in wanted], 1)


def as_samples(noised: Int[Tensor, "window level position"]) -> Int[Tensor, "sample position"]:
    """Flatten (window, level) to samples, levels of a window next to each other."""
    return noised.flatten(0, 1)
