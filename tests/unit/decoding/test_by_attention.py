"""What ranks by attention, against loops over matrices; what is hidden, against masks; the control, on planted sinks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.decoding.by_attention import control, recompute
from lib.decoding.by_attention.commit import Independent
from lib.decoding.by_attention.control import Control
from lib.decoding.by_attention.evict import Evict
from lib.decoding.by_attention.watch import attention_of
from lib.decoding.caches import Hidden, readable
from lib.decoding.commit import Quota
from lib.decoding.decoder import DecodingPlan, decode
from lib.decoding.recompute import Blockwise
from lib.decoding.view import View, guess
from lib.models import language_model, loading
from lib.models.language_model import LanguageModel
from tests import tiny

PROMPT, BLOCK, SIZE = 5, range(5, 11), 14


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    options: dict[str, Any] = {"llada": {"family": "llama"}, "dream": {"family": "qwen2", "logit_shift": 1}}[request.param]
    folder = tiny.folder(tmp_path_factory.mktemp(request.param), causal=False, num_hidden_layers=3, **options)
    return loading.load(folder, dtype=torch.float64)


def text(seed: int = 0) -> Tensor:
    return torch.cat([tiny.ids(1, PROMPT, seed=seed), torch.full((1, SIZE - PROMPT), tiny.MASK)], dim=1)


def opened(ids: Tensor, *, size: int = SIZE) -> View:
    return View(ids, torch.arange(size), BLOCK, PROMPT, tiny.MASK, torch.ones(1, len(BLOCK)).long())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_attention(query: Tensor, key: Tensor) -> list[list[float]]:
    """Two query heads share a key head."""
    heads, size = query.shape[1], query.shape[3]
    total = [[0.0] * key.shape[2] for _ in range(query.shape[2])]
    for head in range(heads):
        for row in range(query.shape[2]):
            scores = [float(query[0, head, row] @ key[0, head // 2, place]) / math.sqrt(size) for place in range(key.shape[2])]
            whole = sum(math.exp(score) for score in scores)
            for place, score in enumerate(scores):
                total[row][place] += math.exp(score) / whole / heads
    return total


def test_attention_is_averaged_over_heads() -> None:
    query, key = random(1, 4, 3, 8), random(1, 2, 5, 8, seed=1)
    assert torch.allclose(attention_of(query, key)[0], torch.tensor(slow_attention(query, key)), atol=1e-5)


def test_a_roll_out_is_a_product_of_matrices() -> None:
    """Rows that are not computed are rows of an identity; the mass of a place is its column's sum."""
    rolled, rows, wanted = recompute.Rollout(rows=torch.tensor([[1, 3]])), [1, 3], torch.eye(5)
    for layer in range(3):
        query, key = 3 * random(1, 4, 2, 8, seed=layer), random(1, 2, 5, 8, seed=9 + layer)
        matrix = torch.eye(5)
        for row, weights in zip(rows, slow_attention(query, key), strict=True):
            matrix[row] = (torch.tensor(weights) + matrix[row]) / 2
        wanted = matrix @ wanted
        rolled.see(layer, query, key)
    assert torch.allclose(rolled.mass[0], wanted.sum(0), atol=1e-5)
    rolled.see(0, query, key)  # a new pass begins anew
    assert torch.allclose(rolled.mass[0], matrix.sum(0), atol=1e-5)


def test_d2cache_takes_masks_news_the_nucleus_and_gaps(model: LanguageModel) -> None:
    view = opened(text())
    view.ids[0, 7] = 1
    view.committed = torch.zeros_like(view.ids, dtype=torch.bool)
    view.committed[0, 7] = True
    seen = torch.full((1, SIZE), 0.1, dtype=torch.float64)
    seen[0, 9], seen[0, 12] = 0.9, 0.99  # the second one is surer, but lies far from all text, and in the next block
    view.memory["seen confidence"] = seen
    mass = torch.ones(1, SIZE)
    mass[0, 1], mass[0, 9] = 30.0, 99.0
    rule = recompute.D2Cache(candidates=1, share=0.5, gap=0)
    assert rule.chosen(view, mass)[0].nonzero()[:, 0].tolist() == [1, 7, 9]
    wider = recompute.D2Cache(candidates=1, share=0.5, gap=2)
    assert wider.chosen(view, mass)[0].nonzero()[:, 0].tolist() == [1, 7, 8, 9]
    many = recompute.D2Cache(candidates=6, share=0.0, gap=0)  # five masks are left in the block: the next one opens
    assert many.chosen(view, mass)[0].nonzero()[:, 0].tolist() == [5, 6, 7, 8, 9, 10, 12]
    out = recompute.D2Cache(candidates=1, share=0.5, gap=0, control=Control("sinks out"))
    view.memory["mass"] = torch.ones(1, SIZE).index_fill(1, torch.tensor([1]), 50.0)
    assert 1 not in out.chosen(view, mass)[0].nonzero()[:, 0].tolist()


def test_incoming_attention_is_pooled_before_the_softmax() -> None:
    query, key = random(1, 4, 6, 8), random(1, 2, SIZE, 8, seed=1)
    rows, among = torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([6, 8, 9])
    wanted = [0.0] * 3
    for head in range(4):
        for row in (1, 3, 4):
            scores = [float(query[0, head, row] @ key[0, head // 2, place]) / math.sqrt(8) for place in among.tolist()]
            pooled = [max(scores[max(0, at - 1) : at + 2]) for at in range(3)]
            whole = sum(math.exp(score) for score in pooled)
            wanted = [each + math.exp(score) / whole for each, score in zip(wanted, pooled, strict=True)]
    assert recompute.incoming(query, key, among, rows).tolist() == pytest.approx(wanted, rel=1e-5)


def test_focus_keeps_what_rises(model: LanguageModel) -> None:
    """Target 2 of 6; then those above mean and deviation when they are more; always the left neighbour."""
    view, rows = opened(text()), torch.arange(PROMPT - model.logit_shift, 11)
    view.step = 1

    def kept(rise: list[float], **options: Any) -> list[int]:
        found = recompute.Focus(**options).narrowed(model, view, rows, torch.tensor(rise)).tolist()
        return [place for place in found if place >= PROMPT]

    before = [6] if model.logit_shift else []  # from which 7 is predicted
    assert kept([0.0, 0.1, 0.0, 0.5, 0.0, 0.4], factor=2.0) == [*before, 7, 8, 9, 10]  # 8 and 10, 7 and 9 to their left
    assert kept([9.0, 0.0, 0.0, 0.0, 0.0, 0.0], factor=1.0)[:1] == [5]
    assert kept([0.0] * 6, factor=6.0) == [5, 6, 7, 8, 9, 10]
    assert kept([0.0, 0.1, 0.0, 0.5, 0.0, 0.4], factor=1.5) == kept([0.0, 0.1, 0.0, 0.5, 0.0, 0.4], factor=2.0)


@torch.inference_mode()
def with_stale_layer(model: LanguageModel, before: Tensor, now: Tensor, window: Tensor) -> Tensor:
    """A full pass over `now` in which the first layer's output outside of the window is that of a pass over `before`."""
    body, kept = language_model.network_body(model), []
    first: Any = model.network.get_decoder().layers[0]  # pyright: ignore
    hook = first.register_forward_hook(lambda _, __, output: kept.append(output.clone()))
    body(input_ids=before, use_cache=False)
    hook.remove()

    def mixed(_: Any, __: Any, output: Tensor) -> Tensor:
        inside = torch.isin(torch.arange(output.shape[1]), window)
        return torch.where(inside[None, :, None], output, kept[0])

    hook = first.register_forward_hook(mixed)
    states = body(input_ids=now, use_cache=False).last_hidden_state
    hook.remove()
    return states


@pytest.mark.parametrize("threshold", [2.0, -2.0])
def test_elastic_widens_from_the_layer_after_the_sensor(model: LanguageModel, threshold: float) -> None:
    """A cosine below 2 always, so from the second layer on everything is computed, from the first one's old outputs outside."""
    view = opened(text())
    window = torch.arange(PROMPT - model.logit_shift, BLOCK.stop)
    with torch.inference_mode(), recompute.Elastic(threshold=threshold).passes(model, view) as forward:
        forward(view)
        before, view.ids, view.step = view.ids, view.ids.clone(), 1
        view.ids[0, 6] = 3
        hidden = forward(view)
    if threshold > 1:
        wanted = with_stale_layer(model, before, view.ids, window)
        assert hidden.rows is None and torch.allclose(hidden.states, wanted, atol=1e-6)
        assert hidden.computed == round((len(window) + 2 * SIZE) / 3)
    else:
        assert hidden.rows is not None and hidden.rows[0].tolist() == window.tolist() and hidden.computed == len(window)


def test_elastic_watches_the_most_attended_place_outside() -> None:
    view = opened(text())
    view.memory["mass"] = torch.ones(1, SIZE).index_fill(1, torch.tensor([2]), 50.0)
    attention = torch.rand((6, SIZE), generator=torch.Generator().manual_seed(0))
    attention[:, 2], attention[:, 12], attention[:, 7] = 3.0, 2.0, 9.0
    window = torch.arange(5, 11)
    sensors = {setting: recompute.Elastic(control=Control(setting)).sensor(view, attention, window, 0)
               for setting in ("as they fall", "sinks in", "sinks out")}  # fmt: skip
    assert sensors == {"as they fall": 2, "sinks in": 2, "sinks out": 12}


@pytest.mark.parametrize(("score", "pool"), [("product", 3), ("attention", 1)])
def test_scores_of_keys_are_their_formulas(score: Any, pool: int) -> None:
    query, key = random(1, 4, 6, 8), random(1, 2, SIZE, 8, seed=1)
    if score == "product":
        mean = query.mean(2)
        wanted = [sum(float(mean[0, head] @ key[0, head // 2, place]) for head in range(4)) / 4 for place in range(SIZE)]
    else:
        wanted = [sum(column) for column in zip(*slow_attention(query, key), strict=True)]
    assert Evict(score=score, pool=pool).scored(query, key)[0].tolist() == pytest.approx(wanted, abs=1e-5)


def test_the_best_keys_outside_of_the_block_stay() -> None:
    model = tiny.stub(lambda ids: ids, vocab=4, mask_token_id=tiny.MASK)
    view = opened(text())
    scores = torch.zeros(1, SIZE)
    scores[0, [1, 7, 12]] = torch.tensor([5.0, 9.0, 4.0])  # 7 lies in the block and is kept anyway
    kept = lambda **options: Evict(**options).kept(model, view, scores, 0)[0].tolist()  # noqa: E731
    assert kept(keep=0.25, pool=1) == [1, *BLOCK, 12]
    # pooled over the candidates side by side: 0, 1, 2 have 5, then 11, 12, 13 have 4
    assert kept(keep=0.4, pool=3) == [0, 1, 2, *BLOCK]
    assert kept(keep=0.4, pool=1, prompt_only=True) == [0, 1, *BLOCK, 11, 12, 13]
    view.memory["mass"] = torch.ones(1, SIZE).index_fill(1, torch.tensor([3]), 40.0)
    for setting, wanted in (("sinks in", [1, 3, *BLOCK]), ("sinks out", [1, *BLOCK, 12])):
        assert kept(keep=0.25, pool=1, control=Control(setting)) == wanted  # type: ignore[arg-type]


def test_spans_stay_together() -> None:
    model = tiny.stub(lambda ids: ids, vocab=4, mask_token_id=tiny.MASK)
    view, scores = opened(text()), torch.zeros(1, SIZE)
    scores[0, [0, 1, 2, 3]] = torch.tensor([4.0, 0.0, 3.0, 3.0])  # means 2 and 3
    assert Evict(keep=0.25, pool=1, span=2).kept(model, view, scores, 0)[0].tolist() == [2, 3, *BLOCK]


def test_random_keys_and_confident_ones_are_pooled_as_attention_is() -> None:
    """Else a rule that keeps neighbours together would be compared with scattered keys, and scatter would pass for attention."""
    model = tiny.stub(lambda ids: ids, vocab=4, mask_token_id=tiny.MASK)
    view, scores = opened(text()), torch.zeros(1, SIZE)
    outside = [place for place in range(SIZE) if place not in BLOCK]
    spans = [set(outside[at : at + 2]) for at in range(0, len(outside), 2)]
    for seed in range(6):
        rule = Evict(keep=0.5, pool=1, span=2, control=Control("random", seed=seed))
        kept = set(rule.kept(model, view, scores, 0)[0].tolist())
        assert all(span <= kept or not span & kept for span in spans)
    # The mean of a span decides: 0 and 1 have .45, 2 and 3 .5, though no place is surer than 0.
    view.memory["seen confidence"] = torch.zeros(1, SIZE).index_copy(1, torch.arange(4), torch.tensor([[0.9, 0.0, 0.5, 0.5]]))
    assert Evict(keep=0.25, pool=1, span=2, control=Control("confidence")).kept(model, view, scores, 0)[0].tolist() == [
        2,
        3,
        *BLOCK,
    ]
    assert Evict(keep=0.4, pool=3, control=Control("confidence")).kept(model, view, scores, 0)[0].tolist() == [0, 1, 2, *BLOCK]


def test_an_evicted_key_is_not_seen(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pass in which a mask hides keys from the block, and keys and values outside are those of a plain pass."""
    first = PROMPT - model.logit_shift
    keep = torch.tensor([[0, 2, *range(first, BLOCK.stop), 12]])
    monkeypatch.setattr(Evict, "kept", lambda *_: keep)
    view, rule = opened(text()), Evict(delay=0)
    with torch.inference_mode(), rule.opened(model, view), Blockwise().passes(model, view) as forward:
        forward(view)
        rule.after(model, view)
        view.step = 1
        hidden = forward(view)
        seen = torch.ones((1, 1, SIZE, SIZE), dtype=torch.bool)
        hidden_keys = ~torch.isin(torch.arange(SIZE), keep[0])
        seen[:, :, first : BLOCK.stop, hidden_keys] = False
        body = language_model.network_body(model)
        kept: dict[str, Tensor] = {}
        inside = ((torch.arange(SIZE) >= first) & (torch.arange(SIZE) < BLOCK.stop))[None, :, None]
        projections = [layer for layer in model.layers if layer.role in ("k", "v")]
        keep_all: Any = lambda name: lambda _, __, output: kept.update({name: output.clone()})  # noqa: E731
        put_back: Any = lambda name: lambda _, __, output: torch.where(inside, output, kept[name])  # noqa: E731
        found = []
        for make, mask in ((keep_all, None), (put_back, seen)):
            hooks = [layer.module.register_forward_hook(make(layer.name)) for layer in projections]
            found.append(body(input_ids=view.ids, attention_mask=mask, use_cache=False).last_hidden_state)
            for hook in hooks:
                hook.remove()
        plain, wanted = (states[:, first : BLOCK.stop] for states in found)
    assert torch.allclose(hidden.states, wanted, atol=1e-6) and not torch.allclose(hidden.states, plain, atol=1e-3)


def test_confidence_is_that_of_all_passes_before_the_one_that_counts(model: LanguageModel) -> None:
    """With a delay the pass that counts computes the block alone, and would know nothing of the candidates."""
    seen: list[torch.Tensor] = []

    class Spy(Evict):
        def kept(self, model: Any, view: Any, scores: Any, layer: int) -> Any:
            seen.append(control.seen_confidence(view)[0].clone())
            return super().kept(model, view, scores, layer)

    rule = Spy(keep=0.5, control=Control("confidence"))
    plan = DecodingPlan(Quota(2), recompute=Blockwise(), visible=rule)
    decode(model, text()[:, :PROMPT], new_tokens=SIZE - PROMPT, block_length=3, plan=plan)
    assert bool((seen[0][model.logit_shift :] > 0).all()), "a place without a confidence is ranked by where it stands"


class Late:
    """A predictor that notes which places it is asked for, and whether a pass has read them and left others."""

    def __init__(self) -> None:
        self.new: set[int] = set()
        self.partly = False

    def of_examples(self, model: LanguageModel, examples: Any) -> Tensor:
        raise NotImplementedError

    def write(self, model: LanguageModel, hidden: Hidden, ids: Tensor, late: Tensor) -> Tensor:
        assert bool(readable(model, hidden, ids.shape[1])[late].all()), "a state of no place"
        self.partly |= bool((ids == tiny.MASK).any())
        self.new = set(late[0].nonzero()[:, 0].tolist())
        return torch.full((int(late.sum()),), 3)


@pytest.mark.parametrize("rule", [recompute.Focus(), recompute.D2Cache(candidates=2, share=0.0, gap=0)])
def test_late_tokens_are_read_from_states_of_their_own_pass_and_are_news_in_the_next(model: LanguageModel, rule: Any) -> None:
    """What a pass has left out waits for the next one; what was written late is computed there like all that is new."""
    late, checked = Late(), 0

    def news(view: View) -> None:
        nonlocal checked
        assert view.hidden is not None
        if late.new and view.hidden.rows is not None:
            assert late.new <= set(view.hidden.rows[0].tolist())
            checked += 1
        late.new = set()

    plan = DecodingPlan(recompute=rule, late_share=0.5, late_step=late)
    sizes: dict[str, Any] = {"new_tokens": 9, "block_length": 9}
    got = decode(model, text()[:, :PROMPT], **sizes, plan=plan, on_pass=news)
    assert not bool((got.ids == tiny.MASK).any()) and late.partly and checked > 0


def dependent(setting: Any, *, bound: float = 1.0, shift: int = 0) -> list[int]:
    """Six open places: 5 is the surest and a sink, 6 and 7 depend on each other, 8 is unsure; a shift moves what looks."""
    view = opened(text())
    attention = torch.full((SIZE, SIZE), 0.02)
    attention[:, 5] = 0.3
    attention[6, 7] = attention[7, 6] = 0.2
    view.memory["attention"], view.memory["shift"] = [attention.roll(-shift, 0)] * 2, shift
    view.memory["mass"] = attention.sum(0)[None]
    logits = torch.zeros((6, 4))
    for at, value in enumerate((9.0, 5.0, 4.0, 0.1, 3.0, 2.5)):
        logits[at, 1] = value
    view.guess, view.hidden = guess(view.ids, view.is_open, logits), Hidden(torch.zeros(1, SIZE, 1), None, 0)
    return Independent(0.5, bound, Control(setting))(view)[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("shift", [0, 1])
def test_an_independent_set_is_greedy_by_confidence(shift: int) -> None:
    """The sink depends on all by its column: .3 and .02 on average times 14 places are 2.2; 6 and 7 give 2.8, others .28."""
    assert dependent("as they fall", shift=shift) == [5]
    assert dependent("sinks in", bound=3.0, shift=shift) == [5]
    assert dependent("as they fall", bound=2.5, shift=shift) == [5, 6, 9, 10]
    assert dependent("sinks out", bound=2.0, shift=shift) == [5, 6, 9, 10]
    assert dependent("confidence", bound=2.5, shift=shift) == [5, 6, 7, 9]


def test_the_control_changes_which_and_not_how_many() -> None:
    view = opened(text())
    view.memory["mass"] = torch.tensor([[9.0, *[0.4] * 9, 9.0, *[0.4] * 3]])
    view.memory["seen confidence"] = torch.arange(SIZE)[None] / SIZE
    scores = torch.arange(SIZE, 0, -1)[None].float().index_fill(1, torch.tensor([13]), float("-inf"))
    best = lambda setting: Control(setting).ranked(scores, view)[0].topk(3).indices.tolist()  # noqa: E731
    assert best("as they fall") == [0, 1, 2]
    assert best("sinks in") == [0, 10, 1]
    assert best("sinks out") == [1, 2, 3]
    assert best("confidence") == [12, 11, 10]
    assert sorted(best("random")) != [0, 1, 2] and best("random") == best("random") and 13 not in best("random")
    for setting in control.SETTINGS:
        assert int((Control(setting).ranked(scores, view) > float("-inf")).sum()) == 13


@pytest.mark.parametrize("taken", range(1, 8))
def test_without_a_sink_forcing_sinks_changes_nothing_among_equals(taken: int) -> None:
    """Scores that are pooled over neighbours or spans are equal in runs."""
    view = opened(text())
    view.memory["mass"] = torch.ones((1, SIZE))
    scores = torch.tensor([[2.0] * 3 + [1.0] * 2 + [3.0] * 3 + [float("-inf")] * (SIZE - 8)])
    for setting in ("sinks in", "sinks out"):
        assert Control(setting).take(scores, view, taken).tolist() == Control().take(scores, view, taken).tolist()


def test_masses_and_confidences_are_those_of_the_last_pass(model: LanguageModel) -> None:
    view = opened(text())
    with torch.inference_mode(), control.observed(model, view):
        states = language_model.network_body(model)(input_ids=view.ids, use_cache=False).last_hidden_state
    view.hidden = Hidden(states, None, SIZE)
    control.note_confidence(model, view)
    assert float(view.memory["mass"].mean()) == pytest.approx(1.0, abs=1e-5)
    everywhere = torch.ones_like(view.ids, dtype=torch.bool)
    logits = language_model.logits_at(model, view.ids, everywhere)
    assert torch.allclose(control.seen_confidence(view)[0], logits.double().softmax(-1).amax(-1), atol=1e-6)
    rows = torch.tensor([[6, 7]])
    view.hidden = Hidden(0 * states[:, :2], rows, 2)
    control.note_confidence(model, view)
    changed = (control.seen_confidence(view)[0] - logits.double().softmax(-1).amax(-1)).abs() > 1e-4
    assert changed.nonzero()[:, 0].tolist() == [6 + model.logit_shift, 7 + model.logit_shift]
