"""Logits, attention masses and sink scores against the authors' release."""

from types import SimpleNamespace

import pytest
import torch

from lib.attention import masses, sinks
from lib.models import language_model, loading
from tests.parity import slow

LOGITS_ATOL = 1e-5  # float32 sums in another order; a trial gave exactly 0.0
MASS_ATOL = 1e-4  # masses are sums of 48 x 8 float32 probabilities near 8 in all
# In float64 only the float32 norms are left to round; a wrong formula would keep its difference.
FLOAT64_ATOL = 1e-9


def test_logits_equal_the_recorded_ones(release: SimpleNamespace) -> None:
    with torch.inference_mode():
        logits = release.model.network(input_ids=release.expected["forward.input_ids"]).logits
    torch.testing.assert_close(logits, release.expected["forward.logits"], atol=LOGITS_ATOL, rtol=0)


def test_the_rounding_difference_collapses_in_float64(release: SimpleNamespace) -> None:
    ids = release.expected["forward.input_ids"]
    wide = loading.load(release.folder, dtype=torch.float64)
    with torch.inference_mode():
        logits = wide.network(input_ids=ids).logits
    expected, _ = slow.forward(release.folder, ids, torch.float64)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, expected, atol=FLOAT64_ATOL, rtol=0)
    torch.testing.assert_close(logits.float(), release.expected["forward.logits"], atol=LOGITS_ATOL, rtol=0)


def test_logits_are_sensitive_to_attention_direction(release: SimpleNamespace) -> None:
    """The recorded logits would not come from a causal network: the parity above tells the two apart."""
    ids = release.expected["forward.input_ids"]
    with torch.inference_mode():
        prefix = release.model.network(input_ids=ids[:, :24]).logits
    assert (prefix - release.expected["forward.logits"][:, :24]).abs().max() > 100 * LOGITS_ATOL


def test_logits_at_gives_the_recorded_rows_with_the_layouts_shift(release: SimpleNamespace) -> None:
    ids = release.expected["forward.input_ids"]
    where = ids == release.model.mask_token_id
    where[0, 0] = True  # position 0 keeps its own output under the shift
    source = torch.arange(ids.shape[1]) - release.model.logit_shift
    shifted = release.expected["forward.logits"][:, source.clamp(min=0)]
    got = language_model.logits_at(release.model, ids, where)
    torch.testing.assert_close(got, shifted[where], atol=LOGITS_ATOL, rtol=0)


def test_mask_id_and_shift_come_from_the_checkpoint(llada: SimpleNamespace, dream: SimpleNamespace) -> None:
    assert (llada.model.mask_token_id, llada.model.logit_shift, llada.model.is_causal) == (127, 0, False)
    assert (dream.model.mask_token_id, dream.model.logit_shift, dream.model.is_causal) == (127, 1, False)


def test_summed_mass_equals_the_recorded_one(release: SimpleNamespace) -> None:
    mass = masses.sink_mass(release.model, release.expected["forward.input_ids"])
    torch.testing.assert_close(mass.sum(dim=(0, 2)), release.expected["forward.sink_mass_sum"], atol=MASS_ATOL, rtol=0)


def test_mass_per_layer_and_head_equals_a_slow_float64_softmax(release: SimpleNamespace) -> None:
    ids = release.expected["forward.input_ids"]
    _, maps = slow.forward(release.folder, ids, torch.float64)
    mass = masses.sink_mass(release.model, ids)
    torch.testing.assert_close(mass.double(), maps.sum(3), atol=1e-5, rtol=3e-6)  # float32 sums of 48 terms


def test_released_sink_score_equals_the_recorded_one(release: SimpleNamespace) -> None:
    """The score is steep (alpha 5), so the recorded masses go in: it is the formula that is compared."""
    mass = release.expected["forward.sink_mass_sum"]
    score = sinks.soft_score(mass, sinks.mean_std_threshold(mass))
    torch.testing.assert_close(score, release.expected["forward.sink_score"], atol=1e-6, rtol=1e-5)
    sample_std = mass.mean(-1, keepdim=True) + 2 * mass.std(-1, keepdim=True)
    assert not torch.allclose(sinks.soft_score(mass, sample_std), release.expected["forward.sink_score"], atol=1e-6, rtol=1e-5)


def test_released_sink_score_from_our_own_masses(release: SimpleNamespace) -> None:
    mass = masses.sink_mass(release.model, release.expected["forward.input_ids"]).sum(dim=(0, 2))
    score = sinks.soft_score(mass, sinks.mean_std_threshold(mass))
    # a mass error of 1e-4 moves a sigmoid of slope alpha / 4 by at most 1.25e-4
    torch.testing.assert_close(score, release.expected["forward.sink_score"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_mass_keeps_float32_accuracy_under_bfloat16(release: SimpleNamespace, dtype: torch.dtype) -> None:
    """Each row sums to 1 to float32 accuracy: in bfloat16 sums of 48 numbers near 1/48 would be off by up to a per cent."""
    ids = release.expected["forward.input_ids"]
    mass = masses.sink_mass(loading.load(release.folder, dtype=dtype), ids)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.mean(-1), torch.ones(mass.shape[:-1]), atol=1e-5, rtol=0)
