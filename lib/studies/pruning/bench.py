"""What compressed variants of one model are measured with, and the calibrations that they share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Int
from torch import Tensor

from lib.calibration import one_shot, sets
from lib.calibration.one_shot import Moments
from lib.calibration.sets import Inputs
from lib.calibration.statistics import CalibrationSet
from lib.calibration.sums import InputStatistics
from lib.calibration.token_weights import Weighting
from lib.models.language_model import LanguageModel, Role
from lib.pruning.methods import Method

READERS: tuple[Role, ...] = ("o", "down")  # what reads heads and channels
Read = tuple[Inputs, Weighting | None]  # what decides what a calibration reads and how its tokens count


@dataclass(frozen=True)
class Bench:
    """What every compressed variant of one model is measured with.

    Attributes:
        model: the dense model; its weights are as before after every measurement.
        pool: clean windows that calibration draws from.
        windows: held-out windows of the loss.
        calibration_windows: windows drawn for one calibration.
        draws: masks per held-out window, the same for all variants of a calibration.
        seed: of these masks.
        batch_size: calibration samples at one time.
        own_masks: masks are drawn with the seed of each calibration: masks make most of the variance of a gain, and those that
            all calibrations share are never averaged over.
    """

    model: LanguageModel
    pool: Int[Tensor, "pool position"]
    windows: Int[Tensor, "window position"]
    calibration_windows: int
    draws: int
    seed: int
    batch_size: int = 16
    own_masks: bool = False

    @property
    def masks_differ(self) -> bool:
        """Whether the loss of one and the same model differs between calibrations."""
        return self.own_masks and not self.model.is_causal

    def of_calibration(self, seed: int) -> "Bench":
        """Return the bench that models of a calibration seed are measured with."""
        return replace(self, seed=seed) if self.own_masks else self


class Calibrations:
    """Calibration sets and dense statistics of one bench and one seed, made when first asked for and then shared.

    Attributes:
        bench: whose model must be dense whenever something is asked for the first time; its masks are those of this calibration.
        seed: of the windows, of noise and of random choices.
        windows: clean windows that this calibration reads.
    """

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.seed = bench.of_calibration(seed), seed
        self.windows = sets.draw_windows(bench.pool, count=bench.calibration_windows, seed=seed)
        self._reader = sets.Reader(bench.model, self.windows, seed=seed, batch_size=bench.batch_size)
        self._sets: dict[Read, CalibrationSet] = {}
        self._statistics: dict[Read, list[dict[Role, InputStatistics]]] = {}
        self._moments: dict[Inputs, dict[tuple[int, str], Moments]] = {}
        self._hessians: dict[Inputs, list[dict[Role, InputStatistics]]] = {}

    def set_of(self, method: Method) -> CalibrationSet:
        """Return what a method reads, weighted as it says."""
        key = (method.inputs, method.weighting)
        if key not in self._sets:
            self._sets[key] = self._reader.build(*key)
        return self._sets[key]

    def prepare(self, chosen: Iterable[Method]) -> None:
        """Collect the statistics of several methods together, of those that are one-shot: what reads one text shares the pass."""
        self._collect([method for method in chosen if uses_dense_statistics(method)])

    def share(self, method: Method) -> None:
        """Collect what a method shares with others, which is then there for all of them."""
        if not method.needs_calibration:
            return
        self.set_of(method)
        self.prepare([method])
        if method.is_structured:
            self.moments_of(method.inputs)

    def statistics_of(self, method: Method) -> list[dict[Role, InputStatistics]]:
        """Return the norms that the dense model's layers read of a method's text, weighted as it says."""
        self._collect([method])
        return self._statistics[method.inputs, method.weighting]

    def statistics_for(self, method: Method) -> list[dict[Role, InputStatistics]] | None:
        """Return statistics of the dense model with all that a one-shot method needs; None for one that reads nothing."""
        if not method.needs_calibration:
            return None
        if uses_dense_statistics(method):
            return self.statistics_of(method)
        given = {"hessian": method.needs_hessian, "batch_size": self.bench.batch_size}
        return one_shot.dense_statistics(self.bench.model, self.set_of(method), **given)

    def hessians_of(self, inputs: Inputs) -> list[dict[Role, InputStatistics]]:
        """Return statistics with Hessians of what the dense model's layers read of a text, all tokens alike."""
        if inputs not in self._hessians:
            given = {"hessian": True, "batch_size": self.bench.batch_size}
            self._hessians[inputs] = one_shot.dense_statistics(self.bench.model, self._reader.build(inputs), **given)
        return self._hessians[inputs]

    def moments_of(self, inputs: Inputs) -> dict[tuple[int, str], Moments]:
        """Return mean and deviation of what `o` and `down` of the dense model read of a text, all tokens alike."""
        if inputs not in self._moments:
            ids, batch = self._reader.build(inputs).input_ids, self.bench.batch_size
            self._moments[inputs] = one_shot.dense_moments(self.bench.model, ids, READERS, batch_size=batch)
        return self._moments[inputs]

    def reader_hessians(
        self, inputs: Inputs, means: Mapping[tuple[int, str], Tensor] | None = None
    ) -> dict[tuple[int, str], Tensor]:
        """Return the Hessians of `o` and `down` on a text, about the means where these are given."""
        found: dict[tuple[int, str], Tensor] = {
            (block, role): of_block[role].hessian() for block, of_block in enumerate(self.hessians_of(inputs)) for role in READERS
        }
        if means is None:
            return found
        tokens = 2.0 * self.windows.shape[1]  # a Hessian is divided by samples, not by tokens
        return {place: hessian - tokens * means[place].outer(means[place]).to(hessian) for place, hessian in found.items()}

    def _collect(self, chosen: Sequence[Method]) -> None:
        missing: dict[Inputs, dict[Read, CalibrationSet]] = {}
        for method in chosen:
            key = (method.inputs, method.weighting)
            if key not in self._statistics:
                missing.setdefault(method.inputs, {})[key] = self.set_of(method)
        for of_text in missing.values():
            ids, weights = next(iter(of_text.values())).input_ids, [one.token_weight for one in of_text.values()]
            found = one_shot.shared_statistics(self.bench.model, ids, weights, batch_size=self.bench.batch_size)
            self._statistics |= dict(zip(of_text, found, strict=True))


def uses_dense_statistics(method: Method) -> bool:
    """Tell whether a method prunes with norms of the dense model alone."""
    return method.importance == "wanda" and not method.sequential and not method.needs_hessian
