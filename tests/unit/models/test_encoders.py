"""A tiny DistilBERT folder: logits, masses, pruning, bound, text and export equal what transformers' own class gives."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import DistilBertConfig, DistilBertForMaskedLM

from lib.attention import masses
from lib.calibration import one_shot, reads, sets
from lib.calibration.statistics import CalibrationSet
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.decoding import decoder, systems
from lib.decoding.commit import EntropyBound
from lib.decoding.speculation import speculate
from lib.diffusion import drawn_likelihood, likelihood, ragged, sampler, traces
from lib.diffusion.commits import DenoisingStep
from lib.diffusion.noise import process_of
from lib.evaluation import pseudo_perplexity, scoring
from lib.models import export, loading, official, streaming
from lib.models.gguf import export as gguf
from lib.models.language_model import LanguageModel, closing_token, logits_at, may_be_noised
from lib.pruning import methods, phases, pruner, shrink
from lib.quantization import folding
from lib.studies.joint import runs as joint_runs
from lib.studies.variance import noise_match, sink_effect
from tests import tiny

IDS = tiny.ids(3, 16)
EVERYWHERE = torch.ones_like(IDS, dtype=torch.bool)
PADDED = torch.ones_like(IDS)
PADDED[0, 10:] = 0
ROLES = ("q", "k", "v", "o", "up", "down")


def network(**changes: Any) -> DistilBertForMaskedLM:
    """A network whose biases and norms are far from 0 and 1, so that leaving one out shows."""
    shape: dict[str, Any] = {
        "vocab_size": tiny.VOCAB,
        "dim": 32,
        "hidden_dim": 40,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 64,
    }
    config = DistilBertConfig(**{**shape, "initializer_range": 0.3, **changes})
    config.mask_token_id = tiny.MASK  # type: ignore[attr-defined]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = DistilBertForMaskedLM(config).eval()
        for parameter in made.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.5, 0.3)
    return made.requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def model(folder: Path) -> LanguageModel:
    return loading.load(folder)


def eager() -> DistilBertForMaskedLM:
    made = network()
    made.set_attn_implementation("eager")
    return made


def test_what_is_known_of_it(model: LanguageModel) -> None:
    assert (model.family, model.kind, model.attention, model.logit_shift) == ("distilbert", "masked diffusion", "full", 0)
    assert [layer.role for layer in model.by_block[1]] == list(ROLES)
    assert model.mask_token_id == tiny.MASK
    state = model.network.state_dict()
    assert all(torch.equal(state[layer.name], layer.module.weight) for layer in model.layers)


def test_logits_are_those_of_transformers(model: LanguageModel) -> None:
    wanted = eager()(input_ids=IDS).logits
    torch.testing.assert_close(logits_at(model, IDS, EVERYWHERE), wanted.flatten(0, 1), rtol=1e-5, atol=1e-5)
    wanted = eager()(input_ids=IDS, attention_mask=PADDED).logits[PADDED.bool()]
    torch.testing.assert_close(logits_at(model, IDS, PADDED.bool(), attention_mask=PADDED), wanted, rtol=1e-5, atol=1e-5)


def test_masses_are_sums_of_the_eager_attention(model: LanguageModel) -> None:
    wanted = torch.stack(eager()(input_ids=IDS, output_attentions=True).attentions)
    torch.testing.assert_close(masses.sink_mass(model, IDS), wanted.sum(-2), rtol=1e-5, atol=1e-6)
    wanted = torch.stack(eager()(input_ids=IDS, attention_mask=PADDED, output_attentions=True).attentions)
    real = torch.where(PADDED.bool()[None, :, None, :, None], wanted, 0.0).sum(-2)
    torch.testing.assert_close(masses.sink_mass(model, IDS, attention_mask=PADDED), real, rtol=1e-5, atol=1e-6)
    assert float(wanted.sum(-2).std()) > 0.1  # far from uniform


def test_a_key_can_be_blocked_in_one_layer(model: LanguageModel) -> None:
    """The recorder sees what later layers make of it: the first layer's masses stay, those behind the block change."""
    layers: list[int] = []

    def choose(layer: int, mass: torch.Tensor) -> torch.Tensor | None:
        layers.append(layer)
        blocked = torch.zeros_like(mass, dtype=torch.bool)
        blocked[..., 0] = True
        return blocked if layer == 0 else None

    plain = masses.sink_mass(model, IDS)
    with masses.blocking(model, choose):
        without = masses.sink_mass(model, IDS)
    assert layers == [0, 1]
    assert torch.equal(without[0], plain[0]) and not torch.allclose(without[1], plain[1], atol=1e-3)


def test_norms_and_hessians_are_of_what_each_matrix_reads(model: LanguageModel) -> None:
    """By hooks on transformers' own network: five tensors are read in a block, `up` reads one of its own."""
    seen: dict[str, torch.Tensor] = {}
    own = network()
    for name, module in own.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layer." in name:
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.update({f"{name}.weight": inputs[0].flatten(0, 1)})
            )
    own(input_ids=IDS)
    for hessian in (False, True):
        found = one_shot.dense_statistics(model, CalibrationSet(IDS), hessian=hessian)
        for layer in model.layers:
            statistics = reads.statistics_of(found[layer.block], layer.role)
            torch.testing.assert_close(statistics.squares[0], seen[layer.name].square().sum(0), rtol=1e-4, atol=1e-4)
            if hessian:
                products = seen[layer.name].T @ seen[layer.name]
                torch.testing.assert_close(statistics.products, products, rtol=1e-4, atol=1e-3)
    kept = one_shot.input_bytes(model, samples=1, positions=1)
    assert kept == 2 * 4 * (3 * 32 + 40)  # q, o and up read states, down reads the MLP's width


def test_wanda_keeps_exactly_what_its_scores_say(model: LanguageModel) -> None:
    """One-shot on clean text, by the formula: |W| times the norm of the input; biases, norms and head stay as they were."""
    found = one_shot.dense_statistics(model, CalibrationSet(IDS))
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    wanted = {}
    for layer in model.layers:
        norm = reads.statistics_of(found[layer.block], layer.role).squares[0].sqrt()
        score = layer.module.weight.abs() * norm
        drop = score.argsort(dim=1, stable=True)[:, : score.shape[1] // 2]
        wanted[layer.name] = layer.module.weight.clone().scatter_(1, drop, 0.0)
    method = methods.Method("wanda", sequential=False)
    pruner.prune_with_(model, method, methods.Target(0.5), found)
    after = model.network.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], wanted.get(name, value)), name


def test_pruned_and_written_in_its_own_layout(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    """A tied head is stored once; the files keep every name, and transformers' class reads them."""
    pruner.prune_(model, methods.METHODS["magnitude"], methods.Target(0.5))
    written = official.save_as_read(model, tmp_path / "pruned")
    assert load_file(written / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert torch.equal(logits_at(loading.load(written), IDS, EVERYWHERE), logits_at(model, IDS, EVERYWHERE))


@pytest.mark.parametrize("name", ["Wanda", "sink-aware (Wanda)", "SparseGPT", "magnitude"])
def test_pruned_written_and_read_again(name: str, model: LanguageModel, tmp_path: Path) -> None:
    pruner.prune_(model, methods.METHODS[name], methods.Target(0.5), windows=IDS, seed=0)
    assert pruner.measured_sparsity(model) == 0.5
    written = export.save_plain(model, tmp_path / "pruned")
    assert torch.equal(logits_at(loading.load(written), IDS, EVERYWHERE), logits_at(model, IDS, EVERYWHERE))
    plain = DistilBertForMaskedLM.from_pretrained(written).eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits.flatten(0, 1), logits_at(model, IDS, EVERYWHERE), rtol=1e-5, atol=1e-5)


def test_bound_and_text(model: LanguageModel) -> None:
    first = likelihood.nelbo(model, IDS, draws=4, seed=0)
    again = likelihood.nelbo(model, IDS, draws=4, seed=0, batch_size=3)
    torch.testing.assert_close(first.per_window, again.per_window, rtol=1e-5, atol=1e-6)
    text = sampler.sample(model, IDS[:, :8], new_tokens=8, steps=8, block_length=4)
    assert torch.equal(text[:, :8], IDS[:, :8]) and not bool((text == tiny.MASK).any())
    same = decoder.decode(model, IDS[:, :8], new_tokens=8, block_length=4, plan=systems.fast_plan(steps_per_block=4))
    assert torch.equal(same.ids, text)


def test_tokens_that_are_always_shown_are_neither_masked_nor_counted(folder: Path, tmp_path: Path) -> None:
    """[CLS] and [SEP] stand at the ends of a row and once within; a bound that masked or counted them would be another number."""
    model = loading.load(tiny.edit_config(folder, seen_token_ids=[1, 2]))
    assert model.seen_token_ids == (1, 2)
    windows = tiny.ids(4, 12) % 20 + 3
    windows[:, 0], windows[:, -1], windows[1, 5] = 1, 2, 2
    found = likelihood.nelbo(model, windows, draws=6, seed=0)
    slow = []
    for index, window in enumerate(windows):
        is_text = window > 2
        masks = likelihood.exact_count_masks(is_text, 6, generator=generator(0, "nelbo", index))
        assert not bool(masks[:, ~is_text].any())
        costs = []
        for mask in masks:
            logits = logits_at(model, window.masked_fill(mask, tiny.MASK)[None], mask[None])
            costs.append(torch.nn.functional.cross_entropy(logits, window[mask]))
        slow.append(torch.stack(costs).mean())
    torch.testing.assert_close(found.per_window.float(), torch.stack(slow), rtol=1e-5, atol=1e-5)
    noised = sets.noised_windows(model, windows, seed=0)
    shown = (windows < 3)[:, None].expand(noised.shape)
    assert torch.equal(noised[shown], windows[:, None].expand(noised.shape)[shown])
    assert bool((noised[:, -1][windows > 2] == tiny.MASK).all())  # the last level hides all others
    again = loading.load(export.save_plain(model, tmp_path / "again"))
    assert again.seen_token_ids == (1, 2)
    with pytest.raises(InputError, match="seen_token_ids must be among the 31 tokens of the network, got"):
        loading.load(tiny.edit_config(folder, seen_token_ids=[99]))


# --- what is never hidden: [CLS] is 1, [SEP] is 2 and ends a text -----------------------------------------------------------


@pytest.fixture
def shown(folder: Path) -> LanguageModel:
    return loading.load(tiny.edit_config(folder, seen_token_ids=[1, 2], eos_token_id=2))


def framed_windows() -> torch.Tensor:
    """Rows with one [SEP] within and one with two, so that rows differ in how many tokens may be hidden."""
    windows = tiny.ids(3, 14) % 20 + 3
    windows[:, 0], windows[:, -1], windows[1, 5], windows[2, 4], windows[2, 9] = 1, 2, 2, 2, 2
    return windows


def cross_entropies(model: LanguageModel, ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Of the tokens of one row that are hidden."""
    logits = logits_at(model, ids.masked_fill(where, tiny.MASK)[None], where[None])
    return torch.nn.functional.cross_entropy(logits, ids[where], reduction="none")


class Reads:
    """Takes the place of a function of (model, ids, ...) and keeps the ids."""

    def __init__(self, real: Any) -> None:
        self.real, self.ids = real, []

    def __call__(self, model: LanguageModel, ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        self.ids.append(ids.clone())
        return self.real(model, ids, *rest, **options)


def test_the_loss_by_mask_ratio_hides_text_alone(shown: LanguageModel) -> None:
    """Half of 12, 11 and 10 tokens is 6, 6 and 5: counts of whole rows would be 7, and would hide special tokens."""
    windows = framed_windows()
    found = joint_runs.loss_by_noise(shown, windows, ratios=[0.5, 0.05, 1.0], seed=0, batch_size=2)
    for ratio, values in zip((0.5, 0.05, 1.0), found, strict=True):
        draws = torch.rand(windows.shape, generator=generator(0, "loss by noise", f"{ratio:g}"))
        for window, draw, value in zip(windows, draws, values, strict=True):
            text = window > 2
            count = max(1, round(ratio * int(text.sum())))
            where = torch.zeros_like(text)
            where[draw.masked_fill(~text, 2.0).argsort()[:count]] = True
            torch.testing.assert_close(value.float(), cross_entropies(shown, window, where).mean(), rtol=1e-5, atol=1e-5)


def test_random_masks_of_a_generation_hide_text_alone(shown: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = traces.trace(shown, framed_windows()[:, :4], positions=14, steps=5)
    reads = Reads(masses.sink_mass)
    monkeypatch.setattr(noise_match.masses, "sink_mass", reads)
    noise_match.match(shown, trace, ratios=[0.99, 0.5], generator=generator(0))
    may, seen = may_be_noised(shown, trace.texts), trace.texts < 3
    assert len(reads.ids) == 8 and bool(seen[:, [0, -1]].all())
    steps = noise_match.matching_steps(trace, [0.99, 0.5])
    for number, ids in enumerate(reads.ids):
        assert torch.equal(ids[seen], trace.texts[seen])
        hidden = trace.is_masked[:, steps[number % 2]].sum(1)
        most = (may & (torch.arange(14) >= 4 * (number > 3))).sum(1)
        assert torch.equal((ids == tiny.MASK).sum(1), torch.minimum(hidden, most))


def test_the_frequency_of_sinks_is_counted_over_masks_of_text(shown: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, window = Reads(masses.sink_mass), framed_windows()[2]
    monkeypatch.setattr(sink_effect.attention, "sink_mass", reads)
    sink_effect.window_frequency_variance(shown, window, top_k=2, steps=10, stream=generator(0, "x"))
    (ids,) = reads.ids
    assert bool((ids[:, window < 3] == window[window < 3]).all())
    assert sorted((ids == tiny.MASK).sum(1).tolist()) == list(range(1, 11))  # all counts of its ten tokens


def test_likelihoods_of_answers_leave_special_tokens_out(shown: LanguageModel) -> None:
    """An answer that ends with [SEP], as `sums.answer_loss` and a harness may write it, costs what its text costs."""
    ids = torch.tensor([1, 5, 6, 2, 7, 8, 9, 2])
    answer = torch.arange(8) >= 3
    text = answer & (ids > 2)
    found, wanted = (
        likelihood.masked_log_likelihood(shown, ids, where, draws=4, generator=generator(0, "a")) for where in (answer, text)
    )
    assert torch.equal(found, wanted)
    settings = scoring.EvaluationSettings(draws=4)
    one = scoring.Passage((1, 5, 6, 7, 2), 3, ("one",))
    nothing = scoring.Passage((1, 5, 6, 7, 2), 4, ("nothing",))
    (value, _), (none, _) = scoring.score(shown, [one, nothing], settings=settings)
    row = torch.tensor(one.ids)
    assert value == pytest.approx(-float(cross_entropies(shown, row, row == 7)[0]), rel=1e-5) and none == 0.0


def test_a_pseudo_perplexity_leaves_special_tokens_out(shown: LanguageModel) -> None:
    window = torch.tensor([1, 5, 6, 7, 2])
    found = pseudo_perplexity.pseudo_perplexity(shown, window[None], answer_tokens=2, draws=3, seed=0)
    assert float(found.per_window[0]) == pytest.approx(float(cross_entropies(shown, window, window == 7)[0]), rel=1e-5)
    with pytest.raises(InputError, match="an answer must have a token that may be hidden, got none in window 0: leave it out"):
        pseudo_perplexity.pseudo_perplexity(shown, window[None], answer_tokens=1, draws=3, seed=0)


def test_the_bound_of_other_noise_leaves_special_tokens_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loading.load(tiny.edit_config(folder, seen_token_ids=[1, 2], noise={"kind": "uniform"}))
    windows, reads = framed_windows(), Reads(logits_at)
    monkeypatch.setattr(drawn_likelihood, "logits_at", reads)
    found = likelihood.nelbo(model, windows, draws=3, seed=0).per_window
    seen = (windows < 3).repeat_interleave(3, 0)
    assert torch.equal(torch.cat(reads.ids)[seen], windows.repeat_interleave(3, 0)[seen])
    for index, window in enumerate(windows):
        options = {"draws": 3, "generator": generator(0, "nelbo", index)}
        wanted = -drawn_likelihood.log_likelihood(model, process_of(model), window, window > 2, **options).mean()
        torch.testing.assert_close(found[index], wanted / (window > 2).sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [4, 10])
def test_generations_stand_between_the_frame_of_training(shown: LanguageModel, steps: int) -> None:
    """The last new token is [SEP] from the first step on, neither masked nor counted as written; 10 steps write 9 tokens."""
    assert closing_token(shown) == 2
    prompts = framed_windows()[:, :4]
    trace = traces.trace(shown, prompts, positions=14, steps=steps)
    assert bool((trace.ids[:, :, -1] == 2).all()) and not bool(trace.is_masked[:, :, -1].any())
    assert bool(trace.is_masked[:, 0, 4:-1].all()) and bool(may_be_noised(shown, trace.texts[:, 4:-1]).all())
    assert not bool((trace.texts == tiny.MASK).any())
    plain = sampler.sample(shown, prompts, new_tokens=10, steps=steps)
    assert not torch.equal(plain, trace.texts)
    states = sets.trajectory_states(shown, framed_windows(), prompt_tokens=4, steps=10, at=[0.0, 0.5], seed=0)
    assert bool((states[:, :, -1] == 2).all()) and bool((states[:, 0, 4:-1] == tiny.MASK).all())


def test_every_decoder_writes_what_the_sampler_may_write(shown: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is made to prefer [SEP] everywhere, then the mask."""
    head = cast(Any, shown.network).vocab_projector
    monkeypatch.setitem(head._parameters, "bias", torch.nn.Parameter(head.bias.detach().clone(), requires_grad=False))
    head.bias[[2, tiny.MASK]] = torch.tensor([90.0, 80.0])
    prompts, sizes = framed_windows()[:2, :4], dict[str, Any](new_tokens=6, block_length=3)
    plain = sampler.sample(shown, prompts, steps=6, **sizes)[:, 4:]
    assert not bool(torch.isin(plain, torch.tensor([1, 2, tiny.MASK])).any())
    uneven = [*prompts.tolist(), [1, 5]]  # another length, so that texts are padded
    written = {
        "padded": ragged.denoise(shown, uneven, steps=6, **sizes)[:2],
        "decoded": decoder.decode(shown, prompts, **sizes, plan=systems.fast_plan(steps_per_block=3)).ids[:, 4:],
        "drafted": torch.cat([speculate(shown, row, **sizes, drafts=2).ids for row in prompts.split(1)])[:, 4:],
    }
    for name, text in written.items():
        assert torch.equal(text, plain), name
    bound = decoder.decode(shown, prompts, **sizes, plan=decoder.DecodingPlan(EntropyBound(1e9)))
    assert bound.forwards == 2, "what is never written has no entropy"


def test_guidance_masks_no_special_tokens(shown: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, steps = Reads(logits_at), list[DenoisingStep]()
    monkeypatch.setattr(sampler, "logits_at", reads)
    prompt = torch.tensor([[1, 5, 2, 6]])
    sampler.sample(shown, prompt, new_tokens=4, steps=2, cfg_scale=1.0, on_step=steps.append)
    assert len(steps) == 2
    assert [ids[1, :4].tolist() for ids in reads.ids] == [[1, tiny.MASK, 2, tiny.MASK]] * 2


def test_an_encoders_tokenizer_says_what_is_always_shown(folder: Path) -> None:
    made = tiny.tokenizer()
    made.add_special_tokens({"cls_token": "[BOS]", "sep_token": "[EOS]"})
    made.save_pretrained(folder)
    assert loading.load(folder).seen_token_ids == (made.cls_token_id, made.sep_token_id) == (1, 2)


def test_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    made = network(tie_word_embeddings=False)
    made.save_pretrained(tmp_path / "own")
    found = loading.load(tmp_path / "own")
    wanted = made(input_ids=IDS).logits.flatten(0, 1)
    torch.testing.assert_close(logits_at(found, IDS, EVERYWHERE), wanted, rtol=1e-5, atol=1e-5)


def test_more_than_its_positions_are_refused(model: LanguageModel) -> None:
    assert logits_at(model, tiny.ids(1, 64), torch.ones(1, 64, dtype=torch.bool)).isfinite().all()
    with pytest.raises(InputError, match="must have at most 64 positions, got 65"):
        logits_at(model, tiny.ids(1, 65), torch.ones(1, 65, dtype=torch.bool))


def test_a_layer_at_fault_is_named(model: LanguageModel) -> None:
    model.network.state_dict()["distilbert.transformer.layer.1.ffn.lin1.weight"][0, 0] = float("nan")
    with pytest.raises(InputError, match=r"mend distilbert\.transformer\.layer\.1\.ffn\.lin1\.weight"):
        logits_at(model, IDS, EVERYWHERE)


def test_what_needs_a_decoder_says_so_in_one_line(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    plan = systems.fast_plan(cache="dual", steps_per_block=2)
    refused = {
        "a cache of keys and values": lambda: decoder.decode(model, IDS[:, :8], new_tokens=4, block_length=2, plan=plan),
        "a model of phases": lambda: phases.phased(model, [model, model], borders=[0.5]),
        "a packed checkpoint": lambda: export.save_packed(model, tmp_path / "packed", quantized={}),
        "a rewritten model": lambda: folding.check_dense(model),
        "a streamed model": lambda: streaming.load(folder),
        "a model spread over devices": lambda: loading.load(folder, device_map={"": "cpu"}),
        "heads and channels": lambda: shrink.choose(model, sparsity=0.5),
        "a GGUF export": lambda: gguf.save_gguf(model, tmp_path / "x.gguf"),
    }
    for what, call in refused.items():
        with pytest.raises(InputError, match=f"^{what} must be") as caught:
            call()
        assert "\n" not in str(caught.value) and str(caught.value).count(": ") >= 1
