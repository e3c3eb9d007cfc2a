"""What a calibration reads: clean windows, windows noised at several levels as the model was trained, or the states of real
generations; and how much each token of it counts.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from lib.calibration import measured_weights
from lib.calibration.hidden_states import ReachedError
from lib.calibration.measured_weights import Masses
from lib.calibration.statistics import CalibrationSet
from lib.calibration.token_weights import Weighting
from lib.core.errors import InputError, require
from lib.core.runtime import generator
from lib.diffusion import noise, sampler
from lib.diffusion.commits import DenoisingStep
from lib.diffusion.noise import process_of
from lib.models.language_model import LanguageModel, blocks_of, may_be_noised, require_diffusion

Times = Literal["grid", "grid_below_one", "uniform"]
GRID_STEPS = 10  # the release takes every fifth of 50 steps


@dataclass(frozen=True)
class Inputs:
    """What a calibration reads.

    Attributes:
        kind: `"clean"` text, `"noised"` text, or states along real generations (`"trajectory"`).
        times: how the noise levels are spread, see `noise_times`.
        levels: noise levels (or states of a trajectory) per window.
        schedule: `"llada"` noises any position, `"dream"` never the first and the last.
        prompt_share: share of a window that is the prompt of its trajectory.
        clean_share: share of a noised window, from its start, that is never masked, as a prompt is; Quant-dLLM (arXiv 2510.03274)
            calibrates with 1/4.

    A model whose attention goes by blocks writes one block behind finished ones and before nothing, so of its windows only the
    last block is noised, or written by the trajectory, and `prompt_share` says nothing.
    """

    kind: Literal["clean", "noised", "trajectory"] = "clean"
    times: Times = "grid"
    levels: int = GRID_STEPS
    schedule: noise.Schedule = "llada"
    prompt_share: float = 0.25
    clean_share: float = 0.0


CLEAN, NOISED = Inputs(), Inputs("noised")


def draw_windows(pool: Int[Tensor, "pool position"], *, count: int, seed: int) -> Int[Tensor, "window position"]:
    """Draw calibration windows without replacement; another seed draws others.

    Raises:
        InputError: fewer windows than asked for.
    """
    if not 1 <= count <= len(pool):
        raise InputError(f"calibration windows must be in [1, {len(pool)}] (those there are), got {count}: lower it or add text")
    return pool[torch.randperm(len(pool), generator=generator(seed, "calibration windows"))[:count]]


def check_windows(model: LanguageModel, windows: Int[Tensor, "window position"]) -> None:
    """Raise `InputError` unless there are windows that the model can read."""
    length = windows.shape[1]
    limit = int(getattr(model.network.config, "max_position_embeddings", length))
    if not len(windows):
        raise InputError("a calibration set must hold samples, got none: give at least one window")
    if not 2 <= length <= limit:
        raise InputError(f"calibration windows must have 2 to {limit} tokens, got {length}: choose another length")


def read(
    model: LanguageModel, windows: Int[Tensor, "window position"], inputs: Inputs, *, seed: int
) -> Int[Tensor, "window level position"]:
    """Return what the calibration reads of each window.

    Args:
        model: a diffusion model, unless inputs are clean.
        windows: clean token windows.
        inputs: what to make of them.
        seed: of the noise and of the sampling.

    Raises:
        InputError: noise for an autoregressive model.
    """
    if inputs.kind == "clean":
        return windows[:, None]
    if inputs.kind == "noised":
        return noised_windows(model, windows, inputs, seed=seed)
    prompt = _last_block(model, windows.shape[1]) if model.goes_by_blocks else int(windows.shape[1] * inputs.prompt_share)
    at = [level / inputs.levels for level in range(inputs.levels)]
    return trajectory_states(model, windows, prompt_tokens=prompt, steps=windows.shape[1] - prompt, at=at, seed=seed)


def build(
    model: LanguageModel,
    windows: Int[Tensor, "window position"],
    *,
    inputs: Inputs = CLEAN,
    weighting: Weighting | None = None,
    seed: int,
    batch_size: int = 4,
) -> CalibrationSet:
    """Make a calibration set from clean windows: what is read, and the token weights that the dense model gives it.

    Args:
        model: the dense model.
        windows: clean token windows.
        inputs: clean, noised, or trajectories.
        weighting: how tokens count; None counts all alike. Weights that come from several noise levels (`averaged`, or by
            instability) are measured on noised text, one a token of the window, and hold for all levels that are read.
        seed: of noise, sampling and random controls.
        batch_size: samples at one time.

    Raises:
        InputError: windows that are too short or too long, noise for an autoregressive model, or a weighting that needs it.
    """
    return Reader(model, windows, seed=seed, batch_size=batch_size).build(inputs, weighting)


class Reader:
    """What calibrations of one dense model read: each kind of input is made once, and measured once, for all that weigh it.

    Attributes:
        model: the dense model; its weights must be those of the dense model whenever something is asked for the first time.
        windows: clean token windows.
        seed: of noise, sampling and random controls.
        batch_size: samples at one time.

    Raises:
        InputError: windows that are too short or too long.
    """

    def __init__(self, model: LanguageModel, windows: Int[Tensor, "window position"], *, seed: int, batch_size: int = 4) -> None:
        check_windows(model, windows)
        self.model, self.windows, self.seed, self.batch_size = model, windows, seed, batch_size
        self._masses: dict[Inputs, Masses] = {}
        self._levels: dict[Inputs, int] = {}

    def masses(self, inputs: Inputs) -> Masses:
        """Return the samples of a kind of input, and where their masses are measured."""
        if inputs not in self._masses:
            ids = read(self.model, self.windows, inputs, seed=self.seed)
            self._masses[inputs] = Masses(self.model, ids.flatten(0, 1), batch_size=self.batch_size)
            self._levels[inputs] = ids.shape[1]
        return self._masses[inputs]

    def build(self, inputs: Inputs = CLEAN, weighting: Weighting | None = None) -> CalibrationSet:
        """Make a calibration set, see `build`."""
        masses = self.masses(inputs)
        if weighting is None:
            return CalibrationSet(masses.input_ids)
        if not weighting.over_levels:
            return CalibrationSet(masses.input_ids, measured_weights.weights(masses, weighting, seed=self.seed))
        noised = inputs
        if inputs.kind != "noised":
            noised = replace(NOISED, schedule=inputs.schedule, levels=weighting.levels)
        given = {"levels": noised.levels, "seed": self.seed}
        weight = measured_weights.weights_over_levels(self.masses(noised), weighting, **given)
        return CalibrationSet(masses.input_ids, weight.repeat_interleave(self._levels[inputs], dim=0))


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
        return noise.stratified_times(levels, generator=generator(seed, "calibration times", window)).tolist()
    steps = levels if kind == "grid" else levels + 1
    return [(level + 1) / steps for level in range(levels)]


def noised_windows(
    model: LanguageModel, windows: Int[Tensor, "window position"], inputs: Inputs = NOISED, *, seed: int
) -> Int[Tensor, "window level position"]:
    """Noise every window at several levels, by masks or by the noise that the model was trained with.

    Of a model whose attention goes by blocks the last block alone is noised: no block ever reads a noised one before it. All
    noises change the same positions, but for those that are drawn as they were.

    Args:
        model: a diffusion model.
        windows: clean token windows.
        inputs: how many levels, how they are spread, and which positions are masked.
        seed: the noise of (window, level) depend on it and on these two numbers alone, whatever the batch.

    Raises:
        InputError: an autoregressive model.

    Source: the release's calibration; it draws all masks from one global stream, so that they depend on the batch size.
    """
    require_diffusion(model, "noised calibration", instead="calibrate it on clean text")
    process = process_of(model)
    rows, clean = [], int(windows.shape[1] * inputs.clean_share)
    for index, window in enumerate(windows):
        for level, time in enumerate(noise_times(inputs.times, levels=inputs.levels, seed=seed, window=index)):
            stream = generator(seed, "calibration", index, level)
            at, mask = torch.tensor([time]), 0  # which mask stands there for a moment does not matter
            drawn = noise.forward_noise(window[None], mask_token_id=mask, generator=stream, t=at, schedule=inputs.schedule)
            ids = process.fill(window, drawn.is_masked[0], generator=stream)
            is_open = (torch.arange(len(ids), device=ids.device) >= clean) & may_be_noised(model, window.to(ids.device))
            if model.goes_by_blocks:
                is_open[: _last_block(model, len(ids))] = False
            rows.append(torch.where(is_open, ids, window.to(ids.device)))
    return torch.stack(rows).view(len(windows), inputs.levels, windows.shape[1])


def _last_block(model: LanguageModel, length: int) -> int:
    """Return where the last block of a window begins, of a model whose attention goes by blocks."""
    blocks = blocks_of(model, length)[0]
    return int((blocks < blocks[-1]).sum())


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
        InputError: a fraction out of range, settings that the sampler refuses, or more than one block to write where attention
            goes by blocks (later ones are not there).

    Source: "rollout" calibration of Traj-MC (Zishan-Shao/traj-mc).
    """
    if not at or not all(0 <= fraction < 1 for fraction in at):
        raise InputError(f"fractions of a trajectory must be in [0, 1), got {list(at)}: 0 is the all-masked state")
    if model.goes_by_blocks:
        least, rule = _last_block(model, windows.shape[1]), "states of a trajectory must be whole texts, so of one block"
        require(prompt_tokens >= least, rule, f"{prompt_tokens} prompt tokens with {model.name}", f"give at least {least}")
    wanted = [int(fraction * steps) for fraction in at]
    kept: dict[int, Tensor] = {}

    def on_step(step: DenoisingStep) -> None:
        """Keep the states that are wanted."""
        if step.step in wanted:
            kept[step.step] = step.input_ids.cpu()
        if step.step == max(wanted):
            raise ReachedError

    with suppress(ReachedError):
        sampler.sample(
            model,
            windows[:, :prompt_tokens],
            new_tokens=windows.shape[1] - prompt_tokens,
            steps=steps,
            temperature=temperature,
            closed=True,
            generator=generator(seed, "calibration trajectory"),
            on_step=on_step,
        )
    return torch.stack([kept[step] for step in wanted], 1)
