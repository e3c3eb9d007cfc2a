"""The mass recorder against slow loops, and what it leaves untouched."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lib.attention import masses
from lib.core.errors import InputError
from lib.models.language_model import LanguageModel, network_body
from lib.models.layers import attention
from tests import tiny

ATOL = 1e-5  # float32 against float64 or against another order of summation, masses up to about 20


@pytest.fixture(scope="module", params=[True, False], ids=["causal", "bidirectional"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("model"), causal=request.param, kv_heads=2)


def eager_maps(model: LanguageModel, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Attention `[layer, batch, head, query, key]` as transformers' eager path returns it."""
    model.network.set_attn_implementation("eager")
    try:
        out = network_body(model)(input_ids=ids, attention_mask=attention_mask, output_attentions=True, use_cache=False)
    finally:
        model.network.set_attn_implementation(attention.NAME)
    return torch.stack(out.attentions)


def slow_probabilities(query: Tensor, key: Tensor, *, scaling: float, causal: bool) -> Tensor:
    """One head and one query at a time, in float64; query head h reads key head h // group."""
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    probs = torch.zeros(batch, heads, queries, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                seen = q + 1 if causal else key.shape[2]
                scores = key[b, h // group, :seen].double() @ query[b, h, q].double() * scaling
                probs[b, h, q, :seen] = scores.softmax(0)
    return probs


def draw_qk(seed: int = 0) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(2, 6, 7, 8, generator=stream), torch.randn(2, 2, 7, 8, generator=stream)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [(0, 7), (2, 5), (6, 7)])
def test_probabilities_of_grouped_heads_equal_a_slow_loop(causal: bool, rows: tuple[int, int]) -> None:
    query, key = draw_qk()
    got = masses.probabilities(query, key, None, rows=rows, scaling=0.3, is_causal=causal)
    expected = slow_probabilities(query, key, scaling=0.3, causal=causal)[:, :, rows[0] : rows[1], : got.shape[-1]]
    assert got.shape[-1] == (rows[1] if causal else 7)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0)
    interleaved = slow_probabilities(query, key[:, [1, 0]], scaling=0.3, causal=causal)
    assert (interleaved[:, :, rows[0] : rows[1], : got.shape[-1]] - expected).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("per_query", [True, False])
def test_probabilities_obey_the_mask_and_leave_it_unchanged(kind: str, per_query: bool) -> None:
    query, key = draw_qk(1)
    allowed = torch.rand(2, 1, 7 if per_query else 1, 7, generator=torch.Generator().manual_seed(2)) < 0.6
    allowed[..., 0] = True
    mask = allowed if kind == "boolean" else torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    before = mask.clone()
    got = masses.probabilities(query, key, mask, rows=(1, 6), scaling=1.0, is_causal=True)
    full = allowed.expand(2, 1, 7, 7)[:, :, 1:6]
    scores = (query[:, :, 1:6] @ key.repeat_interleave(3, 1).transpose(2, 3)).masked_fill(~full, float("-inf"))
    torch.testing.assert_close(got, scores.softmax(-1), atol=1e-6, rtol=0)
    assert torch.equal(mask, before)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 6, 5))


def test_the_inputs_are_left_unchanged() -> None:
    query, key = draw_qk(3)
    copies = query.clone(), key.clone()
    masses.probabilities(query, key, None, rows=(0, 7), scaling=1.0, is_causal=False)
    assert torch.equal(query, copies[0])
    assert torch.equal(key, copies[1])


def test_mass_equals_the_column_sums_of_eager_attention(model: LanguageModel) -> None:
    ids = tiny.ids(3, 20)
    mass = masses.sink_mass(model, ids)
    torch.testing.assert_close(mass, eager_maps(model, ids).sum(3), atol=ATOL, rtol=0)
    assert mass.shape == (2, 3, 4, 20)
    assert mass.std() > 0.3  # far from uniform, so a wrong axis would show


@pytest.mark.parametrize("chunk", [1, 3, 19, 20, 1000])
def test_mass_does_not_depend_on_the_chunk(model: LanguageModel, chunk: int) -> None:
    ids = tiny.ids(2, 20)
    torch.testing.assert_close(masses.sink_mass(model, ids, query_chunk=chunk), masses.sink_mass(model, ids), atol=ATOL, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_excluded_and_equals_the_unpadded_run(model: LanguageModel, side: str) -> None:
    """Rotary attention sees distances only, so a shift by left padding changes nothing either."""
    text, pad = tiny.ids(2, 14), tiny.ids(2, 5, seed=9)
    ones, zeros = torch.ones_like(text), torch.zeros_like(pad)
    ids, mask = (
        (torch.cat([pad, text], 1), torch.cat([zeros, ones], 1))
        if side == "left"
        else (torch.cat([text, pad], 1), torch.cat([ones, zeros], 1))
    )
    mass = masses.sink_mass(model, ids, attention_mask=mask, query_chunk=4)
    assert torch.isfinite(mass).all()
    assert (mass[..., ~mask[0].bool()] == 0).all()
    torch.testing.assert_close(mass[..., mask[0].bool()], masses.sink_mass(model, text), atol=5e-5, rtol=0)


def test_rows_with_different_padding_in_one_batch(model: LanguageModel) -> None:
    ids = tiny.ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    mass = masses.sink_mass(model, ids, attention_mask=mask)
    torch.testing.assert_close(mass[:, 0], masses.sink_mass(model, ids[:1])[:, 0], atol=ATOL, rtol=0)
    torch.testing.assert_close(mass[:, 1, :, :8], masses.sink_mass(model, ids[1:, :8])[:, 0], atol=ATOL, rtol=0)
    torch.testing.assert_close(mass[:, 1].sum(-1), torch.full((2, 4), 8.0), atol=ATOL, rtol=0)


def test_recording_leaves_the_output_unchanged(model: LanguageModel) -> None:
    ids = tiny.ids(2, 16)
    with torch.inference_mode():
        plain = model.network(input_ids=ids).logits
        with masses.record(model):
            recorded = model.network(input_ids=ids).logits
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-5)  # the same sums in another order


def test_recording_leaves_the_output_of_a_float64_network_at_its_precision(tmp_path: Path) -> None:
    """Masses are float32; the output that goes on to the next layer must not become so."""
    double, ids = tiny.model(tmp_path, causal=False), tiny.ids(2, 16)
    double.network.double()
    with torch.inference_mode():
        plain = double.network(input_ids=ids).logits
        with masses.record(double):
            recorded = double.network(input_ids=ids).logits
    torch.testing.assert_close(recorded, plain, atol=1e-12, rtol=1e-12)


def test_recording_leaves_gradients_unchanged(tmp_path: Path) -> None:
    learning, ids, found = tiny.model(tmp_path, causal=False), tiny.ids(2, 16), []
    learning.network.requires_grad_(True)
    for context in (nullcontext(), masses.record(learning)):
        with context:
            learning.network(input_ids=ids).logits.square().sum().backward()
        found.append([layer.module.weight.grad for layer in learning.layers])
        learning.network.zero_grad()
    assert all(torch.equal(plain, recorded) for plain, recorded in zip(*found, strict=True))


def test_recording_leaves_the_output_of_a_masked_pass_bit_for_bit(model: LanguageModel) -> None:
    """With a mask the output is SDPA's own: a padding query, which sees nothing, must not become NaN."""
    ids, real = tiny.ids(2, 16), torch.ones(2, 16, dtype=torch.long)
    real[0, 10:] = 0
    with torch.inference_mode():
        plain = model.network(input_ids=ids, attention_mask=real).logits
        with masses.record(model, attention_mask=real):
            recorded = model.network(input_ids=ids, attention_mask=real).logits
    assert torch.equal(plain, recorded)


def test_the_attention_implementation_is_restored_after_an_error(model: LanguageModel) -> None:
    with pytest.raises(RuntimeError, match="inside"), masses.record(model):
        assert model.network.config._attn_implementation == masses.NAME
        raise RuntimeError("inside")
    assert model.network.config._attn_implementation == attention.NAME
    assert masses._ACTIVE.get() is None


def test_pop_without_a_pass_is_refused_and_forgets_what_it_gave(model: LanguageModel) -> None:
    with torch.inference_mode(), masses.record(model) as recorder:
        with pytest.raises(InputError, match="got no forward pass"):
            recorder.pop()
        network_body(model)(input_ids=tiny.ids(1, 8))
        assert recorder.pop().shape == (2, 1, 4, 1, 8)
        with pytest.raises(InputError, match="got no forward pass"):
            recorder.pop()


def test_two_passes_do_not_mix(model: LanguageModel) -> None:
    first, second = tiny.ids(1, 9), tiny.ids(1, 9, seed=5)
    with torch.inference_mode(), masses.record(model) as recorder:
        network_body(model)(input_ids=first)
        recorder.pop()
        network_body(model)(input_ids=second)
        got = recorder.pop()[:, :, :, 0]
    torch.testing.assert_close(got, masses.sink_mass(model, second))


def test_the_map_is_eager_attention_averaged_over_layers_and_heads(model: LanguageModel) -> None:
    ids = tiny.ids(2, 11)
    with torch.inference_mode(), masses.record(model, keep=("map",), query_chunk=4) as recorder:
        network_body(model)(input_ids=ids)
        got = recorder.pop_map()
    torch.testing.assert_close(got, eager_maps(model, ids).mean(dim=(0, 2)), atol=1e-6, rtol=0)


def favourites_by_hand(maps: Tensor, *, queries: list[int]) -> Tensor:
    """Which keys are the favourite of one of the queries in the mean over heads, from `[layer, batch, head, query, key]`."""
    marked = torch.zeros(maps.shape[0], maps.shape[1], maps.shape[-1], dtype=torch.bool)
    for layer in range(maps.shape[0]):
        for row in range(maps.shape[1]):
            for query in queries:
                mean = [sum(head[key] for head in maps[layer, row, :, query].tolist()) for key in range(maps.shape[-1])]
                marked[layer, row, mean.index(max(mean))] = True
    return marked


@pytest.mark.parametrize("chunk", [1, 4, 128])
def test_favourites_are_the_argmax_keys_of_the_queries_before_each_mark(model: LanguageModel, chunk: int) -> None:
    ids, marks = tiny.ids(3, 14), [1, 6, 7, 14]
    with torch.inference_mode(), masses.record(model, keep=("argmax",), marks=marks, query_chunk=chunk) as recorder:
        network_body(model)(input_ids=ids)
        got = recorder.pop_argmax()
        with pytest.raises(InputError, match="favourites must be recorded"):
            recorder.pop_argmax()
    maps = eager_maps(model, ids)
    expected = torch.stack([favourites_by_hand(maps, queries=list(range(mark))) for mark in marks], 2)
    assert torch.equal(got, expected)
    assert (got[:, :, 1:].sum(-1) > got[:, :, :-1].sum(-1)).any()
    # a head's own favourites are others than those of the mean over heads
    assert not torch.equal(favourites_by_hand(maps[:, :, :1], queries=list(range(14))), expected[:, :, -1])


@pytest.mark.parametrize("chunk", [3, 128])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_favourite_and_is_none(model: LanguageModel, side: str, chunk: int) -> None:
    """A left padding query of a causal model sees nothing at all; its row is NaN and must not vote for key 0."""
    ids, mask = tiny.ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    padding = slice(0, 4) if side == "left" else slice(9, 13)
    mask[1, padding] = 0
    with (
        torch.inference_mode(),
        masses.record(model, keep=("argmax",), attention_mask=mask, query_chunk=chunk) as recorder,
    ):
        network_body(model)(input_ids=ids, attention_mask=mask)
        got = recorder.pop_argmax()[:, :, 0]
    real = mask[1].bool()
    alone = eager_maps(model, ids[1:, real])
    assert torch.equal(got[:, 1, real], favourites_by_hand(alone, queries=list(range(9)))[:, 0])
    assert not got[:, 1, ~real].any()
    assert torch.equal(got[:, :1], favourites_by_hand(eager_maps(model, ids[:1]), queries=list(range(13))))


def test_value_norms_are_those_of_the_projected_hidden_states(model: LanguageModel) -> None:
    ids = tiny.ids(2, 9)
    with torch.inference_mode(), masses.record(model, keep=("value_norm",), marks=[4, 9]) as recorder:
        states = network_body(model)(input_ids=ids, output_hidden_states=True).hidden_states
        got = recorder.pop_value_norms()
        with pytest.raises(InputError, match="value norms must be recorded"):
            recorder.pop_value_norms()
    assert got.shape == (2, 2, 2, 9)
    for index, layer in enumerate(model.network.get_decoder().layers):  # pyright: ignore
        weight = layer.self_attn.v_proj.weight.double()
        entering = layer.input_layernorm(states[index]).double()
        for head in range(2):
            values = entering @ weight[8 * head : 8 * head + 8].T
            torch.testing.assert_close(got[index, :, head].double(), values.pow(2).sum(-1).sqrt(), atol=ATOL, rtol=0)


def test_nothing_is_kept_unasked(model: LanguageModel) -> None:
    with torch.inference_mode(), masses.record(model) as recorder:
        network_body(model)(input_ids=tiny.ids(1, 5))
        for pop in (recorder.pop_map, recorder.pop_argmax, recorder.pop_value_norms):
            with pytest.raises(InputError, match="must be recorded before they are read"):
                pop()


def test_prefix_masses_equal_separate_passes(tmp_path: Path) -> None:
    model = tiny.model(tmp_path, causal=True)
    ids, lengths = tiny.ids(2, 17), [1, 4, 5, 17]
    got = masses.read_prefixes(model, ids, lengths=lengths).pop()
    for index, length in enumerate(lengths):
        alone = masses.sink_mass(model, ids[:, :length])
        torch.testing.assert_close(got[:, :, :, index, :length], alone, atol=ATOL, rtol=0)
        assert (got[:, :, :, index, length:] == 0).all()


def test_prefix_favourites_and_values_equal_separate_passes(tmp_path: Path) -> None:
    model = tiny.model(tmp_path, causal=True)
    ids, lengths = tiny.ids(2, 15), [1, 5, 6, 15]
    recorder = masses.read_prefixes(model, ids, lengths=lengths, keep=("argmax", "value_norm"))
    favourites, norms = recorder.pop_argmax(), recorder.pop_value_norms()
    for index, length in enumerate(lengths):
        alone = masses.read_prefixes(model, ids[:, :length], lengths=[length], keep=("argmax", "value_norm"))
        assert torch.equal(favourites[:, :, index, :length], alone.pop_argmax()[:, :, 0])
        assert not favourites[:, :, index, length:].any()
        torch.testing.assert_close(norms[..., :length], alone.pop_value_norms(), atol=ATOL, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_map_ends_at_the_last_prefix_whatever_makes_the_output(dtype: torch.dtype, tmp_path: Path) -> None:
    causal = tiny.model(tmp_path, causal=True)
    torch.nn.Module.to(causal.network, dtype)
    assert masses.read_prefixes(causal, tiny.ids(2, 16), lengths=(4, 9), keep=("map",)).pop_map().shape == (2, 9, 16)


def test_prefix_masses_of_a_bidirectional_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must come from a causal model"):
        masses.read_prefixes(tiny.model(tmp_path, causal=False), tiny.ids(1, 8), lengths=[4])


@pytest.mark.parametrize("marks", [[4, 4], [5, 3], [9]])
def test_bad_marks_are_refused(model: LanguageModel, marks: list[int]) -> None:
    with (
        pytest.raises(InputError, match="marks must rise"),
        torch.inference_mode(),
        masses.record(model, marks=marks),
    ):
        network_body(model)(input_ids=tiny.ids(1, 8))


def test_a_chunk_below_one_is_refused(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="query_chunk must be at least 1, got 0"):
        masses.sink_mass(model, tiny.ids(1, 8), query_chunk=0)


def test_bfloat16_sums_are_kept_in_float32() -> None:
    """300 queries attend almost alike to one key: a bfloat16 running sum would stop growing at 256."""
    query = torch.ones(1, 1, 300, 4, dtype=torch.bfloat16)
    key = torch.zeros(1, 1, 300, 4, dtype=torch.bfloat16)
    key[:, :, 7] = 40.0
    recorder = masses.MassRecorder(query_chunk=7)
    recorder.add(query, key, None, scaling=0.5, is_causal=False)
    mass = recorder.pop()
    assert mass.dtype == torch.float32
    assert abs(float(mass[..., 7]) - 300) < 1e-3
    scores = (query.double() @ key.double().transpose(2, 3) * 0.5).softmax(-1).sum(2)
    torch.testing.assert_close(mass[0, :, :, 0].double(), scores, atol=1e-3, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, Tensor):
                self.largest = max(self.largest, item.numel())
        return result


def test_autocast_does_not_round_masses(model: LanguageModel) -> None:
    """Training is measured under it; each query still gives away exactly 1."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mass = masses.sink_mass(model, tiny.ids(2, 32))
    torch.testing.assert_close(mass.sum(-1), torch.full(mass.shape[:-1], 32.0), atol=1e-4, rtol=0)


def test_no_square_tensor_is_made_or_kept(tmp_path: Path) -> None:
    positions, chunk = 256, 8
    model = tiny.model(tmp_path, causal=False, max_position_embeddings=positions)
    watch = LargestTensor()
    with watch:
        mass = masses.sink_mass(model, tiny.ids(1, positions), query_chunk=chunk)
    assert mass.numel() == 2 * 4 * positions
    # the largest is a layer's activations or 4 heads x chunk x keys; a square one would have 65,536 elements for one head alone
    assert watch.largest <= max(4 * chunk * positions, positions * 40)
    assert watch.largest < positions * positions
