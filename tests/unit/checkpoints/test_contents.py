"""What tensors a folder holds: wrappers' names, stored frequencies, packed and sparse weights, left-over settings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.checkpoints import contents, lookup
from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.models import containers, export, loading, streaming
from lib.models.language_model import LanguageModel
from tests import tiny


def logits(model: LanguageModel) -> Tensor:
    with torch.inference_mode():
        return model.network(input_ids=tiny.ids(2, 9)).logits


def renamed(folder: Path, rename: Any) -> Path:
    file = folder / "model.safetensors"
    save_file({rename(name): value for name, value in load_file(file).items()}, file)
    return folder


def both(folder: Path) -> tuple[LanguageModel, LanguageModel]:
    lookup.check(ModelSource(str(folder)))
    return loading.load(folder), streaming.load(folder)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "_orig_mod.module.base_model.model."]
)
def test_prefixes_of_wrappers_go(prefix: str, tmp_path: Path) -> None:
    folder = renamed(tiny.folder(tmp_path / "x"), lambda name: prefix + name)
    for loaded in both(folder):
        assert torch.equal(logits(loaded), logits(loading.load(tiny.folder(tmp_path / "plain"))))


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_names_of_wrapped_blocks_go(wrapper: str, tmp_path: Path) -> None:
    folder = renamed(tiny.folder(tmp_path / "x"), lambda name: name.replace("layers.0.", f"layers.0.{wrapper}."))
    for loaded in both(folder):
        assert torch.equal(logits(loaded), logits(loading.load(tiny.folder(tmp_path / "plain"))))


def test_prefixes_go_in_other_layouts(tmp_path: Path) -> None:
    folder = renamed(Path(shutil.copytree(tiny.LLADA, tmp_path / "x")), lambda name: f"module.{name}")
    for loaded in both(folder):
        assert torch.equal(logits(loaded), logits(loading.load(tiny.LLADA)))


def test_a_prefix_of_some_tensors_is_refused(tmp_path: Path) -> None:
    folder = renamed(tiny.folder(tmp_path / "x"), lambda name: name if "norm" in name else f"module.{name}")
    with pytest.raises(InputError, match=r"must begin with module\. or none, got .*norm.* without it"):
        loading.load(folder)


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="must have one name, got two for"):
        contents.plain_names(["model.norm.weight", "model._orig_mod.norm.weight"], Path("x"))


# Frequencies


def frequencies(base: float, width: int = 8) -> Tensor:
    return torch.tensor([base ** (-2 * index / width) for index in range(width // 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_stored_frequencies_that_say_nothing_new_are_left_out(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    expected = logits(loading.load(folder))
    tiny.edit_weights(folder, {name.format(block): frequencies(500.0).to(dtype) for block in range(2)})
    for loaded in both(folder):
        assert torch.equal(logits(loaded), expected)


def test_stored_frequencies_of_another_base_are_refused(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x")
    tiny.edit_weights(folder, {"model.layers.1.self_attn.rotary_emb.inv_freq": frequencies(500.0)})
    for load in (loading.load, streaming.load):
        with pytest.raises(InputError, match=r"layers\.1.*inv_freq must be what config\.json gives"):
            load(folder)


def test_frequencies_in_other_layouts(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.LLADA, tmp_path / "x"))
    plain = loading.load(tiny.LLADA)
    config: Any = plain.network.config
    stored = frequencies(config.rope_parameters["rope_theta"], config.hidden_size // config.num_attention_heads)
    tiny.edit_weights(folder, {"model.transformer.blocks.0.rotary_emb.inv_freq": stored})
    for loaded in both(folder):
        assert torch.equal(logits(loaded), logits(plain))


# Our own formats


@pytest.fixture
def pruned(tmp_path: Path) -> LanguageModel:
    made = tiny.model(tmp_path / "dense", intermediate_size=64)
    for layer in made.layers:
        layer.module.weight.data[layer.module.weight.abs() < 0.1] = 0
    return made


def rounded(model: LanguageModel, bits: dict[str, int]) -> dict[str, export.QuantizedWeight]:
    """Round in place, each role with its own bits."""
    made = {}
    for layer in model.layers:
        if layer.role in bits:
            weight = layer.module.weight.data
            scales = (weight.view(len(weight), -1, 32).abs().amax(2) / (2 ** (bits[layer.role] - 1) - 1)).bfloat16().float()
            spread = scales.repeat_interleave(32, 1)
            codes = torch.where(spread > 0, weight / spread, weight).round()
            low, high = -(2 ** (bits[layer.role] - 1)), 2 ** (bits[layer.role] - 1) - 1
            made[layer.name] = export.QuantizedWeight(codes.clamp(low, high).to(torch.int8), scales, bits[layer.role], 32)
            layer.module.weight.data.copy_(made[layer.name].dequantize(dtype=weight.dtype))
    return made


ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize("bits", [dict.fromkeys(ROLES, 4), {"q": 3, "up": 8}], ids=["all", "some"])
def test_packed_folders_load_as_they_were(bits: dict[str, int], pruned: LanguageModel, tmp_path: Path) -> None:
    export.save_packed(pruned, tmp_path / "packed", quantized=rounded(pruned, bits))
    loaded = loading.load(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(pruned))
    lookup.check(ModelSource(str(tmp_path / "packed")))
    assert "notes" not in loaded.describe()
    with pytest.raises(InputError, match="must hold plain floats, got packed weights"):
        streaming.load(tmp_path / "packed")
    written = export.save_plain(loaded, tmp_path / "plain")
    assert "quantization_config" not in json.loads((written / "config.json").read_text())
    assert torch.equal(logits(loading.load(written)), logits(pruned))


@pytest.mark.parametrize("bits", [{}, dict.fromkeys(ROLES, 3), {"q": 4}], ids=["floats", "codes", "some"])
def test_sparse_folders_load_as_they_were(bits: dict[str, int], pruned: LanguageModel, tmp_path: Path) -> None:
    containers.save_sparse(pruned, tmp_path / "sparse", quantized=rounded(pruned, bits))
    lookup.check(ModelSource(str(tmp_path / "sparse")))
    assert torch.equal(logits(loading.load(tmp_path / "sparse")), logits(pruned))
    assert torch.equal(logits(containers.load_sparse(tmp_path / "sparse")), logits(pruned))
    with pytest.raises(InputError, match="got a sparse container"):
        streaming.load(tmp_path / "sparse")


def test_bits_are_those_of_the_closest_target(pruned: LanguageModel, tmp_path: Path) -> None:
    """Other programs name layers by patterns beside the class: 8 bits read as 4 are other weights of the same shape."""
    bits = {**dict.fromkeys(ROLES, 4), "down": 8, "o": 2}
    folder = export.save_packed(pruned, tmp_path / "packed", quantized=rounded(pruned, bits))
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    (second,) = [module for module in stated["config_groups"]["group_1"]["targets"] if ".1." in module]
    for group in stated["config_groups"].values():
        width = group["weights"]["num_bits"]
        group["targets"] = {2: ["re:.*0.self_attn.o_proj$", second], 4: ["Linear"], 8: ["re:.*down_proj$", "re:x"]}[width]
    tiny.edit_config(folder, quantization_config=stated)
    assert torch.equal(logits(loading.load(folder)), logits(pruned))
    assert {name.split(".")[-2]: code.bits for name, code in containers.read_codes(folder).items()}["down_proj"] == 8
    for group in stated["config_groups"].values():
        group["targets"] = ["re:nothing$"]
    with pytest.raises(InputError, match=r"must say the bits of model\.layers"):
        loading.load(tiny.edit_config(folder, quantization_config=stated))


def test_packed_weights_of_another_scheme_are_refused(pruned: LanguageModel, tmp_path: Path) -> None:
    folder = export.save_packed(pruned, tmp_path / "packed", quantized=rounded(pruned, dict.fromkeys(ROLES, 4)))
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    tiny.edit_config(folder, quantization_config=raw["quantization_config"])
    with pytest.raises(InputError, match="got compressed-tensors quantization"):
        loading.load(folder)


# Settings


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_a_left_over_quantization_is_named_and_ignored(method: str, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x")
    expected = logits(loading.load(folder))
    tiny.edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    for loaded in both(folder):
        assert torch.equal(logits(loaded), expected)
        (note,) = loaded.notes
        assert "quantization_config" in note and "ignored" in note
        assert loaded.describe()["notes"] == [note]
    assert "quantization_config" not in json.loads(
        (export.save_plain(loading.load(folder), tmp_path / "out") / "config.json").read_text()
    )


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("layout", ["llama", "qwen2", "llada", "dream"])
def test_either_name_of_the_dtype_is_read(layout: str, key: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    if layout in ("llama", "qwen2"):
        tiny.folder(folder, family=layout)
    else:
        shutil.copytree({"llada": tiny.LLADA, "dream": tiny.DREAM}[layout], folder)
    expected = logits(loading.load(folder))
    tiny.edit_config(folder, dtype=None, torch_dtype=None)
    for loaded in both(tiny.edit_config(folder, **{key: "bfloat16"})):
        assert torch.equal(logits(loaded), expected)
