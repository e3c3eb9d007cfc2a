"""Where the variance of a paired difference comes from, and how to spend forward passes for the narrowest interval.

Calibrations are crossed with windows and with the masks of each window, since every compressed model is measured on the same
masks; masks are nested in windows. A difference is mean + C + W + CW + M(W) + CM(W), each part with a variance of its own.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lib.core.errors import require


@dataclass(frozen=True)
class Components:
    """Variances of the parts of a difference, in squared units of the values; unbiased, so that a small one may come out below 0.

    Attributes:
        calibration: between calibrations, alike on all windows: more windows do not lower it.
        window: between windows, alike for all calibrations.
        both: of a calibration on a window beyond these two.
        masks: between draws of masks on one window, alike for all calibrations.
        rest: of a calibration under a draw beyond all of these.
    """

    calibration: float
    window: float
    both: float
    masks: float
    rest: float

    def variance(self, *, calibrations: int, windows: int, draws: float, own_masks: bool = False) -> float:
        """Return the variance of the mean of so many; parts below 0 count as 0.

        Args:
            calibrations: measured on every window.
            windows: held-out windows.
            draws: of masks a window.
            own_masks: every calibration has masks of its own, which all methods and the dense model share.

        >>> Components(1.0, 4.0, 8.0, 16.0, 32.0).variance(calibrations=2, windows=4, draws=2)
        6.5
        >>> Components(1.0, 4.0, 8.0, 16.0, 32.0).variance(calibrations=2, windows=4, draws=2, own_masks=True)
        5.5
        """
        each = calibrations * windows * draws
        shares = (calibrations, windows, calibrations * windows, each if own_masks else windows * draws, each)
        parts = (self.calibration, self.window, self.both, self.masks, self.rest)
        return sum(max(part, 0.0) / share for part, share in zip(parts, shares, strict=True))


@dataclass(frozen=True)
class Spending:
    """How many of each to measure, the forward passes that takes, and the standard error of the mean that follows."""

    calibrations: int
    windows: int
    draws: int
    passes: float
    standard_error: float


def components(values: Float[Tensor, "calibration window draw"]) -> Components:
    """Split the variance of differences by a balanced analysis of variance.

    Args:
        values: differences of two compressed models under the same masks, or of one and the dense model. A draw is what is drawn
            together: for stratified or balanced masks a whole set of them, whose mean is the value.

    Returns:
        The components that equate mean squares and their expectations.

    Raises:
        InputError: fewer than two calibrations, windows or draws, or a value that is not finite.

    Source: Searle, Casella and McCulloch, Variance Components (1992), chapter 4: expected mean squares of a crossed factor and a
        nested one, all random.
    """
    rule = "variance components must come from two calibrations, windows and draws or more"
    require(values.dim() == 3 and min(values.shape) >= 2, rule, f"shape {list(values.shape)}", "measure more of each")
    bad = int((~values.isfinite()).sum())
    require(bad == 0, "differences must be finite", f"{bad} that are not", "leave such windows out")
    data = values.detach().cpu().double().numpy()
    a, b, n = data.shape
    whole, by_c, by_w = data.mean(), data.mean((1, 2), keepdims=True), data.mean((0, 2), keepdims=True)
    by_cw, by_m = data.mean(2, keepdims=True), data.mean(0, keepdims=True)
    of_c = b * n * ((by_c - whole) ** 2).sum() / (a - 1)
    of_w = a * n * ((by_w - whole) ** 2).sum() / (b - 1)
    of_cw = n * ((by_cw - by_c - by_w + whole) ** 2).sum() / ((a - 1) * (b - 1))
    of_m = a * ((by_m - by_w) ** 2).sum() / (b * (n - 1))
    rest = ((data - by_cw - by_m + by_w) ** 2).sum() / ((a - 1) * b * (n - 1))
    found = ((of_c - of_cw) / (b * n), (of_w - of_m - of_cw + rest) / (a * n), (of_cw - rest) / n, (of_m - rest) / a, rest)
    return Components(*(float(part) for part in found))


def best_spending(
    found: Components,
    *,
    budget: float,
    most_windows: int,
    per_calibration: float = 0.0,
    per_draw: int = 1,
    fewest_calibrations: int = 2,
    own_masks: bool = False,
) -> Spending:
    """Choose calibrations, windows and draws for the smallest variance of the mean that a budget allows.

    Args:
        found: components of the difference.
        budget: forward passes of one compressed model, all calibrations together.
        most_windows: held-out windows that there are.
        per_calibration: what making and pruning with one calibration takes, in forward passes of a measurement.
        per_draw: passes of one draw, as `components` was given draws.
        fewest_calibrations: an interval over new calibrations needs two at least.
        own_masks: see `Components.variance`; the dense model's passes are not counted.

    Returns:
        The best of all that the budget allows; of equally good ones the cheapest.

    Raises:
        InputError: the budget does not reach for one draw on one window with the fewest calibrations.
    """
    least = fewest_calibrations * (per_calibration + per_draw)
    counts = min(most_windows, per_draw, fewest_calibrations) >= 1 and per_calibration >= 0
    rule = "a budget must reach for one draw on one window with every calibration"
    require(counts and budget >= least, rule, f"{budget:g} passes of {least:g}", "raise it, or lower fewest_calibrations")
    masks_matter = max(found.masks, found.rest) > 0
    best: tuple[float, float, int, int, int] = (float("inf"), float("inf"), 0, 0, 0)
    for calibrations in range(fewest_calibrations, int(budget / (per_calibration + per_draw) + 1e-9) + 1):
        sets = int((budget / calibrations - per_calibration) / per_draw + 1e-9)  # of masks, over all windows
        for windows in range(1, min(most_windows, sets) + 1):
            draws = sets // windows if masks_matter else 1
            variance = found.variance(calibrations=calibrations, windows=windows, draws=draws, own_masks=own_masks)
            passes = calibrations * (per_calibration + per_draw * windows * draws)
            best = min(best, (variance, passes, calibrations, windows, draws))
    return Spending(best[2], best[3], best[4], passes=best[1], standard_error=best[0] ** 0.5)
