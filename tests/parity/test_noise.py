"""The recorded noised inputs obey the noise processes that `diffusion.forward_noise` implements."""

from types import SimpleNamespace

import torch

from lib.core import runtime
from lib.diffusion import noise

LEVELS = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0])


def noisy(release: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (recorded masks `[window, level, position]`, clean ids)."""
    drawn = torch.cat([release.expected[f"sink_{name}_50.noisy_input_ids"] for name in ("wanda", "sparsegpt")])
    clean = release.expected["calibration.input_ids"].repeat(2, 1)[:, None]
    masked = drawn == 127
    assert torch.equal(drawn.masked_fill(masked, 0), clean.expand_as(drawn).masked_fill(masked, 0))
    return masked, clean[:, 0]


def test_llada_mask_share_follows_the_rate_of_each_level(llada: SimpleNamespace) -> None:
    share = noisy(llada)[0].float().mean(dim=(0, 2))
    rate = (1 - noise.NOISE_EPS) * LEVELS + noise.NOISE_EPS
    # binomial error over 8 x 48 tokens
    assert ((share - rate).abs() <= 4 * (rate * (1 - rate) / 384).sqrt()).all()
    assert share[-1] == 1.0


def test_forward_noise_at_the_last_level_equals_the_recorded_input(llada: SimpleNamespace) -> None:
    clean = llada.expected["calibration.input_ids"]
    ours = noise.forward_noise(clean, mask_token_id=127, generator=runtime.generator(0), t=torch.ones(4))
    assert torch.equal(ours.input_ids, llada.expected["sink_wanda_50.noisy_input_ids"][:, -1])


def test_dream_never_masks_the_ends(dream: SimpleNamespace) -> None:
    masked, clean = noisy(dream)
    assert not masked[..., 0].any()
    assert not masked[..., -1].any()
    ours = noise.forward_noise(clean, mask_token_id=127, generator=runtime.generator(0), t=torch.ones(8), schedule="dream")
    assert torch.equal(ours.is_masked.all(0), masked.any(dim=(0, 1)))
