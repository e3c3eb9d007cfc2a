"""GGUF files: as llama.cpp writes them, divided, replaced, damaged, or of what is not read here."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lib.checkpoints import files, lookup
from lib.checkpoints.gguf import conversion, headers
from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.models import loading
from lib.models.language_model import tokenizer_of
from tests import ggufs, tiny

WIDE = {"intermediate_size": 64}  # whole blocks of 32 in every row
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "llada": "llama", "dream": "qwen2"}
DIFFUSION = ("llada", "dream")


def made(architecture: str, **options: Any) -> Any:
    network = tiny.network(family=FAMILIES[architecture], causal=architecture not in DIFFUSION, **WIDE, **options)
    with torch.no_grad():  # biases begin as zeros, which no order of rows would show
        for name, value in network.named_parameters():
            if name.endswith("bias"):
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    return network


def logits(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        return network(input_ids=tiny.ids(2, 10)).logits


def refusal(path: Path, *, early: bool = True) -> str:
    """The cheap check and loading say the same."""
    with pytest.raises(InputError) as caught:
        loading.load(path)
    assert "\n" not in str(caught.value)
    if early:
        with pytest.raises(InputError) as checked:
            lookup.check(ModelSource(str(path)))
        assert str(checked.value) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_file_equals_the_network_it_was_written_from(architecture: str, tie: bool, tmp_path: Path) -> None:
    network = made(architecture, tie=tie, rope_parameters={"rope_type": "default", "rope_theta": 50.0}, rms_norm_eps=1e-2)
    loaded = loading.load(ggufs.write(tmp_path / "tiny.gguf", network, architecture=architecture))
    torch.testing.assert_close(logits(loaded.network), logits(network), atol=1e-5, rtol=0)
    diffusion = architecture in DIFFUSION
    assert (loaded.is_causal, loaded.mask_token_id) == (not diffusion, tiny.MASK if diffusion else None)
    assert loaded.logit_shift == (0 if architecture == "llada" else 1)
    assert tokenizer_of(loaded)("cab")["input_ids"] == [2, 26]
    assert not list(tmp_path.glob(".partial-*")), "the conversion leaves nothing half done beside it"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("architecture", DIFFUSION)
def test_quantized_kinds_are_the_network_rounded_as_they_say(architecture: str, kind: str, tmp_path: Path) -> None:
    file = ggufs.write(tmp_path / "tiny.gguf", made(architecture), architecture=architecture, kind=kind)
    loaded = loading.load(file)
    torch.testing.assert_close(logits(loaded.network), logits(ggufs.read_back(made(architecture), kind)), atol=1e-5, rtol=0)
    distance = (logits(loaded.network) - logits(made(architecture))).norm() / logits(made(architecture)).norm()
    assert 1e-5 < distance < {"F16": 3e-3, "BF16": 3e-2, "Q8_0": 0.1, "Q4_0": 1.0}[kind], (
        "about the format's step, through the net"
    )


def test_rows_are_put_back_only_where_llama_cpp_moves_them(tmp_path: Path) -> None:
    """On these weights the order matters: the same file read as the other kind gives other logits."""
    network = made("llada")
    mixed = {**ggufs.stored(network, "llada"), **{f"blk.{n}.attn_q.weight": torch.eye(32) * (n + 2) for n in range(2)}}
    file = ggufs.write(tmp_path / "tiny.gguf", network, architecture="llada", extra=mixed)
    found = headers.read(file)
    weights = load_file(conversion.folder_of(file) / "model.safetensors")
    assert found.architecture == "llada"
    rows = weights["model.layers.0.self_attn.q_proj.weight"][:8].argmax(1).tolist()
    assert rows == [0, 2, 4, 6, 1, 3, 5, 7]


def test_the_shift_is_the_files_own(tmp_path: Path) -> None:
    """llama.cpp writes other networks as `dream`, without the shift."""
    assert loading.load(ggufs.write(tmp_path / "a.gguf", made("dream"), architecture="dream", shift=False)).logit_shift == 0


def test_a_mask_without_its_field_is_found_by_its_name(tmp_path: Path) -> None:
    tokens = [*ggufs.TOKENS[:-2], "<|mdm_mask|>", "<30>"]
    file = ggufs.write(tmp_path / "tiny.gguf", made("llada"), architecture="llada", mask=None, tokens=tokens)
    assert loading.load(file).mask_token_id == tiny.VOCAB - 2
    again = ggufs.write(tmp_path / "none.gguf", made("llada"), architecture="llada", mask=None)
    assert "must name its mask token, got none" in refusal(again)


# Which file


def test_several_files_are_refused_by_name_and_one_can_be_named(tmp_path: Path) -> None:
    for seed, name in enumerate(("a.Q4.gguf", "b.Q8.gguf")):
        ggufs.write(tmp_path / name, made("llama", seed=seed), architecture="llama")
    message = refusal(tmp_path)
    assert "a.Q4.gguf, b.Q8.gguf" in message and "name the file" in message
    torch.testing.assert_close(
        logits(loading.load(tmp_path / "b.Q8.gguf").network), logits(made("llama", seed=1)), atol=1e-5, rtol=0
    )


def test_a_divided_file_is_read_whole(tmp_path: Path) -> None:
    first = ggufs.write(tmp_path / "tiny.gguf", made("llada"), architecture="llada", parts=3)
    for path in (tmp_path, first, first.with_name("tiny-00002-of-00003.gguf")):
        torch.testing.assert_close(logits(loading.load(path).network), logits(made("llada")), atol=1e-5, rtol=0)
    assert loading.load(tmp_path).fingerprint == loading.load(first).fingerprint


def test_a_missing_or_foreign_part_is_refused(tmp_path: Path) -> None:
    first = ggufs.write(tmp_path / "tiny.gguf", made("llada"), architecture="llada", parts=3)
    before = loading.load(first).fingerprint
    (tmp_path / "other").mkdir()
    other = ggufs.write(tmp_path / "other" / "tiny.gguf", made("llada", seed=1), architecture="llada", parts=3)
    shutil.copy(other.with_name("tiny-00002-of-00003.gguf"), tmp_path)
    assert loading.load(first).fingerprint != before
    (tmp_path / "tiny-00002-of-00003.gguf").unlink()
    assert "no tiny-00002-of-00003.gguf" in refusal(tmp_path)
    shutil.copy(first, tmp_path / "tiny-00002-of-00003.gguf")
    assert "take all parts from one division" in refusal(tmp_path)


def test_beside_safetensors_a_gguf_is_not_meant_and_beside_a_configuration_it_is(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "both")
    ggufs.write(folder / "x.gguf", made("llama", seed=1), architecture="llama")
    assert torch.equal(logits(loading.load(folder).network), logits(tiny.network()))
    (folder / "model.safetensors").unlink()
    torch.testing.assert_close(logits(loading.load(folder).network), logits(made("llama", seed=1)), atol=1e-5, rtol=0)


# The conversion


def test_a_replaced_file_is_converted_again(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    ggufs.write(file, made("llama"), architecture="llama")
    stamp = os.stat(file)
    loading.load(file)
    ggufs.write(file, made("llama", seed=1), architecture="llama")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    torch.testing.assert_close(logits(loading.load(file).network), logits(made("llama", seed=1)), atol=1e-5, rtol=0)


def test_one_content_is_converted_once(tmp_path: Path) -> None:
    file = ggufs.write(tmp_path / "tiny.gguf", made("llama"), architecture="llama")
    first = loading.load(file)
    stamp = (conversion.folder_of(file) / "model.safetensors").stat().st_mtime_ns
    assert loading.load(file).fingerprint == first.fingerprint
    assert (conversion.folder_of(file) / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_conversion_is_made_again(name: str, damage: str, tmp_path: Path) -> None:
    file = ggufs.write(tmp_path / "tiny.gguf", made("llama"), architecture="llama")
    converted = conversion.folder_of(file) / name
    if damage == "cut":
        converted.write_bytes(converted.read_bytes()[:-10])
    else:
        converted.unlink()
    torch.testing.assert_close(logits(loading.load(file).network), logits(made("llama")), atol=1e-5, rtol=0)


def test_large_files_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "SHARD_BYTES", 10_000)
    file = ggufs.write(tmp_path / "tiny.gguf", made("dream"), architecture="dream")
    assert len(list(conversion.folder_of(file).glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(loading.load(file).network), logits(made("dream")), atol=1e-5, rtol=0)


@pytest.fixture
def writable(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let only folders below the named ones be written; tests may run as root, whom no permission stops."""

    make = conversion.tempfile.TemporaryDirectory

    def only(*folders: Path) -> None:
        def guarded(*arguments: Any, **options: Any) -> Any:
            where = options.get("dir")
            if where is not None and not any(Path(where).is_relative_to(folder) for folder in folders):
                raise PermissionError(13, "Permission denied", str(where))
            return make(*arguments, **options)

        monkeypatch.setattr(conversion.tempfile, "TemporaryDirectory", guarded)

    return only


def test_where_the_folder_cannot_be_written_the_cache_takes_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: Callable[..., None]
) -> None:
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "sealed").mkdir()
    file = ggufs.write(tmp_path / "sealed" / "tiny.gguf", made("llama"), architecture="llama")
    writable()
    message = refusal(file, early=False)
    assert "must be written to" in message and "Permission denied" in message
    writable(tmp_path / "cache")
    assert conversion.folder_of(file).parent == tmp_path / "cache" / "gguf"
    torch.testing.assert_close(logits(loading.load(file).network), logits(made("llama")), atol=1e-5, rtol=0)


# What is refused


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight", "blk.0.attn_k.bias"])
def test_a_missing_tensor_is_refused_by_name(name: str, tmp_path: Path) -> None:
    file = ggufs.write(tmp_path / "tiny.gguf", made("dream"), architecture="dream", without=(name,))
    assert "must hold the tensors of its network, got no model." in refusal(file)


def test_a_surplus_tensor_is_refused(tmp_path: Path) -> None:
    extra = {"blk.2.ffn_up.weight": torch.zeros(64, 32)}
    file = ggufs.write(tmp_path / "tiny.gguf", made("llama"), architecture="llama", extra=extra)
    assert "got model.layers.2.mlp.up_proj.weight besides" in refusal(file)
    file = ggufs.write(tmp_path / "other.gguf", made("llama"), architecture="llama", extra={"mm.0.weight": torch.zeros(2, 2)})
    assert "got mm.0.weight" in refusal(file)


@pytest.mark.parametrize(
    ("architecture", "fields", "said"),
    [
        ("llama", {"expert_count": 8}, "must have no experts, got 8"),
        ("llama", {"rope.scaling.type": "yarn"}, "rope.scaling.type yarn"),
        ("llama", {"rope.scaling.factor": 4}, "rope.scaling.factor 4"),  # llama.cpp takes these two for linear scaling
        ("qwen2", {"rope.scale_linear": 4}, "rope.scale_linear 4"),
        ("qwen2", {"attention.sliding_window": 8}, "a sliding window of 8"),
        ("llama", {"rope.dimension_count": 4}, "all 8 values of a head must be rotated, got 4"),
    ],
)
def test_options_that_the_networks_lack_are_refused(architecture: str, fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(ggufs.write(tmp_path / "tiny.gguf", made(architecture), architecture=architecture, fields=fields))


def test_a_scaling_that_changes_nothing_is_read(tmp_path: Path) -> None:
    fields = {"rope.scaling.type": "none", "rope.scaling.factor": 4, "rope.scale_linear": 1}
    for number, said in enumerate((fields, {"rope.scaling.factor": 1})):
        file = ggufs.write(tmp_path / f"{number}.gguf", made("llama"), architecture="llama", fields=said)
        torch.testing.assert_close(logits(loading.load(file).network), logits(made("llama")), atol=1e-5, rtol=0)


def test_scaled_frequencies_are_refused_and_plain_ones_say_nothing(tmp_path: Path) -> None:
    for factor in (1.0, 8.0):
        extra = {"rope_freqs.weight": torch.tensor([1.0, 1.0, 1.0, factor])}
        file = ggufs.write(tmp_path / f"{factor}.gguf", made("llama"), architecture="llama", extra=extra)
        if factor == 1:
            torch.testing.assert_close(logits(loading.load(file).network), logits(made("llama")), atol=1e-5, rtol=0)
        else:
            assert "rotary frequencies must be plain" in refusal(file, early=False)


def test_another_network_under_the_name_of_dream_is_refused(tmp_path: Path) -> None:
    """llama.cpp writes Nemotron-Labs-Diffusion as `dream`; it has no biases."""
    without = tuple(f"blk.{block}.attn_{each}.bias" for block in range(2) for each in "qkv")
    file = ggufs.write(tmp_path / "tiny.gguf", made("dream"), architecture="dream", without=without)
    assert "must have biases of q, k and v" in refusal(file)


def test_an_unknown_architecture_is_refused_before_anything_is_converted(tmp_path: Path) -> None:
    file = ggufs.write(tmp_path / "tiny.gguf", made("llama"), architecture="llama")
    file.write_bytes(file.read_bytes().replace(b"llama", b"mamba"))
    assert "must be of llama, qwen2, llada, dream, got mamba" in refusal(file)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("keep", [3, 12, 200, -1])
def test_a_cut_file_is_refused(keep: int, tmp_path: Path) -> None:
    file = ggufs.write(tmp_path / "tiny.gguf", made("llama"), architecture="llama")
    file.write_bytes(file.read_bytes()[:keep] if keep > 0 else file.read_bytes()[:-200])
    assert "GGUF" in refusal(file)
