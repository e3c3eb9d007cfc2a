"""Models that switch weights with the mask ratio: every row against the plain model of its phase, and what the phases cost."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lib.attention import masses
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion import likelihood, sampler
from lib.models.language_model import LanguageModel, linear_layers, logits_at
from lib.models.layers import attention
from lib.pruning import importances, phases
from tests import tiny

BORDERS = (0.7, 0.3)
ATOL = 1e-5  # float32 products of other shapes; two phases differ by more than 0.1


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("dense"), family=request.param, causal=False)


@pytest.fixture(scope="module")
def plain(dense: LanguageModel) -> list[LanguageModel]:
    return [pruned(dense, sparsity) for sparsity in (0.2, 0.4, 0.6)]


@pytest.fixture(scope="module")
def model(dense: LanguageModel, plain: list[LanguageModel]) -> LanguageModel:
    return phases.phased(dense, plain, borders=BORDERS)


def pruned(model: LanguageModel, sparsity: float) -> LanguageModel:
    network = copy.deepcopy(model.network)
    layers = linear_layers(network)
    for layer in layers:
        weight = layer.module.weight
        weight.data = importances.prune(weight.data, importances.keep_mask(weight.data.abs(), sparsity=sparsity))
    return replace(model, network=network, layers=layers)


def masked_rows(counts: list[int], *, length: int = 10, seed: int = 0) -> Tensor:
    """Rows with the given numbers of masks at random places."""
    ids = tiny.ids(len(counts), length, seed=seed)
    order = torch.rand(ids.shape, generator=generator(seed)).argsort(1).argsort(1)
    return ids.masked_fill(order < torch.tensor(counts)[:, None], tiny.MASK)


def hidden(model: LanguageModel, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    body = cast(Any, model.network.get_decoder())
    with torch.inference_mode():
        return body(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def body_of(model: LanguageModel) -> phases.PhasedDecoder:
    return cast(phases.PhasedDecoder, model.network.get_decoder())


# Which phase


def test_a_ratio_on_the_border_belongs_to_the_noisier_phase(model: LanguageModel) -> None:
    """0.7 and 0.3 have no exact float32: a ratio in another precision would miss the border."""
    ids = masked_rows(list(range(11)))
    assert body_of(model).phase_of(ids).tolist() == [2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0]


def test_padding_counts_neither_as_masked_nor_as_text(model: LanguageModel) -> None:
    ids = torch.full((3, 10), tiny.MASK)
    ids[:, :2] = 1
    attention_mask = torch.ones_like(ids)
    attention_mask[0, 3:] = 0  # 1 of 3, else 8 of 10
    attention_mask[1, 2:] = 0  # 0 of 2
    attention_mask[2] = 0
    assert phases.mask_ratio(ids, mask_token_id=tiny.MASK, attention_mask=attention_mask).tolist() == [1 / 3, 0.0, 0.0]
    assert body_of(model).phase_of(ids, attention_mask).tolist() == [1, 2, 2]
    assert body_of(model).phase_of(ids, attention_mask.bool()).tolist() == [1, 2, 2]
    assert body_of(model).phase_of(ids).tolist() == [0, 0, 0]


# What a row gets


def test_every_row_of_a_mixed_batch_equals_the_plain_model_of_its_phase(model: LanguageModel, plain: list[LanguageModel]) -> None:
    counts = [1, 9, 5, 0, 10, 3, 2, 7]
    ids = masked_rows(counts)
    got = hidden(model, ids)
    assert got.shape == (8, 10, 32)
    for row, count in enumerate(counts):
        phase = 0 if count >= 7 else 1 if count >= 3 else 2
        every = torch.cat([hidden(one, ids[row : row + 1]) for one in plain])
        torch.testing.assert_close(got[row], every[phase], atol=ATOL, rtol=ATOL)
        assert all((got[row] - every[other]).abs().max() > 0.1 for other in range(3) if other != phase)


def test_a_batch_of_one_phase_is_bit_for_bit_the_plain_model(model: LanguageModel, plain: list[LanguageModel]) -> None:
    for phase, count in enumerate((8, 5, 1)):
        ids = masked_rows([count] * 3, seed=phase)
        assert torch.equal(hidden(model, ids), hidden(plain[phase], ids))
        with torch.inference_mode():
            assert torch.equal(model.network(input_ids=ids).logits, plain[phase].network(input_ids=ids).logits)


def test_phases_of_equal_weights_give_the_dense_results(dense: LanguageModel) -> None:
    same = phases.phased(dense, [dense, dense.network, copy.deepcopy(dense.network)], borders=BORDERS)
    ids = masked_rows([1, 9, 5, 10])
    torch.testing.assert_close(hidden(same, ids), hidden(dense, ids), atol=ATOL, rtol=ATOL)
    windows = tiny.ids(2, 10)
    bounds = [likelihood.nelbo(one, windows, draws=6, seed=0, batch_size=1).per_window for one in (same, dense)]
    assert torch.equal(*bounds)
    texts = [sampler.sample(one, tiny.ids(2, 4), new_tokens=8, steps=8) for one in (same, dense)]
    assert torch.equal(*texts)


def test_the_padding_mask_goes_with_its_row(model: LanguageModel, plain: list[LanguageModel]) -> None:
    counts = [9, 1, 5, 8]
    ids = masked_rows(counts)
    attention_mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 1, 2)):
        attention_mask[row, 10 - padding :] = 0
    got = hidden(model, ids, attention_mask)
    for row, phase in enumerate(body_of(model).phase_of(ids, attention_mask).tolist()):
        real = attention_mask[row].bool()
        alone = hidden(plain[phase], ids[row : row + 1, real])
        torch.testing.assert_close(got[row, real], alone[0], atol=ATOL, rtol=ATOL)


def test_the_logit_shift_is_kept(dense: LanguageModel, plain: list[LanguageModel]) -> None:
    shifted = [replace(one, logit_shift=1) for one in (dense, *plain)]
    model, ids = phases.phased(shifted[0], shifted[1:], borders=BORDERS), masked_rows([9, 1])
    where = ids == tiny.MASK
    got = logits_at(model, ids, where)
    expected = [logits_at(shifted[1 + phase], ids[row, None], where[row, None]) for row, phase in ((0, 0), (1, 2))]
    torch.testing.assert_close(got, torch.cat(expected), atol=ATOL * 10, rtol=ATOL)


# What the library does with it


def test_the_bound_reads_every_draw_in_its_phase(model: LanguageModel, plain: list[LanguageModel]) -> None:
    windows, length, draws = tiny.ids(2, 10), 10, 12
    expected = []
    for index, ids in enumerate(windows):
        everything = torch.ones(length, dtype=torch.bool)
        masks = likelihood.exact_count_masks(everything, draws, generator=generator(3, "nelbo", index))
        losses = []
        for mask in masks:
            ratio = int(mask.sum()) / length
            one = plain[sum(ratio < border for border in BORDERS)]
            logits = logits_at(one, ids.masked_fill(mask, tiny.MASK)[None], mask[None])
            losses.append(float(F.cross_entropy(logits.double(), ids[mask])))
        expected.append(sum(losses) / draws)
    got = likelihood.nelbo(model, windows, draws=draws, seed=3)
    assert got.per_window.tolist() == pytest.approx(expected, abs=1e-4)
    for one in plain:
        alone = likelihood.nelbo(one, windows, draws=draws, seed=3).per_window
        assert (alone - got.per_window).abs().max() > 0.005  # fifty times the tolerance above


@pytest.mark.parametrize("prompt", [0, 6])
def test_the_sampler_switches_where_the_ratio_of_the_whole_row_crosses_a_border(model: LanguageModel, prompt: int) -> None:
    """With a prompt of 6 and 14 masks the ratio starts at 0.7: the share of the new tokens alone would switch later."""
    used: list[int] = []
    hooks = [
        decoder.register_forward_hook(lambda *_, phase=phase: used.append(phase))
        for phase, decoder in enumerate(body_of(model).decoders)
    ]
    masked: list[int] = []
    sampler.sample(
        model,
        tiny.ids(2, prompt),
        new_tokens=20 - prompt,
        steps=20 - prompt,
        on_step=lambda step: masked.append(int(step.is_masked[0].sum())),
    )
    for hook in hooks:
        hook.remove()
    assert masked == list(range(20 - prompt, 0, -1))
    assert used == [0 if count >= 14 else 1 if count >= 6 else 2 for count in masked]
    assert used.count(0) == (7 if prompt == 0 else 1) and set(used) == {0, 1, 2}


def test_a_sampled_text_is_that_of_models_switched_by_hand(model: LanguageModel, plain: list[LanguageModel]) -> None:
    prompt, ids = tiny.ids(1, 4), torch.full((1, 16), tiny.MASK)
    ids[:, :4] = prompt
    for _ in range(12):
        where = ids == tiny.MASK
        ratio = int(where.sum()) / 16
        logits = logits_at(plain[sum(ratio < border for border in BORDERS)], ids, where)
        best = int(logits.double().softmax(-1).amax(-1).argmax())
        ids[0, where[0].nonzero()[best, 0]] = logits[best].argmax()
    assert torch.equal(sampler.sample(model, prompt, new_tokens=12, steps=12), ids)
    assert not all(torch.equal(sampler.sample(one, prompt, new_tokens=12, steps=12), ids) for one in plain)


def test_masses_of_a_batch_of_one_phase_are_those_of_the_plain_model(
    model: LanguageModel, plain: list[LanguageModel], dense: LanguageModel
) -> None:
    for phase, count in enumerate((8, 5, 1)):
        ids = masked_rows([count] * 2)
        got = masses.sink_mass(model, ids)
        assert got.shape == (2, 2, 4, 10)
        assert torch.equal(got, masses.sink_mass(plain[phase], ids))
    networks = (model, dense, *plain)
    assert [one.network.config._attn_implementation for one in networks] == [attention.NAME] * 5
    with masses.record(model):  # the given models are not switched along
        assert [one.network.config._attn_implementation for one in networks[1:]] == [attention.NAME] * 4


def test_masses_along_a_trajectory_come_from_the_phase_of_the_step(model: LanguageModel, plain: list[LanguageModel]) -> None:
    steps: list[tuple[Tensor, Tensor]] = []
    with masses.record(model) as recorder:
        sampler.sample(
            model, tiny.ids(2, 0), new_tokens=10, steps=5, on_step=lambda step: steps.append((step.input_ids, recorder.pop()))
        )
    assert len(steps) == 5
    for ids, mass in steps:
        phase = int(body_of(model).phase_of(ids)[0])
        assert torch.equal(mass[:, :, :, 0], masses.sink_mass(plain[phase], ids))


def test_recording_or_blocking_rows_of_several_phases_is_refused(model: LanguageModel) -> None:
    ids = masked_rows([9, 1])
    with pytest.raises(InputError, match=r"must be of one phase, got phases \[0, 2\]: run rows of equal mask ratio"):
        masses.sink_mass(model, ids)
    with masses.blocking(model, lambda _, mass: mass > 3), pytest.raises(InputError, match="must be of one phase"):
        hidden(model, ids)
    hidden(model, ids)  # and goes on outside


# How it is built


def test_everything_but_the_pruned_matrices_is_the_dense_models(
    model: LanguageModel, plain: list[LanguageModel], dense: LanguageModel
) -> None:
    network, source = model.network, dense.network
    assert cast(Any, network.get_output_embeddings()).weight is cast(Any, source.get_output_embeddings()).weight
    assert cast(Any, network.get_input_embeddings()).weight is cast(Any, source.get_input_embeddings()).weight
    ours = dict(source.get_decoder().named_parameters())
    for decoder, one in zip(body_of(model).decoders, plain, strict=True):
        prunable = {layer.name.removeprefix("model."): layer.module.weight for layer in one.layers}
        for name, value in decoder.named_parameters():
            assert value is (prunable[name] if name in prunable else ours[name])
    matrices = sum(layer.module.weight.numel() for layer in dense.layers)
    assert model.num_parameters == dense.num_parameters + 2 * matrices


def test_one_configuration_the_dense_models_governs_every_phase(dense: LanguageModel) -> None:
    """A copy may have been left in another attention function, or read by another rule; the phases must not keep it."""
    strange = pruned(dense, 0.5)
    strange.network.config.is_causal = True
    strange.network.set_attn_implementation("eager")
    model, ids = phases.phased(dense, [dense, strange], borders=[0.5]), masked_rows([2, 2])
    assert torch.equal(hidden(model, ids), hidden(pruned(dense, 0.5), ids))
    configs = {id(module.config) for module in model.network.modules() if hasattr(module, "config")}
    assert configs == {id(model.network.config)} and model.network.config is not dense.network.config


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    dense = tiny.model(tmp_path, causal=False, tie=True)
    model = phases.phased(dense, [dense, pruned(dense, 0.5)], borders=[0.5])
    head = cast(Any, model.network.get_output_embeddings()).weight
    assert head is cast(Any, model.network.get_input_embeddings()).weight is cast(Any, dense.network).model.embed_tokens.weight


def test_the_table_of_layers_names_the_matrices_of_every_phase(model: LanguageModel, plain: list[LanguageModel]) -> None:
    state = dict(model.network.named_parameters())
    assert len(model.layers) == len({layer.name for layer in model.layers}) == 3 * 14
    for layer, original in zip(model.layers, [layer for one in plain for layer in one.layers], strict=True):
        assert state[layer.name] is layer.module.weight is original.module.weight
        assert (layer.block, layer.role) == (original.block, original.role)
    assert model.layers[0].name == "model.decoders.0.layers.0.self_attn.q_proj.weight"
    assert model.fingerprint == ""


def test_the_dense_model_is_left_as_it_is(dense: LanguageModel, plain: list[LanguageModel]) -> None:
    ids = masked_rows([9, 1])
    before, modules = hidden(dense, ids), list(dense.network.modules())
    hidden(phases.phased(dense, plain, borders=BORDERS), ids)
    assert torch.equal(hidden(dense, ids), before)
    assert all(old is new for old, new in zip(modules, dense.network.modules(), strict=True))


# Refusals


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ((0.3, 0.7), "must fall strictly"),
        ((0.5, 0.5), "must fall strictly"),
        ((1.0, 0.5), "must fall strictly"),
        ((0.5, 0.0), "must fall strictly"),
        ((0.5, math.nan), "must fall strictly"),
        ((0.5,), "one more than borders, got 3 and 1"),
    ],
)
def test_bad_borders_are_refused(
    dense: LanguageModel, plain: list[LanguageModel], borders: tuple[float, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        phases.phased(dense, plain, borders=borders)


def test_phases_of_another_model_are_refused(dense: LanguageModel, tmp_path: Path) -> None:
    family = "qwen2" if "Qwen2" in type(dense.network).__name__ else "llama"
    other = tiny.model(tmp_path / "other", family=family, causal=False, seed=1)
    with pytest.raises(InputError, match=r"pruned matrices only, got another embed_tokens.weight in phase 1"):
        phases.phased(dense, [dense, other], borders=[0.5])
    smaller = tiny.model(tmp_path / "smaller", family=family, causal=False, intermediate_size=24)
    with pytest.raises(InputError, match=r"got another .* in phase 0"):
        phases.phased(dense, [smaller, dense], borders=[0.5])
    deeper = tiny.model(tmp_path / "deeper", family=family, causal=False, num_hidden_layers=3)
    with pytest.raises(InputError, match=r"got another .* in phase 1"):
        phases.phased(dense, [dense, deeper], borders=[0.5])


def test_a_changed_norm_is_refused(dense: LanguageModel) -> None:
    other = copy.deepcopy(dense.network)
    cast(Any, other).model.layers[1].input_layernorm.weight.data[0] += 0.5
    with pytest.raises(InputError, match=r"another layers.1.input_layernorm.weight in phase 0"):
        phases.phased(dense, [other, dense], borders=[0.5])


def test_an_autoregressive_model_is_refused(tmp_path: Path) -> None:
    causal = tiny.model(tmp_path, causal=True)
    with pytest.raises(InputError, match="must follow the mask ratio of masked diffusion, got autoregressive"):
        phases.phased(causal, [causal, causal], borders=[0.5])


def test_caches_and_further_options_are_refused(model: LanguageModel) -> None:
    ids = masked_rows([9, 1])
    with pytest.raises(InputError, match="in full passes, got use_cache"):
        model.network(input_ids=ids, use_cache=True)
    with pytest.raises(InputError, match="got position_ids"):
        model.network(input_ids=ids, position_ids=torch.arange(10)[None])
    with pytest.raises(InputError, match="got inputs_embeds"):
        model.network(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(InputError, match="got no input_ids"):
        body_of(model)()


def test_a_phased_model_is_no_phase_and_has_no_single_list_of_blocks(model: LanguageModel, dense: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"must belong to one network, got 3 phases: prune each before phased\(\)"):
        linear_layers(model.network)
    with pytest.raises(InputError, match="must belong to one network"):
        phases.phased(dense, [dense, model], borders=[0.5])


# Sparsities


@pytest.mark.parametrize(
    ("mean", "spread", "borders", "gentle_at", "expected"),
    [
        (0.5, 0.1, (0.5,), "high_noise", [0.4, 0.6]),
        (0.5, 0.1, (0.5,), "low_noise", [0.6, 0.4]),
        (0.5, 0.1, (0.25,), "high_noise", [0.45, 0.65]),  # widths 0.75 and 0.25: their order decides
        (0.5, 0.1, (0.75,), "high_noise", [0.35, 0.55]),
        (0.5, 0.2, (0.6, 0.3), "high_noise", [0.32, 0.52, 0.72]),
        (0.5, 0.0, (0.6, 0.3), "low_noise", [0.5, 0.5, 0.5]),
        (0.5, 0.3, (), "high_noise", [0.5]),  # one phase has nowhere to spread to
        (0.1, 0.1, (0.5,), "low_noise", [0.2, 0.0]),
    ],
)
def test_phase_sparsities_by_hand(
    mean: float, spread: float, borders: tuple[float, ...], gentle_at: phases.GentleAt, expected: list[float]
) -> None:
    got = phases.phase_sparsities(mean, spread=spread, borders=borders, gentle_at=gentle_at)
    assert got == pytest.approx(expected, abs=1e-12)


@given(
    mean=st.floats(0.2, 0.7),
    spread=st.floats(0, 0.25),
    borders=st.lists(st.floats(0.01, 0.99), max_size=4, unique=True).map(lambda values: sorted(values, reverse=True)),
    gentle_at=st.sampled_from(["high_noise", "low_noise"]),
)
def test_phase_sparsities_are_evenly_spread_around_the_weighted_mean(
    mean: float, spread: float, borders: list[float], gentle_at: phases.GentleAt
) -> None:
    try:
        chosen = phases.phase_sparsities(mean, spread=spread, borders=borders, gentle_at=gentle_at)
    except InputError:
        assume(False)
        return
    assert phases.mean_sparsity(chosen, borders) == pytest.approx(mean, abs=1e-12)
    gaps = torch.tensor(chosen, dtype=torch.float64).diff() * (1 if gentle_at == "high_noise" else -1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 2 * spread / max(len(borders), 1)), atol=1e-12, rtol=0)


def test_the_mean_sparsity_is_what_uniform_ratios_meet() -> None:
    sparsities, borders = (0.1, 0.5, 0.9), (0.8, 0.3)
    met = [sparsities[sum(t / 1000 < border for border in borders)] for t in range(1000)]
    assert phases.mean_sparsity(sparsities, borders) == pytest.approx(sum(met) / 1000, abs=1e-12)
    assert phases.mean_sparsity(sparsities, borders) == pytest.approx(0.2 * 0.1 + 0.5 * 0.5 + 0.3 * 0.9)


def test_impossible_sparsities_are_refused() -> None:
    with pytest.raises(InputError, match=r"of every phase must be in \[0, 1\), got \[-0.1, 0.3\]: lower the spread"):
        phases.phase_sparsities(0.1, spread=0.2, borders=[0.5])
    with pytest.raises(InputError, match=r"of every phase must be in \[0, 1\), got \[0.8, 1.0\]"):
        phases.phase_sparsities(0.9, spread=0.1, borders=[0.5])
    with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\), got 50 \(a fraction"):
        phases.phase_sparsities(50, spread=0.1, borders=[0.5])
    with pytest.raises(InputError, match=r"spread must not be negative, got -0\.1: turn the order round"):
        phases.phase_sparsities(0.5, spread=-0.1, borders=[0.5])
    with pytest.raises(InputError, match="borders must fall"):
        phases.phase_sparsities(0.5, spread=0.1, borders=[1.5])
    with pytest.raises(InputError, match="one more than borders"):
        phases.mean_sparsity([0.5], [0.5])
    with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\), got 1"):
        phases.mean_sparsity([0.5, 1.0], [0.5])


# Bytes


def test_bytes_by_hand() -> None:
    """Kept 3, 1 of 9 weights, both in one place; widths 0.25 and 0.75: 1.5 kept on average, 3 in the union, 4 one by one."""
    first, second = torch.zeros(3, 3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.bool)
    first[0], second[0, 0] = True, True
    got = phases.stored_bytes([{"a": first}, {"a": second}], borders=[0.75], bytes_per_weight=2)
    assert (got.all_phases, got.one_mask, got.dense) == (3 * 2 + 2 * 2, 3 + 2, 18)
    assert got.mean_sparsity == pytest.approx(7.5 / 9)
    apart = phases.stored_bytes([{"a": first}, {"a": second}], borders=[0.75], bytes_per_weight=2, shared_values=False)
    assert apart == replace(got, all_phases=4 * 2 + 2 * 2)
    half = phases.stored_bytes([{"a": first}, {"a": second}], borders=[0.75], bytes_per_weight=0.5)
    assert (half.all_phases, half.one_mask, half.dense) == (2 + 4, 1 + 2, 5)  # 1.5, 0.75 and 4.5 bytes rounded up


def test_bytes_equal_a_slow_count_over_matrices_of_several_shapes() -> None:
    stream, shapes, borders = generator(0), {"a": (5, 7), "b": (3, 16), "c": (1, 1)}, (0.9, 0.5)
    masks = [{name: torch.rand(shape, generator=stream) < keep for name, shape in shapes.items()} for keep in (0.7, 0.5, 0.2)]
    shared = apart = single = 0
    gone = 0.0
    for name, shape in shapes.items():
        lists = [mask[name].flatten().tolist() for mask in masks]
        bits = -(-shape[0] * shape[1] // 8)
        shared += 2 * sum(any(kept) for kept in zip(*lists, strict=True)) + 3 * bits
        apart += 2 * sum(sum(kept) for kept in lists) + 3 * bits
        mean = 0.1 * sum(lists[0]) + 0.4 * sum(lists[1]) + 0.5 * sum(lists[2])
        single += math.ceil(2 * mean - 1e-6) + bits
        gone += shape[0] * shape[1] - mean
    got = phases.stored_bytes(masks, borders=borders, bytes_per_weight=2)
    assert (got.all_phases, got.one_mask, got.dense) == (shared, single, 2 * (35 + 48 + 1))
    assert got.mean_sparsity == pytest.approx(gone / 84)
    assert phases.stored_bytes(masks, borders=borders, bytes_per_weight=2, shared_values=False).all_phases == apart != shared


def test_masks_of_one_sparsity_cost_what_their_union_adds() -> None:
    mask = torch.rand((8, 8), generator=generator(1)).argsort(1) < 4
    same = phases.stored_bytes([{"a": mask}, {"a": mask}], borders=[0.5], bytes_per_weight=2)
    assert (same.all_phases, same.one_mask, same.dense) == (64 + 16, 64 + 8, 128)
    opposite = phases.stored_bytes([{"a": mask}, {"a": ~mask}], borders=[0.5], bytes_per_weight=2)
    assert opposite.all_phases == 128 + 16 > opposite.dense


def test_masks_that_do_not_belong_together_are_refused() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    for other in ({"b": mask}, {"a": mask[:1]}, {"a": mask, "b": mask}):
        with pytest.raises(InputError, match="masks for the same matrices"):
            phases.stored_bytes([{"a": mask}, other], borders=[0.5], bytes_per_weight=2)
    with pytest.raises(InputError, match="masks for the same matrices"):
        phases.stored_bytes([{}, {}], borders=[0.5], bytes_per_weight=2)
    with pytest.raises(InputError, match="one more than borders"):
        phases.stored_bytes([{"a": mask}], borders=[0.5], bytes_per_weight=2)
    with pytest.raises(InputError, match="bytes_per_weight must be positive, got 0"):
        phases.stored_bytes([{"a": mask}, {"a": mask}], borders=[0.5], bytes_per_weight=0)


def test_the_masks_of_pruned_copies_are_counted_at_the_sparsity_they_were_pruned_to(plain: list[LanguageModel]) -> None:
    masks = [{layer.name: layer.module.weight != 0 for layer in one.layers} for one in plain]
    got = phases.stored_bytes(masks, borders=BORDERS, bytes_per_weight=2)
    weights = [torch.cat([layer.module.weight.flatten() for layer in one.layers])[None] for one in plain]
    measured = [float((weight == 0).double().mean()) for weight in weights]
    assert got.mean_sparsity == pytest.approx(phases.mean_sparsity(measured, BORDERS), abs=1e-9)
