"""The noise object against recorded known answers, by brute force, and with the wrong posterior that must fail."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion import noise
from lib.diffusion.ancestral import sample_back
from lib.diffusion.noise import Noise

KNOWN = json.loads((Path(__file__).parents[2] / "parity" / "noise_known_answers.json").read_text())
JOINT = torch.tensor(KNOWN["joint"], dtype=torch.float64)
NOISES: dict[str, Noise] = {
    "masked": noise.masked_noise(4, mask_token_id=3),
    "uniform": noise.uniform_noise(3),
    "xdlm_k0.3": noise.mixed_noise(4, mask_token_id=3, uniform_share=0.3),
    "xdlm_k0.1": noise.mixed_noise(4, mask_token_id=3),
}
CONSTANT = torch.tensor(KNOWN["constant_denoiser"], dtype=torch.float64)
every_noise = pytest.mark.parametrize("name", NOISES)


def padded(probs: Tensor, process: Noise) -> Tensor:
    """Three tokens' probabilities, and none for the mask."""
    return torch.cat([probs, probs.new_zeros((*probs.shape[:-1], process.vocab_size - 3))], -1)


def likelihood(process: Noise, t: float) -> Tensor:
    """q_t(z | x) written out, `[token, state]`, from the definition and not from the library's mixing."""
    table = torch.zeros(3, process.vocab_size, dtype=torch.float64)
    for x, z in itertools.product(range(3), range(process.vocab_size)):
        uniform = process.uniform_share / (process.vocab_size if process.mask_in_uniform else 3)
        uniform = 0.0 if z == 3 and not process.mask_in_uniform else uniform
        table[x, z] = (1 - t) * (x == z) + t * (uniform + (z == 3) * (1 - process.uniform_share))
    return table


def denoise(process: Noise, name: str, t: float) -> Tensor:
    """What one of four denoisers says of both clean tokens in every pair of states, `[z1, z2, place, token]`."""
    q, states = likelihood(process, t), process.vocab_size
    if name in ("constant", "marginals"):
        both = (CONSTANT, CONSTANT) if name == "constant" else (JOINT.sum(1), JOINT.sum(0))
        return torch.stack(both).expand(states, states, 2, 3)
    first, second = (JOINT @ q).T[None].expand(states, -1, -1), (q.T @ JOINT)[:, None].expand(-1, states, -1)
    if name == "full_posterior":
        first, second = first * q.T[:, None], second * q.T[None]
    found = torch.stack([first, second], 2)
    return found / found.sum(-1, keepdim=True).clamp(min=1e-300)


def rate(process: Noise, name: str, t: float) -> float:
    """The expected integrand at t, summed over every clean and noisy pair."""
    q, probs = likelihood(process, t), denoise(process, name, t)
    pairs = itertools.product(range(3), range(3), range(process.vocab_size), range(process.vocab_size))
    chance = {(x1, x2, z1, z2): float(JOINT[x1, x2] * q[x1, z1] * q[x2, z2]) for x1, x2, z1, z2 in pairs}
    possible = [key for key, value in chance.items() if value > 0]
    clean = torch.tensor([key[:2] for key in possible]).flatten()
    noisy = torch.tensor([key[2:] for key in possible])
    log_probs = padded(probs[noisy[:, 0], noisy[:, 1]].flatten(0, 1), process).log()
    at = torch.full((len(clean),), t, dtype=torch.float64)
    losses = process.loss(log_probs, clean, noisy.flatten(), at).view(-1, 2).sum(1)
    return float(losses @ torch.tensor([chance[key] for key in possible], dtype=torch.float64))


@every_noise
def test_the_loss_of_a_position_is_the_recorded_one(name: str) -> None:
    process = NOISES[name]
    rows = KNOWN["noises"][name]["loss"]
    clean, noisy = (torch.tensor([row[key] for row in rows]) for key in ("clean", "noisy"))
    t = torch.tensor([row["t"] for row in rows], dtype=torch.float64)
    log_probs = padded(CONSTANT, process).log().expand(len(rows), -1)
    got = process.loss(log_probs, clean, noisy, t)
    assert got.tolist() == pytest.approx([row["value"] for row in rows], rel=1e-12)
    single = process.loss(log_probs.float(), clean, noisy, t.float())
    assert single.tolist() == pytest.approx([row["value"] for row in rows], rel=2e-4, abs=1e-5)


@every_noise
@pytest.mark.parametrize("denoiser", ["constant", "marginals", "leave_one_out", "full_posterior"])
def test_the_integrand_is_the_recorded_one(name: str, denoiser: str) -> None:
    recorded = KNOWN["noises"][name]["rate"][denoiser]
    got = [rate(NOISES[name], denoiser, float(t)) for t in recorded]
    assert got == pytest.approx(list(recorded.values()), rel=1e-10)


@every_noise
def test_the_bound_of_the_leave_one_out_optimum_is_the_entropy_and_the_wrong_posterior_is_worse(name: str) -> None:
    process, recorded = NOISES[name], KNOWN["noises"][name]["nelbo"]
    nodes = [(index + 0.5) / 60 for index in range(60)]
    # t = u^2 takes the steepness at 0 away
    bounds = {key: sum(rate(process, key, u * u) * 2 * u for u in nodes) / 60 for key in ("leave_one_out", "full_posterior")}
    assert bounds["leave_one_out"] == pytest.approx(KNOWN["entropy"]["joint"], rel=3e-3)
    assert bounds["full_posterior"] == pytest.approx(recorded["full_posterior"], rel=3e-3)
    if name != "masked":
        assert bounds["full_posterior"] > bounds["leave_one_out"] + 0.2


@every_noise
def test_the_step_back_is_the_recorded_one(name: str) -> None:
    process = NOISES[name]
    for row in KNOWN["noises"][name]["reverse"]:
        got = process.reverse(padded(CONSTANT, process), torch.tensor(row["noisy"]), t=row["t"], s=row["s"])
        assert got.tolist() == pytest.approx(row["probabilities"], abs=1e-12)


def joint_after(process: Noise, denoiser: str, steps: int) -> Tensor:
    """The exact distribution of both tokens after `steps` steps back, all states followed."""
    states = torch.arange(process.vocab_size)
    now = process.mixing[:, None] * process.mixing[None, :]
    for step in range(steps, 0, -1):
        t, s = step / steps, (step - 1) / steps
        probs = padded(denoise(process, denoiser, t), process)
        first = process.reverse(probs[:, :, 0], states[:, None].expand_as(now), t=t, s=s)
        second = process.reverse(probs[:, :, 1], states[None].expand_as(now), t=t, s=s)
        now = torch.einsum("ab,abx,aby->xy", now, first, second)
    return now[:3, :3]


@every_noise
@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_the_sampler_is_as_far_from_the_truth_as_recorded(name: str, steps: int) -> None:
    recorded = KNOWN["ancestral_total_variation"]
    for denoiser in ("leave_one_out", "full_posterior"):
        if f"{name}.{denoiser}" in recorded:
            distance = float((joint_after(NOISES[name], denoiser, steps) - JOINT).abs().sum() / 2)
            assert distance == pytest.approx(recorded[f"{name}.{denoiser}"][str(steps)], abs=1e-9)


@every_noise
def test_drawn_samples_follow_the_exact_distribution_of_the_sampler(name: str) -> None:
    process, steps, draws = NOISES[name], 2, 20_000
    calls = iter(range(steps, 0, -1))

    def denoiser(ids: Tensor, where: Tensor) -> Tensor:
        return padded(denoise(process, "leave_one_out", next(calls) / steps)[ids[:, 0], ids[:, 1]], process)[where]

    ids = torch.zeros((draws, 2), dtype=torch.long)
    where = torch.ones_like(ids, dtype=torch.bool)
    got = sample_back(denoiser, process, ids, where, steps=steps, generator=generator(3), greedy="never")
    counts = torch.zeros(3, 3, dtype=torch.float64).index_put_((got[:, 0], got[:, 1]), torch.ones(1).double(), accumulate=True)
    expected = joint_after(process, "leave_one_out", steps)
    assert float((counts / draws - expected).abs().max()) < 5 * (0.25 / draws) ** 0.5


def test_greedy_sampling_fills_chosen_places_only_with_the_most_probable_token() -> None:
    process = NOISES["xdlm_k0.3"]
    ids = torch.tensor([[2, 2, 2]])
    where = torch.tensor([[False, True, True]])
    probs = padded(torch.tensor([[[0.1, 0.2, 0.7], [0.9, 0.05, 0.05], [0.1, 0.8, 0.1]]]).double(), process)
    cases: tuple[tuple[Any, int], ...] = (("last", 1), ("always", 1), ("always", 6))
    for greedy, steps in cases:
        got = sample_back(
            lambda _, places: probs[places], process, ids, where, steps=steps, generator=generator(0), greedy=greedy
        )
        assert got[0, 0] == 2
        if steps == 1:
            assert got.shape == ids.shape
            assert 3 not in got[0, 1:].tolist()
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        sample_back(lambda _, places: probs[places], process, ids, where, steps=0, generator=generator(0))


@every_noise
def test_corruption_has_the_rates_of_its_definition_and_leaves_prompts_alone(name: str) -> None:
    process, rows = NOISES[name], 60_000
    ids = torch.ones((rows, 2), dtype=torch.long)
    may_change = torch.tensor([True, False]).expand(rows, 2)
    noised = process.corrupt(ids, torch.full(ids.shape, 0.4), generator=generator(1), may_change=may_change)
    assert torch.equal(noised.input_ids[:, 1], ids[:, 1])
    assert not noised.is_drawn[:, 1].any()
    shares = torch.bincount(noised.input_ids[:, 0], minlength=process.vocab_size) / rows
    assert shares.tolist() == pytest.approx(likelihood(process, 0.4)[1].tolist(), abs=0.01)


def test_noises_of_different_mixing_draw_at_the_same_places() -> None:
    ids = torch.randint(0, 3, (8, 16), generator=generator(0))
    t = torch.rand((8, 16), generator=generator(1))
    drawn = [process.corrupt(ids, t, generator=generator(2)).is_drawn for process in NOISES.values()]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def test_masked_noise_gives_cross_entropy_over_t_and_finite_gradients_where_probabilities_underflow() -> None:
    process = NOISES["masked"]
    logits = torch.tensor([[0.0, -300.0, 1.0, 0.0], [0.0, -300.0, 1.0, 0.0]], requires_grad=True)
    clean, noisy, t = torch.tensor([1, 1]), torch.tensor([3, 1]), torch.tensor([0.25, 0.25])
    losses = process.loss(logits.log_softmax(-1), clean, noisy, t)
    assert losses[1] == 0
    assert float(losses[0].detach()) > 0
    certain = torch.tensor([[0.0, -3.0, 1.0, -300.0]]).log_softmax(-1)
    plain = process.loss(certain, clean[:1], noisy[:1], t[:1])
    assert float(plain) == pytest.approx(-float(certain[0, 1]) / 0.25, rel=1e-6)
    assert abs(float(plain) + float(certain[0, 1])) > 1  # the weight is 1 / t, not 1
    losses.sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("name", ["uniform", "xdlm_k0.1"])
def test_float32_losses_are_finite_and_not_negative_at_both_ends_of_time(name: str) -> None:
    process = NOISES[name]
    logits = torch.randn((64, process.vocab_size), generator=generator(4)) * 8
    logits.requires_grad_(True)
    clean, noisy = (torch.randint(0, 3, (64,), generator=generator(seed)) for seed in (5, 6))
    for time in (1e-3, 0.5, 1 - 1e-3):
        losses = process.loss(logits.log_softmax(-1), clean, noisy, torch.full((64,), time))
        assert bool(losses.isfinite().all())
        assert float(losses.min()) > -1e-3
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert bool(gradient.isfinite().all())


@every_noise
def test_autocast_does_not_round_the_loss(name: str) -> None:
    """Training runs under it: a product with the mixing in bfloat16 would be off by more than small losses are."""
    process, stream = NOISES[name], generator(0, "autocast")
    clean, t = torch.randint(3, (1, 200), generator=stream), noise.training_times(200, generator=stream)
    noisy = process.corrupt(clean, t[None], generator=stream).input_ids[0]
    log_probs = torch.randn(200, process.vocab_size, generator=stream).log_softmax(-1)
    plain = process.loss(log_probs, clean[0], noisy, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(process.loss(log_probs, clean[0], noisy, t), plain)


def test_full_posterior_of_a_seen_token_weighs_the_network_by_the_noise() -> None:
    process = NOISES["uniform"]
    got = process.full_posterior(CONSTANT, torch.tensor(1), t=0.3)
    wanted = CONSTANT * likelihood(process, 0.3)[:, 1]
    assert got.tolist() == pytest.approx((wanted / wanted.sum()).tolist(), abs=1e-12)


def test_training_times_are_stratified_shuffled_and_inside() -> None:
    times = noise.training_times(100, generator=generator(0))
    assert times.min() > 1e-4 and times.max() < 1 - 1e-4
    assert sorted(((times - 1e-3) / 0.998 * 100).floor().long().clamp(0, 99).tolist()) == pytest.approx(list(range(100)), abs=1)
    assert not torch.equal(times, times.sort().values)


def test_impossible_noises_are_refused() -> None:
    with pytest.raises(InputError, match=r"uniform_share must be in \[0, 1\], got 10"):
        Noise(4, 3, 10)
    with pytest.raises(InputError, match=r"without a mask token, got 0\.5"):
        Noise(4, None, 0.5)
    with pytest.raises(InputError, match=r"got s 0\.5 and t 0\.3"):
        NOISES["uniform"].reverse(CONSTANT, torch.tensor(0), t=0.3, s=0.5)
