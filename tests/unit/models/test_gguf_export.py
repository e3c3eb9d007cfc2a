"""GGUF files: what is read back is what was written, weight by weight, logit by logit and token by token."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Split
from transformers import PreTrainedTokenizerFast

from lib.core.config import ROOT
from lib.core.errors import InputError
from lib.models import loading
from lib.models.export import Kept
from lib.models.gguf import export as gguf_export
from lib.models.gguf import tokenizer as gguf_tokenizer
from lib.models.gguf.export import GgufFile, save_gguf
from lib.models.language_model import LanguageModel
from lib.pruning import shrink
from lib.texts import articles
from tests import tiny
from tests.ggufs import rounded_

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}


def wide(folder: Path, **options: Any) -> LanguageModel:
    return tiny.model(folder, **{"causal": False, **WIDE, **options})


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def read_back_(model: LanguageModel, path: Path) -> dict[str, Kind]:
    """Put the tensors of a file into a network, undoing the permutation head by head with slow loops."""
    reader, config = gguf.GGUFReader(path), model.network.config
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    weights, kinds = {}, {}
    for tensor in reader.tensors:
        *block, role, kind = tensor.name.split(".")
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(role)
        if heads and config.model_type == "llama":
            size, undone = len(value) // heads, value.clone()
            for head in range(heads):
                for index in range(size // 2):
                    undone[head * size + index] = value[head * size + 2 * index]
                    undone[head * size + size // 2 + index] = value[head * size + 2 * index + 1]
            value = undone
        name = f"model.layers.{block[1]}.{names[role]}.{kind}" if block else f"{names[role]}.{kind}"
        weights[name], kinds[name] = value, tensor.tensor_type
    expected = {name for name in model.network.state_dict() if not config.tie_word_embeddings or name != "lm_head.weight"}
    assert weights.keys() == expected
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.fill_(float("nan"))
    model.network.load_state_dict(weights, strict=False)
    return kinds


def logits(model: LanguageModel) -> torch.Tensor:
    with torch.inference_mode():
        return model.network(input_ids=tiny.ids(2, 9)).logits.float()


# Weights


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("options", [{}, {"tie": True}, {"kv_heads": 4}, {"kv_heads": 1}], ids=str)
def test_float32_comes_back_bit_for_bit(tmp_path: Path, causal: bool, family: str, options: dict[str, Any]) -> None:
    model = tiny.model(tmp_path / "m", causal=causal, family=family, **options)
    expected = logits(model)
    made = save_gguf(model, tmp_path / "m.gguf")
    assert made == GgufFile(tmp_path / "m.gguf", (), (), ())
    found = fields(made.path)
    assert found["general.architecture"] == {"llama": ("llada", "llama"), "qwen2": ("dream", "qwen2")}[family][causal]
    kinds = read_back_(model, made.path)
    assert set(kinds.values()) == {Kind.F32}
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats_stay_what_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    model = loading.load(tiny.folder(tmp_path / "m", causal=False, **WIDE), dtype=dtype)
    before = {name: value.float().clone() for name, value in model.network.state_dict().items()}
    kinds = read_back_(model, save_gguf(model, tmp_path / "m.gguf").path)
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {gguf_export.FLOATS[dtype]}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {Kind.F32}
    assert all(torch.equal(value.float(), before[name]) for name, value in model.network.state_dict().items())


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 32), (4, 32), (4, 64), (5, 32), (8, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_stand_in_the_file_bit_for_bit(tmp_path: Path, bits: int, group: int, dtype: torch.dtype) -> None:
    """Bytes are read with shifts of this test's own, and the logits are those of the fake-quantized model."""
    model = loading.load(tiny.folder(tmp_path / "m", causal=False, hidden_size=64, intermediate_size=128), dtype=dtype)
    quantized = rounded_(model, bits=4 if bits == 5 else bits, group=group, sparsity=0.5)  # codes of 4 bits are some of 5
    quantized = {name: dataclasses.replace(weight, bits=bits) for name, weight in quantized.items()}
    expected = logits(model)
    made = save_gguf(model, tmp_path / "m.gguf", quantized=quantized)
    assert made.exact == tuple(quantized) and made.requantized == made.as_floats == ()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(made.path).tensors}
    up = quantized["model.layers.1.mlp.up_proj.weight"]
    codes, scales = blocks(tensors["blk.1.ffn_up.weight"])
    assert np.array_equal(codes, up.codes.numpy())
    assert np.array_equal(scales, up.scales.float().repeat_interleave(group // 32, dim=1).numpy())
    kinds = read_back_(model, made.path)
    assert {kinds[name] for name in quantized} == {Kind.Q4_0 if bits <= 4 else Kind.Q8_0}
    if dtype == torch.float32:
        assert torch.equal(logits(model), expected)
        zeros = {layer.name: layer.module.weight == 0 for layer in model.layers}
        assert all(torch.equal(zeros[name], weight.codes == 0) for name, weight in quantized.items())
    assert fields(made.path)["general.file_type"] == (2 if bits <= 4 else 7)


def blocks(tensor: gguf.ReaderTensor) -> tuple[np.ndarray, np.ndarray]:
    """Read codes and scales of Q4_0 or Q8_0 byte by byte."""
    size, codes, scales = (18 if tensor.tensor_type == Kind.Q4_0 else 34), [], []
    for row in np.asarray(tensor.data, dtype=np.uint8):
        own, steps = [], []
        for start in range(0, len(row), size):
            block = row[start : start + size]
            steps.append(float(np.frombuffer(block[:2].tobytes(), np.float16)[0]))
            if size == 34:
                own += [int(value) - 256 * (value > 127) for value in block[2:]]
            else:
                own += [int(value & 15) - 8 for value in block[2:]] + [int(value >> 4) - 8 for value in block[2:]]
        codes.append(own)
        scales.append(steps)
    return np.array(codes, dtype=np.int8), np.array(scales, dtype=np.float32)


def test_what_blocks_cannot_hold_is_rounded_again_and_said(tmp_path: Path) -> None:
    """A group that 32 does not divide, and a scale below what float16 tells apart."""
    for what in ("group", "scale"):
        model = wide(tmp_path / what)
        if what == "scale":
            model.layers[0].module.weight.mul_(1e-6)
        quantized = rounded_(model, bits=4, group=16 if what == "group" else 32)
        made = save_gguf(model, tmp_path / f"{what}.gguf", quantized=quantized)
        again = tuple(quantized) if what == "group" else (model.layers[0].name,)
        assert made.requantized == again and set(made.exact) == quantized.keys() - set(again)
        before = {name: weight.dequantize(dtype=torch.float32) for name, weight in quantized.items()}
        read_back_(model, made.path)
        for layer in model.layers:
            same = torch.equal(layer.module.weight, before[layer.name])
            assert same == (layer.name in made.exact)
            want = gguf.quants.dequantize(gguf.quants.quantize(before[layer.name].numpy(), Kind.Q4_0), Kind.Q4_0)
            assert same or np.array_equal(layer.module.weight.numpy(), want), "gguf's own quantizer"


def test_rows_that_are_no_whole_blocks_stay_floats(tmp_path: Path) -> None:
    model = wide(tmp_path / "m", intermediate_size=40)
    quantized = rounded_(model, bits=8, group=8)
    expected = logits(model)
    quantized = {name: weight for name, weight in quantized.items() if "down" in name}
    made = save_gguf(model, tmp_path / "m.gguf", quantized=quantized)
    assert made.as_floats == tuple(quantized) and made.exact == made.requantized == ()
    read_back_(model, made.path)
    assert torch.equal(logits(model), expected)


def test_a_smaller_model_says_how_wide_its_heads_are(tmp_path: Path) -> None:
    dense = wide(tmp_path / "m")
    kept = Kept([torch.tensor([1])] * 2, [torch.arange(0, 96, 3)] * 2)
    model = shrink.shrunk(dense, groups=kept.groups, channels=kept.channels)
    expected = logits(model)
    made = save_gguf(model, tmp_path / "m.gguf", kept=kept)
    found = fields(made.path)
    named = {"attention.head_count": 2, "attention.head_count_kv": 1, "feed_forward_length": 32, "embedding_length": 64}
    named |= {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16}
    assert {name: found[f"llada.{name}"] for name in named} == named
    assert json.loads(found["kept"])["groups"] == [[1], [1]]
    read_back_(model, made.path)
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)
    assert "llada.attention.key_length" not in fields(save_gguf(dense, tmp_path / "dense.gguf").path)


def test_a_twin_is_read_by_transformers_itself(tmp_path: Path) -> None:
    model = dataclasses.replace(tiny.model(tmp_path / "m", causal=True, **WIDE, vocab_size=260), tokenizer=letters())
    expected = logits(model)
    save_gguf(model, tmp_path / "twin" / "m.gguf")
    loaded = loading.load(tmp_path / "twin" / "m.gguf")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=0)
    assert loaded.is_causal and loaded.network.config.num_key_value_heads == 2


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_diffusion_model_says_how_it_is_run(tmp_path: Path, family: str) -> None:
    model = dataclasses.replace(wide(tmp_path / "m", family=family), logit_shift=int(family == "qwen2"))
    found = fields(save_gguf(model, tmp_path / "m.gguf").path)
    architecture = {"llama": "llada", "qwen2": "dream"}[family]
    assert found[f"{architecture}.attention.causal"] is False
    assert found["diffusion.shift_logits"] is (family == "qwen2")
    assert found["tokenizer.ggml.mask_token_id"] == tiny.MASK
    assert found["tokenizer.ggml.model"] == "no_vocab"
    twin = fields(save_gguf(tiny.model(tmp_path / "t", family=family), tmp_path / "t.gguf").path)
    assert not [name for name in twin if "causal" in name or "diffusion" in name or "mask" in name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention": "block-causal"}, "llama.cpp must look at all positions or at earlier ones, got block-causal"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotated without scaling, got yarn: use save_plain"),
        ({"hidden_act": "gelu"}, "must be silu, got gelu"),
        ({"model_type": "qwen3"}, "must be of llama, qwen2, got qwen3: use save_plain"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "must see all positions, got sliding windows"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    model = wide(tmp_path / "m")
    if "attention" in change:
        model = dataclasses.replace(model, **change)
    else:
        name, value = next(iter(change.items()))
        vars(model.network.config)[name] = value
    with pytest.raises(InputError, match=said):
        save_gguf(model, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_biases_of_a_llama_have_no_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"have a place in GGUF's llada, got model.layers.0.self_attn.q_proj.bias"):
        save_gguf(wide(tmp_path / "m", attention_bias=True), tmp_path / "m.gguf")


def test_a_file_is_not_overwritten_and_codes_are_checked(tmp_path: Path) -> None:
    model = wide(tmp_path / "m")
    quantized = rounded_(model, bits=4, group=32)
    model.layers[0].module.weight[0, 0] += 1
    with pytest.raises(InputError, match=r"must be codes . scales"):
        save_gguf(model, tmp_path / "m.gguf", quantized=quantized)
    save_gguf(model, tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"new file, got .*m.gguf, which exists"):
        save_gguf(model, tmp_path / "m.gguf")


# Tokens


def letters(pre: Any = None, **options: Any) -> PreTrainedTokenizerFast:
    """Bytes, one merge, and special tokens."""
    names = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab"]
    core = Tokenizer(BPE({name: index for index, name in enumerate(names)}, [("a", "b")]))
    core.pre_tokenizer = pre or ByteLevel(add_prefix_space=False)
    core.decoder = ByteDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **options)


@pytest.mark.parametrize("name", ["dlm", "ar"])
def test_the_embedded_models_tokens_are_read_back(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = loading.load(ROOT / "models" / "reference" / name)
    made, tokenizer = save_gguf(model, tmp_path / f"{name}.gguf"), model.tokenizer
    assert tokenizer is not None
    found = fields(made.path)
    assert found["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(list(range(model.network.config.vocab_size)))
    assert found["tokenizer.ggml.pre"] == "smollm" and found["tokenizer.ggml.model"] == "gpt2"
    types = found["tokenizer.ggml.token_type"]
    assert [index for index, kind in enumerate(types) if kind == gguf.TokenType.CONTROL] == sorted(tokenizer.all_special_ids)
    ids = {role: found[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "padding")}
    assert ids == {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.ggml.add_eos_token"] is False
    if name == "dlm":
        assert found["tokenizer.ggml.mask_token_id"] == model.mask_token_id
    rows = [row for file in ("articles_evaluation", "articles_calibration") for row in articles.read_rows(file)]
    texts = [articles.format_article(row, description_last=False) for row in rows]
    texts += [f"{row['question']} {row['answer']}" for row in articles.read_rows("sums_test")]
    rate = gguf_export.tokenizer_mismatch(tokenizer, made.path, texts)
    with capsys.disabled():
        print(f"\n{name}: {100 * rate:.2f} % of {len(texts)} texts are tokenised otherwise by transformers' reader of the GGUF")
    assert rate == 0.0


def test_a_mismatch_is_counted(tmp_path: Path) -> None:
    """With the pre-tokenizer of another model some texts come apart at other places; a merge across them shows it."""
    names = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "12"]
    core = Tokenizer(BPE({name: index for index, name in enumerate(names)}, [("1", "2")]))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), letters().backend_tokenizer.decoder
    grouped = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    model = dataclasses.replace(wide(tmp_path / "m", vocab_size=260), tokenizer=grouped)
    own = save_gguf(model, tmp_path / "own.gguf").path
    other = save_gguf(model, tmp_path / "other.gguf", pre_tokenizer="qwen2").path
    texts = ["ab 12", "x 1 2", "12", "a"]
    assert gguf_export.tokenizer_mismatch(grouped, own, texts) == 0.0
    assert gguf_export.tokenizer_mismatch(grouped, other, texts) == 0.5
    with pytest.raises(InputError, match="over texts, got none"):
        gguf_export.tokenizer_mismatch(grouped, own, [])


def test_rows_without_a_token_and_added_words_are_marked(tmp_path: Path) -> None:
    tokenizer = letters()
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.chat_template = "{{ messages }}"
    model = dataclasses.replace(wide(tmp_path / "m", vocab_size=300), tokenizer=tokenizer)
    found = fields(save_gguf(model, tmp_path / "m.gguf").path)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 300 and tokens[-1] == "[PAD299]" and types[-1] == gguf.TokenType.UNUSED
    assert types[tokens.index("<think>")] == gguf.TokenType.USER_DEFINED
    assert types[tokens.index("<mask>")] == types[tokens.index("<s>")] == gguf.TokenType.CONTROL
    assert types[tokens.index("ab")] == gguf.TokenType.NORMAL and found["tokenizer.ggml.merges"] == ["a b"]
    assert found["tokenizer.chat_template"] == "{{ messages }}" and found["tokenizer.ggml.add_bos_token"] is False


def test_ways_to_split_texts_have_llama_cpps_names() -> None:
    splits = gguf_tokenizer.GGUF_PRE_TOKENIZER_SPLITS
    bytes_only = ByteLevel(add_prefix_space=False, use_regex=False)
    cases: list[tuple[Any, str | None]] = [
        (ByteLevel(add_prefix_space=False), "gpt-2"),
        (pre_tokenizers.Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]), "smollm"),
        (pre_tokenizers.Sequence([Digits(individual_digits=False), ByteLevel(add_prefix_space=False)]), None),
        (ByteLevel(add_prefix_space=True), None),
        (bytes_only, None),
        (pre_tokenizers.Sequence([Split("x", "isolated"), bytes_only]), None),
    ]
    for name in gguf_tokenizer.NAMED_SPLITS:
        cases.append((pre_tokenizers.Sequence([Split(Regex(splits[name]), "isolated"), bytes_only]), name))
    for pre, name in cases:
        raw = json.loads(letters(pre).backend_tokenizer.to_str())
        if name is None:
            with pytest.raises(InputError, match=r"llama.cpp has a name for, got .*: give pre_tokenizer=NAME"):
                gguf_tokenizer.pre_tokenizer_name(raw)
        else:
            assert gguf_tokenizer.pre_tokenizer_name(raw) == name


def test_other_tokenizers_are_refused_and_may_be_left_out(tmp_path: Path) -> None:
    model = dataclasses.replace(wide(tmp_path / "m"), tokenizer=tiny.tokenizer())
    with pytest.raises(InputError, match="must be byte-level BPE, got WordLevel with a decoder None: export the model without"):
        save_gguf(model, tmp_path / "m.gguf")
    save_gguf(dataclasses.replace(model, tokenizer=None), tmp_path / "m.gguf")
    with pytest.raises(InputError, match="ids below 31, got 258: resize"):
        save_gguf(dataclasses.replace(model, tokenizer=letters()), tmp_path / "n.gguf")
