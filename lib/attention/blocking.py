"""Which keys to block in the test of whether sinks matter: the largest sinks, random keys, large keys that are no sinks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lib.attention import sinks

Rule = Callable[[Tensor, torch.Generator], Tensor]  # (mass [*batch, key], generator) -> keys to block [*batch, key]


def largest_keys(mass: Float[Tensor, "*batch key"], *, k: int) -> Bool[Tensor, "*batch key"]:
    """Mark the k keys with the largest mass (all of them when there are fewer).

    Source: top-k sinks of a head as Rulli et al. (arXiv 2510.15731) block them.
    """
    marked = torch.zeros(mass.shape, dtype=torch.bool, device=mass.device)
    return marked.scatter(-1, sinks.top_k_positions(mass, k=min(k, mass.shape[-1])), True)


def random_keys(mass: Float[Tensor, "*batch key"], *, k: int, generator: torch.Generator) -> Bool[Tensor, "*batch key"]:
    """Mark k keys drawn evenly, anew for every row of the batch and every head (all of them when there are fewer)."""
    return largest_keys(torch.rand(mass.shape, generator=generator).to(mass.device), k=k)


def large_other_keys(
    mass: Float[Tensor, "*batch key"], *, k: int, epsilon: float = sinks.RULLI_EPSILON
) -> Bool[Tensor, "*batch key"]:
    """Mark the k largest keys that are no sinks by Rulli's rule; fewer where a head has not so many.

    >>> large_other_keys(torch.tensor([9.0, 1.0, 2.0, 0.0]), k=1).tolist()
    [False, False, True, False]
    """
    are_sinks = sinks.sinks_leave_one_out(mass, epsilon=epsilon)
    return largest_keys(torch.where(are_sinks, float("-inf"), mass), k=k) & ~are_sinks


def rules(k: int) -> dict[str, Rule]:
    """Return what is compared at one k: sinks, and the two controls of the same size."""
    return {
        "sinks": lambda mass, generator: largest_keys(mass, k=k),
        "random keys": lambda mass, generator: random_keys(mass, k=k, generator=generator),
        "large non-sinks": lambda mass, generator: large_other_keys(mass, k=k),
    }


@dataclass
class KeyBlocker:
    """Chooses the keys to block in each layer, for `attention.blocking`, and counts what that takes away.

    Attributes:
        rule: which keys, from their masses.
        generator: CPU generator of the random rule.
        step_before: choose from the masses of the pass before, as in a generation, instead of those of the same pass. The first
            pass after `reset` then blocks nothing.
        copies: of the text in a pass, behind each other (the bound of a model by blocks reads a noised and a clean one). The keys
            of one position are one key: chosen by their mean mass, blocked together.
    """

    rule: Rule
    generator: torch.Generator
    step_before: bool = False
    copies: int = 1
    _before: dict[int, Tensor] = field(default_factory=dict)
    _keys: float = 0.0
    _removed: float = 0.0
    _rows: int = 0

    def __call__(self, layer: int, mass: Float[Tensor, "batch head key"]) -> Bool[Tensor, "batch head key"] | None:
        """Choose the keys of one layer."""
        basis = mass
        if self.step_before:
            earlier = self._before.get(layer)
            self._before[layer] = mass
            if earlier is None:
                return None
            basis = earlier
        blocked = self.rule(basis.unflatten(-1, (self.copies, -1)).mean(-2), self.generator)
        self._keys += float(blocked.sum())
        blocked = blocked.repeat(*[1] * (blocked.dim() - 1), self.copies)
        # a causal model has more keys than at the step before: the new ones are not blocked
        blocked = torch.nn.functional.pad(blocked, (0, mass.shape[-1] - blocked.shape[-1]))
        self._rows += mass.shape[:-1].numel()
        self._removed += float((mass * blocked).sum() / mass.sum() * mass.shape[:-1].numel())
        return blocked

    def reset(self) -> None:
        """Forget the step before: other texts follow."""
        self._before.clear()

    @property
    def keys_per_head(self) -> float:
        """How many keys were blocked, on average over heads, layers, rows and passes that blocked."""
        return self._keys / max(1, self._rows)

    @property
    def removed_share(self) -> float:
        """Share of the attention, in [0, 1], that the blocked keys would have received."""
        return self._removed / max(1, self._rows)


def unstable_keys(
    frequency_variance: Float[Tensor, "*batch key"], *, threshold: float, only_sinks: bool
) -> Bool[Tensor, "*batch key"]:
    """Mark the keys whose frequency variance exceeds a threshold.

    Args:
        frequency_variance: 1 - share of steps in which the key is among the top sinks of its head.
        threshold: in [0, 1].
        only_sinks: True leaves out the keys that never are a sink. The digest's pseudo-code read literally (False) blocks those
            first, because their frequency variance is 1.

    Source: the digest's pseudo-code, attention-position masking at inference. It is no weight pruning.

    >>> value = torch.tensor([0.2, 0.9, 1.0])
    >>> unstable_keys(value, threshold=0.5, only_sinks=False).tolist()
    [False, True, True]
    >>> unstable_keys(value, threshold=0.5, only_sinks=True).tolist()
    [False, True, False]
    """
    marked = frequency_variance > threshold
    return marked & (frequency_variance < 1.0) if only_sinks else marked


# reading of the digest's rule -> only_sinks
READINGS = MappingProxyType({"literal": False, "only former sinks": True})
