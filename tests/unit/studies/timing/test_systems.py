"""The table of published decoders: fidelity against passes by hand, the control's differences, and areas worked by hand."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from lib.core.errors import InputError
from lib.decoding import commit, decoder, remask
from lib.decoding import systems as published
from lib.decoding.by_attention import control
from lib.decoding.by_attention.control import SETTINGS, Control
from lib.decoding.decoder import DecodingPlan
from lib.decoding.recompute import Blockwise, Vicinity
from lib.decoding.speculation import Speculation
from lib.decoding.view import View
from lib.evaluation.scoring import EvaluationSettings
from lib.models import language_model
from lib.models.language_model import LanguageModel
from lib.studies.timing import answering, fidelity, figures, systems, tasks
from lib.studies.timing.runs import PLAIN
from tests import tiny

PROMPT, NEW, BLOCK = 5, 8, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Three layers, so that FOCUS has one that it narrows."""
    return tiny.model(tmp_path_factory.mktemp("dlm"), causal=False, num_hidden_layers=3)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("ar"), seed=1)


def test_fidelity_is_the_distance_to_a_full_pass(model: LanguageModel) -> None:
    """Pass by pass: logits of the decoder's view against those of its whole text."""
    prompt, seen = tiny.ids(1, PROMPT), []
    plan = DecodingPlan(recompute=Blockwise())
    keep: Any = lambda view: seen.append(replace(view))  # noqa: E731
    decoder.decode(model, prompt, new_tokens=NEW, block_length=BLOCK, plan=plan, on_pass=keep)
    same, far = [], []
    for view in seen:
        assert isinstance(view, View) and view.guess is not None
        exact = language_model.logits_at(model, view.ids, view.guess.where).double().softmax(-1)
        own = view.guess.logits.double().softmax(-1)
        for p, q in zip(exact, own, strict=True):
            same.append(float(p.argmax() == q.argmax()))
            far.append(float((p * (p / q).log()).sum()))
    got = fidelity.measure(model, prompt, plan, new_tokens=NEW, block=BLOCK)
    assert float(got.top1[0]) == pytest.approx(sum(same) / len(same))
    assert float(got.divergence[0]) == pytest.approx(sum(far) / len(far), rel=1e-6) and float(got.divergence[0]) > 1e-4
    thirds = got.by_ratio[0]
    assert thirds[1:].isfinite().all() and thirds.shape == (3, 2)
    ratios = [view.ids[:, PROMPT:].eq(tiny.MASK).double().mean() for view in seen for _ in range(int(view.guess.where.sum()))]
    early = [at for at, ratio in enumerate(ratios) if float(ratio) > 2 / 3]
    assert float(thirds[2, 1]) == pytest.approx(sum(far[at] for at in early) / len(early), abs=1e-9)


@pytest.mark.parametrize("recompute", [Vicinity(radius=99, warm_up=0), Blockwise(refresh_every=1)])
def test_exact_passes_have_fidelity_one(model: LanguageModel, recompute: Any) -> None:
    got = fidelity.measure(model, tiny.ids(2, PROMPT), DecodingPlan(recompute=recompute), new_tokens=NEW, block=BLOCK)
    assert got.top1.tolist() == [1.0, 1.0] and float(got.divergence.abs().max()) < 1e-5


def test_what_is_exact_is_known_without_a_pass(model: LanguageModel) -> None:
    """What `is_exact` says is measured, too."""
    for each in published.published(threshold=0.5, fixed=commit.Quota(2), delimiters=(3, 4)):
        if not fidelity.is_exact(each.plan) or isinstance(each.plan, Speculation):
            continue
        got = fidelity.measure(model, tiny.ids(1, PROMPT), each.plan, new_tokens=NEW, block=BLOCK)
        assert float(got.divergence.abs().max()) < 1e-5 and float(got.top1.min()) == 1.0, each.name
    assert fidelity.is_exact(PLAIN) and not fidelity.is_exact(DecodingPlan(commit.Credit()))


def test_every_system_has_a_row_and_a_rival_in_the_table(model: LanguageModel, judge: LanguageModel) -> None:
    listed = published.published(threshold=0.5, fixed=commit.Quota(2), delimiters=(3, 4))
    options: dict[str, Any] = {"new_tokens": NEW, "block": BLOCK, "repeats": 1, "seed": 0, "judge": judge}
    table = systems.compare(model, tiny.ids(2, PROMPT), listed, **options).set_index("system")
    assert table.index.tolist() == [PLAIN, *(each.name for each in listed)] and table.index.is_unique
    assert set(table["rival"]) <= set(table.index)
    assert table.loc["MAGE", "against rival"] == (
        "visible: Visible -> Evict(keep=0.5, score=attention, pool=1, span=1, delay=0, prompt_only=False)"
    )
    assert table.loc[PLAIN, "forwards"] == 2 * NEW and table.loc[PLAIN, "agreement"] == 1.0
    assert table.loc["FreeDave, 4 drafts", "agreement"] == 1.0
    assert table.loc["FreeDave, 4 drafts", "forwards"] <= 2 * NEW < table.loc["FreeDave, 4 drafts", "rows"]
    assert table.loc["dual", "KL"] > 0 and table.loc["all, fixed", "KL"] == 0.0
    ran = table[table["not tested"] != "nothing is cut off at this length"]
    seconds, peaks = (ran[name].tolist() for name in ("seconds", "peak MB"))  # NaN would fail both
    assert all(value > 0 for value in seconds) and all(value >= 0 for value in peaks) and len(peaks) < len(table)
    assert set(table[table["control"] == "sinks"].index) == set(published.ranked(Control(), commit.Quota(), threshold=0.5))
    # Four tokens are left behind the first block, and a suffix of four is shown: nothing is cut.
    idle = table[table["not tested"] != ""]
    assert set(idle.index) >= {"suffix cut", "suffix, last place", "suffix, another place", "vicinity"}
    assert set(idle["not tested"]) <= {"nothing is cut off at this length", "every pass is full at this length"}
    assert all(math.isnan(value) for name in ("top1", "KL", "agreement", "nats") for value in idle[name].tolist())
    assert "Sparse-dLLM" not in idle.index
    gap = float(str(table.loc["MAGE", "nats"])) - float(str(table.loc["dual", "nats"]))
    assert float(str(table.loc["MAGE", "nats difference"])) == pytest.approx(gap, abs=1e-6)


def test_the_control_has_a_row_a_system_and_setting(model: LanguageModel) -> None:
    options: dict[str, Any] = {"fixed": commit.Quota(2), "threshold": 0.5, "new_tokens": NEW, "block": BLOCK, "seed": 0}
    table = systems.control(model, tiny.ids(3, PROMPT), **options)
    assert len(table) == 6 * len(SETTINGS)
    for name, part in table.groupby("system"):
        rows = part.set_index("control")
        usual = "sinks in" if name == "Focus-dLLM" else "as they fall"  # it keeps its sinks as it is published
        assert float(str(rows.loc[usual, "difference"])) == 0.0 and set(rows["usual"]) == {usual}
        # The first ones make full passes, or predict only the places that their ranking left.
        assert set(rows["measure"]) == {"other tokens" if name in ("DAPD", "FOCUS", "d2Cache") else "KL"}
        if not rows.loc["random", "not tested"]:
            gap = float(str(rows.loc["random", "value"])) - float(str(rows.loc[usual, "value"]))
            assert float(str(rows.loc["random", "difference"])) == pytest.approx(gap, abs=1e-9)
    columns = (table[name].tolist() for name in ("control", "usual", "not tested", "p", "p Holm"))
    for setting, own, why, raw, adjusted in zip(*columns, strict=True):
        assert math.isnan(raw) == bool(why)
        assert math.isnan(adjusted) if setting == own or why else adjusted >= raw
    assert "" in set(table["not tested"]) and len(set(table["not tested"])) > 1


def test_what_tests_nothing_is_said_and_is_no_member_of_the_family(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of 1 leaves nothing to evict, so Sparse-dLLM's four settings say so; the others are adjusted among themselves."""
    counts: list[int] = []
    holm: Any = lambda p: counts.append(len(p)) or p  # noqa: E731
    monkeypatch.setattr(systems.paired, "holm", holm)
    whole: Any = lambda each, fixed, threshold: {  # noqa: E731
        name: replace(plan, visible=replace(plan.visible, keep=1.0)) if plan.visible.evicts else plan
        for name, plan in ranked(each, fixed, threshold=threshold).items()
    }
    ranked = published.ranked
    monkeypatch.setattr(published, "ranked", whole)
    options: dict[str, Any] = {"fixed": commit.Quota(2), "threshold": 0.5, "new_tokens": NEW, "block": BLOCK, "seed": 0}
    table = systems.control(model, tiny.ids(2, PROMPT), **options)
    own = table[table["system"] == "Sparse-dLLM"].set_index("control")
    assert set(own.drop("as they fall")["not tested"]) == {"the budget covers every candidate"}
    scores = own.drop("as they fall")
    assert all(math.isnan(value) for name in ("value", "difference", "p", "KL") for value in scores[name].tolist())
    assert own.loc["as they fall", "not tested"] == "" and float(str(own.loc["as they fall", "KL"])) >= 0
    columns = (table[name].tolist() for name in ("control", "usual", "not tested"))
    assert counts == [sum(not why and setting != own for setting, own, why in zip(*columns, strict=True))] and counts[0] < 24


def test_every_system_differs_from_its_rival_in_one_choice() -> None:
    """Also in its settings: what both have under one name is equal. WINO's shadows are how it judges."""
    listed = published.published(threshold=0.45, fixed=commit.Quota(2), delimiters=(3, 4))
    by_name = {PLAIN: systems.PLAIN_SYSTEM} | {each.name: each for each in listed}
    for each in listed:
        plan, rival = each.plan, by_name[each.rival].plan
        if isinstance(plan, Speculation) or each.rival == PLAIN:
            continue
        assert isinstance(rival, DecodingPlan)
        apart = {part.name for part in fields(DecodingPlan) if getattr(plan, part.name) != getattr(rival, part.name)}
        shadows = {"recompute"} if isinstance(plan.remask, remask.NarrowOut) else set()
        assert apart - shadows == {{"block ends": "ends"}.get(each.choice, each.choice)}, each.name
        for part in apart:
            own, other = (published.dials(getattr(one, part)) for one in (plan, rival))
            changed = {name for name in own.keys() & other.keys() if own[name] != other[name]}
            assert changed <= ({"tail"} if each.rival == "suffix cut" else {"suffix_tokens"}), each.name
        assert each.against(by_name[each.rival]).count(" -> ") == len(apart)
    assert by_name["DAPD"].plan.commit.threshold == by_name["threshold"].plan.commit.threshold == 0.45  # type: ignore[union-attr]
    vicinity, edits = by_name["vicinity"].plan, by_name["LLaDA 2.1 edits"].plan
    assert isinstance(vicinity, DecodingPlan) and vicinity.recompute == Vicinity(radius=16, warm_up=4)
    assert isinstance(edits, DecodingPlan) and (edits.commit, edits.remask) == (commit.Threshold(0.7), remask.Edit(0.5, 16))


def test_no_instrument_of_the_control_runs_in_a_system(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masses are measured where sinks are forced in or out alone: what is timed is the system."""
    opened: list[str] = []
    real = control.observed
    monkeypatch.setattr(control, "observed", lambda *given: opened.append("") or real(*given))
    for setting in SETTINGS:
        opened.clear()
        for name, plan in published.ranked(Control(setting), commit.Quota(2), threshold=0.5).items():
            before = len(opened)
            decoder.decode(model, tiny.ids(1, PROMPT), new_tokens=NEW, block_length=BLOCK, plan=plan)
            assert (len(opened) > before) == (setting in ("sinks in", "sinks out")), (name, setting)


def test_names_of_nothing_are_refused_and_wino_needs_its_own_place() -> None:
    answering.check_names(["threshold", "KLASS"], ["dual", "WINO", "AdaBlock"], fixed=commit.Quota())
    for names in ((["treshold"], []), ([], ["duel"])):
        with pytest.raises(InputError, match="must be among"):
            answering.check_names(*names, fixed=commit.Quota())
    found = [{each.name for each in published.published(threshold=0.5, fixed=commit.Quota(2), logit_shift=k)} for k in (0, 1)]
    assert found[0] - found[1] == {"WINO"} and not found[1] - found[0]


def test_an_area_penalises_what_is_lost() -> None:
    """r 1, 2, 4 with 60, 57, 30: the last lies more than five points below and does not count."""
    weight = math.exp(-3 * (1 - 57 / 60))
    wanted = 60 + (2 - 1) * (57 * weight + 60) / 2
    assert answering.area([(1.0, 60.0), (2.0, 57.0), (4.0, 30.0)]) == pytest.approx(wanted)
    assert answering.area([(1.0, 60.0), (4.0, 30.0), (2.0, 57.0)]) == pytest.approx(wanted)
    assert answering.area([(1.0, 0.0), (2.0, 0.0)]) == 0.0
    with pytest.raises(InputError, match="a curve must have points"):
        answering.area([])


def test_a_curve_counts_tokens_a_pass(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Passes and answers are planted: 3 documents of 8 tokens in 2 passes each at the loose setting, 8 at the strict one."""

    def answers(_: Any, __: Any, plan: Any, *, settings: Any, limit: int, tally: Any = None) -> tuple[bool, ...]:
        assert settings.batch_size == 1
        strict = plan.commit.threshold == 1.0
        tally.extend([(8, 8 if strict else 2)] * limit)
        return (True, strict, False)

    monkeypatch.setattr(answering, "answers", answers)
    task: Any = tasks.load("tiny_topic_written")
    options: dict[str, Any] = {"settings": EvaluationSettings(block_length=64), "limit": 3, "plain": (True, True, False)}
    table = answering.curve(model, task, [0.5, 1.0], ["threshold"], **options)
    assert table["parallelism"].tolist() == [1.0, 4.0, 1.0] and set(table["block"]) == {32}  # an answer has 32 tokens
    assert table["accuracy"].tolist() == pytest.approx([2 / 3, 1 / 3, 2 / 3])
    assert table["difference high"].tolist()[0] == 0.0 < table["difference high"].tolist()[2], "one row is compared with itself"
    assert table["area"].tolist() == pytest.approx([200 / 3] * 3)  # the loose point lies below the first by more than five
    figure, drawn = figures.parallelism(table)
    assert figure.axes[0].get_title() == "tiny_topic_written, blocks of 32"
    figure.savefig(tmp_path / "curve.png")
    plt.close(figure)
    assert len(drawn) == 3


def test_answers_are_paired_by_document(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {0.5: (True, True, True, False)}
    reader: Any = lambda _, __, plan, **___: marks[plan.commit.threshold]  # noqa: E731
    monkeypatch.setattr(answering, "answers", reader)
    listed = published.published(threshold=0.5, fixed=commit.Quota(2))
    task = tasks.load("tiny_topic_written")
    options: dict[str, Any] = {"limit": 4, "names": ["threshold"], "plain": (True, False, True, False)}
    table = answering.system_accuracies(model, task, listed, settings=EvaluationSettings(block_length=16), **options)
    assert table["system"].tolist() == [PLAIN, "threshold"] and set(table["task"]) == {task.name}
    assert table["accuracy"].tolist() == [0.5, 0.75] and table["difference"].tolist() == [0.0, 0.25]
    assert table[["difference low", "difference high"]].to_numpy()[0].tolist() == [0.0, 0.0], "the plain sampler beside itself"
    lows, highs = table["difference low"].tolist(), table["difference high"].tolist()
    assert lows[1] < 0.25 < highs[1] and table["only this"].tolist() == [0, 1]
    assert set(table["block"]) == {16}


def test_blocks_that_an_answer_cannot_tell_apart_are_answered_once() -> None:
    """An answer of 32 tokens is one block of 32 in blocks of 32, 64 and 128."""
    task, settings = tasks.load("tiny_topic_written"), EvaluationSettings(gen_length=128, draws=7)
    found = answering.settings_by_block(task, settings, [16, 64, 32, 128])
    assert found == [replace(settings, block_length=length) for length in (16, 64)]


def test_unknown_names_are_refused_before_any_answer(model: LanguageModel) -> None:
    task = tasks.load("tiny_topic_written")
    options: dict[str, Any] = {"settings": EvaluationSettings(), "limit": 2, "plain": (True, False)}
    with pytest.raises(InputError, match=r"answering_systems must be among threshold, factor.*, got 'threshhold'"):
        listed = published.published(threshold=0.5, fixed=commit.Quota(2))
        answering.system_accuracies(model, task, listed, names=["threshhold"], **options)
    with pytest.raises(InputError, match=r"curve_rules must be among threshold, factor.*, got 'DAPD'"):
        answering.curve(model, task, [0.5], ["DAPD"], **options)


def test_a_system_that_a_model_has_no_place_for_answers_nothing(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings name WINO and AdaBlock for all models; one with a logit shift, or without delimiters, goes on without them."""
    monkeypatch.setattr(answering, "answers", lambda *_, **__: (True, False))
    listed = published.published(threshold=0.5, fixed=commit.Quota(2), logit_shift=1)
    options: dict[str, Any] = {"settings": EvaluationSettings(), "limit": 2, "plain": (True, False)}
    names = ["WINO", "AdaBlock", "dual"]
    table = answering.system_accuracies(model, tasks.load("tiny_topic_written"), listed, names=names, **options)
    assert table["system"].tolist() == [PLAIN, "dual"]


def test_attention_by_blocks_has_no_fidelity(model: LanguageModel) -> None:
    blocks = replace(model, attention="block-causal", block_length=4)
    with pytest.raises(InputError, match="fidelity must be of a model whose attention is not by blocks, got block-causal"):
        fidelity.measure(blocks, tiny.ids(1, PROMPT), DecodingPlan(), new_tokens=NEW, block=BLOCK)
