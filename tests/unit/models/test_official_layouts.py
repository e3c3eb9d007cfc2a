"""Every released layout, on tiny checkpoints: what is loaded is what the files say, and every wrong thing gives one line."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM

from lib.attention.masses import sink_mass
from lib.checkpoints import integrity, lookup
from lib.core.errors import InputError
from lib.evaluation import standins, tasks
from lib.evaluation.scoring import EvaluationSettings
from lib.models import export, language_model, loading
from lib.models.language_model import LanguageModel
from lib.models.layers import attention
from lib.pruning import pruner
from lib.pruning.methods import METHODS, Target
from recipes import rehearsal, rehearsal_models, rehearsal_rows
from recipes.rehearsal_models import BLOCKS, EMBEDDING_ROWS, IMAGE_CODES
from recipes.rehearsal_tokenizers import TEXT_TOKENS
from tests import tiny
from tests.parity import slow

LLADA_LIKE = ("llada", "llada-1.5", "mmada")
DIFFUSION = (*LLADA_LIKE, "dream")
AUTOREGRESSIVE = ("llama", "qwen2")
# Network, mask token, logit shift, rows of the embedding; the position of the mask among the special tokens is the release's.
KNOWN = {
    "llada": (LlamaForCausalLM, "<|mdm_mask|>", 0, EMBEDDING_ROWS),
    "llada-1.5": (LlamaForCausalLM, "<|mdm_mask|>", 0, EMBEDDING_ROWS),
    "mmada": (LlamaForCausalLM, "<|mdm_mask|>", 0, EMBEDDING_ROWS + IMAGE_CODES),
    "dream": (Qwen2ForCausalLM, "<|mask|>", 1, EMBEDDING_ROWS),
    "llama": (LlamaForCausalLM, None, 1, EMBEDDING_ROWS),
    "qwen2": (Qwen2ForCausalLM, None, 1, EMBEDDING_ROWS),
}
FLOAT64_ATOL = 1e-9


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-ins, not to be changed."""
    return rehearsal.write(tmp_path_factory.mktemp("rehearsal") / "made") / "models"


@pytest.fixture
def copied(released: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies that a test may damage."""
    return lambda name: Path(shutil.copytree(released / name, tmp_path / name))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in folder.glob("model*.safetensors") for key, value in load_file(file).items()}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_shard(folder: Path, changes: dict[str, Tensor | None], *, number: int = -1) -> Path:
    """Add, replace or (None) remove tensors of one shard, wherever a changed one lies; the index stays as it was."""
    for index, file in enumerate(shards(folder)):
        there = load_file(file)
        is_chosen = index == number % len(shards(folder))
        mine = {key: value for key, value in changes.items() if key in there or (is_chosen and value is not None)}
        kept = {key: value for key, value in {**there, **mine}.items() if value is not None}
        save_file(kept, file, metadata={"format": "pt"})
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> Path:
    """Change the map of tensors to shards."""
    file = folder / integrity.INDEX
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))
    return folder


def logits(model: LanguageModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.network(input_ids=ids, use_cache=False).logits


def text_ids(*shape: int) -> Tensor:
    return tiny.ids(*shape, vocab=TEXT_TOKENS)


# What is loaded


@pytest.mark.parametrize("name", list(KNOWN))
def test_each_layout_loads_as_what_it_is(released: Path, name: str) -> None:
    family, mask, shift, rows = KNOWN[name]
    model = loading.load(released / name)
    assert type(model.network) is family
    assert (model.is_causal, model.logit_shift, model.name) == (mask is None, shift, name)
    raw = json.loads((released / name / "config.json").read_text())
    assert model.mask_token_id == raw.get("mask_token_id")
    if mask is not None:
        assert language_model.tokenizer_of(model).convert_tokens_to_ids(mask) == model.mask_token_id
    embedding: Any = model.network.get_input_embeddings()
    assert embedding.weight.shape[0] == rows > len(language_model.tokenizer_of(model))
    assert len(model.layers) == 7 * BLOCKS
    assert model.num_parameters == sum(value.numel() for value in tensors(released / name).values())


@pytest.mark.parametrize("name", DIFFUSION)
def test_logits_equal_a_slow_network_written_from_the_papers(released: Path, name: str) -> None:
    ids = text_ids(2, 12)
    ids[:, 5:8] = loading.load(released / name).mask_token_id or 0
    expected, _ = slow.forward(released / name, ids, torch.float64)
    got = logits(loading.load(released / name, dtype=torch.float64), ids)
    torch.testing.assert_close(got, expected, atol=FLOAT64_ATOL, rtol=0)
    torch.testing.assert_close(logits(loading.load(released / name), ids), expected.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_logits_equal_the_class_of_transformers(released: Path, name: str) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(released / name, dtype=torch.float32)
    model, ids = loading.load(released / name), text_ids(2, 12)
    with torch.inference_mode(), attention.without_products(model.network):
        torch.testing.assert_close(logits(model, ids), plain(input_ids=ids).logits, atol=1e-5, rtol=0)
    changed = ids.clone()
    changed[:, -1] = 0
    assert torch.equal(logits(model, changed)[:, :-1], logits(model, ids)[:, :-1])


def test_llama_keeps_the_scaling_of_its_rotations(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    before = logits(loading.load(folder), text_ids(1, 40))
    assert not torch.allclose(
        before, logits(loading.load(tiny.edit_config(folder, rope_scaling=None)), text_ids(1, 40)), atol=1e-3
    )


@pytest.mark.parametrize("name", DIFFUSION)
def test_predictions_are_far_from_uniform_and_look_both_ways(released: Path, name: str) -> None:
    model, ids = loading.load(released / name), text_ids(4, 16)
    predicted = logits(model, ids).log_softmax(-1)
    entropy = float(-(predicted.exp() * predicted).sum(-1).mean())
    assert entropy < 0.7 * math.log(predicted.shape[-1])
    changed = ids.clone()
    changed[:, -1] = 0
    assert not torch.allclose(logits(model, changed)[:, 0], logits(model, ids)[:, 0], atol=1e-3)
    mass = sink_mass(model, ids)
    assert mass.shape[0] == BLOCKS and float(mass.std(-1).mean()) > 0.2


def test_dreams_outputs_are_shifted_by_one(released: Path) -> None:
    model, ids = loading.load(released / "dream"), text_ids(2, 9)
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, [0, 4]] = True
    whole = logits(model, ids)
    torch.testing.assert_close(language_model.logits_at(model, ids, where), whole[:, [0, 3]].flatten(0, 1), atol=1e-5, rtol=0)
    plain = loading.load(released / "llada")
    whole = logits(plain, ids)
    torch.testing.assert_close(language_model.logits_at(plain, ids, where), whole[:, [0, 4]].flatten(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(KNOWN))
def test_biases_are_on_q_k_and_v_of_qwen2_only(released: Path, name: str) -> None:
    model, stored = loading.load(released / name), tensors(released / name)
    for layer in model.layers:
        has_bias = name in ("dream", "qwen2") and layer.role in ("q", "k", "v")
        assert (layer.module.bias is not None) is has_bias
        if has_bias:
            bias = stored[layer.name.removesuffix("weight") + "bias"].float()
            assert torch.equal(layer.module.bias, bias) and bias.abs().max() > 0.1


@pytest.mark.parametrize("name", list(KNOWN))
def test_bfloat16_goes_there_and_back(released: Path, name: str, tmp_path: Path) -> None:
    stored = tensors(released / name)
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    model = loading.load(released / name, dtype=torch.bfloat16)
    again = loading.load(export.save_plain(model, tmp_path / "plain"), dtype=torch.bfloat16)
    ids = text_ids(2, 8)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert again.network.state_dict().keys() == model.network.state_dict().keys()
    for key, value in model.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[key], value)
    assert sorted(value.float().sum() for value in stored.values()) == sorted(
        value.float().sum() for value in again.network.state_dict().values()
    )
    assert (again.is_causal, again.mask_token_id, again.logit_shift) == (model.is_causal, model.mask_token_id, model.logit_shift)


@pytest.mark.parametrize("name", list(KNOWN))
def test_there_are_several_shards_and_the_index_names_them(released: Path, name: str) -> None:
    index = json.loads((released / name / integrity.INDEX).read_text())
    assert len(shards(released / name)) > 2
    assert set(index["weight_map"].values()) == {file.name for file in shards(released / name)}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(released / name).values())
    integrity.check_index(released / name)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(("name", "key", "head"), [
    ("llada", "weight_tying", "model.transformer.ff_out.weight"),
    ("mmada", "weight_tying", "model.transformer.ff_out.weight"),
    ("dream", "tie_word_embeddings", "lm_head.weight"),
])  # fmt: skip
def test_a_tied_head_is_the_embedding(name: str, key: str, head: str, stored: bool, copied: Callable[[str], Path]) -> None:
    folder = copied(name)
    untied = logits(loading.load(folder, dtype=torch.float64), text_ids(1, 7))
    embedding = slow.NAMES[json.loads((folder / "config.json").read_text())["model_type"]]["embed"]
    edit_shard(folder, {head: tensors(folder)[str(embedding)].clone() if stored else None})
    model = loading.load(tiny.edit_config(folder, **{key: True}), dtype=torch.float64)
    assert model.network.get_parameter("lm_head.weight") is model.network.get_parameter("model.embed_tokens.weight")
    expected, _ = slow.forward(folder, text_ids(1, 7), torch.float64)
    torch.testing.assert_close(logits(model, text_ids(1, 7)), expected, atol=FLOAT64_ATOL, rtol=0)
    assert not torch.allclose(expected, untied, atol=1e-2)


# Tokenizers


@pytest.mark.parametrize("name", list(KNOWN))
def test_text_goes_through_the_tokenizer_and_back(released: Path, name: str) -> None:
    tokenizer = language_model.tokenizer_of(loading.load(released / name))
    text = "Question: What is 12 + 30?\nAnswer: It is 42.\n\n#### 42"
    ids: Any = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[0] == tokenizer.bos_token_id) is (name == "llama")  # no other release puts BOS before a text
    assert max(ids[1:]) < TEXT_TOKENS
    assert isinstance(tokenizer.decode([KNOWN[name][3] - 1]), str)  # a row of the embedding that is no token


def test_special_tokens_have_the_ids_of_the_release(released: Path) -> None:
    """Behind the text's, in the order of the released files; the mask is no mask to LLaDA's tokenizer."""
    llada = language_model.tokenizer_of(loading.load(released / "llada"))
    config = json.loads((released / "llada" / "config.json").read_text())
    assert (llada.bos_token_id, llada.eos_token_id) == (TEXT_TOKENS, TEXT_TOKENS + 1) == (TEXT_TOKENS, config["eos_token_id"])
    assert llada.mask_token_id is None and len(llada("<|mdm_mask|>")["input_ids"]) == 1
    assert llada.convert_tokens_to_ids("<|eot_id|>") == len(llada) - 1
    dream = language_model.tokenizer_of(loading.load(released / "dream"))
    config = json.loads((released / "dream" / "config.json").read_text())
    assert (dream.eos_token_id, dream.mask_token_id) == (config["eos_token_id"], config["mask_token_id"])
    assert (dream.bos_token, dream.bos_token_id) == ("<|beginoftext|>", config["mask_token_id"] - 1)


def test_chat_templates_are_those_of_the_evaluations(released: Path) -> None:
    """LLaDA-1.5 and MMaDA are asked through one; the base models are not."""
    asked = [{"role": "user", "content": " What is 2 + 2? "}]
    for name, gap in (("llada-1.5", "\n\n"), ("mmada", "\n")):
        tokenizer = language_model.tokenizer_of(loading.load(released / name))
        made: Any = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        head = "<|start_header_id|>{}<|end_header_id|>" + gap
        assert made == f"<|startoftext|>{head.format('user')}What is 2 + 2?<|eot_id|>{head.format('assistant')}"
        ids: Any = tokenizer(made, add_special_tokens=False)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids) == made
    for name in ("llada", "dream", "llama", "qwen2"):
        assert language_model.tokenizer_of(loading.load(released / name)).chat_template is None


# MMaDA's additions


def test_settings_of_mmada_that_no_network_has_are_ignored(released: Path, copied: Callable[[str], Path]) -> None:
    """A setting that would change the text trunk is checked by name; what is left describes images and changes nothing."""
    folder, own = copied("mmada"), rehearsal_models.checkpoints()
    extra = own["mmada"].config.keys() - own["llada-1.5"].config.keys()
    assert {"codebook_size", "num_vq_tokens", "new_vocab_size", "llm_vocab_size"} <= extra
    before = logits(loading.load(released / "mmada"), text_ids(1, 9))
    after = loading.load(tiny.edit_config(folder, **dict.fromkeys(extra)))
    assert torch.equal(logits(after, text_ids(1, 9)), before)
    after = loading.load(tiny.edit_config(folder, model_type="llada", architectures=["LLaDAModelLM"]))
    assert torch.equal(logits(after, text_ids(1, 9)), before)


@pytest.mark.parametrize("extra", ["model.vision_tower.proj.weight", "vq_model.quantize.weight", "model.transformer.mm.weight"])
def test_tensors_beside_the_text_trunk_are_refused_by_name(extra: str, copied: Callable[[str], Path]) -> None:
    folder = edit_shard(copied("mmada"), {extra: torch.zeros(2, 2)})
    with pytest.raises(InputError, match=f"must hold only known tensors, got '{extra}'"):
        loading.load(folder)


def test_an_embedding_of_another_size_than_the_vocabulary_is_refused(copied: Callable[[str], Path]) -> None:
    """As if MMaDA's image codes had been forgotten in config.json."""
    folder = tiny.edit_config(copied("mmada"), embedding_size=EMBEDDING_ROWS)
    rule = rf"model\.embed_tokens\.weight must have shape \({EMBEDDING_ROWS}, 32\).*got \({EMBEDDING_ROWS + IMAGE_CODES}, 32\)"
    with pytest.raises(InputError, match=rule):
        loading.load(folder)


# What is refused


def refusal(check: Callable[[], object]) -> str:
    """Return the one line with its three clauses."""
    with pytest.raises(InputError) as caught:
        check()
    message = str(caught.value)
    assert "\n" not in message and ", got" in message and ": " in message
    return message


@pytest.mark.parametrize(("name", "other"), [("llada", "dream"), ("dream", "llada"), ("llama", "mmada"), ("qwen2", "llama")])
def test_the_configuration_of_another_layout_is_refused(name: str, other: str, copied: Callable[[str], Path]) -> None:
    folder, foreign = copied(name), copied(other)
    shutil.copy(foreign / "config.json", folder / "config.json")
    message = refusal(lambda: loading.load(folder))
    rules = ("of another layout", "not a LLaDA text trunk", "mismatched files", "must name the same one")
    assert any(part in message for part in rules)


@pytest.mark.parametrize("name", list(KNOWN))
def test_a_missing_shard_is_refused_by_name_before_anything_is_read(name: str, copied: Callable[[str], Path]) -> None:
    folder = copied(name)
    lost = shards(folder)[1]
    lost.unlink()
    assert lost.name in refusal(lambda: lookup.check(loading.ModelSource(str(folder))))
    assert lost.name in refusal(lambda: loading.load(folder))


@pytest.mark.parametrize("name", list(KNOWN))
def test_a_tensor_of_another_shape_is_refused_by_name(name: str, copied: Callable[[str], Path]) -> None:
    folder = copied(name)
    key = next(key for key in sorted(tensors(folder)) if "up_proj" in key)
    edit_shard(folder, {key: tensors(folder)[key].T.contiguous()})
    message = refusal(lambda: loading.load(folder))
    assert "up_proj.weight must have shape (64, 32)" in message and "got (32, 64)" in message


@pytest.mark.parametrize("name", list(KNOWN))
def test_an_unknown_model_type_is_refused(name: str, copied: Callable[[str], Path]) -> None:
    folder = tiny.edit_config(copied(name), model_type="llada_3d", architectures=["LLaDA3DModelLM"])
    message = refusal(lambda: loading.load(folder))
    assert "got architectures 'LLaDA3DModelLM' and model_type 'llada_3d': the closest is llada" in message


@pytest.mark.parametrize("name", list(KNOWN))
def test_a_tensor_that_no_shard_holds_is_refused_by_name(name: str, copied: Callable[[str], Path]) -> None:
    folder = copied(name)
    key = next(key for key in sorted(tensors(folder)) if "up_proj" in key)
    edit_shard(folder, {key: None})
    assert f"got no {key} in model-0" in refusal(lambda: integrity.check_index(folder))
    assert "got no tensor model.layers.0.mlp.up_proj.weight" in refusal(lambda: loading.load(folder))


def test_a_shard_that_the_index_does_not_name_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("llada")
    shutil.copy(shards(folder)[0], folder / "model-00004-of-00004.safetensors")
    message = refusal(lambda: integrity.check_index(folder))
    assert "got model-00004-of-00004.safetensors beside them: delete what is left of another download" in message


def test_a_tensor_that_the_index_puts_elsewhere_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("dream")
    where = json.loads((folder / integrity.INDEX).read_text())["weight_map"]
    at_home, elsewhere = where["model.norm.weight"], where["model.embed_tokens.weight"]
    assert at_home != elsewhere
    edit_index(folder, lambda named: named.update({"model.norm.weight": elsewhere}))
    message = refusal(lambda: integrity.check_index(folder))
    assert f"got no model.norm.weight in {elsewhere}" in message or f"got model.norm.weight in {at_home}, too" in message


def test_a_tensor_in_two_shards_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("qwen2")
    at_home = json.loads((folder / integrity.INDEX).read_text())["weight_map"]["model.norm.weight"]
    other = next(number for number, file in enumerate(shards(folder)) if file.name != at_home)
    file = shards(folder)[other]
    save_file({**load_file(file), "model.norm.weight": torch.zeros(32)}, file)
    assert f"got model.norm.weight in {file.name}, too" in refusal(lambda: integrity.check_index(folder))


def test_a_tensor_that_the_index_forgets_is_refused(copied: Callable[[str], Path]) -> None:
    folder = edit_index(copied("llama"), lambda named: named.pop("model.norm.weight"))
    assert ".safetensors and not in the index" in refusal(lambda: integrity.check_index(folder))


def test_without_an_index_there_is_nothing_to_compare(released: Path, tmp_path: Path) -> None:
    integrity.check_index(tiny.folder(tmp_path / "single"))


# Hashes


def flip(file: Path) -> None:
    """Change one bit of the last weight: shape, size and header stay as they were."""
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(bytes(content))


def test_a_changed_weight_is_found_by_its_hash_alone(copied: Callable[[str], Path]) -> None:
    folder = copied("llada")
    assert integrity.check_hashes(folder) == 0  # nobody vouches for these files yet
    assert integrity.write_hashes(folder).name == "SHA256SUMS"
    assert integrity.check_hashes(folder) == 1 + len(shards(folder))
    flip(shards(folder)[1])
    integrity.check_index(folder)
    loading.load(folder)
    message = refusal(lambda: integrity.check_hashes(folder))
    assert f"{shards(folder)[1].name} must have SHA-256" in message and "download it again" in message


def test_the_hubs_cache_vouches_for_its_own_files(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """There a snapshot links to blobs that are named by their hash; small files are named by another one."""
    folder, blobs = copied("dream"), tmp_path / "blobs"
    blobs.mkdir()
    for file in shards(folder):
        blob = blobs / integrity.file_hash(file)
        file.rename(blob)
        file.symlink_to(blob)
    shutil.move(folder / "config.json", blobs / "0123456789abcdef0123456789abcdef01234567")
    (folder / "config.json").symlink_to(blobs / "0123456789abcdef0123456789abcdef01234567")
    assert integrity.check_hashes(folder) == len(shards(folder))
    flip(shards(folder)[0].resolve())
    assert shards(folder)[0].name in refusal(lambda: integrity.check_hashes(folder))


@pytest.mark.parametrize("line", ["not a hash  config.json", f"{'0' * 64}  nothing.safetensors", f"{'0' * 63}  config.json"])
def test_a_damaged_list_of_hashes_is_refused(line: str, copied: Callable[[str], Path]) -> None:
    folder = copied("llada")
    (folder / "SHA256SUMS").write_text(line + "\n")
    assert repr(line) in refusal(lambda: integrity.check_hashes(folder))


# One's own diffusion model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_bringing_your_own_diffusion_model(released: Path, tmp_path: Path, family: str) -> None:
    """A plain folder with three settings in config.json: is_causal, mask_token_id and, where it is 1, logit_shift."""
    folder = Path(shutil.copytree(released / family, tmp_path / "mine"))
    assert loading.load(folder).is_causal
    mask = len(language_model.tokenizer_of(loading.load(folder)))  # a row of the embedding that is no token yet
    model = loading.load(tiny.edit_config(folder, is_causal=False, mask_token_id=mask, logit_shift=1))
    assert (model.is_causal, model.mask_token_id, model.logit_shift) == (False, mask, 1)
    lookup.check_tokenizer(loading.ModelSource(str(folder)))
    pruner.prune_(model, METHODS["sink-aware (Wanda)"], Target(0.5), windows=text_ids(2, 16))
    assert pruner.measured_sparsity(model) == 0.5
    settings = EvaluationSettings(draws=2, gen_length=4, steps=4, block_length=4, cfg_scale=0.5)
    made = {name: standins.merged(name, rehearsal_rows.rows(name), family="llada") for name in ("piqa", "gsm8k")}
    results = tasks.evaluate(model, made, settings=settings, limit=3)
    assert [len(result.correct) for result in results.values()] == [3, 3]
    again = loading.load(export.save_plain(model, tmp_path / "pruned"))
    assert (again.is_causal, again.mask_token_id, again.logit_shift) == (False, mask, 1)
    assert torch.equal(logits(again, text_ids(1, 6)), logits(model, text_ids(1, 6)))
    assert refusal(lambda: loading.load(tiny.edit_config(folder, mask_token_id=None))).startswith(
        "a diffusion model must name its"
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(integrity, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "hashes"


def forbidden(file: Path) -> str:
    pytest.fail(f"{file} was read whole")


def test_what_has_not_changed_is_hashed_once(copied: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied("llada")
    integrity.check(folder)
    assert not cache.exists(), "nobody vouches for these files, so none was hashed"
    integrity.write_hashes(folder)
    integrity.check(folder)
    assert len(list(cache.iterdir())) == 1 + len(shards(folder))
    monkeypatch.setattr(integrity, "file_hash", forbidden)
    integrity.check(folder)
    link = folder.parent / "link"
    link.symlink_to(folder)
    integrity.check(link)
    with pytest.raises(pytest.fail.Exception):
        integrity.check_hashes(folder)


def test_a_changed_file_is_hashed_again(copied: Callable[[str], Path], cache: Path) -> None:
    folder = copied("llada")
    integrity.write_hashes(folder)
    integrity.check(folder)
    file = shards(folder)[1]
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert file.stat().st_size == before.st_size
    for _ in range(2):  # the wrong hash is remembered, too, and refused again
        assert f"{file.name} must have SHA-256" in refusal(lambda: integrity.check(folder))
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    integrity.check(folder)


def test_a_file_of_another_size_is_hashed_again(copied: Callable[[str], Path], cache: Path) -> None:
    folder = copied("llada")
    integrity.write_hashes(folder)
    integrity.check(folder)
    file = folder / "config.json"
    before = file.stat()
    file.write_text(file.read_text() + " ")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "config.json must have SHA-256" in refusal(lambda: integrity.check(folder))


def test_the_index_is_checked_first(copied: Callable[[str], Path], cache: Path) -> None:
    folder = copied("dream")
    integrity.write_hashes(folder)
    integrity.check(folder)
    edit_index(folder, lambda named: named.pop("model.norm.weight"))
    assert ".safetensors and not in the index" in refusal(lambda: integrity.check(folder))


FOREIGN = {"path": "/elsewhere", "size": 1, "mtime_ns": 1, "sha256": "0" * 64}


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps(FOREIGN)])
def test_foreign_records_of_hashes_are_ignored(content: str, copied: Callable[[str], Path], cache: Path) -> None:
    folder = copied("llada")
    integrity.write_hashes(folder)
    integrity.check(folder)
    for record in cache.iterdir():
        record.write_text(content)
    integrity.check(folder)
    assert all(len(json.loads(record.read_text())["sha256"]) == 64 for record in cache.iterdir())
    assert not any("0" * 64 in record.read_text() for record in cache.iterdir())
    for record in cache.iterdir():  # a record of this very file, but with something that is no hash
        record.write_text(json.dumps({**json.loads(record.read_text()), "sha256": "none"}))
    integrity.check(folder)


def test_a_cache_that_cannot_be_written_costs_time_only(copied: Callable[[str], Path], cache: Path) -> None:
    folder = copied("llada")
    integrity.write_hashes(folder)
    cache.parent.write_text("a file where the folder should be")
    integrity.check(folder)
    flip(shards(folder)[0])
    assert shards(folder)[0].name in refusal(lambda: integrity.check(folder))
