"""Streamed models: equal to those in memory bit for bit, within their budget, and nothing written to them is lost."""

import copy
import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lib.attention import masses
from lib.calibration import sets
from lib.calibration.token_weights import Weighting
from lib.checkpoints import lookup
from lib.core.errors import InputError
from lib.diffusion import likelihood
from lib.models import export, loading, streaming, weight_store
from lib.models.language_model import LanguageModel
from lib.models.layers import attention
from lib.models.weight_store import StreamedLinear, WeightStore
from lib.pruning import pruner
from lib.pruning.methods import METHODS, RELEASE, Method, Target
from tests import ggufs, tiny
from tests.unit import slow_pruning as slow

HALF = Target(0.5)
METHODS_HERE = {
    **{name: METHODS[name] for name in ("random", "magnitude", "Wanda", "SparseGPT", "sink-aware (SparseGPT)")},
    "sink-aware (Wanda)": RELEASE["sink_wanda"],
    "by head": Method("wanda", weighting=Weighting("sinks_up", level="head")),
}
LAYOUTS = ("llada", "dream", "sharded bf16", "tied")


def checkpoint(layout: str, path: Path) -> tuple[Path, torch.dtype]:
    if layout == "sharded bf16":
        options = {"causal": False, "num_hidden_layers": 3}
        return tiny.folder(path / "sharded", shard_size="10KB", dtype=torch.bfloat16, **options), torch.bfloat16
    if layout == "tied":
        return tiny.folder(path / "tied", causal=False, tie=True), torch.float32
    return {"llada": tiny.LLADA, "dream": tiny.DREAM}[layout], torch.float32


@pytest.fixture(params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LanguageModel, LanguageModel]:
    """The same checkpoint in memory, and streamed with room for a single matrix."""
    folder, dtype = checkpoint(request.param, tmp_path)
    return loading.load(folder, dtype=dtype), streaming.load(folder, dtype=dtype, budget=0)


@pytest.fixture
def streamed(tmp_path: Path) -> LanguageModel:
    return streaming.load(tiny.LLADA, budget=0, scratch=tmp_path)


def store_of(model: LanguageModel) -> WeightStore:
    linear = model.layers[0].module
    assert isinstance(linear, StreamedLinear)
    return linear.store


def same_weights(first: LanguageModel, second: LanguageModel) -> bool:
    return slow.same_state(second, slow.state_of(first)) and set(slow.state_of(first)) == set(slow.state_of(second))


def logits(model: LanguageModel) -> Tensor:
    with torch.inference_mode():
        return model.network(input_ids=tiny.ids(2, 10)).logits


# --- equal to the model in memory ----------------------------------------------------------------------------------------


def test_a_streamed_model_is_the_one_in_memory(pair: tuple[LanguageModel, LanguageModel]) -> None:
    whole, streamed = pair
    assert streamed.describe() == whole.describe() and streamed.fingerprint == whole.fingerprint
    assert (streamed.mask_token_id, streamed.logit_shift, streamed.is_causal, streamed.device) == (
        whole.mask_token_id,
        whole.logit_shift,
        whole.is_causal,
        whole.device,
    )
    assert [(layer.block, layer.role, layer.name) for layer in streamed.layers] == [
        (layer.block, layer.role, layer.name) for layer in whole.layers
    ]
    shapes = [{name: (value.shape, value.dtype) for name, value in each.network.named_parameters()} for each in pair]
    assert shapes[0] == shapes[1]
    buffers = [dict(each.network.named_buffers()) for each in pair]
    assert buffers[0].keys() == buffers[1].keys()
    assert all(
        torch.equal(value, buffers[1][name]) and value.dtype == buffers[1][name].dtype for name, value in buffers[0].items()
    )
    assert not streamed.network.training and not any(value.requires_grad for value in streamed.network.parameters())
    settings = [{**each.network.config.to_dict(), "_name_or_path": ""} for each in pair]
    assert settings[0] == settings[1] and streamed.network.config._attn_implementation == attention.NAME
    assert same_weights(whole, streamed)


def test_what_is_computed_with_it_is_equal(pair: tuple[LanguageModel, LanguageModel]) -> None:
    ids = tiny.ids(3, 12)
    assert torch.equal(*map(logits, pair))
    assert torch.equal(*(masses.sink_mass(each, ids) for each in pair))
    windows = tiny.ids(2, 12, seed=1)
    first, second = (sets.build(each, windows, weighting=Weighting(), seed=0).token_weight for each in pair)
    assert first is not None and second is not None and torch.equal(first, second)
    assert torch.equal(*(likelihood.nelbo(each, windows, draws=2, seed=0).per_window for each in pair))


@pytest.mark.parametrize("name", METHODS_HERE)
def test_pruning_is_identical(pair: tuple[LanguageModel, LanguageModel], name: str) -> None:
    whole, streamed = pair
    for model in pair:
        pruner.prune_(model, METHODS_HERE[name], HALF, windows=tiny.ids(5, 20), seed=3)
    assert same_weights(whole, streamed)
    assert pruner.measured_sparsity(streamed) == pruner.measured_sparsity(whole) >= 0.5
    assert torch.equal(*map(logits, pair))


def test_another_dtype_than_the_files(tmp_path: Path) -> None:
    """Weights are rounded when they are read, and once only: a changed matrix is kept as it is."""
    for dtype in (torch.bfloat16, torch.float64):
        whole, streamed = loading.load(tiny.DREAM, dtype=dtype), streaming.load(tiny.DREAM, dtype=dtype, budget=0)
        assert same_weights(whole, streamed)
        for model in (whole, streamed):
            pruner.prune_(model, METHODS["SparseGPT"], HALF, windows=tiny.ids(5, 20))
        assert same_weights(whole, streamed)
        assert {value.dtype for value in streamed.network.state_dict().values()} == {dtype}


def test_a_lent_model_gets_its_weights_back(streamed: LanguageModel) -> None:
    before = slow.state_of(streamed)
    with pruner.restored(streamed) as model:
        pruner.prune_(model, METHODS["Wanda"], HALF, windows=tiny.ids(5, 20))
        assert not slow.same_state(model, before)
    assert slow.same_state(streamed, before)


def test_a_gguf_file_is_streamed_from_its_conversion(tmp_path: Path) -> None:
    ggufs.write(tmp_path / "model.gguf", tiny.network(), architecture="llama")
    loaded = streaming.load(tmp_path / "model.gguf")
    assert torch.equal(logits(loaded), logits(loading.load(tmp_path / "model.gguf")))
    assert loaded.fingerprint == lookup.fingerprint(tmp_path / "model.gguf")


# --- the budget ----------------------------------------------------------------------------------------------------------


def watched(store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes in memory after every use."""
    found, get = [], store.get

    def spy(name: str) -> Tensor:
        weight = get(name)
        found.append(sum(value.nbytes for value in store._resident.values()))
        assert found[-1] == store.resident_bytes
        return weight

    monkeypatch.setattr(store, "get", spy)
    return found


@pytest.mark.parametrize("matrices", [0, 1, 3, 5])
def test_no_more_than_the_budget_is_in_memory(matrices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 4 * 96 * 64
    model = streaming.load(tiny.LLADA, budget=matrices * largest)
    seen = watched(store_of(model), monkeypatch)
    pruner.prune_(model, METHODS["SparseGPT"], HALF, windows=tiny.ids(5, 20))
    logits(model)
    assert (matrices - 1) * largest < max(seen) <= max(largest, matrices * largest, 4 * 128 * 64)


def test_by_default_a_walk_reads_each_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = streaming.load(tiny.LLADA)
    store, block = store_of(model), 4 * (4 * 64 * 64 + 3 * 64 * 96)
    assert store.budget == block and store.resident_bytes == store.bytes_read == 0
    windows = sets.build(model, tiny.ids(9, 20), seed=0)
    pruner.check(model, HALF)
    before = store.bytes_read
    pruner.prune_on_(model, METHODS["Wanda"], HALF, windows, batch_size=2)  # 5 batches, twice
    assert store.bytes_read - before == 2 * 2 * block  # its own check, and the walk
    assert store.resident_bytes == block


def test_a_matrix_used_again_is_not_the_one_to_go() -> None:
    model = streaming.load(tiny.LLADA, budget=3 * 4 * 64 * 64)
    q, k, v, o = (layer.module for layer in model.layers[:4])
    kept = q.weight.data_ptr()
    for each in (k, v):
        each.weight.sum()
    assert q.weight.data_ptr() == kept
    o.weight.sum()  # k goes
    before = store_of(model).bytes_read
    assert q.weight.data_ptr() == kept and v.weight.sum() == v.weight.sum()
    assert store_of(model).bytes_read == before
    k.weight.sum()
    assert store_of(model).bytes_read == before + 4 * 64 * 64


# --- what is written stays -----------------------------------------------------------------------------------------------


def zero_in_place(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.zero_()


def zero_in_inference_mode(weight: torch.Tensor) -> None:
    with torch.inference_mode():
        weight.mul_(0)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": zero_in_place,
    "in inference mode": zero_in_inference_mode,
    "data": lambda weight: weight.data.zero_(),
    "detached": lambda weight: weight.detach().zero_(),
    "a view": lambda weight: [row.zero_() for row in weight.detach()],
    "copied": lambda weight: weight.detach().copy_(torch.zeros(weight.shape)),
}


@pytest.mark.parametrize("how", WRITES)
def test_every_kind_of_write_survives(streamed: LanguageModel, how: str) -> None:
    others = slow.state_of(streamed)
    layer = streamed.layers[4]
    for _ in range(2):  # the second time it comes from the scratch file
        before = store_of(streamed).bytes_read
        WRITES[how](layer.module.weight)
        logits(streamed)
        assert store_of(streamed).bytes_read > before
        assert layer.module.weight.count_nonzero() == 0
        with torch.no_grad():
            layer.module.weight.add_(1)
        logits(streamed)
        assert (layer.module.weight == 1).all()
    assert all(torch.equal(value, others[name]) for name, value in streamed.network.state_dict().items() if name != layer.name)


def test_a_first_read_in_inference_mode_counts_writes_too(streamed: LanguageModel) -> None:
    with torch.inference_mode():
        weight = streamed.layers[0].module.weight
    assert not weight.is_inference()
    del weight
    streamed.layers[0].module.weight.zero_()
    logits(streamed)
    assert streamed.layers[0].module.weight.count_nonzero() == 0


def test_a_tensor_that_is_held_stays_and_is_written_later(streamed: LanguageModel) -> None:
    held = streamed.layers[0].module.weight
    logits(streamed)
    assert streamed.layers[0].module.weight is held
    held.zero_()
    del held
    logits(streamed)
    assert streamed.layers[0].module.weight.count_nonzero() == 0


def test_the_checkpoint_is_not_touched_and_the_scratch_folder_goes(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.DREAM, tmp_path / "dream"))
    (tmp_path / "scratch").mkdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = streaming.load(folder, budget=0, scratch=tmp_path / "scratch")
    pruner.prune_(model, METHODS["magnitude"], HALF)
    logits(model)
    assert len(list((tmp_path / "scratch").glob("*/*.safetensors"))) == len(model.layers)
    del model
    gc.collect()
    assert not list((tmp_path / "scratch").iterdir())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- what is refused -----------------------------------------------------------------------------------------------------


def test_what_would_lose_a_write_or_double_the_model_is_refused(streamed: LanguageModel) -> None:
    linear = streamed.layers[0].module
    with pytest.raises(InputError, match=r"q_proj\.weight must be changed in place, got another tensor"):
        linear.weight = torch.nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(InputError, match="must be changed in place, got load_state_dict"):
        streamed.network.load_state_dict(slow.state_of(streamed))
    with pytest.raises(InputError, match="must not be copied"):
        copy.deepcopy(streamed.network)
    linear.note = "other attributes are free"  # type: ignore[assignment]


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(InputError, match="budget must be a number of bytes from 0, got -1"):
        streaming.load(tiny.LLADA, budget=-1)


def broken_llada(name: str, folder: Path) -> Path:
    path = Path(shutil.copytree(tiny.LLADA, folder / "llada"))
    block = "model.transformer.blocks.1"
    changes: dict[str, dict[str, Tensor | None]] = {
        "missing": {f"{block}.up_proj.weight": None},
        "unknown": {f"{block}.extra.weight": torch.zeros(2)},
        "bias": {f"{block}.q_proj.bias": torch.zeros(64)},
        "shape": {f"{block}.up_proj.weight": torch.zeros(64, 96)},
        "surplus": {"model.transformer.blocks.2.up_proj.weight": torch.zeros(96, 64)},
        "no norm": {"model.transformer.ln_f.weight": None},
    }
    return tiny.edit_weights(path, changes[name])


@pytest.mark.parametrize("name", ["missing", "unknown", "bias", "shape", "surplus", "no norm"])
def test_a_broken_checkpoint_is_refused_as_in_memory_before_a_weight_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = broken_llada(name, tmp_path)
    with pytest.raises(InputError) as expected:
        loading.load(folder)

    def no_reading(*_: object, **__: object) -> None:
        raise AssertionError("headers are enough")

    for module in (streaming, weight_store):
        monkeypatch.setattr(module, "read", no_reading)
    with pytest.raises(InputError) as got:
        streaming.load(folder)
    assert str(got.value) == str(expected.value)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder, dtype = checkpoint("sharded bf16", tmp_path)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match="every shard in"):
        streaming.load(folder, dtype=dtype)


# --- saving --------------------------------------------------------------------------------------------------------------

LOAD_ALONE = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
network = AutoModelForCausalLM.from_pretrained(sys.argv[1])
weights = {name: value.clone() for name, value in network.state_dict().items()}
save_file(weights, sys.argv[2])
print(json.dumps([type(network).__name__, "lib" in sys.modules, sorted(network.config.to_dict())]))
"""


def loaded_alone(folder: Path, output: Path) -> tuple[str, dict[str, Tensor]]:
    """Class and weights that a process without this project finds in a checkpoint."""
    command = [sys.executable, "-I", "-c", LOAD_ALONE, str(folder), str(output)]
    family, with_lib, _ = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert not with_lib
    return family, load_file(output)


@pytest.mark.parametrize(("layout", "family"), [("dream", "Qwen2ForCausalLM"), ("sharded bf16", "LlamaForCausalLM")])
def test_a_saved_model_loads_alone_with_its_weights(layout: str, family: str, tmp_path: Path) -> None:
    folder, dtype = checkpoint(layout, tmp_path)
    model = streaming.load(folder, dtype=dtype, budget=0)
    pruner.prune_(model, METHODS["Wanda"], HALF, windows=tiny.ids(5, 20))
    saved = streaming.save(model, tmp_path / "saved", max_shard_bytes=20_000)
    assert len(list(saved.glob("model-*-of-*.safetensors"))) > 2
    got, weights = loaded_alone(saved, tmp_path / "weights.safetensors")
    assert got == family
    expected = slow.state_of(model)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) and weights[name].dtype == dtype for name, value in expected.items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard", [20_000, 10**9])
def test_it_is_the_checkpoint_that_is_written_in_memory(layout: str, shard: int, tmp_path: Path) -> None:
    folder, dtype = checkpoint(layout, tmp_path)
    whole, streamed = loading.load(folder, dtype=dtype), streaming.load(folder, dtype=dtype, budget=0)
    plain = export.save_plain(whole, tmp_path / "plain")
    for number, model in enumerate((whole, streamed)):
        saved = streaming.save(model, tmp_path / f"saved-{number}", max_shard_bytes=shard)
        assert (saved / "config.json").read_bytes() == (plain / "config.json").read_bytes()
        files = lookup.weight_files(saved)
        found = {name: value for file in files for name, value in load_file(file).items()}
        expected = load_file(plain / "model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())
        again = loading.load(saved, dtype=dtype)
        assert torch.equal(logits(again), logits(model)) and again.describe()["kind"] == model.describe()["kind"]
        assert (again.mask_token_id, again.logit_shift) == (model.mask_token_id, model.logit_shift)
        assert len(files) == 1 or all(file.stat().st_size < shard + 2000 or tensors(file) == 1 for file in files)


def tensors(file: Path) -> int:
    with safe_open(file, framework="pt") as opened:
        return len(list(opened.keys()))


def test_one_shard_at_a_time_is_in_memory(streamed: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(values: dict[str, Tensor], *_: object, **__: object) -> None:
        sizes.append(sum(value.nbytes for value in values.values()))

    monkeypatch.setattr(streaming, "save_file", spy)
    streaming.save(streamed, tmp_path / "saved", max_shard_bytes=50_000)
    assert max(sizes) <= 50_000 and sum(sizes) == 4 * streamed.num_parameters


def test_a_saved_folder_is_new_and_a_shard_has_room(streamed: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_shard_bytes must be positive, got 0"):
        streaming.save(streamed, tmp_path / "saved", max_shard_bytes=0)
    streaming.save(streamed, tmp_path / "saved")
    with pytest.raises(InputError, match="new folder"):
        streaming.save(streamed, tmp_path / "saved")
