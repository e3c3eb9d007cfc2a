"""Tiny folders in the layout of every family of the registry: what is loaded, and what every way of saving keeps."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from lib.checkpoints import contents, lookup
from lib.checkpoints.families import ENCODERS, FAMILIES, PLAIN, Family
from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.grid import availability
from lib.models import export, loading, official, streaming
from lib.models.language_model import LanguageModel, tokenizer_of
from tests import tiny

PARITY = tiny.PARITY
MASK = 30
QWEN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE = {**QWEN, "vocab_size": 31, "max_position_embeddings": 64, "initializer_range": 0.3, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}


def trunk(network: str, **changes: Any) -> Callable[[Path], Path]:
    """Write the official layout of a family that names everything as a class of transformers does.

    Args:
        network: the class, without `ForCausalLM`.
        changes: settings of the family's config.json.
    """

    def write(folder: Path) -> Path:
        made: Any = getattr(transformers, f"{network}ForCausalLM")
        shape = SHAPE | (EXPERTS if network == "Qwen3Moe" else {"head_dim": 16} if network == "Qwen3" else {})
        with torch.random.fork_rng():
            torch.manual_seed(len(network))
            model = made(made.config_class(**shape, norm_topk_prob=changes.get("norm_topk_prob", True)))
        folder.mkdir()
        raw = {**shape, "rope_theta": 5000.0, "rms_norm_eps": 1e-6, "rope_scaling": None, "tie_word_embeddings": False, **changes}
        (folder / "config.json").write_text(json.dumps(raw))
        save_file(one_by_one(model.state_dict()), folder / "model.safetensors")
        return folder

    return write


def one_by_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take stacks of experts apart, as checkpoints hold them."""
    found = {}
    for name, tensor in tensors.items():
        base, _, kind = name.rpartition(".experts.")
        if not base:
            found[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = {"down_proj": [("down", matrix)], "gate_up_proj": list(zip(("gate", "up"), matrix.chunk(2), strict=True))}
            found |= {f"{base}.experts.{expert}.{role}_proj.weight": part.clone() for role, part in parts[kind]}
    return found


def recorded(name: str, **changes: Any) -> Callable[[Path], Path]:
    """Copy a recorded checkpoint, some settings changed."""
    return lambda folder: tiny.edit_config(tiny.copied(PARITY / name, folder), **changes)


def merged(folder: Path) -> Path:
    """Write LLaDA 2 as dFactory trains it: the experts of a layer in one tensor a role."""
    recorded("llada2_moe", model_type="llada2_moe_veomni")(folder)
    stored, stacks = load_file(folder / "model.safetensors"), {}
    for name in sorted(stored, key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")]):
        base, _, rest = name.partition(".mlp.experts.")
        if rest:
            stacks.setdefault(f"{base}.mlp.experts.{rest.split('.')[1]}", []).append(stored.pop(name))
    save_file({**stored, **{name: torch.stack(parts) for name, parts in stacks.items()}}, folder / "model.safetensors")
    return folder


def say(folder: Path, kind: str, token: str, *, mask: bool = False) -> Path:
    """Add the tokenizer of a family, whose token 30 is the mask, and says so or not."""
    if kind == "qwen2":
        letters = {chr(ord("A") + index): index for index in range(MASK)}
        (folder / "vocab.json").write_text(json.dumps(letters))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        added = {str(MASK): {"content": token, "special": True, "lstrip": False, "rstrip": False, "normalized": False}}
        code = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
        said = {"mask_token": token} if mask else {}
        eos = {"eos_token": "C", "unk_token": None, "pad_token": "C"}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, **code, **said, **eos}))
        return folder
    made = tiny.words()
    made.add_tokens([f"x{index}" for index in range(MASK - len(made))])
    made.add_tokens([token], special_tokens=True)
    if mask:
        made.mask_token = token
    made.save_pretrained(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Case:
    """A release: how its folder is written, and what must be loaded."""

    write: Callable[[Path], Path]
    family: str
    network: str
    mask: int
    shift: int = 0
    attention: str = "full"
    block: int | None = None
    origin: str = "prompt"
    tokenizer: type | None = None


def spoken(write: Callable[[Path], Path], kind: str, token: str, *, mask: bool = False) -> Callable[[Path], Path]:
    return lambda folder: say(write(folder), kind, token, mask=mask)


SDAR = {"architectures": ["SDARForCausalLM"], "model_type": "sdar"}
BLOCKS: Any = {"attention": "block-causal", "origin": "start"}
LLADA_LIKE: Any = {"family": "llada", "network": "Llama", "mask": 127}
CASES: dict[str, Case] = {
    "LLaDA-8B-Base": Case(recorded("llada_tiny"), **LLADA_LIKE),
    "LLaDA-1.5": Case(recorded("llada_tiny", mask_token_id=5), **{**LLADA_LIKE, "mask": 5}),
    "UltraLLaDA": Case(recorded("llada_tiny", rope_theta=2.8e8, max_sequence_length=262144), **LLADA_LIKE),
    "MMaDA-8B-MixCoT": Case(recorded("llada_tiny", model_type="mmada", architectures=["MMadaModelLM"]), "mmada", "Llama", 127),
    "LLaDA-V": Case(recorded("llada_v"), "llada-v", "Llama", 127),
    "iLLaDA-8B-Base": Case(recorded("illada"), "illada", "Llama", 5),
    "Dream-v0-Base-7B": Case(recorded("dream_tiny"), "dream", "Qwen2", 127, 1),
    "Dream-Coder-v0": Case(
        recorded("dream_tiny", architectures=["DreamModel"], max_position_embeddings=131072), "dream", "Qwen2", 127, 1,
    ),
    "DiffuCoder-7B-cpGRPO": Case(recorded("dream_rope"), "dream", "Qwen2", 127, 1),
    "open-dcoder-0.5B": Case(
        spoken(trunk("Qwen2", architectures=["Qwen2ForCausalLM"], model_type="qwen2"), "qwen2", "[MASK]", mask=True),
        "open-dcoder", "Qwen2", MASK, 1, tokenizer=Qwen2Tokenizer,
    ),
    "diffullama": Case(
        spoken(trunk("Llama", architectures=["LlamaForCausalLM"], model_type="llama"), "fast", "<mask>", mask=True),
        "diffullama", "Llama", MASK, 1, tokenizer=PreTrainedTokenizerFast,
    ),
    "a2d-llama": Case(
        spoken(trunk("Llama", architectures=["A2DLlamaLMHeadModel"], model_type="a2d-llama"), "fast", "<|mask|>"),
        "a2d-llama", "Llama", MASK, tokenizer=PreTrainedTokenizerFast,
    ),
    "Qwen2.5-Coder-0.5B-diffusion-mdlm": Case(
        spoken(trunk("Qwen2", architectures=["A2DQwen2LMHeadModel"], model_type="a2d-qwen2"), "qwen2", "<|mask|>"),
        "a2d-qwen2", "Qwen2", MASK, tokenizer=Qwen2Tokenizer,
    ),
    "Qwen3-0.6B-diffusion-mdlm": Case(
        spoken(trunk("Qwen3", architectures=["A2DQwen3LMHeadModel"], model_type="a2d-qwen3"), "qwen2", "<|mask|>", mask=True),
        "a2d-qwen3", "Qwen3", MASK, tokenizer=Qwen2Tokenizer,
    ),
    "Qwen3-0.6B-diffusion-bd3lm": Case(
        trunk("Qwen3", architectures=["A2DQwen3LMHeadModel"], model_type="a2d-qwen3", block_size=16, mask_token_id=MASK),
        "a2d-qwen3", "Qwen3", MASK, block=16, **BLOCKS,
    ),
    "SDAR-4B-Chat": Case(recorded("sdar"), "sdar", "Qwen3", 127, block=4, **BLOCKS),
    "SDAR-8B-Chat-b32": Case(spoken(trunk("Qwen3", **SDAR), "qwen2", "<|MASK|>"), "sdar", "Qwen3", MASK, block=32,
                             tokenizer=Qwen2Tokenizer, **BLOCKS),
    "TraDo-4B-Instruct": Case(spoken(trunk("Qwen3", **SDAR), "qwen2", "<|MASK|>", mask=True), "sdar", "Qwen3", MASK, block=4,
                              tokenizer=Qwen2Tokenizer, **BLOCKS),
    "DiRL-8B-Instruct": Case(trunk("Qwen3", **SDAR, mask_token_id=MASK, block_size=8), "sdar", "Qwen3", MASK, block=8, **BLOCKS),
    "SDAR-30B-A3B": Case(
        trunk("Qwen3Moe", architectures=["SDARMoeForCausalLM"], model_type="sdar_moe", mask_token_id=MASK),
        "sdar-moe", "Qwen3Moe", MASK, block=4, **BLOCKS,
    ),
    "Fast_dLLM_v2_7B": Case(recorded("fast_dllm_v2"), "fast-dllm-v2", "Qwen2", 127, 1, block=32, **BLOCKS),
    "Stable-DiffCoder-8B": Case(recorded("stable_diffcoder"), "stable-diffcoder", "Llama", 5, block=4, **BLOCKS),
    "Nemotron-Labs-Diffusion-3B": Case(
        recorded("nemotron_labs_diffusion", block_size=None), "nemotron-labs-diffusion", "Ministral3", 100,
        attention="context-causal", block=32,
    ),
    "LLaDA-MoE-7B-A1B": Case(recorded("llada_moe"), "llada-moe", "Qwen3Moe", 127),
    "LLaDA2.0-mini": Case(recorded("llada2_moe"), "llada2", "Glm4Moe", 127, block=32, **BLOCKS),
    "LLaDA2.1-mini": Case(recorded("llada2_moe"), "llada2.1", "Glm4Moe", 127, block=32, **BLOCKS),
    "LLaDA2.0-mini-trained": Case(merged, "llada2", "Glm4Moe", 127, block=32, **BLOCKS),
    "RND1-Base-0910": Case(
        spoken(trunk("Qwen3Moe", architectures=["RND1LM"], model_type="rnd1"), "qwen2", "<|mask|>", mask=True),
        "rnd1", "Qwen3Moe", MASK, 1, tokenizer=Qwen2Tokenizer,
    ),
}  # fmt: skip
every_release = pytest.mark.parametrize("name", list(CASES))


def logits(model: LanguageModel) -> Tensor:
    with torch.inference_mode():
        return model.network(input_ids=tiny.ids(2, 12), use_cache=False).logits


def facts(model: LanguageModel) -> dict[str, object]:
    """All that a loaded model is, but where it came from."""
    other = ("name", "source", "network", "tokenizer", "layers", "fingerprint", "generation")
    return {each.name: getattr(model, each.name) for each in dataclasses.fields(model) if each.name not in other}


def test_every_family_has_a_folder_here() -> None:
    assert {case.family for case in CASES.values()} == set(FAMILIES) - {each.name for each in (*PLAIN, *ENCODERS)}


@every_release
def test_a_release_is_loaded_as_what_it_is(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = case.write(tmp_path / name)
    lookup.check(ModelSource(str(folder)))
    model = loading.load(folder)
    assert (model.family, type(model.network).__name__) == (case.family, f"{case.network}ForCausalLM")
    assert (model.mask_token_id, model.logit_shift, model.is_causal) == (case.mask, case.shift, False)
    assert (model.attention, model.block_length, model.block_origin) == (case.attention, case.block, case.origin)
    assert case.tokenizer is None or isinstance(model.tokenizer, case.tokenizer)
    assert model.stop_token_ids
    changed = tiny.ids(1, 12)
    changed[:, -1] = (changed[:, -1] + 1) % MASK
    with torch.inference_mode():
        moved = model.network(input_ids=changed).logits[:, 0]
    assert not torch.allclose(moved, logits(model)[:1, 0], atol=1e-4), "without a mask, attention looks both ways"


@every_release
def test_every_way_of_saving_keeps_what_a_model_is(name: str, tmp_path: Path) -> None:
    model = loading.load(CASES[name].write(tmp_path / name))
    expected = logits(model)
    ways: dict[str, Callable[[Path], object]] = {
        "save_pretrained": model.network.save_pretrained,
        "save_plain": lambda folder: export.save_plain(model, folder),
        "stream": lambda folder: streaming.save(model, folder, max_shard_bytes=20_000),
    }
    for way, save in ways.items():
        save(tmp_path / way)
        again = loading.load(tmp_path / way)
        assert facts(again) == facts(model), way
        assert torch.equal(logits(again), expected), way
        twice = tmp_path / f"{way}-twice"
        again.network.save_pretrained(twice)
        assert facts(loading.load(twice)) == facts(model), way


@every_release
def test_what_is_written_as_it_was_read_is_the_same_release(name: str, tmp_path: Path) -> None:
    """A family or blocks that a name alone tells were lost with it, in a second copy, or where config.json named another base."""
    folder = tiny.edit_config(CASES[name].write(tmp_path / name), _name_or_path="someone/base")
    model = loading.load(folder)
    first = model
    for copy in ("once", "twice"):
        is_other = official.other_layout(lookup.resolve(model.source))
        (export.save_plain if is_other else official.save_as_read)(model, tmp_path / copy)
        model = loading.load(tmp_path / copy)
        assert facts(model) == facts(first), copy
        assert torch.equal(logits(model), logits(first)), copy


@pytest.mark.parametrize("name", ["LLaDA2.1-mini", "open-dcoder-0.5B", "SDAR-8B-Chat-b32"])
def test_a_name_of_the_hubs_cache_goes_along(name: str, tmp_path: Path) -> None:
    cached = tmp_path / f"models--org--{name}" / "snapshots" / "abc123"
    cached.parent.mkdir(parents=True)
    model = loading.load(CASES[name].write(cached))
    written = official.save_as_read(model, tmp_path / "written")
    assert json.loads((written / "config.json").read_text())["_name_or_path"] == f"org/{name}"
    assert facts(loading.load(written)) == facts(model)


@pytest.mark.parametrize("record", PLAIN, ids=lambda record: record.name)
def test_plain_classes_are_autoregressive_and_stay_so(record: Family, tmp_path: Path) -> None:
    made: Any = getattr(transformers, f"{record.network}ForCausalLM")
    more = EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1} if "Moe" in record.network else {"head_dim": 8}
    network = made(made.config_class(**SHAPE | more))
    network.generation_config.eos_token_id = [2, 9]
    network.save_pretrained(tmp_path / "plain")
    model = loading.load(say(tmp_path / "plain", "qwen2" if record.name == "qwen2" else "fast", "<other>"))
    assert (model.family, model.attention, model.is_causal, model.mask_token_id) == (record.name, "causal", True, None)
    assert (model.logit_shift, model.block_length, model.stop_token_ids) == (1, None, (2, 9))
    assert model.describe()["kind"] == "autoregressive"
    model.network.save_pretrained(tmp_path / "saved")
    export.save_plain(model, tmp_path / "exported")
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        assert facts(loading.load(folder)) == facts(model)
        assert torch.equal(logits(loading.load(folder)), logits(model))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "Moe" not in case.network])
def test_a_streamed_release_is_the_whole_one(name: str, tmp_path: Path) -> None:
    folder = CASES[name].write(tmp_path / name)
    whole, streamed = loading.load(folder), streaming.load(folder)
    assert facts(streamed) == facts(whole)
    assert torch.equal(logits(streamed), logits(whole))


def test_a_fused_projection_is_streamed_by_its_rows(tmp_path: Path) -> None:
    """LLaDA 2's first layer has no experts; alone it is a dense network."""
    folder = recorded("llada2_moe", num_hidden_layers=1)(tmp_path / "dense")
    later = [name for name in load_file(folder / "model.safetensors") if ".layers.1." in name or ".layers.2." in name]
    tiny.edit_weights(folder, dict.fromkeys(later))
    whole, streamed = loading.load(folder), streaming.load(folder, budget=0)
    assert torch.equal(logits(streamed), logits(whole))
    assert [layer.module.weight.shape for layer in streamed.layers] == [layer.module.weight.shape for layer in whole.layers]


@pytest.mark.parametrize("name", ["llada_moe", "llada2_moe"])
def test_a_streamed_mixture_is_the_whole_one(name: str, tmp_path: Path) -> None:
    folder = recorded(name)(tmp_path / "moe")
    assert torch.equal(logits(streaming.load(folder)), logits(loading.load(folder)))


def test_merged_experts_are_not_streamed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must lie in one piece|the checkpoint is incomplete or of another layout"):
        streaming.load(merged(tmp_path / "merged"))


def test_merged_experts_are_the_recorded_network(tmp_path: Path) -> None:
    assert torch.equal(logits(loading.load(merged(tmp_path / "merged"))), logits(loading.load(PARITY / "llada2_moe")))


def test_a_qwen_tokenizer_may_be_one_file(tmp_path: Path) -> None:
    """transformers 5 writes no vocab.json."""
    folder = CASES["TraDo-4B-Instruct"].write(tmp_path / "model")
    model = loading.load(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    tokenizer_of(model).save_pretrained(folder)
    assert not (folder / "vocab.json").exists()
    again = loading.load(folder)
    assert again.mask_token_id == MASK
    assert tokenizer_of(again)("CAB<|MASK|>")["input_ids"] == [2, 0, 1, MASK]


def test_the_base_of_rotations_is_read_in_either_place(tmp_path: Path) -> None:
    """UltraLLaDA differs from LLaDA in it alone; transformers 5 writes it among the rotations' settings."""
    for name in ("llada_tiny", "dream_tiny", "sdar", "illada", "llada_moe", "llada2_moe"):
        beside, inside = (tiny.copied(PARITY / name, tmp_path / f"{name}-{place}") for place in ("beside", "inside"))
        tiny.edit_config(beside, rope_theta=77.0)
        tiny.edit_config(inside, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
        first, second = loading.load(beside), loading.load(inside)
        assert torch.equal(logits(first), logits(second)), name
        assert not torch.allclose(logits(first), logits(loading.load(PARITY / name)), atol=1e-3)


@pytest.mark.parametrize("name", ["SDAR-30B-A3B", "RND1-Base-0910"])
@pytest.mark.parametrize("normed", [True, False])
def test_weights_of_experts_add_up_to_one_unless_the_release_says_no(name: str, normed: bool, tmp_path: Path) -> None:
    folder = CASES[name].write(tmp_path / name)
    assert cast(Any, loading.load(folder).network.config).norm_topk_prob is True
    changed = loading.load(tiny.edit_config(folder, norm_topk_prob=normed))
    assert cast(Any, changed.network.config).norm_topk_prob is normed


# Heads that are or are not the embedding


@pytest.mark.parametrize("read", [loading.load, streaming.load])
@pytest.mark.parametrize(
    ("name", "key", "head", "embedding"),
    [
        ("llada_tiny", "weight_tying", "model.transformer.ff_out.weight", "model.transformer.wte.weight"),
        ("dream_tiny", "tie_word_embeddings", "lm_head.weight", "model.embed_tokens.weight"),
        ("sdar", "tie_word_embeddings", "lm_head.weight", "model.embed_tokens.weight"),
        ("nemotron_labs_diffusion", "tie_word_embeddings", "diffusion_head.weight", "encoder.embed_tokens.weight"),
    ],
)
def test_a_stored_head_that_differs_from_the_embedding_is_kept(
    name: str, key: str, head: str, embedding: str, read: Any, tmp_path: Path
) -> None:
    """It was dropped without a word, and logits were those of the embedding."""
    folder = recorded(name, **{key: True})(tmp_path / "tied")
    untied = logits(loading.load(PARITY / name))
    model = read(folder)
    assert torch.equal(logits(model), untied) and not model.network.config.tie_word_embeddings
    assert torch.equal(logits(loading.load(streaming.save(model, tmp_path / "saved"))), untied)
    tiny.edit_weights(folder, {head: load_file(folder / "model.safetensors")[embedding].clone()})
    model = read(folder)
    assert model.network.config.tie_word_embeddings and not torch.allclose(logits(model), untied, atol=1e-2)


# What is refused before weights are fetched


UNKNOWN = {"architectures": ["WeDLMForCausalLM"], "model_type": "wedlm"}


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose configuration alone may be fetched."""
    (tmp_path / "repository").mkdir()

    def snapshot(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        if any("safetensors" in pattern and not pattern.endswith(".json") for pattern in allow_patterns):
            pytest.fail("weights were asked for")
        return str(tmp_path / "repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return tmp_path / "repository"


def test_an_unknown_family_on_the_hub_is_refused_by_its_configuration_alone(on_the_hub: Path) -> None:
    (on_the_hub / "config.json").write_text(json.dumps(UNKNOWN))
    source = ModelSource("someone/model", "main")
    for ask in (lookup.check, lookup.resolve, loading.load, streaming.load):
        with pytest.raises(InputError, match="got a WeDLM"):
            ask(source)
    found = availability.checkpoint(source)
    assert found.state == "cannot be had" and "got a WeDLM" in found.reason


def test_the_tokenizers_mask_is_a_sign_on_the_hub_too(on_the_hub: Path) -> None:
    source = ModelSource("someone/model", "main")
    (on_the_hub / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}))
    lookup.check(source)
    (on_the_hub / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "[MASK]"}}))
    with pytest.raises(InputError, match=r"mask token '\[MASK\]' in its tokenizer"):
        lookup.check(source)
    (on_the_hub / "tokenizer_config.json").rename(on_the_hub / "special_tokens_map.json")
    with pytest.raises(InputError, match=r"mask token '\[MASK\]' in its tokenizer"):
        lookup.check(source)
    lookup.check(ModelSource("fredzzp/open-dcoder-0.5B", "main"))


def test_the_family_is_looked_at_before_the_weights(tmp_path: Path) -> None:
    folder = recorded("sdar", **UNKNOWN)(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    for ask in (lookup.check, loading.load):
        with pytest.raises(InputError, match="got a WeDLM"):
            ask(ModelSource(str(folder)))


def test_a_mask_outside_the_vocabulary_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "tensors", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(InputError, match="must be one of the 128 tokens of the network"):
        loading.load(recorded("sdar", mask_token_id=151669)(tmp_path / "model"))


def test_a_tokenizer_that_contradicts_the_configuration_is_refused(tmp_path: Path) -> None:
    folder = trunk("Qwen3", **SDAR, mask_token_id=7)(tmp_path / "model")
    with pytest.raises(InputError, match=r"got 7 in config\.json, 30 in its added tokens"):
        loading.load(say(folder, "qwen2", "<|MASK|>"))
    shutil.rmtree(folder)
    folder = say(trunk("Qwen3", **SDAR, mask_token_id=MASK)(folder), "qwen2", "<|MASK|>")
    assert loading.load(folder).mask_token_id == MASK
