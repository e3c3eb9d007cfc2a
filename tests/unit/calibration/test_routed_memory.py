"""One Hessian of an expert at a time: what is alive does not grow with the number of experts."""

from collections.abc import Callable
from weakref import WeakSet

import pytest
import torch

from lib.calibration import routed, sums
from lib.pruning import pruner
from lib.pruning.methods import METHODS, Target
from tests import tiny


def counted(peaks: list[int]) -> Callable[..., sums.InputStatistics]:
    """`with_products`, noting the bytes of outer products of experts that exist whenever some are made."""
    alive: WeakSet[torch.Tensor] = WeakSet()

    def made(norms: sums.InputStatistics, *, readers: int | None) -> sums.InputStatistics:
        found = sums.with_products(norms, readers=readers)
        assert found.products is not None
        alive.add(found.products)
        peaks.append(sum(each.nbytes for each in alive))
        return found

    return made


@pytest.mark.parametrize("family", tiny.MIXTURES)
@pytest.mark.parametrize("by_role", [False, True])
def test_the_peak_of_hessians_does_not_grow_with_the_experts(family: str, by_role: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for experts in (4, 32):
        peaks: list[int] = []
        monkeypatch.setattr(routed, "with_products", counted(peaks))
        names = {"qwen3_moe": {"num_experts": experts}, "glm4_moe": {"n_routed_experts": experts, "n_group": 2}}
        model = tiny.mixture(family, **names[family])
        pruner.prune_(model, METHODS["SparseGPT"], Target(0.5), windows=tiny.ids(24, 48), batch_size=8, by_role=by_role)
        found[experts] = max(peaks)
        assert len(peaks) > experts
    pooled_and_own = 2 * 4 * 16**2  # `down`: one expert's, and the layer's for those that fall back
    assert found[4] == found[32] <= max(4 * 32**2, pooled_and_own)
