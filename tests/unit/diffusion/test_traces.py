"""Traces of sinks along a generation: against separate forward passes, and on traces made by hand."""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.attention import masses as attention
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion import traces
from lib.models import loading
from lib.models.language_model import LanguageModel, network_body
from lib.studies.traces import views
from lib.studies.traces.figures import frontier_by_step, heads_at_mark, layers_by_step, position_by_step
from lib.studies.traces.tables import concentration, first_position_share, mass_by_state, rates_table, top_sinks_table, wander
from tests import tiny
from tests.unit import slow_variance as slow

PROMPTS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
SETTINGS: dict[str, Any] = {"positions": 16, "steps": 6}


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    model = tiny.model(tmp_path_factory.mktemp("ar"), causal=True)
    return model, traces.trace(model, PROMPTS, **SETTINGS)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    model = tiny.model(tmp_path_factory.mktemp("dlm"), causal=False)
    return model, traces.trace(model, PROMPTS, **SETTINGS)


def test_a_denoising_trace_holds_the_masses_of_what_the_network_read(diffusion):
    model, trace = diffusion
    for step in (0, 3, 5):
        mass = attention.sink_mass(model, trace.ids[:, step])
        torch.testing.assert_close(trace.mass[:, step], mass.mean(dim=(0, 2)), atol=1e-5, rtol=0)
        torch.testing.assert_close(trace.layer_mass[:, step], mass.mean(2).transpose(0, 1), atol=1e-5, rtol=0)
    half = attention.sink_mass(model, trace.ids[:, trace.mark_steps[1]])
    torch.testing.assert_close(trace.head_mass[:, 1], half.transpose(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_have_three_marks_all_the_same(diffusion, causal, steps):
    for model, _ in (diffusion, causal):
        trace = traces.trace(model, PROMPTS, positions=16, steps=steps, heads=True)
        heads: Any = trace.heads
        assert trace.head_mass.shape[1] == heads.value_norm.shape[1] == len(trace.mark_steps) == 3
        for mark, step in enumerate(trace.mark_steps):
            torch.testing.assert_close(trace.head_mass[:, mark].mean((1, 2)), trace.mass[:, step])


def test_denoising_starts_all_masked_and_unmasks_for_good(diffusion):
    _, trace = diffusion
    assert trace.is_masked[:, 0, 4:].all() and not trace.is_masked[:, :, :4].any()
    assert (trace.is_masked.int().diff(dim=1) <= 0).all()
    assert (trace.ids[trace.is_masked] == tiny.MASK).all()


def test_a_prefix_trace_equals_one_pass_a_prefix(causal):
    model, trace = causal
    assert trace.keys.tolist() == [6, 8, 10, 12, 14, 16]
    for step, keys in enumerate(trace.keys.tolist()):
        mass = attention.sink_mass(model, trace.ids[:, step, :keys]).mean(dim=(0, 2))
        torch.testing.assert_close(trace.mass[:, step, :keys], mass, atol=1e-5, rtol=0)
        assert (trace.mass[:, step, keys:] == 0).all()


def test_gu_rate_of_a_trace_counts_layers_and_heads_by_hand(causal):
    model, trace = causal
    sums = attention.sink_mass(model, trace.ids[:, 2, :10])
    by_hand = torch.tensor([[float(sums[layer, 1, head, 0] / 10 > 0.3) for head in range(4)] for layer in range(2)]).mean()
    assert trace.gu_rate[1, 2] == by_hand
    best = max(
        sum(float(sums[layer, 1, head, key] / (10 - key) > 0.3) for layer in range(2) for head in range(4)) / 8
        for key in range(10)
    )
    assert trace.gu_best[1, 2] == pytest.approx(best)


def test_the_frontier_is_the_first_mask_or_the_end_of_the_prefix(causal, diffusion):
    _, trace = diffusion
    for prompt in range(3):
        for step in range(6):
            masked = trace.is_masked[prompt, step].nonzero()
            assert trace.frontier[prompt, step] == (masked[0] if len(masked) else 16)
    assert causal[1].frontier[0].tolist() == causal[1].keys.tolist()


def test_relative_to_frontier_moves_with_it_and_leaves_out_absent_keys():
    mass = torch.arange(12.0).view(1, 2, 6).repeat(2, 1, 1)
    mass[1] += 100.0
    frontier = torch.tensor([[1, 2], [3, 2]])
    out = views.relative_to_frontier(mass, frontier, keys=torch.tensor([4, 6]), reach=2)
    # step 0: offsets -2..1 are positions -1 0 1 2 and 1 2 3 4, of which -1 and 4 do not exist
    assert out[0].tolist() == [101.0, (0 + 102) / 2, (1 + 103) / 2, 2.0]
    assert out[1].tolist() == [(6 + 106) / 2, (7 + 107) / 2, (8 + 108) / 2, (9 + 109) / 2]


def test_uniform_mass_is_that_of_a_network_without_preference(tmp_path):
    network = tiny.network(causal=True)
    for layer in network.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    network.save_pretrained(tmp_path)
    model = loading.load(tmp_path)
    mass = attention.sink_mass(model, PROMPTS.view(1, -1))[0, 0, 0]
    torch.testing.assert_close(mass, views.uniform_mass(12, is_causal=True), atol=1e-5, rtol=0)
    assert views.uniform_mass(12, is_causal=False).tolist() == [1.0] * 12


def test_attention_maps_have_rows_that_sum_to_one_and_columns_that_are_the_masses(causal, diffusion):
    model, trace = diffusion
    maps = views.attention_maps(model, trace, prompt=1, steps=[0, 5])
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.sum(1), trace.mass[1, [0, 5]], atol=1e-5, rtol=0)
    model, trace = causal
    first = views.attention_maps(model, trace, prompt=0, steps=[0])[0]
    assert (first[:, 6:] == 0).all() and (first[6:] == 0).all() and (first.triu(1) == 0).all()


def test_statistics_of_a_trace_made_by_hand(diffusion):
    mass = torch.ones(3, 6, 16)
    mass[0, :, 0] = 5.0  # never moves, at the first position
    mass[1, torch.arange(6), torch.tensor([2, 2, 2, 7, 7, 3])] = 5.0
    mass[2, :, 9] = 5.0
    trace = dataclasses.replace(diffusion[1], mass=mass)
    assert first_position_share(trace).tolist() == [1.0, 0.0, 0.0]
    assert wander(trace).tolist() == [0.0, 0.5, 0.0]
    torch.testing.assert_close(concentration(trace, k=1), torch.full((3,), 5.0 / 20.0))


def test_concentration_of_a_causal_model_is_that_of_the_full_text(causal):
    _, trace = causal
    expected = trace.mass[:, -1].sort(descending=True).values[:, :5].sum(-1) / trace.mass[:, -1].sum(-1)
    torch.testing.assert_close(concentration(trace, k=5), expected)


def test_mass_by_state_is_the_mean_over_masks_and_written_tokens(diffusion):
    _, trace = diffusion
    table = mass_by_state(trace)
    step = trace.mark_steps[1]
    written = [trace.mass[p, step, i] for p in range(3) for i in range(16) if not trace.is_masked[p, step, i]]
    assert table.loc[1, "written"] == pytest.approx(float(torch.stack(written).mean()))
    beside = [
        trace.mass[p, step, i]
        for p in range(3)
        for i in range(16)
        if trace.is_masked[p, step, i]
        and (not trace.is_masked[p, step, i - 1] or (i < 15 and not trace.is_masked[p, step, i + 1]))
    ]
    assert table.loc[1, "mask beside written"] == pytest.approx(float(torch.stack(beside).mean()))


def test_tables_and_figures_cover_every_model(causal, diffusion):
    both = [dataclasses.replace(diffusion[1], name="dlm"), dataclasses.replace(causal[1], name="ar")]
    table = top_sinks_table(both, {"dlm": tiny.words(), "ar": tiny.words()}, k=3, seed=0)
    assert table["model"].tolist() == ["dlm"] * 3 + ["ar"] * 3
    assert table["keys"].tolist() == [16] * 3 + [10, 12, 14]
    assert all(table["top-3 share, %, low"].to_numpy() <= table["top-3 share, %"].to_numpy())
    assert set(rates_table(both, k=3, seed=0)["model"]) == {"dlm", "ar"}
    drawn = [position_by_step(both)[1], frontier_by_step(both, reach=8)[1], layers_by_step(both)[1], heads_at_mark(both)[1]]
    assert all(set(data["model"]) == {"dlm", "ar"} for data in drawn)
    cell = drawn[0].query("model == 'ar' and step == 2")
    assert cell["3"].item() == pytest.approx(float(both[1].mass[0, 2, 3]))
    assert cell["12"].isna().item()


def test_a_text_longer_than_the_model_can_read_is_refused(causal, diffusion):
    for model in (causal[0], diffusion[0]):
        with pytest.raises(InputError, match="at most 64"):
            traces.trace(model, PROMPTS, positions=65, steps=6)


# --- single layers and heads -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def causal_heads(causal):
    return causal[0], traces.trace(causal[0], PROMPTS, **SETTINGS, heads=True)


@pytest.fixture(scope="module")
def diffusion_heads(diffusion):
    return diffusion[0], traces.trace(diffusion[0], PROMPTS, **SETTINGS, heads=True)


def maps_and_values(model, ids):
    """Eager attention `[layer, head, query, key]` of one text, and the norms of its value vectors."""
    model.network.set_attn_implementation("eager")
    out = network_body(model)(input_ids=ids[None], output_attentions=True, output_hidden_states=True, use_cache=False)
    model.network.set_attn_implementation("sdpa")
    norms = []
    for layer, states in zip(model.network.get_decoder().layers, out.hidden_states, strict=False):  # pyright: ignore
        norms.append(layer.self_attn.v_proj(layer.input_layernorm(states[0])).view(len(ids), -1, 8).norm(dim=-1).T)
    return torch.stack(out.attentions)[:, 0].detach(), torch.stack(norms).detach()


def above_release(masses):
    mean = slow.average(masses)
    return [mass > mean + 2 * slow.variance(masses) ** 0.5 for mass in masses]


@pytest.mark.parametrize("kind", ["causal_heads", "diffusion_heads"])
def test_single_heads_of_every_step_equal_a_pass_of_their_own(kind, request):
    """A diffusion model reads what it had at that step, an autoregressive one the prefix alone; later keys are no sinks."""
    model, trace = request.getfixturevalue(kind)
    heads, found = trace.heads, {"rulli_sets": 0, "sets": 0}
    for prompt in range(3):
        for step, keys in enumerate(trace.keys.tolist()):
            maps, norms = maps_and_values(model, trace.ids[prompt, step, :keys])
            for layer in range(2):
                for head in range(4):
                    rows = maps[layer, head].tolist()
                    sums = [sum(row[key] for row in rows) for key in range(keys)]
                    for name, expected in (("rulli_sets", slow.rulli_sinks(rows, 3.0)), ("sets", above_release(sums))):
                        got = getattr(heads, name)[prompt, step, layer, head]
                        assert got.tolist() == [*expected, *[False] * (16 - keys)]
                        found[name] += sum(expected)
                favourites = slow.argmax_sets([maps[layer].tolist()])[0]
                assert set(heads.favourites[prompt, step, layer].nonzero()[:, 0].tolist()) == favourites
                score = slow.average([slow.first_token_score(rows) for rows in maps[layer].tolist()])
                assert float(heads.first_score[prompt, step, layer]) == pytest.approx(score, abs=1e-5)
            if step in trace.mark_steps:
                mark = trace.mark_steps.index(step)
                torch.testing.assert_close(heads.value_norm[prompt, mark, :, :, :keys], norms, atol=1e-4, rtol=0)
    assert found["rulli_sets"] > 30 and found["sets"] > 30  # there was something to compare


@pytest.mark.parametrize("kind", ["causal", "diffusion"])
def test_heads_are_kept_on_request_and_change_nothing_else(kind, request):
    plain, full = request.getfixturevalue(kind)[1], request.getfixturevalue(f"{kind}_heads")[1]
    assert plain.heads is None
    for field in dataclasses.fields(plain):
        one, other = getattr(plain, field.name), getattr(full, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else field.name == "heads" or one == other
    assert full.heads.value_norm.shape == (3, 3, 2, 2, 16)


# --- how a text is generated -------------------------------------------------------------------------------------------


def test_the_finished_text_is_kept(causal, diffusion):
    for _, trace in (causal, diffusion):
        assert torch.equal(trace.texts[:, :4], PROMPTS)
    model, trace = causal
    assert torch.equal(trace.texts, trace.ids[:, -1])
    # the last step of an autoregressive trace is a plain pass over the finished text
    mass = attention.sink_mass(model, trace.texts)
    torch.testing.assert_close(trace.mass[:, -1], mass.mean(dim=(0, 2)), atol=1e-5, rtol=0)
    # the last step of a denoising trace still has masks, and what is written stays
    _, trace = diffusion
    written = ~trace.is_masked[:, -1]
    assert torch.equal(trace.texts[written], trace.ids[:, -1][written])
    assert not written.all()


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"remasking": "random"}, {"block_length": 4}], ids=lambda o: next(iter(o))
)
def test_a_setting_of_the_sampler_reaches_it_and_is_reproducible(diffusion, options):
    model, greedy = diffusion
    if "block_length" in options:
        once = traces.trace(model, PROMPTS, **SETTINGS, **options)
        # three blocks of two steps each: the second block starts when the first is written
        assert not once.is_masked[:, 2, 4:8].any() and once.is_masked[:, 1, 8:].all()
        assert greedy.is_masked[:, 2, 4:8].any()
        return
    first, again, other = (
        traces.trace(model, PROMPTS, **SETTINGS, **options, generator=generator(seed, "sampling")) for seed in (0, 0, 1)
    )
    assert torch.equal(first.ids, again.ids) and torch.equal(first.mass, again.mass) and torch.equal(first.texts, again.texts)
    assert not torch.equal(first.is_masked, other.is_masked)
    assert not torch.equal(first.is_masked, greedy.is_masked)
    assert first.is_masked.sum(-1).tolist() == greedy.is_masked.sum(-1).tolist()  # as many a step, but other ones
    with pytest.raises(InputError, match="must be given a generator"):
        traces.trace(model, PROMPTS, **SETTINGS, **options)


def test_sampled_continuations_are_reproducible(causal):
    model, greedy = causal
    first, again, other = (
        traces.trace(model, PROMPTS, **SETTINGS, temperature=1.0, generator=generator(seed, "sampling")) for seed in (0, 0, 1)
    )
    assert torch.equal(first.texts, again.texts)
    assert not torch.equal(first.texts, other.texts) and not torch.equal(first.texts, greedy.texts)


@pytest.mark.parametrize("kind", ["causal", "diffusion"])
def test_single_heads_of_any_step_are_those_of_the_trace(kind, request):
    model, trace = request.getfixturevalue(kind)
    heads = views.head_masses(model, trace, prompt=1, steps=list(trace.mark_steps))
    torch.testing.assert_close(heads, trace.head_mass[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "diffusion"])
def test_a_scene_keeps_as_much_as_fits(kind, request):
    model, trace = request.getfixturevalue(kind)
    model = replace(model, tokenizer=tiny.words())
    heads, positions = trace.head_mass.shape[3:]
    steps, layers = trace.mass.shape[1], trace.head_mass.shape[2]
    whole = views.scene(model, trace, prompt=1)
    assert whole.mass.shape == (steps, layers, heads, positions) and whole.depth == layers
    average = whole.mass[:, :, :, : int(trace.keys[0])].mean((1, 2))
    np.testing.assert_allclose(average, trace.mass[1, :, : int(trace.keys[0])].numpy(), rtol=1e-4, atol=1e-5)
    assert whole.masked.tolist() == trace.is_masked[1].tolist()
    few = views.scene(model, trace, values=3 * heads * positions)
    assert (len(few.steps), few.layers) == (3, ["layer 0"]) and few.steps[-1] == whole.steps[-1]


class Bar:
    """Takes the place of a bar."""

    def __init__(self, work: Any = None, **options: Any) -> None:
        self.work, self.options, self.moved = work, options, 0
        BARS.append(self)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.options["closed"] = True

    def __iter__(self) -> Iterator[Any]:
        for each in self.work:
            self.moved += 1
            yield each

    def update(self) -> None:
        self.moved += 1


BARS: list[Bar] = []


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_trace_moves_a_bar_to_its_end(is_causal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step at a time, or a text at a time; and where nobody watches nothing is drawn."""
    model = tiny.model(tmp_path, causal=is_causal)
    monkeypatch.setattr(traces, "progress", Bar)
    BARS.clear()
    traces.trace(model, PROMPTS, **SETTINGS)
    (bar,) = BARS
    assert bar.moved == (len(PROMPTS) if is_causal else SETTINGS["steps"]) and bar.options["desc"] == model.name
    assert is_causal or (bar.options["total"], bar.options["closed"]) == (SETTINGS["steps"], True)


def test_no_bar_is_drawn_where_nobody_watches(
    diffusion: tuple[LanguageModel, traces.SinkTrace], capsys: pytest.CaptureFixture[str]
) -> None:
    model, trace = diffusion
    again = traces.trace(model, PROMPTS, **SETTINGS)
    assert torch.equal(again.mass, trace.mass) and capsys.readouterr().err == ""
