"""Adaptive refresh against a slow loop over layers and positions."""

import math
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib.decoding import refresh
from lib.models import language_model, loading
from lib.models.language_model import LanguageModel
from tests import tiny

LENGTH = 12
EXACT = 1e-5  # the networks normalise in float32 whatever their dtype


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tiny.folder(tmp_path_factory.mktemp(request.param), causal=False, family=request.param)
    return loading.load(folder, dtype=torch.float64)


@torch.inference_mode()
def states(model: LanguageModel, ids: Tensor) -> Tensor:
    return language_model.network_body(model)(input_ids=ids, use_cache=False).last_hidden_state


def attention_of(layer: Any, hidden: Tensor, keys: Tensor, values: Tensor, rotations: Any, query: int) -> Tensor:
    """Attention of one query of one row over all kept keys, head by head."""
    own, size = layer.self_attn, layer.self_attn.head_dim
    vector = own.q_proj(hidden).view(-1, size)
    groups = own.num_key_value_groups
    heads = []
    for head, part in enumerate(vector):
        turned = turn(part, rotations, query)
        scores = keys[:, head // groups] @ turned / math.sqrt(size)
        heads.append(scores.softmax(0) @ values[:, head // groups])
    return own.o_proj(torch.cat(heads))


def turn(vector: Tensor, rotations: Any, position: int) -> Tensor:
    """Rotary embedding of one head's vector."""
    half = len(vector) // 2
    cos, sin = (part[0, position] for part in rotations)
    return vector * cos + torch.cat([-vector[half:], vector[:half]]) * sin


class SlowRefresh:
    """One row of text, every layer's features in lists over positions."""

    def __init__(self, model: LanguageModel, length: int) -> None:
        self.body = cast(Any, model.network.get_decoder())
        self.keys: list[Any] = [[None] * length for _ in self.body.layers]
        self.values: list[Any] = [[None] * length for _ in self.body.layers]
        self.attention: list[Any] = [[None] * length for _ in self.body.layers]
        self.mlp: list[Any] = [[None] * length for _ in self.body.layers]

    def step(self, ids: Tensor, count: int | None) -> tuple[Tensor, list[list[int]]]:
        """Return the final states and the positions recomputed in each layer (`count` None: all)."""
        hidden = list(self.body.embed_tokens(ids))
        everywhere = torch.arange(len(ids))[None]
        rotations = self.body.rotary_emb(hidden[0][None, None], everywhere)
        chosen_by_layer = []
        for index, layer in enumerate(self.body.layers):
            own, size = layer.self_attn, layer.self_attn.head_dim
            normed = [layer.input_layernorm(vector) for vector in hidden]
            chosen = list(range(len(ids)))
            if count is not None:
                near = [torch.cosine_similarity(own.v_proj(x), self.values[index][i], dim=0) for i, x in enumerate(normed)]
                chosen = sorted(sorted(chosen, key=lambda position, near=near: round(float(near[position]), 5))[:count])
            for i in chosen:
                turned = [turn(part, rotations, i) for part in own.k_proj(normed[i]).view(-1, size)]
                self.keys[index][i] = torch.stack(turned)
                self.values[index][i] = own.v_proj(normed[i])
            keys = torch.stack(self.keys[index])
            values = torch.stack(self.values[index]).view(len(ids), -1, size)
            for i in chosen:
                self.attention[index][i] = attention_of(layer, normed[i], keys, values, rotations, i)
            hidden = [vector + self.attention[index][i] for i, vector in enumerate(hidden)]
            for i in chosen:
                self.mlp[index][i] = layer.mlp(layer.post_attention_layernorm(hidden[i]))
            hidden = [vector + self.mlp[index][i] for i, vector in enumerate(hidden)]
            chosen_by_layer.append(chosen)
        return torch.stack([self.body.norm(vector) for vector in hidden]), chosen_by_layer


def versions(rows: int) -> list[Tensor]:
    """A text and three later states of it, each with a few other tokens."""
    found = [tiny.ids(rows, LENGTH)]
    for seed in (1, 2, 3):
        change = torch.rand((rows, LENGTH), generator=torch.Generator().manual_seed(seed)) < 0.6
        found.append(torch.where(change, tiny.ids(rows, LENGTH, seed=seed + 10), found[-1]))
    return found


def test_partial_passes_equal_the_slow_loop(model: LanguageModel) -> None:
    texts, ratio = versions(2), 0.4
    count = refresh.refresh_count(LENGTH, ratio=ratio)
    assert count == 5
    with torch.inference_mode(), refresh.adaptive_pass(model, ratio=ratio) as run:
        got = [run(ids, step == 0) for step, ids in enumerate(texts)]
    assert [hidden.computed for hidden in got] == [2 * LENGTH, *[2 * count] * 3]
    seen = set()
    for row in range(2):
        with torch.inference_mode():
            slow = SlowRefresh(model, LENGTH)
            for step, ids in enumerate(texts):
                expected, chosen = slow.step(ids[row], None if step == 0 else count)
                assert float((got[step].states[row] - expected).abs().max()) < EXACT
                seen |= {(row, step, index, *rows) for index, rows in enumerate(chosen) if step}
    # the layers and the rows choose for themselves, or a loop over one of them would do
    assert len({rows[3:] for rows in seen}) > 4


@pytest.mark.parametrize("fresh", [True, False])
def test_recomputing_everything_is_a_plain_pass(model: LanguageModel, fresh: bool) -> None:
    texts = versions(2)
    with torch.inference_mode(), refresh.adaptive_pass(model, ratio=0.2 if fresh else 1.0) as run:
        got = [run(ids, fresh or step == 0).states for step, ids in enumerate(texts)]
    for ids, found in zip(texts, got, strict=True):
        assert torch.equal(found, states(model, ids))


def test_features_are_kept(model: LanguageModel) -> None:
    """With one position a layer, a partial pass is not exact; the next fresh one is."""
    texts = versions(1)
    with torch.inference_mode(), refresh.adaptive_pass(model, ratio=0.01) as run:
        run(texts[0], True)
        partial, fresh = run(texts[3], False), run(texts[3], True)
    exact = states(model, texts[3])
    assert float((partial.states - exact).abs().max()) > 1e-2
    assert partial.computed == 1
    assert torch.equal(fresh.states, exact)


def test_the_network_is_left_as_it_was(model: LanguageModel) -> None:
    ids = tiny.ids(1, LENGTH)
    before = states(model, ids)
    layers = list(cast(Any, model.network.get_decoder()).layers)

    def own(_: Any) -> Tensor:
        return torch.zeros(())

    layers[0].mlp.forward = own
    try:
        with pytest.raises(RuntimeError, match="within"), refresh.adaptive_pass(model, ratio=0.5):
            assert "forward" in vars(layers[1].self_attn)
            raise RuntimeError("within")
        assert vars(layers[0].mlp)["forward"] is own
    finally:
        del layers[0].mlp.forward
    assert not [layer for layer in layers for part in (layer.self_attn, layer.mlp) if "forward" in vars(part)]
    assert torch.equal(states(model, ids), before)


@given(st.integers(1, 400), st.floats(0.001, 1.0))
def test_a_share_is_at_least_one_position_and_at_most_all(positions: int, ratio: float) -> None:
    count = refresh.refresh_count(positions, ratio=ratio)
    assert 1 <= count <= positions
    assert count == 1 or abs(count - ratio * positions) <= 0.5
    assert refresh.refresh_count(positions, ratio=1.0) == positions


def test_length_alone_does_not_count_as_a_move() -> None:
    kept = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]])
    new = kept * torch.tensor([50.0, 1.0, -1.0])[None, :, None] + torch.tensor([0.0, 0.1, 0.0])[None, :, None]
    assert refresh.moved_most(new, kept, count=1).tolist() == [[2]]
    assert refresh.moved_most(new, kept, count=2).tolist() == [[1, 2]]


def test_rounding_does_not_choose() -> None:
    """Vectors that differ by rounding alone have not moved: then the first positions are taken, however the rounding falls."""
    stream = torch.Generator().manual_seed(0)
    kept = torch.randn((1, 40, 16), generator=stream)
    for _ in range(5):
        new = kept * (1 + 1e-6 * torch.randn(kept.shape, generator=stream))
        new[0, 30] = -kept[0, 30]
        assert refresh.moved_most(new, kept, count=4).tolist() == [[0, 1, 2, 30]]


@pytest.mark.parametrize(("wanted", "expected"), [(range(0), [0, 1, 3]), (range(5, 7), [3, 5, 6]), (range(4, 8), [3, 4, 5])])
def test_among_unmoved_tokens_the_wanted_ones_come_first(wanted: range, expected: list[int]) -> None:
    """But a token that has moved comes before them."""
    kept = torch.randn((2, 10, 4), generator=torch.Generator().manual_seed(0))
    new = kept.clone()
    new[:, 3] *= -1
    assert refresh.moved_most(new, kept, count=3, wanted=wanted).tolist() == [expected] * 2


def test_a_mask_in_the_block_sees_a_token_that_has_just_come(model: LanguageModel) -> None:
    """Masks beside a new token have not moved in the first layer; were others recomputed instead, they would stay blind."""
    before = tiny.ids(1, LENGTH)
    before[:, 6:10] = tiny.MASK
    now = before.clone()
    now[:, 6] = 3
    with torch.inference_mode():
        with refresh.adaptive_pass(model, ratio=5 / LENGTH, block=range(6, 10)) as run:
            old, new = run(before, True).states.clone(), run(now, False).states
        with refresh.adaptive_pass(model, ratio=5 / LENGTH) as run:
            run(before, True)
            blind = run(now, False).states
    assert float((new - old)[0, 7:10].abs().max(-1).values.min()) > 1e-3
    assert float((blind - old)[0, 7:10].abs().max(-1).values.min()) < EXACT
