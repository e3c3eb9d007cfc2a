"""The training of the family end to end at a toy size: five members, kills and resumes, masks and losses by brute force."""

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lib.checkpoints import facts
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion import traces
from lib.diffusion.noise import process_of
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.tasks import LoadedTask, evaluate, local_task
from lib.models import load
from lib.models.language_model import tokenizer_of
from lib.pruning import pruner
from lib.pruning.methods import METHODS, Target
from lib.studies.pruning import runs
from lib.studies.pruning.bench import Bench
from lib.studies.variance import sink_effect
from lib.texts import articles
from recipes import tokenizer
from recipes.family import batches, cards, dose, objectives, progress, recipe, scaling, sources, train
from recipes.family.batches import Rows
from recipes.family.objectives import MEMBERS, Member
from recipes.family.recipe import Recipe
from recipes.family.train import Pace

TOY = Recipe(
    steps=6,
    text_rows=3,
    tasks_share=0.02,
    length=40,
    vocab_size=600,
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=4,
    kv_heads=2,
    warmup_steps=2,
    eval_windows=2,
    eval_documents=2,
)
TEXT = "The river of number {0} is {0} km long and flows past the town of {0} to the sea. "
PACE = Pace(measure_every=3)
TEXTS = ("calibration", "evaluation")
every_member = pytest.mark.parametrize("member", MEMBERS)


@pytest.fixture(autouse=True)
def small_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts by hand instead of published packages, few task documents for the tokenizer, float32 everywhere."""
    found = {"rivers": [sources.Document(f"river {number}", TEXT.format(number) * 3) for number in range(80)]}
    rows = [
        {"title": f"River {n}", "extract": TEXT.format(n), "description": f"river {n}", "topic": "Geography"} for n in range(60)
    ]
    monkeypatch.setattr(sources, "documents", lambda folder: found)
    monkeypatch.setattr(sources, "articles", lambda folder: rows)
    monkeypatch.setattr(train, "TOKENIZER_TASKS", 30)
    # A tokenizer of few words makes more tokens of a question than the family's own.
    monkeypatch.setattr(batches, "WIDTHS", {task: max(64, width) for task, width in batches.WIDTHS.items()})
    monkeypatch.setattr(train.processor, "is_bfloat16_faster", lambda: False)


def run(member: Member, folder: Path, *, toy: Recipe = TOY, pace: Pace = PACE) -> Path:
    """Train below `folder` and return the model folder."""
    out = folder / "models" / member
    train.train(member, toy, folder=folder / "work", out=out, pace=pace)
    return out


@every_member
def test_a_stopped_run_goes_on_to_bit_identical_weights(member: Member, tmp_path: Path) -> None:
    whole = run(member, tmp_path / "whole")
    run(member, tmp_path / "cut", pace=Pace(measure_every=3, stop_after=2))
    assert not (tmp_path / "cut" / "models").exists()
    resumed = run(member, tmp_path / "cut")
    states = [load_file(tmp_path / name / "work" / member / "state.safetensors") for name in ("whole", "cut")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # float32 weights and moments
    logs = [json.loads((folder / "training_log.json").read_text()) for folder in (whole, resumed)]
    for log in logs:
        for line in log:
            del line["seconds"]
    assert [line["step"] for line in logs[0]] == [1, 3, 6]
    assert logs[0] == logs[1]
    assert set(logs[0][0]["held_out"]) == {"rivers", "encyclopaedia"}
    assert logs[0][0]["sinks"]["clean_first_token"] == pytest.approx(1 / TOY.length, rel=5)


def test_members_load_and_differ_in_mask_and_noise_alone(tmp_path: Path) -> None:
    loaded = {member: load(run(member, tmp_path)) for member in ("ar", "dlm")}
    assert (loaded["ar"].is_causal, loaded["dlm"].is_causal) == (True, False)
    assert loaded["dlm"].tokenizer is not None
    assert loaded["dlm"].mask_token_id == loaded["dlm"].tokenizer.mask_token_id
    configs = [json.loads((tmp_path / "models" / name / "config.json").read_text()) for name in ("ar", "dlm")]
    differing = {key for key in configs[0].keys() | configs[1].keys() if configs[0].get(key) != configs[1].get(key)}
    assert differing == {"is_causal", "mask_token_id"}
    assert configs[0]["num_key_value_heads"] < configs[0]["num_attention_heads"]


TASK = {
    "task": "toy", "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": 0,
    "doc_to_choice": ["sea", "town"], "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
WRITTEN = {
    "task": "written", "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}",
    "doc_to_target": "sea", "generation_kwargs": {"until": ["."], "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
ROWS = [{"question": "The river flows to the"}, {"question": "The river of number 3 flows past the town to the"}]
SAID: dict[Member, dict[str, Any]] = {
    "ar": {"is_causal": True, "attention": "causal"},
    "bd": {"attention": "block-causal", "block_length": objectives.BLOCK, "block_origin": "start"},
    "dlm": {"noise": facts.MASKED},
    "udlm": {"noise": facts.NoiseKind("uniform", 1.0, 3), "mask_token_id": None},
    "xdlm": {"noise": facts.NoiseKind("mixed", 0.1)},
}


@every_member
def test_a_members_folder_tells_what_it_is_and_answers_tasks(member: Member, tmp_path: Path) -> None:
    """From the recipe to numbers: what is loaded has the noise that it was trained with, a bound, choices, text and a trace."""
    model = load(run(member, tmp_path, toy=dataclasses.replace(TOY, steps=2)))
    wanted = {"is_causal": False, "attention": "full", "block_length": None, "mask_token_id": 3, "logit_shift": 0}
    wanted |= {"logit_shift": 1, "mask_token_id": None} if member == "ar" else {}
    wanted |= SAID[member]
    assert {name: getattr(model, name) for name in wanted} == wanted
    config: Any = model.network.config
    if member != "ar":
        trained = objectives.noise_of(member, vocab_size=config.vocab_size, mask_token_id=3)
        found = process_of(model)
        assert found == trained and torch.equal(found.mixing, trained.mixing)
    windows = torch.randint(4, config.vocab_size, (2, 32), generator=generator(0))
    loss = sink_effect.text_loss(model, windows, draws=2, seed=0)
    assert bool(loss.isfinite().all()) and 0 < float(loss.mean()) < 30
    settings = EvaluationSettings(draws=2, gen_length=4, steps=4, block_length=4)
    tasks = {
        name: LoadedTask(name, {name: local_task(config, {"test": ROWS})}, metric, 0.0)
        for name, config, metric in (("toy", TASK, "acc"), ("written", WRITTEN, "exact_match"))
    }
    results = evaluate(model, tasks, settings=settings)
    assert {name: len(result.correct) for name, result in results.items()} == {"toy": 2, "written": 2}
    traced = traces.trace(model, windows[:, :16], positions=32, steps=8)
    assert traced.mass.shape == (2, 8, 32) and bool(traced.mass.isfinite().all())
    pruned = pruner.prune_(model, METHODS["Wanda"], Target(0.5), windows=windows, seed=0)
    assert not pruned or all(isinstance(note, str) for note in pruned)


def test_members_start_alike_and_read_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {member: [] for member in MEMBERS}
    first: dict[str, dict[str, Tensor]] = {}
    keep = objectives.row_losses

    def watch(member, model, network, rows, *, generator):
        first.setdefault(member, {name: tensor.clone() for name, tensor in model.state_dict().items()})
        seen[member].append(rows.ids.clone())
        return keep(member, model, network, rows, generator=generator)

    monkeypatch.setattr(train, "row_losses", watch)
    for member in MEMBERS:
        run(member, tmp_path, toy=dataclasses.replace(TOY, steps=2))
    for member in MEMBERS[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen["ar"], seen[member], strict=True))
        assert all(torch.equal(first["ar"][name], first[member][name]) for name in first["ar"])


def test_members_started_together_read_what_one_of_them_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, build = [], batches.build

    def slow(*arguments: Any, **options: Any) -> Any:
        made.append(arguments)
        time.sleep(0.3)
        return build(*arguments, **options)

    monkeypatch.setattr(batches, "build", slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: train.prepare(tmp_path / "new", TOY), range(2)))
    assert len(made) == 1
    assert (found[0].windows == found[1].windows).all() and found[0].held_out.keys() == found[1].held_out.keys()


def test_models_are_kept_along_the_way_and_change_nothing(tmp_path: Path) -> None:
    plain, kept = run("dlm", tmp_path / "plain"), run("dlm", tmp_path / "kept", pace=Pace(measure_every=3, keep_every=2))
    weights = [load_file(folder / "model.safetensors") for folder in (plain, kept)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert sorted(path.name for path in (tmp_path / "kept" / "work" / "dlm").glob("step-*")) == ["step-2", "step-4"]
    run("dlm", tmp_path / "stopped", pace=Pace(keep_every=4, stop_after=3))
    assert [path.name for path in (tmp_path / "stopped" / "work" / "dlm").glob("step-*")] == ["step-3"]
    first, second = (load(tmp_path / "kept" / "work" / "dlm" / f"step-{step}").network for step in (2, 4))
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("member", ["ar", "bd", "udlm"])
def test_a_run_goes_on_from_a_model_that_was_kept(member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in bfloat16 and empty moments are all that differ: rows, noise and the rate's decay are those of the whole run."""
    run(member, tmp_path / "whole", pace=Pace(measure_every=3, keep_every=2))
    kept = tmp_path / "whole" / "work" / member / "step-4"
    rates: list[float] = []
    keep = train.update_

    def watch(model: Any, optimizers: Any, *, rate: float) -> None:
        rates.append(rate / TOY.learning_rate)
        keep(model, optimizers, rate=rate)

    monkeypatch.setattr(train, "update_", watch)
    out = tmp_path / "later" / "model"
    train.train(member, TOY, folder=tmp_path / "later" / "work", out=out, pace=PACE, begin_from=kept)
    decaying = [(6 - step) / 3 for step in (4, 5)]  # in the last 35 % of 6 steps, rounded up
    assert rates == pytest.approx([min(0.5, decaying[0]), min(1.0, decaying[1])])  # warmed up anew in 2 steps
    numbers, whole = (json.loads((folder / "recipe.json").read_text()) for folder in (out, tmp_path / "whole/models" / member))
    assert (numbers["step"], numbers["restarts"], whole["restarts"]) == (6, [4], [])
    assert numbers["trained_tokens"] == whole["trained_tokens"] and numbers["seconds"] >= 0
    log = json.loads((out / "training_log.json").read_text())
    assert [line["step"] for line in log] == [1, 3, 6]
    monkeypatch.undo()
    first, second = load_file(kept / "model.safetensors"), load_file(out / "model.safetensors")
    assert max(float((first[name] - second[name]).abs().max()) for name in first) > 0


@pytest.mark.parametrize(
    ("member", "changes", "words"),
    [
        ("ar", {"steps": 9}, "is_causal must be False"),
        ("bd", {"steps": 9}, "attention_kind must be None"),
        ("udlm", {"steps": 9}, "noise must be None"),
        ("dlm", {"steps": 9, "learning_rate": 1e-4}, "learning_rate must be 0.003"),
        ("dlm", {}, "steps must be more than the 6"),
        ("dlm", {"steps": 9, "vocab_size": 580}, "vocab_size must be 600"),
    ],
)
def test_no_run_goes_on_from_another_one(member: Member, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    begun = run("dlm", tmp_path / "first")
    toy = dataclasses.replace(TOY, **changes)
    with pytest.raises(InputError, match=words):
        train.train(member, toy, folder=tmp_path / "next", out=tmp_path / "out", begin_from=begun)
    assert not (tmp_path / "out").exists()


def test_no_run_goes_on_with_another_tokenizer(tmp_path: Path) -> None:
    begun = run("dlm", tmp_path / "first")
    other = tokenizer.train_tokenizer([TEXT.format(1) * 3, "another text"], vocab_size=300)
    other.save_pretrained(begun)
    toy = dataclasses.replace(TOY, steps=9)
    with pytest.raises(InputError, match="the tokenizer must be that of"):
        train.train("dlm", toy, folder=tmp_path / "next", out=tmp_path / "out", begin_from=begun)


@pytest.mark.parametrize("member", ["ar", "bd", "udlm"])
def test_the_dose_of_sink_weights_is_that_of_three_prunings(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every share is the mean gain over the mean damage, with windows and masks that differ between calibrations."""
    toy = dataclasses.replace(TOY, steps=12, learning_rate=1e-2)
    run(member, tmp_path, toy=toy, pace=Pace(measure_every=12, keep_every=6))
    monkeypatch.setattr(dose, "LENGTH", toy.length)
    monkeypatch.setattr(dose, "SPARSITY", 0.9)  # that a toy is damaged at all
    kept, last = tmp_path / "work" / member / "step-6", tmp_path / "models" / member
    call = ["dose", member, str(last), str(kept), "--windows", "6", "--calibrations", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", call)
    dose.main()
    found = json.loads((tmp_path / member / "sink_weights.json").read_text())
    assert [line["tokens"] for line in found] == sorted(line["tokens"] for line in found) and len(found) == 2
    model = load(last)
    windows = [articles.article_windows(tokenizer_of(model), articles.read_rows(f"articles_{name}"), length=40) for name in TEXTS]
    gains, damages, masks = [], [], []
    for seed in (0, 1):
        bench = Bench(model, windows[0], windows[1][:6], 16, 2, seed)
        of = {one.method: one.loss for one in runs.compare(bench, dose.METHODS, [Target(0.9)], seeds=[seed])}
        dense = runs.loss(bench)
        gains.append((of["Wanda"] - of["sinks"]).mean())
        damages.append((of["Wanda"] - dense).mean())
        masks.append(dense)
    assert found[-1]["damage"] == pytest.approx(float(torch.stack(damages).mean()), abs=1e-4)
    expected = float(torch.stack(gains).mean() / torch.stack(damages).mean())
    assert found[-1]["sinks"]["share"] is None or found[-1]["sinks"]["share"] == pytest.approx(expected, abs=1e-3)
    assert member == "ar" or not torch.equal(*masks)
    uniform = cards.uniform_share(model) if member != "bd" else found[-1]["uniform_share"]
    assert 0 < found[-1]["top_share"] < 1 and found[-1]["uniform_share"] == pytest.approx(uniform, abs=1e-4)


@every_member
def test_training_lowers_the_loss(member: Member, tmp_path: Path) -> None:
    toy = dataclasses.replace(TOY, steps=40, learning_rate=1e-2, tasks_share=0.01)
    out = run(member, tmp_path, toy=toy, pace=Pace(measure_every=40))
    log = json.loads((out / "training_log.json").read_text())
    assert log[-1]["held_out"]["rivers"] < log[0]["held_out"]["rivers"] - 1.0


# Masks


def slow_two_copies(length: int, block: int) -> Tensor:
    """Who sees whom, position by position: 0..length-1 is the noised copy, the rest the clean one."""
    seen = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for query in range(2 * length):
        for key in range(2 * length):
            own, other = query % length // block, key % length // block
            if query < length:
                seen[query, key] = own == other if key < length else other < own
            else:
                seen[query, key] = key >= length and other <= own
    return seen


@pytest.mark.parametrize(("length", "block"), [(1, 1), (7, 3), (8, 4), (16, 16), (20, 16)])
def test_the_two_copy_mask_is_the_one_written_out(length: int, block: int) -> None:
    assert torch.equal(objectives.two_copies_seen(length, block=block), slow_two_copies(length, block))


def toy_rows(length: int = 36) -> Rows:
    ids = torch.randint(4, TOY.vocab_size, (3, length), generator=generator(0))
    is_real = torch.ones_like(ids, dtype=torch.bool)
    is_real[1, 29:] = False
    is_answer = is_real.clone()
    is_answer[:2, :20] = False
    return Rows(ids, is_answer, is_real)


@pytest.fixture
def tok() -> tokenizer.PreTrainedTokenizerFast:
    made = tokenizer.train_tokenizer([TEXT.format(n) for n in range(99)], vocab_size=TOY.vocab_size)
    made.add_tokens([f"<{n}>" for n in range(TOY.vocab_size - len(made))])
    return made


def built(tok: tokenizer.PreTrainedTokenizerFast, member: Member) -> recipe.LlamaForCausalLM:
    model = recipe.build_model(TOY, tok, member=member)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # far from uniform, so that a wrong position or weight shows
    return model


def test_two_copies_in_one_pass_equal_one_pass_a_block(tok: tokenizer.PreTrainedTokenizerFast) -> None:
    model, rows = built(tok, "bd"), toy_rows()
    noised = rows.ids.masked_fill(torch.rand(rows.ids.shape, generator=generator(1)) < 0.5, 3)
    with torch.no_grad():
        got = objectives.hidden_states("bd", model.model, noised, rows)
        for start in range(0, rows.ids.shape[1], objectives.BLOCK):
            stop = min(start + objectives.BLOCK, rows.ids.shape[1])
            ids = torch.cat([rows.ids[:, :start], noised[:, start:stop]], 1)
            bias = objectives.attention_bias("bd", rows.is_real[:, :stop])
            alone = model.model(input_ids=ids, attention_mask=bias).last_hidden_state[:, start:]
            real = rows.is_real[:, start:stop]
            assert torch.allclose(got[:, start:stop][real], alone[real], atol=2e-5)
        full = model.model(input_ids=noised, attention_mask=None).last_hidden_state
    assert not torch.allclose(got, full, atol=1e-2)


@every_member
def test_padding_changes_nothing_and_what_may_be_seen_is_seen(member: Member, tok: tokenizer.PreTrainedTokenizerFast) -> None:
    model, rows = built(tok, member), toy_rows()
    other = Rows(rows.ids.clone(), rows.is_answer, rows.is_real)
    other.ids[1, 29:] = 7
    changed = rows.ids.clone()
    changed[0, -1] += 1
    with torch.no_grad():
        first, second, third = (
            objectives.hidden_states(member, model.model, one.ids, one)
            for one in (rows, other, Rows(changed, rows.is_answer, rows.is_real))
        )
    assert torch.allclose(first[rows.is_real], second[rows.is_real], atol=1e-5)
    moved = (first[0] - third[0]).abs().amax(-1) > 1e-6
    earliest = {"ar": 35, "bd": 32}.get(member, 0)
    assert moved.nonzero().min() == earliest


# Losses


@every_member
def test_the_loss_of_a_row_equals_a_slow_loop(member: Member, tok: tokenizer.PreTrainedTokenizerFast) -> None:
    model, rows = built(tok, member), toy_rows()
    mask = model.config.mask_token_id if member != "ar" else None
    with torch.no_grad():
        got = objectives.row_losses(member, model, model.model, rows, generator=generator(5))
        if member == "ar":
            logits = model.lm_head(objectives.hidden_states(member, model.model, rows.ids, rows))
            for row in range(3):
                places = [p for p in range(1, 36) if rows.is_answer[row, p]]
                losses = [float(F.cross_entropy(logits[row, p - 1], rows.ids[row, p])) for p in places]
                assert float(got[row]) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
            return
        process = objectives.noise_of(member, vocab_size=cast(int, model.config.vocab_size), mask_token_id=cast(int, mask))
        rng = generator(5)
        t = objectives.times(member, rows, generator=rng)
        noised = process.corrupt(rows.ids, t, generator=rng, may_change=rows.is_answer)
        logits = model.lm_head(objectives.hidden_states(member, model.model, noised.input_ids, rows)).double()
        for row in range(3):
            total = 0.0
            for p in rows.is_answer[row].nonzero()[:, 0].tolist():
                z, x, at = int(noised.input_ids[row, p]), int(rows.ids[row, p]), noised.t[row, p : p + 1].double()
                if member in ("dlm", "bd") and z != mask:
                    continue
                log_probs = logits[row, p : p + 1].log_softmax(-1)
                total += float(process.loss(log_probs, torch.tensor([x]), torch.tensor([z]), at))
            assert float(got[row]) == pytest.approx(total / int(rows.is_answer[row].sum()), rel=2e-3, abs=1e-4)


def test_block_times_are_one_a_block_and_row_times_one_a_row() -> None:
    rows = toy_rows()
    cases: tuple[tuple[Member, list[int]], ...] = (("bd", [16, 16, 4]), ("dlm", [36]))
    for member, parts in cases:
        found = objectives.times(member, rows, generator=generator(0))
        for part in found.split(parts, 1):
            assert bool((part == part[:, :1]).all())
        assert len(found.unique()) == 3 * len(parts)


# Measurements


@every_member
def test_generation_keeps_prompts_and_fills_every_answer(member: Member, tok: tokenizer.PreTrainedTokenizerFast) -> None:
    model, rows = built(tok, member), toy_rows()
    with torch.no_grad():  # a head that likes the mask best must not keep places masked
        model.lm_head.weight[3] = 0
        model.lm_head.weight.mul_(1e-3)
    got = progress.answer_greedily(member, progress.shadow(model), rows, mask_token_id=3, rng=generator(0))
    assert torch.equal(got[~rows.is_answer], rows.ids[~rows.is_answer])
    if member in ("dlm", "bd"):
        assert not bool((got[rows.is_answer] == 3).any())


def test_a_model_that_knows_the_answers_scores_one(
    tok: tokenizer.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "WIDTHS", dict.fromkeys(batches.WIDTHS, 256))  # this tokenizer knows hardly a word
    monkeypatch.setattr(progress, "answer_greedily", lambda member, model, rows, *, mask_token_id, rng: rows.ids)
    model = recipe.build_model(dataclasses.replace(TOY, length=64), tok, member="dlm")
    assert set(progress.accuracies("dlm", model, tok, count=2, seed=0).values()) == {1.0}
    wrong = lambda member, model, rows, *, mask_token_id, rng: rows.ids + rows.is_answer  # noqa: E731
    monkeypatch.setattr(progress, "answer_greedily", wrong)
    assert set(progress.accuracies("dlm", model, tok, count=2, seed=0).values()) == {0.0}


def test_sink_statistics_of_attention_that_is_even(tok: tokenizer.PreTrainedTokenizerFast) -> None:
    model = recipe.build_model(TOY, tok, member="dlm")
    with torch.no_grad():
        for layer in cast(Any, model.model).layers:
            layer.self_attn.q_proj.weight.zero_()
    windows = torch.randint(4, 600, (2, 40), generator=generator(0))
    found = progress.sink_statistics("dlm", progress.shadow(model), windows, seed=0)
    assert found["clean_first_token"] == pytest.approx(1 / 40, abs=1e-4)
    assert found["noised_top_share"] == pytest.approx(1 / 40, abs=1e-4)
    causal = progress.sink_statistics("ar", progress.shadow(recipe.build_model(TOY, tok, member="ar")), windows, seed=0)
    assert set(causal) == {key for key in found if key.startswith("clean")}


def test_the_learning_rate_warms_up_stays_and_decays_to_zero() -> None:
    plan = Recipe(steps=100, warmup_steps=10, decay_fraction=0.4)
    rates = [recipe.learning_rate(step, plan) / plan.learning_rate for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:60] == pytest.approx([1.0] * 50)
    assert rates[61:] == pytest.approx([(100 - step) / 40 for step in range(61, 100)])


def test_the_shipped_size_is_nine_million_weights_below_40_megabytes() -> None:
    tok = tokenizer.train_tokenizer([TEXT.format(1)], vocab_size=300)
    tok.add_tokens([f"<{n}>" for n in range(4096 - len(tok))])
    model = recipe.build_model(Recipe(), tok, member="dlm")
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert 8.5e6 < weights < 9.5e6
    assert 2 * weights < 40e6
    assert batches.COUNTS.keys() == batches.WIDTHS.keys()
    assert max(batches.WIDTHS.values()) <= Recipe().length


# Cards


def test_a_card_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder that the recipe wrote to numbers and a card; the uniform share of each mask is counted by hand."""
    monkeypatch.setattr(cards, "LENGTH", 32)
    monkeypatch.setattr(cards, "SINK_WINDOWS", 2)
    monkeypatch.setattr(cards, "SINK_DRAWS", 2)
    monkeypatch.setattr(cards, "DRAWS", 1)
    monkeypatch.setattr(cards, "TASKS", ("tiny_add", "tiny_facts"))
    rows = [{"title": f"River {n}", "extract": TEXT.format(n) * 2, "description": "a", "topic": "b"} for n in range(6)]
    monkeypatch.setattr(cards.articles, "read_rows", lambda name: rows)
    uniform = {"ar": sum(1 / n for n in range(1, 33)) / 32, "bd": (1 + 1 / 2) / 32, "dlm": 1 / 32}
    for member, share in uniform.items():
        folder = run(cast(Member, member), tmp_path, toy=dataclasses.replace(TOY, steps=2))
        found = cards.measure(folder, limit=3)
        assert found["uniform_share"] == pytest.approx(share, abs=1e-4)
        assert found["tasks"]["tiny_add"]["documents"] == 3
        assert found["held_out_nats"] > 0 and found["held_out_windows"] >= 2
        recipe_ = json.loads((folder / "recipe.json").read_text())
        written = cards.card(member, recipe_, found, hardware="a test")
        assert f"**{found['held_out_nats']:.3f} ± {found['held_out_standard_error']:.3f}**" in written
        assert "| `tiny_add` | 0 of 3 | **0.0%** |" in written and "a test" in written and "(2 steps; a little" in written
        again = cards.card(member, {**recipe_, "restarts": [1]}, found, hardware="a test")
        assert "(2 steps, at step 1 from weights in bfloat16 with fresh moments of the optimizers; a little" in again


def test_every_shape_of_every_network_is_compiled(tmp_path: Path) -> None:
    """Beyond torch's limit of eight shapes the third size of a scaling run would go on uncompiled, and look slow."""
    tok, counter = train.prepare(tmp_path, TOY).tok, CompileCounter()
    for width in (16, 32, 48):
        sized = dataclasses.replace(TOY, hidden_size=width)
        network = recipe.compile_body(recipe.build_model(sized, tok, member="dlm"), backend=counter)
        for length in range(4, 9):
            network(input_ids=torch.ones((1, length), dtype=torch.long))
    assert counter.frame_count == 15


def test_a_scaling_run_stops_at_its_time_and_counts_tokens(tmp_path: Path) -> None:
    corpus = train.prepare(tmp_path, TOY)
    found = scaling.curve(TOY, corpus, seconds=0.5, compiled=False)
    assert len(found["curve"]) >= 1 and found["curve"][-1]["seconds"] >= 0.5
    first = sum(int(rows.is_real.sum()) for rows in batches.step_rows(corpus, 0, text=3, tasks_share=0.02, seed=0))
    assert found["curve"][0]["tokens"] >= first
    assert found["parameters"] == sum(p.numel() for p in recipe.build_model(TOY, corpus.tok, member="dlm").parameters())
