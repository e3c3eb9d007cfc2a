"""Exports reload bit for bit in a process that has transformers and not this project."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lib.checkpoints import contents
from lib.core.config import ROOT
from lib.core.errors import InputError
from lib.models import containers, export, loading
from lib.models.export import Kept, QuantizedWeight
from lib.models.language_model import LanguageModel
from lib.models.layers import attention
from lib.pruning import shrink
from lib.quantization import rounding
from tests import tiny

GROUP = 8
FLOAT_BYTES = 4
RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, found = torch.load("ids.pt"), {}
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    weights = {key: value for key, value in model.state_dict().items() if key.endswith("_proj.weight")}
    config = {key: getattr(model.config, key, None) for key in ("is_causal", "mask_token_id", "logit_shift")}
    found[name] = {"logits": logits, "weights": weights, "config": config, "dtype": model.dtype}
assert "lib" not in sys.modules
found["tokens"] = AutoTokenizer.from_pretrained(sys.argv[1])("w1 w2 [MASK]").input_ids
torch.save(found, "found.pt")
"""


def rounded(
    model: LanguageModel, bits: Callable[[int], int], *, size: int = GROUP, dtype: torch.dtype = torch.bfloat16
) -> dict[str, QuantizedWeight]:
    """Prune half of every matrix, round it, put it into the network, and return the codes; `bits` by position in the table."""
    made = {}
    for index, layer in enumerate(model.layers):
        weight = layer.module.weight.detach().float()
        weight = torch.where(weight.abs() >= weight.abs().median(), weight, 0.0)
        top = 2 ** (bits(index) - 1) - 1
        groups = weight.reshape(len(weight), -1, size)
        scales = (groups.abs().amax(dim=2) / top).to(dtype)
        codes = torch.round(groups / scales.float()[..., None]).clamp(-top - 1, top).reshape(weight.shape).to(torch.int8)
        made[layer.name] = QuantizedWeight(codes, scales, bits(index), size)
        layer.module.weight.data = made[layer.name].dequantize(dtype=layer.module.weight.dtype)
    return made


def logits(model: LanguageModel) -> Tensor:
    with torch.no_grad(), attention.without_products(model.network):
        return model.network(input_ids=tiny.ids(2, 10)).logits


def in_new_process(folder: Path, names: list[str]) -> dict[str, Any]:
    """Run `RELOAD` where `lib` cannot be imported."""
    torch.save(tiny.ids(2, 10), folder / "ids.pt")
    (folder / "reload.py").write_text(RELOAD)
    outside = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and not (Path(path) / "lib").is_dir()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(outside), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "reload.py", *names], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(folder / "found.pt", weights_only=False)


BITS: Mapping[str, Callable[[int], int]] = {
    "2": lambda _: 2,
    "3": lambda _: 3,
    "4": lambda _: 4,
    "8": lambda _: 8,
    "mixed": lambda index: (2, 3, 4, 8)[index % 4],
}
MODELS: Mapping[str, dict[str, Any]] = {
    "diffusion-float32": {"causal": False},
    "diffusion-bfloat16": {"causal": False, "dtype": torch.bfloat16},
    "causal-float32": {"causal": True, "family": "qwen2", "tie": True},
}
SCALES = {"diffusion-float32": torch.bfloat16, "diffusion-bfloat16": torch.bfloat16, "causal-float32": torch.float32}
CASES = [("diffusion-float32", bits) for bits in BITS] + [
    ("diffusion-bfloat16", "3"),
    ("diffusion-bfloat16", "8"),
    ("causal-float32", "4"),
]


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Export every case in both formats, and return (found in a new process, expected, folder)."""
    folder = tmp_path_factory.mktemp("exports")
    expected: dict[str, Any] = {}
    for kind, bits in CASES:
        options = dict(MODELS[kind])
        dtype = options.get("dtype", torch.float32)
        model = replace(
            loading.load(tiny.folder(folder / "dense" / f"{kind}-{bits}", **options), dtype=dtype), tokenizer=tiny.tokenizer()
        )
        if not model.is_causal:
            model = replace(
                model, logit_shift=1
            )  # as of a Dream, whose layout says it and whose plain Qwen2 configuration does not
        quantized = rounded(model, BITS[bits], dtype=SCALES[kind])
        expected[f"{kind}-{bits}"] = model, quantized, logits(model)
        export.save_packed(model, folder / f"packed-{kind}-{bits}", quantized=quantized)
        export.save_plain(model, folder / f"plain-{kind}-{bits}")
    names = [f"{form}-{kind}-{bits}" for kind, bits in CASES for form in ("packed", "plain")]
    return in_new_process(folder, names), expected, folder


@pytest.mark.parametrize("form", ["packed", "plain"])
@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_a_new_process_without_this_project_reloads_it_bit_for_bit(reloaded: Any, kind: str, bits: str, form: str) -> None:
    found, expected, _ = reloaded
    model, quantized, before = expected[f"{kind}-{bits}"]
    again = found[f"{form}-{kind}-{bits}"]
    assert again["dtype"] == model.network.dtype and torch.equal(again["logits"], before)
    for name, weight in quantized.items():
        assert torch.equal(again["weights"][name], weight.dequantize(dtype=model.network.dtype))
        assert torch.equal(again["weights"][name] == 0, weight.codes == 0) and (weight.codes == 0).float().mean() >= 0.45
    config = {"is_causal": model.is_causal, "mask_token_id": model.mask_token_id, "logit_shift": None if model.is_causal else 1}
    assert again["config"] == config


def test_the_tokenizer_goes_along(reloaded: Any) -> None:
    assert reloaded[0]["tokens"] == [1, 4, 5, tiny.MASK]


@pytest.mark.parametrize("offline", [True, False])
def test_how_the_tokenizer_was_found_does_not_go_along(tmp_path: Path, model: LanguageModel, offline: bool) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "found")
    found = PreTrainedTokenizerFast.from_pretrained(tmp_path / "found")
    found.init_kwargs["local_files_only"] = offline  # as transformers sets it, with the network or without
    export.save_plain(replace(model, tokenizer=found), tmp_path / "out")
    written = (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert "local" not in written and str(tmp_path) not in written
    assert json.loads(written)["mask_token"] == "[MASK]" and found.init_kwargs["local_files_only"] is offline


def test_a_plain_export_is_the_same_model_to_this_project(reloaded: Any) -> None:
    _, expected, folder = reloaded
    model, _, before = expected["diffusion-float32-4"]
    again = loading.load(folder / "plain-diffusion-float32-4")
    assert torch.equal(logits(again), before)
    assert (again.mask_token_id, again.logit_shift, again.is_causal) == (model.mask_token_id, 1, False)
    assert (
        again.tokenizer is not None
        and json.loads((folder / "plain-diffusion-float32-4/config.json").read_text())["dtype"] == "float32"
    )


def test_bytes_add_up_and_packed_codes_take_what_their_bits_say(reloaded: Any) -> None:
    _, expected, folder = reloaded
    for kind, bits in CASES:
        path, (model, quantized, _) = folder / f"packed-{kind}-{bits}", expected[f"{kind}-{bits}"]
        sizes = containers.bytes_by_kind(path)
        assert sum(sizes.values()) == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        words = sum(len(weight.codes) * -(-weight.codes.shape[1] * weight.bits // 32) for weight in quantized.values())
        assert sizes["codes"] == 4 * words and sizes["linear weights"] == sizes["masks"] == 0 and sizes["headers"] > 0
        itemsize = model.network.dtype.itemsize
        assert sizes["scales"] == SCALES[kind].itemsize * sum(weight.scales.numel() for weight in quantized.values())
        tables = 1 if model.network.config.tie_word_embeddings else 2
        assert sizes["embeddings"] == itemsize * tables * tiny.VOCAB * 32
        plain = containers.bytes_by_kind(folder / f"plain-{kind}-{bits}")
        assert plain["linear weights"] == itemsize * sum(weight.codes.numel() for weight in quantized.values())
        assert plain["codes"] == plain["scales"] == 0 and plain["embeddings"] == sizes["embeddings"]


def test_the_configuration_names_every_layer_once(reloaded: Any) -> None:
    _, expected, folder = reloaded
    uniform, mixed = (
        json.loads((folder / f"packed-diffusion-float32-{bits}/config.json").read_text())["quantization_config"]
        for bits in ("3", "mixed")
    )
    assert [group["targets"] for group in uniform["config_groups"].values()] == [["Linear"]] and uniform["ignore"] == ["lm_head"]
    assert uniform["config_groups"]["group_0"]["weights"]["num_bits"] == 3
    named = [name for group in mixed["config_groups"].values() for name in group["targets"]]
    assert sorted(f"{name}.weight" for name in named) == sorted(expected["diffusion-float32-mixed"][1])


@pytest.fixture
def model(tmp_path: Path) -> LanguageModel:
    return tiny.model(tmp_path / "dense", causal=False)


def test_layers_left_out_keep_their_floats(tmp_path: Path, model: LanguageModel) -> None:
    quantized = rounded(model, BITS["4"])
    some = dict(list(quantized.items())[:3])
    export.save_packed(model, tmp_path / "some", quantized=some)
    tensors = load_file(tmp_path / "some/model.safetensors")
    assert {name.removesuffix("_packed") for name in tensors if name.endswith("_packed")} == set(some)
    found = in_new_process_one(tmp_path, "some")
    assert torch.equal(found["logits"], logits(model))


def in_new_process_one(folder: Path, name: str) -> dict[str, Any]:
    tiny.tokenizer().save_pretrained(folder / name)
    return in_new_process(folder, [name])[name]


def test_a_smaller_network_goes_with_its_kept_indices(tmp_path: Path) -> None:
    expected = {}
    for kind in ("diffusion", "causal"):
        dense = tiny.model(tmp_path / "dense" / kind, causal=kind == "causal", kv_heads=2)
        kept = Kept(*shrink.choose(dense, sparsity=0.5))
        small = replace(shrink.shrunk(dense, kept.groups, kept.channels), tokenizer=tiny.tokenizer())
        quantized = rounded(small, BITS["4"], size=4)
        export.save_packed(small, tmp_path / kind, quantized=quantized, kept=kept)
        expected[kind] = logits(small)
        again = export.read_kept(tmp_path / kind)
        assert len(again.groups) == len(again.channels) == 2
        for mine, read in ((kept.groups, again.groups), (kept.channels, again.channels)):
            assert all(torch.equal(one, other) for one, other in zip(mine, read, strict=True))
        shapes = [
            {name: value.shape for name, value in made.network.state_dict().items()}
            for made in (small, shrink.shrunk(dense, again.groups, again.channels))
        ]
        assert shapes[0] == shapes[1]
    found = in_new_process(tmp_path, list(expected))
    assert all(torch.equal(found[kind]["logits"], logits) for kind, logits in expected.items())
    with pytest.raises(InputError, match=r"must hold kept\.json, got none"):
        export.read_kept(tmp_path / "dense")


@pytest.mark.parametrize(
    ("groups", "channels", "message"),
    [
        ([[0], [0, 1]], [[0, 1]] * 2, r"every block must keep as many groups, got \[1, 2\]: from_pretrained cannot load"),
        ([[0, 1]] * 2, [[0, 1], [3]], r"every block must keep as many channels, got \[1, 2\]"),
        ([[0]] * 2, [list(range(20))] * 2, r"kept groups must be 2 in each of 2 blocks as the model has, got \[1\]"),
        ([[0, 1]] * 3, [list(range(40))] * 3, r"kept groups must be 2 in each of 2 blocks as the model has, got \[2\] in 3"),
        ([[1, 0]] * 2, [list(range(40))] * 2, "kept groups must ascend"),
    ],
)
def test_kept_indices_of_another_model_are_refused(
    tmp_path: Path, model: LanguageModel, groups: list[list[int]], channels: list[list[int]], message: str
) -> None:
    kept = Kept([torch.tensor(block) for block in groups], [torch.tensor(block) for block in channels])
    for write in (export.save_plain, containers.save_sparse):
        with pytest.raises(InputError, match=message):
            write(model, tmp_path / "out", kept=kept)
    assert not (tmp_path / "out").exists()


NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, r"bits of model\.layers\.0\.self_attn\.q_proj\.weight must be 2 to 8, got 1"),
        ({"bits": 9}, "must be 2 to 8, got 9"),
        ({"bits": 3}, r"codes of .* must be -4 to 3 for 3 bits, got -7 to 7"),
        ({"group_size": 5}, "group_size of .* must divide its 32 inputs, got 5"),
        ({"group_size": 0}, "group_size of .* must divide its 32 inputs, got 0"),
        ({"group_size": 16}, r"scales of .* must have shape \(32, 2\), got \(32, 4\)"),
        ({"codes": torch.zeros(32, 24, dtype=torch.int8)}, r"codes of .* must have shape \(32, 32\), got \(32, 24\)"),
        ({"scales": torch.full((32, 4), torch.nan)}, "scales of .* must be finite and exact"),
        ({"scales": torch.full((32, 4), torch.inf)}, "scales of .* must be finite and exact"),
        ({"scales": torch.full((32, 4), 1 / 3, dtype=torch.float64)}, "got float64 that float32 cannot hold: round the scales"),
        ({"scales": torch.ones(32, 4)}, r"weights of .* must be codes \* scales, got others"),
    ],
)
def test_codes_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, model: LanguageModel, change: dict[str, Any], message: str
) -> None:
    quantized = rounded(model, BITS["4"])
    quantized[NAME] = replace(quantized[NAME], **change)
    for write in (export.save_packed, containers.save_sparse):
        with pytest.raises(InputError, match=message):
            write(model, tmp_path / "out" / "deep", quantized=quantized)
    assert not (tmp_path / "out").exists()


def test_an_unknown_name_and_an_old_folder_are_refused(tmp_path: Path, model: LanguageModel) -> None:
    quantized = rounded(model, BITS["4"])
    with pytest.raises(InputError, match=r"among the model's, got 'lm_head\.weight'"):
        export.save_packed(model, tmp_path / "out", quantized={**quantized, "lm_head.weight": quantized[NAME]})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").write_text("kept")
    for write in (export.save_plain, containers.save_sparse):
        with pytest.raises(InputError, match="must go to a new folder"):
            write(model, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious.txt"]


def test_scales_in_float32_do_not_survive_a_bfloat16_network(tmp_path: Path) -> None:
    """They are read in the network's dtype: the reload would compute with others, so the export refuses."""
    model = loading.load(tiny.folder(tmp_path / "dense", causal=False, dtype=torch.bfloat16), dtype=torch.bfloat16)
    quantized = rounded(model, BITS["4"])
    scales = quantized[NAME].scales.float() * (1 + 2**-12)
    with pytest.raises(InputError, match="got float32 that bfloat16 cannot hold: round the scales to it first"):
        export.save_packed(model, tmp_path / "out", quantized={NAME: replace(quantized[NAME], scales=scales)})
    exact = {NAME: replace(quantized[NAME], scales=quantized[NAME].scales.float())}  # float32 by name, bfloat16 by value
    export.save_packed(model, tmp_path / "exact", quantized=exact)
    assert torch.equal(in_new_process_one(tmp_path, "exact")["logits"], logits(model))


@pytest.mark.parametrize("writer", ["save_plain", "save_packed", "save_sparse"])
def test_an_error_while_writing_leaves_nothing(
    tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    quantized = rounded(model, BITS["4"])
    monkeypatch.setattr(export, "save_torch_state_dict", full)
    monkeypatch.setattr(containers, "save_file", full)
    writers = {
        "save_plain": lambda: export.save_plain(model, tmp_path / "out" / "x"),
        "save_packed": lambda: export.save_packed(model, tmp_path / "out" / "x", quantized=quantized),
        "save_sparse": lambda: containers.save_sparse(model, tmp_path / "out" / "x"),
    }
    with pytest.raises(OSError, match="no space"):
        writers[writer]()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_export_leaves_no_checkpoint(tmp_path: Path) -> None:
    """The weights are on disk, the rename is not done."""
    tiny.folder(tmp_path / "dense", causal=False)
    script = f"""
import os, pathlib
from lib.models import export, load
pathlib.Path.rename = lambda *_: os._exit(9)
export.save_plain(load('{tmp_path}/dense'), '{tmp_path}/out/x')
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 9, run.stderr[-3000:]
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert len(left) == 1 and left[0].startswith(".x.") and left[0].endswith(".partial")
    model = loading.load(tmp_path / "dense")
    assert torch.equal(logits(loading.load(export.save_plain(model, tmp_path / "out/x"))), logits(model))


def prune_(model: LanguageModel, sparsity: float) -> None:
    for layer in model.layers:
        flat = layer.module.weight.data.flatten()
        flat[flat.abs().argsort()[: int(sparsity * flat.numel())]] = 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_container_returns_every_weight_and_its_size_is_mask_and_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = loading.load(tiny.folder(tmp_path / "dense", causal=False, dtype=dtype, intermediate_size=39), dtype=dtype)
    model = replace(loaded, tokenizer=tiny.tokenizer(), logit_shift=1)
    prune_(model, 0.5)
    containers.save_sparse(model, tmp_path / "sparse")
    again = containers.load_sparse(tmp_path / "sparse", dtype=dtype)
    for name, value in model.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], value), name
    assert torch.equal(logits(again), logits(model))
    assert (again.mask_token_id, again.logit_shift, again.is_causal) == (tiny.MASK, 1, False) and again.tokenizer is not None
    sizes = containers.bytes_by_kind(tmp_path / "sparse")
    layers = [layer.module.weight for layer in model.layers]
    assert sizes["masks"] == sum(-(-weight.numel() // 8) for weight in layers) and sizes["linear weights"] == 0
    assert sizes["kept values"] == dtype.itemsize * sum(int(weight.count_nonzero()) for weight in layers)
    assert sum(sizes.values()) == sum(file.stat().st_size for file in (tmp_path / "sparse").iterdir())


@pytest.mark.parametrize(("bits", "masked"), [("4", True), ("3", True), ("2", False)])
def test_the_container_holds_kept_codes_of_a_quantized_model(
    tmp_path: Path, model: LanguageModel, bits: str, masked: bool
) -> None:
    """Half of 4 bits and a bit of mask are 3 bits a weight; with 2 bits the mask would save nothing."""
    quantized = rounded(model, BITS[bits])
    if bits == "2":  # exactly half, where the mask costs as much as the zeros
        for layer in model.layers:
            codes = (
                torch.tensor([1, 0], dtype=torch.int8).repeat(layer.module.weight.numel() // 2).reshape(layer.module.weight.shape)
            )
            quantized[layer.name] = replace(quantized[layer.name], codes=codes)
            layer.module.weight.data = quantized[layer.name].dequantize(dtype=torch.float32)
    containers.save_sparse(model, tmp_path / "sparse", quantized=quantized)
    assert torch.equal(logits(containers.load_sparse(tmp_path / "sparse")), logits(model))
    sizes = containers.bytes_by_kind(tmp_path / "sparse")
    count = sum(weight.codes.numel() for weight in quantized.values())
    kept = [int((weight.codes != 0).sum()) if masked else weight.codes.numel() for weight in quantized.values()]
    assert sizes["masks"] == (count // 8 if masked else 0)
    assert sizes["codes"] == sum(-(-number * int(bits) // 8) for number in kept)
    export.save_packed(model, tmp_path / "packed", quantized=quantized)
    packed = containers.bytes_by_kind(tmp_path / "packed")
    assert sizes["scales"] == packed["scales"] and (not masked or sizes["codes"] + sizes["masks"] < packed["codes"])
    grid = rounding.Grid(int(bits), group_size=GROUP)
    counted = [
        rounding.stored_bytes((w.codes.shape[0], w.codes.shape[1]), grid=grid, kept=int(w.codes.count_nonzero()))
        for w in quantized.values()
    ]
    assert sizes["codes"] + sizes["masks"] + sizes["scales"] == sum(counted)  # what is counted has a file behind it


def test_a_shared_embedding_is_stored_once(tmp_path: Path) -> None:
    model = tiny.model(tmp_path / "dense", causal=True, tie=True)
    prune_(model, 0.5)
    containers.save_sparse(model, tmp_path / "sparse")
    assert containers.bytes_by_kind(tmp_path / "sparse")["embeddings"] == FLOAT_BYTES * tiny.VOCAB * 32
    assert torch.equal(logits(containers.load_sparse(tmp_path / "sparse")), logits(model))


def test_a_dense_matrix_is_stored_without_a_mask(tmp_path: Path, model: LanguageModel) -> None:
    """At 1/32 zeros the mask of float32 weights costs what the zeros did."""
    first, second = (layer.module.weight.data for layer in model.layers[:2])
    first[:, 0] = 0.0  # exactly 1 / 32
    second[:, 0], second[0, 1] = 0.0, 0.0
    containers.save_sparse(model, tmp_path / "sparse")
    stored = load_file(tmp_path / "sparse" / containers.SPARSE)
    assert [name for name in stored if name.endswith(".mask")] == [f"{model.layers[1].name}.mask"]
    assert torch.equal(logits(containers.load_sparse(tmp_path / "sparse")), logits(model))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    share=st.floats(0, 1),
    bits=st.sampled_from([None, 2, 3, 4, 5, 6, 7, 8]),
    seed=st.integers(0, 99),
)
def test_parts_of_any_matrix_go_together_again(rows: int, columns: int, share: float, bits: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pruned = torch.rand(rows, columns, generator=generator) < share
    quantized = None
    if bits is None:
        weight = torch.randn(rows, columns, generator=generator).masked_fill(pruned, 0.0)
    else:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        codes = torch.randint(low, high, (rows, columns), generator=generator).masked_fill(pruned, 0).to(torch.int8)
        quantized = QuantizedWeight(codes, torch.rand(rows, 1, generator=generator) + 0.1, bits, columns)
        weight = quantized.dequantize(dtype=torch.float32)
    stored = containers._stored_sparse(weight, quantized)
    if stored is None:
        assert int((weight == 0).sum()) * 32 <= weight.numel()
        return
    parts, layout = stored
    assert torch.equal(contents.expanded(parts, **layout), weight)


def test_only_a_container_is_read_as_one(tmp_path: Path, model: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"must hold sparse\.safetensors, got none"):
        containers.load_sparse(tmp_path / "dense")
    prune_(model, 0.5)
    containers.save_sparse(model, tmp_path / "sparse")
    assert torch.equal(logits(loading.load(tmp_path / "sparse")), logits(model))
    plain = containers.unpack_sparse(tmp_path / "sparse", tmp_path / "plain")
    assert not (plain / containers.SPARSE).exists() and torch.equal(logits(loading.load(plain)), logits(model))


def test_codes_lie_in_the_file_as_the_format_says(tmp_path: Path, model: LanguageModel) -> None:
    """Offset binary, element i of a row at bit i * bits of little-endian 32-bit words, in a loop over bits."""
    quantized = rounded(model, BITS["3"])
    quantized[NAME].codes[5, :2] = torch.tensor([-4, 3])  # both ends
    model.layers[0].module.weight.data = quantized[NAME].dequantize(dtype=torch.float32)
    export.save_packed(model, tmp_path / "packed", quantized=quantized)
    tensors = load_file(tmp_path / "packed/model.safetensors")
    words = tensors[f"{NAME}_packed"]
    row = np.unpackbits(words[5].numpy().view(np.uint8), bitorder="little")
    read = [sum(int(row[3 * index + bit]) << bit for bit in range(3)) - 4 for index in range(32)]
    assert read == quantized[NAME].codes[5].tolist() and len(set(read)) > 4
    assert torch.equal(unpack_from_int32(words, 3, torch.Size([32, 32])), quantized[NAME].codes)
    assert tensors[f"{NAME}_shape"].tolist() == [32, 32] and torch.equal(tensors[f"{NAME}_scale"], quantized[NAME].scales)
