"""LoRA adapters: the sum by formula on matrices where a wrong one gives other logits, and what is refused."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from lib.checkpoints import lookup
from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.models import loading, streaming
from lib.models.language_model import LanguageModel, tokenizer_of
from tests import tiny

RANK, ALPHA = 3, 7.0
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q: (32, 32), DOWN: (32, 40)}


def pair(module: str, rank: int, shape: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{module}.lora_A.weight": torch.randn(rank, shape[1], generator=generator),
        f"base_model.model.{module}.lora_B.weight": torch.randn(shape[0], rank, generator=generator),
    }


def write(folder: Path, base: object, tensors: dict[str, Tensor], **settings: Any) -> Path:
    folder.mkdir()
    stated = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": True,
        "bias": "none",
        "modules_to_save": None,
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def changed(tensors: dict[str, Tensor], scales: dict[str, float], **options: Any) -> Tensor:
    """Logits of the tiny network with the matrices added one by one, in loops of their own."""
    network = copy.deepcopy(tiny.network(**options))
    with torch.no_grad():
        for module, scale in scales.items():
            first, second = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
            for column in range(first.shape[0]):
                network.get_submodule(module).weight.add_(scale * torch.outer(second[:, column], first[column]))  # type: ignore[union-attr,operator]
        return network(input_ids=tiny.ids(2, 9)).logits


def logits(model: LanguageModel) -> Tensor:
    with torch.inference_mode():
        return model.network(input_ids=tiny.ids(2, 9)).logits


@pytest.mark.parametrize("slora", [False, True])
def test_an_adapter_is_added_to_its_base(slora: bool, tmp_path: Path) -> None:
    tensors = {**pair(Q, RANK, SHAPES[Q]), **pair(DOWN, RANK, SHAPES[DOWN], 1)}
    folder = write(tmp_path / "lora", tiny.folder(tmp_path / "base"), tensors, use_rslora=slora)
    lookup.check(ModelSource(str(folder)))
    loaded = loading.load(folder)
    scale = ALPHA / math.sqrt(RANK) if slora else ALPHA / RANK
    torch.testing.assert_close(logits(loaded), changed(tensors, {Q: scale, DOWN: scale}), atol=1e-4, rtol=1e-5)
    assert loaded.describe()["notes"] == ["LoRA lora merged into base"]
    assert loaded.fingerprint not in (loading.load(tmp_path / "base").fingerprint, "")


def test_patterns_give_ranks_and_alphas_of_single_modules(tmp_path: Path) -> None:
    tensors = {**pair(Q, 2, SHAPES[Q]), **pair(DOWN, RANK, SHAPES[DOWN], 1)}
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 1.0, "proj": 99.0}}
    loaded = loading.load(write(tmp_path / "lora", tiny.folder(tmp_path / "base"), tensors, **patterns))
    torch.testing.assert_close(logits(loaded), changed(tensors, {Q: ALPHA / 2, DOWN: 1 / RANK}), atol=1e-4, rtol=1e-5)


def test_the_fingerprint_follows_adapter_and_base(tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", tiny.folder(tmp_path / "base"), pair(Q, RANK, SHAPES[Q]))
    before = loading.load(folder).fingerprint
    save_file(pair(Q, RANK, SHAPES[Q], 5), folder / "adapter_model.safetensors")
    after = loading.load(folder).fingerprint
    tiny.folder(tmp_path / "base", seed=4)
    assert len({before, after, loading.load(folder).fingerprint}) == 3


def test_a_layout_with_other_names_and_its_own_tokenizer(tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny.LLADA, tmp_path / "llada"))
    module = "model.transformer.blocks.0.q_proj"
    width = loading.load(base).network.config.hidden_size
    tensors = pair(module, RANK, (width, width))
    folder = write(tmp_path / "lora", base, tensors)
    tiny.words().save_pretrained(folder)
    loaded, plain = loading.load(folder), loading.load(base)
    first, second = tensors.values()
    expected = plain.layers[0].module.weight + ALPHA / RANK * second @ first
    torch.testing.assert_close(loaded.layers[0].module.weight.data, expected, atol=1e-5, rtol=1e-5)
    assert tokenizer_of(loaded)("w3")["input_ids"] == [1, 6] and (loaded.mask_token_id, loaded.is_causal) == (
        plain.mask_token_id,
        False,
    )
    lookup.check_tokenizer(ModelSource(str(folder)))


def test_whole_modules_and_tables_are_taken(tmp_path: Path) -> None:
    head, table = torch.randn(tiny.VOCAB, 32), {"A": torch.randn(RANK, tiny.VOCAB), "B": torch.randn(32, RANK)}
    tensors = {f"base_model.model.model.embed_tokens.lora_embedding_{side}": value for side, value in table.items()}
    folder = write(
        tmp_path / "lora",
        tiny.folder(tmp_path / "base"),
        {**tensors, "base_model.model.lm_head.weight": head},
        modules_to_save=["lm_head"],
    )
    network = loading.load(folder).network
    assert torch.equal(network.get_parameter("lm_head.weight"), head)
    expected = tiny.network().get_parameter("model.embed_tokens.weight") + ALPHA / RANK * (table["B"] @ table["A"]).T
    torch.testing.assert_close(network.get_parameter("model.embed_tokens.weight").data, expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_an_embedding_that_is_the_head_is_not_changed(whole: bool, tmp_path: Path) -> None:
    """PEFT trains a changed embedding beside the old head; merging changed both without a word."""
    table = "base_model.model.model.embed_tokens"
    pair_of = {f"{table}.lora_embedding_A": torch.randn(RANK, tiny.VOCAB), f"{table}.lora_embedding_B": torch.randn(32, RANK)}
    tensors = {f"{table}.weight": torch.randn(tiny.VOCAB, 32)} if whole else pair_of
    base = tiny.folder(tmp_path / "base", tie=True)
    folder = write(tmp_path / "lora", base, tensors)
    with pytest.raises(InputError, match=r"which is its head, too, got a change of model\.embed_tokens\.weight"):
        loading.load(folder)
    tied = loading.load(write(tmp_path / "tied", base, tensors, ensure_weight_tying=True)).network
    assert torch.equal(tied.get_parameter("lm_head.weight"), tied.get_parameter("model.embed_tokens.weight"))
    old = tiny.network(tie=True).get_parameter("model.embed_tokens.weight").detach()
    tiny.edit_weights(base, {"lm_head.weight": old})
    network = loading.load(folder).network
    assert torch.equal(network.get_parameter("lm_head.weight"), old)
    assert not torch.equal(network.get_parameter("model.embed_tokens.weight"), old)


def test_a_base_in_bfloat16_is_merged_before_it_is_rounded(tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base", dtype=torch.bfloat16)
    tensors = pair(Q, RANK, SHAPES[Q])
    folder = write(tmp_path / "lora", base, tensors, lora_alpha=0.01)
    plain, merged = loading.load(base), loading.load(folder)
    first, second = tensors.values()
    expected = plain.layers[0].module.weight + 0.01 / RANK * second @ first
    torch.testing.assert_close(merged.layers[0].module.weight.data, expected, atol=1e-7, rtol=1e-6)
    assert loading.load(folder, dtype=torch.bfloat16).layers[0].module.weight.dtype == torch.bfloat16


def test_a_base_in_the_hubs_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = write(tmp_path / "lora", "org/base", pair(Q, RANK, SHAPES[Q]))
    with pytest.raises(InputError, match="the base 'org/base' of lora must be a folder here or in the hub's cache, got neither"):
        loading.load(folder)
    snapshots = tmp_path / "hub" / "models--org--base" / "snapshots"
    tiny.folder(snapshots / "abc1")
    torch.testing.assert_close(
        logits(loading.load(folder)), changed(pair(Q, RANK, SHAPES[Q]), {Q: ALPHA / RANK}), atol=1e-4, rtol=1e-5
    )
    tiny.folder(snapshots / "def2", seed=1)
    with pytest.raises(InputError, match="in one revision, got abc1, def2"):
        loading.load(folder)
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("abc1")
    assert loading.load(folder).describe()["notes"] == ["LoRA lora merged into abc1"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "must be a LoRA, got IA3"),
        ({"peft_type": "PROMPT_TUNING"}, "must be a LoRA, got PROMPT_TUNING"),
        ({"use_dora": True}, r"plain LoRA, got \['DoRA'\]"),
        ({"lora_bias": True}, "plain LoRA, got .*biases"),
        ({"fan_in_fan_out": True}, "transposed weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "must leave its base as it is, got init_lora_weights 'pissa_niter_4'"),
        ({"base_model_name_or_path": None}, "must name its base"),
        ({"r": 4}, "must have rank 4"),
    ],
)
def test_other_adapters_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", tiny.folder(tmp_path / "base"), pair(Q, RANK, SHAPES[Q]), **settings)
    with pytest.raises(InputError, match=said) as caught:
        loading.load(folder)
    assert "\n" not in str(caught.value)


def test_a_configuration_of_the_base_may_lie_beside_an_adapter(tmp_path: Path) -> None:
    """Trainers write it; people were told to rename the adapter to model.safetensors."""
    base = tiny.folder(tmp_path / "base")
    plain = write(tmp_path / "plain", base, pair(Q, RANK, SHAPES[Q]))
    beside = write(tmp_path / "beside", base, pair(Q, RANK, SHAPES[Q]))
    (beside / "config.json").write_bytes((base / "config.json").read_bytes())
    assert torch.equal(logits(loading.load(beside)), logits(loading.load(plain)))
    (beside / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    for ask in (loading.load, streaming.load, lambda folder: lookup.check(ModelSource(str(folder)))):
        with pytest.raises(InputError, match=r"must hold a model or an adapter, got model\.safetensors and adapter_model"):
            ask(beside)
    (beside / "adapter_model.safetensors").unlink()
    assert torch.equal(logits(loading.load(beside)), logits(loading.load(base))), "settings alone are left over"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (pair("model.layers.7.self_attn.q_proj", RANK, (32, 32)), r"layers\.7.*which it does not have"),
        (pair(Q, RANK, (16, 32)), "must have its shape, got"),
        (dict(list(pair(Q, RANK, (32, 32)).items())[:1]), "must have lora_A and lora_B, got"),
        ({**pair(Q, RANK, (32, 32)), f"base_model.model.{Q}.lora_magnitude_vector.weight": torch.ones(32)}, "lora_magnitude"),
        ({"base_model.model.lm_head.weight": torch.zeros(40, 32)}, "in their shape, got lm_head"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(tensors: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        loading.load(write(tmp_path / "lora", tiny.folder(tmp_path / "base"), tensors))


def test_pickled_adapters_and_streams_of_them_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", tiny.folder(tmp_path / "base"), pair(Q, RANK, SHAPES[Q]))
    with pytest.raises(InputError, match="must hold plain floats, got a LoRA adapter"):
        streaming.load(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin alone, and pickle files are never read"):
        loading.load(folder)


def test_a_damaged_base_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", tiny.folder(tmp_path / "base"), pair(Q, RANK, SHAPES[Q]))
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"must hold model\.safetensors"):
        lookup.check(ModelSource(str(folder)))


def test_unmerged_matrices_in_a_whole_checkpoint_are_refused(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "base")
    tiny.edit_weights(folder, {f"{Q}.lora_A.default.weight": torch.zeros(3, 32)})
    with pytest.raises(InputError, match="LoRA beside its base"):
        loading.load(folder)
