"""What is refused, in one line that names what was found and a way that helps; the cheap check says it, too."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib.checkpoints import files, lookup, refusals
from lib.core import config, hub
from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.launch import batch
from lib.models import loading, streaming
from tests import tiny

BLOCK = "model.layers.0.self_attn.q_proj"


def refusal(path: object) -> str:
    """Return the message with which cheap check, loading and streaming refuse a source."""
    said = set()
    for look in (lambda text: lookup.check(ModelSource(text)), loading.load, streaming.load):
        with pytest.raises(InputError) as caught:
            look(str(path))
        said.add(str(caught.value))
    (message,) = said
    assert "\n" not in message and "download it again" not in message
    return message


def quantized(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    tiny.edit_weights(tiny.folder(folder), {f"{BLOCK}.weight": None, **{name: value.clone() for name, value in tensors.items()}})
    return tiny.edit_config(folder, **settings)


CODES, WORDS = torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 32, dtype=torch.int32)
KINDS: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "bitsandbytes": (
        {f"{BLOCK}.weight": CODES, f"{BLOCK}.weight.absmax": torch.zeros(8), f"{BLOCK}.weight.quant_map": torch.zeros(16)},
        {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
    ),
    "GPTQ": (
        {f"{BLOCK}.{part}": WORDS for part in ("qweight", "qzeros", "g_idx")} | {f"{BLOCK}.scales": torch.zeros(4, 32)},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ),
    "AWQ": (
        {f"{BLOCK}.{part}": WORDS for part in ("qweight", "qzeros")} | {f"{BLOCK}.scales": torch.zeros(4, 32)},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
    ),
    "MLX": (
        {f"{BLOCK}.weight": WORDS.to(torch.uint32), f"{BLOCK}.scales": torch.zeros(32, 1), f"{BLOCK}.biases": torch.zeros(32, 1)},
        {"quantization": {"group_size": 32, "bits": 4}, "quantization_config": {"group_size": 32, "bits": 4}},
    ),
    "fp8": (
        {f"{BLOCK}.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn), f"{BLOCK}.weight_scale_inv": torch.ones(1, 1)},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    ),
    "compressed-tensors": (
        {f"{BLOCK}.weight": torch.zeros(32, 32, dtype=torch.int8), f"{BLOCK}.weight_scale": torch.ones(32, 1)},
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}}},
    ),
    "hqq": (
        {f"{BLOCK}.W_q": CODES},
        {"quantization_config": {"quant_method": "hqq"}},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    tensors, settings = KINDS[kind]
    message = refusal(quantized(tmp_path / "x", tensors, **settings))
    assert f"got {kind} quantization" in message and "unquantized" in message


@pytest.mark.parametrize("kind", ["bitsandbytes", "GPTQ", "AWQ", "MLX", "fp8"])
def test_quantized_weights_are_known_without_their_settings(kind: str, tmp_path: Path) -> None:
    assert f"got {kind} quantization" in refusal(quantized(tmp_path / "x", KINDS[kind][0]))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "pytorch_model.bin.index.json"])
def test_pickles_alone_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x")
    (folder / "model.safetensors").rename(folder / name)
    message = refusal(folder)
    assert f"got {name} alone" in message and "pickle files are never read" in message and "save_pretrained(NEW)" in message


def test_loose_weights_and_none_are_refused(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "got model-00001-of-00002.safetensors without it" in refusal(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert "got none in" in refusal(folder)


# What cannot be read


def unreadable(monkeypatch: pytest.MonkeyPatch, function: str, where: Path) -> None:
    """Refuse a file as the system does without permission; tests may run as root, whom it never refuses."""
    real: Callable[..., Any] = getattr(os if function == "listdir" else Path, function)

    def guarded(path: Any, *arguments: Any, **options: Any) -> Any:
        if Path(path) == where:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os if function == "listdir" else Path, function, guarded)


@pytest.mark.parametrize(
    ("function", "name"), [("listdir", ""), ("read_bytes", "config.json"), ("open", "model.safetensors"), ("exists", "")]
)
def test_what_may_not_be_read_is_refused(function: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.folder(tmp_path / "x")
    unreadable(monkeypatch, function, folder / name)
    message = refusal(folder)
    assert "must be readable, got Permission denied: change its permissions" in message


def test_paths_that_cannot_be_are_refused(tmp_path: Path) -> None:
    assert "must be readable, got File name too long" in refusal(tmp_path / ("a" * 300))
    assert len(refusal("/" + "b" * 5000)) < 400
    assert "~ must stand for a home folder" in refusal("~nobody-of-that-name/model")


def test_folders_in_the_place_of_files_are_refused(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert "must be a file, got a folder of that name" in refusal(folder)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "z.gguf").mkdir()
    assert "must be a file, got a folder of that name" in refusal(tmp_path / "y")
    shutil.rmtree(folder / "model.safetensors")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "must be readable, got Is a directory" in refusal(folder)


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x")
    assert "must be a folder or a GGUF file" in refusal(folder / "model.safetensors")


def test_links_to_nothing_are_refused(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/abc")
    assert "got a link to nothing, ../../blobs/abc" in refusal(folder)
    shards = tiny.folder(tmp_path / "y", shard_size="10KB")
    shard = sorted(shards.glob("*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to("gone")
    assert "links to nothing" in refusal(shards)
    (tmp_path / "z").symlink_to("gone")
    assert "existing folder or a hub id" in refusal(tmp_path / "z")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 16000000000\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "x.gguf"])
def test_pointers_of_git_lfs_are_refused(name: str, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x")
    if name == "x.gguf":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(POINTER)
    message = refusal(folder)
    assert "a pointer of Git LFS" in message and "git lfs pull" in message


def test_an_index_names_files_beside_it(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "x", shard_size="10KB")
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"] = {name: f"../{file}" for name, file in raw["weight_map"].items()}
    index.write_text(json.dumps(raw))
    assert "must name files beside it" in refusal(folder)


def test_no_mask_token_is_refused(tmp_path: Path) -> None:
    folder = tiny.edit_config(tiny.folder(tmp_path / "x", causal=False), mask_token_id=None)
    with pytest.raises(InputError, match=r"must name its mask token, got none in .*: set mask_token_id in config\.json"):
        loading.load(folder)


# How much is read


def test_looking_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.folder(tmp_path / "x")
    with (folder / "model.safetensors").open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    asked: list[int] = []
    real = Path.open

    class Counting:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def read(self, size: int = -1) -> bytes:
            asked.append(size)
            return self.stream.read(size)

        def __enter__(self) -> "Counting":
            return self

        def __exit__(self, *_: object) -> None:
            self.stream.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    def spy(path: Path, *arguments: Any, **options: Any) -> Any:
        stream = real(path, *arguments, **options)
        return Counting(stream) if path.suffix in (".safetensors", ".gguf") else stream

    monkeypatch.setattr(Path, "open", spy)
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: real(path, "rb").read() if path.suffix == ".json" else pytest.fail("whole")
    )
    lookup.check(ModelSource(str(folder)))
    assert asked and min(asked) > 0 and sum(asked) <= 64 + header


# The hub: its configuration first


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that answers for a repository; only what is asked for by name is let through."""
    folder = tiny.folder(tmp_path / "repository")

    def fetch(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        assert name == "org/name"
        assert not [pattern for pattern in allow_patterns if "safetensors" in pattern and not pattern.endswith(".index.json")]
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(hub, "problem", lambda: "")
    return folder


def hub_refusal(monkeypatch: pytest.MonkeyPatch) -> str:
    """The launcher's check and loading say the same, before weights are asked for."""
    said = set()
    settings = config.load("quick", overrides={"models.mine.source": "org/name", "models.mine.revision": "abc"})
    for look in (lambda: batch._check_models({"mine": settings.models["mine"]}, {}), lambda: loading.load("org/name@abc")):
        with pytest.raises(InputError) as caught:
            look()
        said.add(str(caught.value))
    (message,) = said
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["bitsandbytes", "GPTQ", "AWQ", "MLX", "fp8", "hqq"])
def test_a_quantized_repository_is_refused_by_its_configuration(
    kind: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "model.safetensors").unlink()
    tiny.edit_config(repository, **KINDS[kind][1])
    message = hub_refusal(monkeypatch)
    assert f"got {kind} quantization in org/name@abc" in message


def test_an_index_of_plain_names_tells_a_left_over(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "model.safetensors").unlink()
    tiny.edit_config(repository, **KINDS["GPTQ"][1])
    index = repository / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"{BLOCK}.weight": "a.safetensors"}}))
    lookup.check(ModelSource("org/name", "abc"))
    index.write_text(json.dumps({"weight_map": {f"{BLOCK}.qweight": "a.safetensors"}}))
    assert "GPTQ" in hub_refusal(monkeypatch)


def test_an_unknown_family_and_no_configuration_are_refused_first(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.edit_config(repository, model_type="mamba")
    said = hub_refusal(monkeypatch)
    assert "model_type 'mamba'" in said and "org/name@abc" in said
    (repository / "config.json").unlink()
    assert "org/name must have config.json, got none" in hub_refusal(monkeypatch)


def test_another_adapter_is_refused_first(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "config.json").unlink()
    (repository / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    assert "must be a LoRA, got IA3 in org/name@abc" in hub_refusal(monkeypatch)


def test_no_message_sends_people_to_download_what_would_be_the_same() -> None:
    """A download helps where a file is cut; each place that says so looks at the bytes of a file."""
    rooms = [path for room in ("checkpoints", "models") for path in (config.ROOT / "lib" / room).glob("*.py")]
    saying = {path.name: path.read_text().count("download it again") for path in rooms}
    assert {name: count for name, count in saying.items() if count} == {"integrity.py": 1, "files.py": 2}


def test_sizes_of_kinds_are_what_safetensors_writes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.bool), "b": torch.zeros(2, dtype=torch.int64)}, tmp_path / "x.safetensors")
    entries = {name: entry["dtype"] for name, entry in files.check_safetensors(tmp_path / "x.safetensors").items()}
    assert refusals.stored(entries) is None
