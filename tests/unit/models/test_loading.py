"""Loading: layouts, the layer table, GGUF, and everything that must be refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib.core.errors import InputError
from lib.models import language_model, loading
from lib.models.language_model import ROLES
from lib.models.layers import attention
from tests import tiny

ROLE_ORDER = ["q", "k", "v", "o", "gate", "up", "down"]


@pytest.fixture
def llada(tmp_path: Path) -> Path:
    """A copy of the recorded LLaDA checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny.LLADA, tmp_path / "llada"))


@pytest.fixture
def dream(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.DREAM, tmp_path / "dream"))


def logits(model: language_model.LanguageModel) -> torch.Tensor:
    with torch.inference_mode():
        return model.network(input_ids=tiny.ids(2, 10)).logits.float()


# What a loaded model is


def test_the_layer_table_lists_every_role_of_every_block_in_order() -> None:
    for folder, layers in ((tiny.LLADA, 2), (tiny.DREAM, 2)):
        loaded = loading.load(folder)
        assert [layer.role for layer in loaded.layers] == ROLE_ORDER * layers
        assert [layer.block for layer in loaded.layers] == [block for block in range(layers) for _ in ROLE_ORDER]
        parameters = dict(loaded.network.named_parameters())
        for layer in loaded.layers:
            assert layer.module.weight is parameters[layer.name]
        assert len({layer.name for layer in loaded.layers}) == 7 * layers


def test_each_role_holds_the_released_matrix() -> None:
    """By value, so that two swapped matrices of one shape (k and v, gate and up) would show."""
    names = dict(zip(ROLE_ORDER, "q_proj k_proj v_proj attn_out ff_proj up_proj ff_out".split(), strict=True))
    raw = load_file(tiny.LLADA / "model.safetensors")
    for layer in loading.load(tiny.LLADA).layers:
        assert torch.equal(layer.module.weight, raw[f"model.transformer.blocks.{layer.block}.{names[layer.role]}.weight"])
    assert list(ROLES) == ROLE_ORDER


def test_embedding_norm_and_head_are_not_in_the_table() -> None:
    for layer in loading.load(tiny.DREAM).layers:
        assert ".layers." in layer.name
        assert "norm" not in layer.name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("causal", [True, False])
def test_plain_folders_keep_their_direction(family: str, causal: bool, tmp_path: Path) -> None:
    loaded = tiny.model(tmp_path, family=family, causal=causal)
    original = tiny.network(family=family, causal=causal)
    with torch.inference_mode():
        expected = original(input_ids=tiny.ids(2, 10)).logits
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    changed = tiny.ids(2, 10).clone()
    changed[:, -1] = (changed[:, -1] + 1) % tiny.MASK
    with torch.inference_mode():
        moved = loaded.network(input_ids=changed).logits
    assert torch.equal(moved[:, 0], logits(loaded)[:, 0]) is causal
    assert (loaded.is_causal, loaded.mask_token_id, loaded.logit_shift) == (causal, None if causal else tiny.MASK, int(causal))


def test_the_mask_id_is_read_from_the_checkpoint(llada: Path) -> None:
    assert loading.load(tiny.edit_config(llada, mask_token_id=3)).mask_token_id == 3


def test_a_diffusion_model_without_mask_token_is_refused(llada: Path) -> None:
    with pytest.raises(InputError, match="must name its mask token"):
        loading.load(tiny.edit_config(llada, mask_token_id=None))


def test_logits_at_shifts_an_autoregressive_model(tmp_path: Path) -> None:
    loaded, where = tiny.model(tmp_path, causal=True), torch.zeros((2, 10), dtype=torch.bool)
    where[:, 4] = True
    got = language_model.logits_at(loaded, tiny.ids(2, 10), where)
    torch.testing.assert_close(got, logits(loaded)[:, 3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_as_asked_and_logits_are_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = loading.load(tiny.folder(tmp_path), dtype=dtype)
    assert {parameter.dtype for parameter in loaded.network.parameters()} == {dtype}
    assert language_model.logits_at(loaded, tiny.ids(1, 4), torch.ones((1, 4), dtype=torch.bool)).dtype == torch.float32
    assert loaded.describe()["dtype"] == str(dtype).removeprefix("torch.")


def test_a_loaded_model_is_ready_to_evaluate(tmp_path: Path) -> None:
    loaded = tiny.model(tmp_path)
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert loaded.network.config._attn_implementation == attention.NAME
    assert loaded.num_parameters == sum(value.numel() for value in load_file(tmp_path / "model.safetensors").values())


def test_a_sharded_bfloat16_checkpoint_equals_the_single_file(tmp_path: Path) -> None:
    sharded = tiny.folder(tmp_path / "many", shard_size="10KB", dtype=torch.bfloat16)
    single = tiny.folder(tmp_path / "one", dtype=torch.bfloat16)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits(loading.load(sharded)), logits(loading.load(single)))


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_is_the_embedding(stored: bool, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path, tie=True)
    if stored:  # some checkpoints store the head although it is tied
        tiny.edit_weights(
            folder, {"lm_head.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()}
        )
    loaded = loading.load(folder)
    assert loaded.network.get_parameter("lm_head.weight") is loaded.network.get_parameter("model.embed_tokens.weight")
    with torch.inference_mode():
        torch.testing.assert_close(logits(loaded), tiny.network(tie=True)(input_ids=tiny.ids(2, 10)).logits, atol=1e-5, rtol=0)


def test_the_fingerprint_follows_weights_and_config(llada: Path) -> None:
    before = loading.load(llada).fingerprint
    assert loading.load(tiny.LLADA).fingerprint == before
    name = "model.transformer.ln_f.weight"
    tiny.edit_weights(llada, {name: load_file(llada / "model.safetensors")[name] + 1e-3})
    after = loading.load(llada).fingerprint
    assert after != before
    assert loading.load(tiny.edit_config(llada, mask_token_id=5)).fingerprint != after


def test_grouped_heads_of_a_llada_layout(llada: Path) -> None:
    """LLaDA-MoE-like options do not exist in the releases, but n_kv_heads does."""
    raw = load_file(llada / "model.safetensors")
    cut = {name: value[:32].clone() for name, value in raw.items() if ".k_proj" in name or ".v_proj" in name}
    loaded = loading.load(tiny.edit_config(tiny.edit_weights(llada, cut), n_kv_heads=2))
    assert loaded.network.config.num_key_value_heads == 2


# What is refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", True),
        ("attention_layer_norm", True),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("input_emb_norm", True),
        ("scale_logits", True),
        ("layer_norm_type", "default"),
        ("rope", False),
        ("activation_type", "gelu"),
        ("block_type", "sequential"),
    ],
)
def test_llada_options_that_llama_cannot_express_are_refused(key: str, value: object, llada: Path) -> None:
    with pytest.raises(InputError, match=f"{key}.*not supported"):
        loading.load(tiny.edit_config(llada, **{key: value}))


def test_a_missing_tensor_is_refused_by_name(llada: Path) -> None:
    tiny.edit_weights(llada, {"model.transformer.blocks.1.up_proj.weight": None})
    with pytest.raises(InputError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        loading.load(llada)


@pytest.mark.parametrize("name", ["model.transformer.blocks.0.extra.weight", "vision.weight", "model.transformer.wpe.weight"])
def test_an_unknown_llada_tensor_is_refused_by_name(name: str, llada: Path) -> None:
    tiny.edit_weights(llada, {name: torch.zeros(2)})
    with pytest.raises(InputError, match="only known tensors, got '" + name):
        loading.load(llada)


def test_a_surplus_tensor_is_refused(dream: Path) -> None:
    tiny.edit_weights(dream, {"model.layers.2.mlp.up_proj.weight": torch.zeros(2)})
    with pytest.raises(InputError, match=r"a surplus tensor model\.layers\.2\.mlp"):
        loading.load(dream)


def test_a_bias_that_the_layout_lacks_is_refused(llada: Path) -> None:
    """Dropping it silently would change the network."""
    tiny.edit_weights(llada, {"model.transformer.blocks.0.q_proj.bias": torch.zeros(64)})
    with pytest.raises(InputError, match=r"q_proj\.bias"):
        loading.load(llada)


def test_a_wrong_shape_is_refused(dream: Path) -> None:
    tiny.edit_weights(dream, {"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 96)})
    with pytest.raises(InputError, match=r"must have shape \(96, 64\).*got \(64, 96\)"):
        loading.load(dream)


MALICIOUS = "from pathlib import Path\nPath(__file__).with_name('ran').write_text('remote code ran')\nclass Evil: pass\n"


@pytest.mark.parametrize("layout", ["llada", "dream", "llama"])
def test_no_code_of_a_checkpoint_is_run(layout: str, llada: Path, dream: Path, tmp_path: Path) -> None:
    folder = {"llada": llada, "dream": dream}.get(layout) or tiny.folder(tmp_path / "llama")
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(MALICIOUS)
    auto_map = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModel": "modeling_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", None],
    }
    tiny.edit_config(folder, auto_map=auto_map)
    loading.load(folder)
    assert not list(folder.rglob("ran"))


# What it says


def test_a_reference_folder_describes_itself(tmp_path: Path) -> None:
    loaded = loading.load(tiny.folder(tmp_path / "mine"), name="ar")
    described = loaded.describe()
    assert (described["name"], described["kind"]) == ("ar", "autoregressive")
    assert json.dumps(described)


def test_dreams_tokenizer_loads_without_its_remote_class(tmp_path: Path) -> None:
    folder = tmp_path / "dream"
    shutil.copytree(tiny.DREAM, folder, ignore=shutil.ignore_patterns("expected*"))
    letters = {chr(ord("a") + index): index for index in range(26)}
    (folder / "vocab.json").write_text(json.dumps(letters))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    remote = {"tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(remote))
    tokenizer = language_model.tokenizer_of(loading.load(folder))
    assert tokenizer("cab")["input_ids"] == [2, 0, 1] and tokenizer.decode([2, 0, 1]) == "cab"


def test_a_model_without_a_tokenizer_says_so_when_it_is_given_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must bring its tokenizer"):
        language_model.tokenizer_of(tiny.model(tmp_path / "mute"))
