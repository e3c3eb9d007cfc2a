"""A changed model in its family's own layout: the same names, shapes, dtypes and settings, other weights where it was changed."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from lib.checkpoints import lookup
from lib.checkpoints.facts import NoiseKind
from lib.checkpoints.files import weight_files
from lib.commands import session
from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.models import containers, export, loading, official, streaming
from lib.pruning import methods, pruner
from recipes import rehearsal_models
from tests import tiny

NAMES = ("llada", "dream", "mmada", "llama", "qwen2")


def tensors(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """Every stored tensor with its file, by the name it has there."""
    found = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as stored:
            found |= {key: (file.name, stored.get_tensor(key)) for key in stored.keys()}  # noqa: SIM118
    return found


def layout(folder: Path) -> dict[str, tuple[str, tuple[int, ...], torch.dtype]]:
    return {key: (file, tuple(value.shape), value.dtype) for key, (file, value) in tensors(folder).items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    for name in NAMES:
        rehearsal_models.write(folder / name, name, seed=0)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_has_names_shapes_files_and_dtypes_of_its_base(name: str, checkpoints: Path, tmp_path: Path) -> None:
    base = checkpoints / name
    model = loading.load(base)
    pruner.prune_(model, methods.METHODS["magnitude per row"], methods.Target(0.5))
    written = official.save_as_read(model, tmp_path / "pruned")
    assert layout(written) == layout(base)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, written))
    assert {key: after[key] for key in before} == before
    again = loading.load(written)
    assert (again.family, again.logit_shift, again.mask_token_id) == (model.family, model.logit_shift, model.mask_token_id)
    assert pruner.measured_sparsity(again) == pruner.measured_sparsity(model) > 0.49
    assert (again.tokenizer is None) == (model.tokenizer is None)
    ids = torch.arange(8)[None] + 5
    assert torch.equal(again.network(input_ids=ids).logits, model.network(input_ids=ids).logits)


def test_an_unchanged_model_is_written_bit_for_bit_in_the_dtype_of_its_files(tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base", causal=False, dtype=torch.bfloat16, shard_size="20KB")
    written = official.save_as_read(loading.load(base), tmp_path / "written")
    old, new = tensors(base), tensors(written)
    assert old.keys() == new.keys()
    for key in old:
        assert old[key][0] == new[key][0] and new[key][1].dtype == torch.bfloat16 and torch.equal(old[key][1], new[key][1])
    assert official.stored_dtypes(written) == (torch.bfloat16,)


def of_two_dtypes(family: str, folder: Path) -> Path:
    """Copy a checkpoint whose matrices are halved but for routers, heads and norms, which stay float32 and fill their digits."""
    copied = tiny.copied(tiny.PARITY / family, folder)
    wide = ("norm", ".gate.weight", "expert_bias", "head")
    stored = {key: value for key, (_, value) in tensors(copied).items()}
    halved = {key: value if any(part in key for part in wide) else value.bfloat16() for key, value in stored.items()}
    assert {value.dtype for value in halved.values()} == {torch.float32, torch.bfloat16}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in halved.values() if value.dtype == torch.float32)
    return tiny.edit_weights(tiny.edit_config(copied, torch_dtype="bfloat16"), halved)


@pytest.mark.parametrize("family", ["llada_tiny", "dream_tiny", "sdar", "llada_moe", "llada2_moe", "nemotron_labs_diffusion"])
def test_what_is_only_written_keeps_the_dtype_of_every_tensor(family: str, tmp_path: Path) -> None:
    base = of_two_dtypes(family, tmp_path / family)
    wide = loading.load(base)
    as_stored = official.load_as_stored(wide.source)
    assert official.stored_dtypes(base)[0] == torch.bfloat16 and torch.float32 in official.stored_dtypes(base)
    plain = export.save_plain(as_stored, tmp_path / "plain")
    written, exact = tensors(plain), export.state(wide)
    assert written.keys() == exact.keys()
    assert all(torch.equal(written[key][1].float(), value) for key, value in exact.items()), "nothing is rounded"
    narrow = {key for key, value in exact.items() if torch.equal(value, value.bfloat16().float())}
    assert {key for key, (_, value) in written.items() if value.dtype == torch.bfloat16} <= narrow
    sizes = [sum(value.nbytes for _, value in tensors(folder).values()) for folder in (base, plain)]
    assert sizes[0] == sizes[1], "nothing is widened"
    sparse = containers.save_sparse(as_stored, tmp_path / "sparse")
    again = export.save_plain(official.load_as_stored(ModelSource(str(sparse))), tmp_path / "again")
    for key, (_, value) in tensors(again).items():
        assert value.dtype == written[key][1].dtype and torch.equal(value, written[key][1]), key


@pytest.mark.parametrize(
    "family", ["fast_dllm_v2", "illada", "llada_moe", "llada2_moe", "llada_v", "nemotron_labs_diffusion", "sdar"]
)
def test_every_layout_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    """LLaDA 2 fuses its projections, Nemotron renames its head, LLaDA-V holds what reads images."""
    base = tiny.copied(tiny.PARITY / family, tmp_path / family)
    written = official.save_as_read(loading.load(base), tmp_path / "other name")
    old, new = tensors(base), tensors(written)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key][1], new[key][1]) for key in old)
    assert lookup.family_of(written) == lookup.family_of(base)


def test_code_is_carried_along_and_numbers_of_the_base_are_not(tmp_path: Path) -> None:
    base = tiny.copied(tiny.LLADA, tmp_path / "base")
    (base / "modeling_llada.py").write_text("raise SystemExit('nobody runs this')\n")
    (base / "LICENSE").write_text("MIT\n")
    (base / "evaluation.json").write_text("{}")
    (base / "README.md").write_text("of the base\n")
    written = official.save_as_read(loading.load(base), tmp_path / "written")
    assert sorted(path.name for path in written.iterdir()) == ["LICENSE", "config.json", "model.safetensors", "modeling_llada.py"]


def test_code_of_the_hub_is_named_by_its_place() -> None:
    assert official._placed("modeling_llada.LLaDAModelLM", "GSAI-ML/LLaDA") == "GSAI-ML/LLaDA--modeling_llada.LLaDAModelLM"
    assert official._placed("a/b--c.D", "other/place") == "a/b--c.D"
    assert official._placed(["t.Slow", None], "a/b") == ["a/b--t.Slow", None]


def test_a_copy_of_the_hubs_dream_finds_its_tokenizer_and_keeps_its_licence(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither card nor licence were fetched, and the tokenizer's code was named as if it lay beside its settings."""
    there = Path(shutil.copytree(checkpoints / "dream", tmp_path / "hub"))
    (there / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (there / "LICENSE").write_text("Apache License\n")
    (there / "tokenization_dream.py").write_text("raise SystemExit('nobody runs this')\n")
    tiny.edit_config(there, auto_map={"AutoModel": "modeling_dream.DreamModel"})
    said = json.loads((there / "tokenizer_config.json").read_text())
    own = {**said, "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
    (there / "tokenizer_config.json").write_text(json.dumps(own))

    def snapshot(_: str, *, allow_patterns: list[str], **__: object) -> str:
        shutil.rmtree(tmp_path / "snapshot", ignore_errors=True)
        wanted = filter_repo_objects([path.name for path in there.iterdir()], allow_patterns=allow_patterns)
        (tmp_path / "snapshot").mkdir()
        for name in wanted:
            shutil.copy(there / name, tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = loading.load("Dream-org/Dream@main")
    assert session.license_of(model) == "apache-2.0"
    written = official.save_as_read(model, tmp_path / "written")
    assert (written / "LICENSE").is_file() and not list(written.glob("*.py"))
    settings = json.loads((written / "tokenizer_config.json").read_text())
    assert settings["auto_map"] == {"AutoTokenizer": ["Dream-org/Dream--tokenization_dream.DreamTokenizer", None]}
    assert {**settings, "auto_map": None} == {**said, "auto_map": None}
    placed = {"AutoModel": "Dream-org/Dream--modeling_dream.DreamModel"}
    assert json.loads((written / "config.json").read_text())["auto_map"] == placed
    assert loading.load(written).family == "dream"


@pytest.mark.parametrize(("name", "origin"), [("llada", "llada"), ("dream", "dream")])
def test_a_plain_export_finds_its_way_back_to_the_own_layout(
    name: official.Layout, origin: str, checkpoints: Path, tmp_path: Path
) -> None:
    model = loading.load(checkpoints / origin, dtype=torch.bfloat16)
    plain = loading.load(export.save_plain(model, tmp_path / "plain"), dtype=torch.bfloat16)
    back = official.save_as(plain, tmp_path / "back", layout=name)
    strip = {key: value[1:] for key, value in layout(back).items()}
    assert strip == {key: value[1:] for key, value in layout(checkpoints / origin).items()}
    again = loading.load(back, dtype=torch.bfloat16)
    assert (again.family, again.logit_shift, again.mask_token_id) == (name, model.logit_shift, model.mask_token_id)
    ids = torch.arange(8)[None] + 5
    assert torch.equal(again.network(input_ids=ids).logits, model.network(input_ids=ids).logits)


def test_what_a_layout_cannot_express_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the layout of llada must hold a llama diffusion model with logit shift 0, got qwen2"):
        official.save_as(loading.load(checkpoints / "dream"), tmp_path / "x", layout="llada")
    with pytest.raises(InputError, match="must hold a llama diffusion model with logit shift 0, got llama, causal attention"):
        official.save_as(loading.load(checkpoints / "llama"), tmp_path / "x", layout="llada")
    for noise in (NoiseKind("uniform", 1.0), NoiseKind("mixed", 0.2)):  # LLaDA's and Dream's code would read masks
        for name in ("llada", "dream"):
            model = dataclasses.replace(loading.load(checkpoints / name), noise=noise)
            with pytest.raises(InputError, match=f"the layout of {name} must hold a model of masked noise, got {noise.kind}"):
                official.save_as(model, tmp_path / "x", layout=name)
    assert not (tmp_path / "x").exists()


def test_networks_that_a_layout_computes_otherwise_are_refused(tmp_path: Path) -> None:
    """LLaDA's settings would have said silu; Dream's code, and this project, would not have read the windows."""
    model = loading.load(tiny.folder(tmp_path / "gelu", causal=False, hidden_act="gelu"))
    with pytest.raises(InputError, match="the activation of llada must be silu, got gelu"):
        official.save_as(model, tmp_path / "x", layout="llada")
    windows = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
    folder = tiny.edit_config(tiny.folder(tmp_path / "windows", family="qwen2", causal=False, **windows), logit_shift=1)
    with pytest.raises(InputError, match="every layer of dream must see all positions, got sliding windows"):
        official.save_as(loading.load(folder), tmp_path / "x", layout="dream")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("name", "family", "shift"), [("llada", "llama", 0), ("dream", "qwen2", 1)])
def test_stop_tokens_stay_those_of_the_model(name: official.Layout, family: str, shift: int, tmp_path: Path) -> None:
    """A vocabulary that reaches the family's own stop token has another word there."""
    own = {"llada": 126081, "dream": 151643}[name]
    small: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": own + 2}
    base = tiny.folder(tmp_path / "base", family=family, causal=False, eos_token_id=7, **small)
    model = loading.load(tiny.edit_config(base, logit_shift=shift, seen_token_ids=[3]))
    again = loading.load(official.save_as(model, tmp_path / "out", layout=name))
    assert (again.stop_token_ids, again.seen_token_ids) == (model.stop_token_ids, model.seen_token_ids) == ((7,), (3,))


def test_settings_of_generation_go_along(tmp_path: Path) -> None:
    """transformers took one end token for two, and greedy text for drawn: `[2, 5]` stands in generation_config.json alone."""
    said = {"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": False, "transformers_version": "4.51.0"}
    base = tiny.folder(tmp_path / "base", eos_token_id=2)
    (base / "generation_config.json").write_text(json.dumps(said))
    model = loading.load(base)
    streamed = streaming.load(base)
    written = (
        export.save_plain(model, tmp_path / "plain"),
        containers.save_sparse(model, tmp_path / "sparse"),
        containers.unpack_sparse(tmp_path / "sparse", tmp_path / "unpacked"),
        streaming.save(streamed, tmp_path / "streamed"),
        official.save_as_read(model, tmp_path / "read"),
    )
    for folder in written:
        assert json.loads((folder / "generation_config.json").read_text()) == said, folder.name
        assert loading.load(folder).stop_token_ids == (2, 5)
    assert GenerationConfig.from_pretrained(written[0]).eos_token_id == [2, 5]
    (base / "generation_config.json").write_text(json.dumps({"_from_model_config": True, "eos_token_id": 2}))
    plain = export.save_plain(loading.load(base), tmp_path / "same")
    assert not (plain / "generation_config.json").exists(), "it says no more than config.json"


def test_a_model_of_other_shapes_is_refused_and_leaves_nothing(checkpoints: Path, tmp_path: Path) -> None:
    model = loading.load(checkpoints / "llada")
    layer = model.layers[-1].module
    layer.weight = torch.nn.Parameter(layer.weight[:, :-1], requires_grad=False)
    with pytest.raises(InputError, match="must have shape"):
        official.save_as_read(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_weights_that_were_not_changed_keep_what_was_stored(stored: torch.dtype, checkpoints: Path, tmp_path: Path) -> None:
    """The network computes in bfloat16, as on a GPU: only the pruned matrix may lose digits."""
    source = tmp_path / "stored"
    shutil.copytree(checkpoints / "llada", source)
    for file in weight_files(source):
        with safe_open(file, framework="pt") as read:
            own = {key: read.get_tensor(key).to(stored) * 1.001 for key in read.keys()}  # noqa: SIM118 (not iterable)
        save_file(own, file, metadata={"format": "pt"})
    model = loading.load(source, dtype=torch.bfloat16)
    layer = model.layers[0].module
    layer.weight[:, ::2] = 0.0
    before, after = tensors(source), tensors(official.save_as_read(model, tmp_path / "out"))
    changed = [key for key in before if not torch.equal(before[key][1], after[key][1])]
    assert len(changed) == 1, "one matrix was pruned"
    kept = after[changed[0]][1] != 0
    assert torch.equal(after[changed[0]][1][kept], before[changed[0]][1][kept]) and 0.4 < float(kept.float().mean()) < 0.6


def test_folders_of_templates_are_written_too(checkpoints: Path, tmp_path: Path) -> None:
    source = tmp_path / "templates"
    shutil.copytree(checkpoints / "llada", source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for write in (official.save_as_read, export.save_plain):
        written = write(loading.load(source), tmp_path / write.__name__)
        assert (written / "additional_chat_templates" / "tools.jinja").is_file() or write is export.save_plain
