"""Experts as linear layers: equal to transformers' stacks and to the official code, and read back from every file."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lib.checkpoints.lookup import read_json
from lib.core.errors import InputError
from lib.models import export, spread, streaming
from lib.models.experts import Expert, ExpertList, as_linears_, experts_of, routing_of
from lib.models.language_model import LanguageModel, linear_layers
from tests import tiny

families = pytest.mark.parametrize("family", tiny.MIXTURES)
# Logits up to 25: on another CPU than the recording one, transformers' own stacks are 1.2e-5 away, the same network in float64
# 1.6e-5, so it is the order of float32 sums alone.
RECORDED = 1.7e-5


def logits(network: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        return network(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()


def expert_modules(model: LanguageModel) -> list[ExpertList]:
    return [module for module in model.network.modules() if isinstance(module, ExpertList)]


def recorded(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A recorded checkpoint in the class of transformers that computes it, by the renaming that families.md gives."""
    folder = tiny.PARITY / name
    raw, stored = read_json(folder / "config.json"), load_file(folder / "model.safetensors")
    alike = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok",
             "max_position_embeddings", "rms_norm_eps", "vocab_size", "tie_word_embeddings")  # fmt: skip
    shape: dict[str, Any] = {key: raw[key] for key in alike}
    shape["head_dim"] = raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    if name == "llada_moe":
        config: Any = Qwen3MoeConfig(
            **shape, num_experts=raw["num_experts"], moe_intermediate_size=raw["expert_intermediate_size"],
            intermediate_size=raw["dense_intermediate_size"], norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[],
            rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]},
        )  # fmt: skip
        network_class: Any = Qwen3MoeForCausalLM
    else:
        config = Glm4MoeConfig(
            **shape, n_routed_experts=raw["num_experts"], n_shared_experts=raw["num_shared_experts"], n_group=raw["n_group"],
            topk_group=raw["topk_group"], moe_intermediate_size=raw["moe_intermediate_size"],
            intermediate_size=raw["intermediate_size"], norm_topk_prob=True, routed_scaling_factor=raw["routed_scaling_factor"],
            first_k_dense_replace=raw["first_k_dense_replace"], use_qk_norm=True, attention_bias=False, num_mtp_layers=0,
            rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"], "partial_rotary_factor": 0.5},
        )  # fmt: skip
        network_class, stored = Glm4MoeForCausalLM, renamed(stored, raw)
    config.is_causal = False
    network = network_class.from_pretrained(None, config=config, state_dict=stored, attn_implementation="sdpa").eval()
    return network, load_file(folder / "expected.safetensors")


def renamed(stored: dict[str, Tensor], raw: dict[str, Any]) -> dict[str, Tensor]:
    """LLaDA 2's names in those of Glm4Moe."""
    words = {
        "model.word_embeddings": "model.embed_tokens", "attention.dense": "self_attn.o_proj",
        "attention.query_layernorm": "self_attn.q_norm", "attention.key_layernorm": "self_attn.k_norm",
        "gate.expert_bias": "gate.e_score_correction_bias",
    }  # fmt: skip
    heads, groups, width = raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"]
    found = {}
    for name, value in stored.items():
        for old, new in words.items():
            name = name.replace(old, new)
        if "query_key_value" not in name:
            found[name] = value
            continue
        for part, rows in zip("qkv", value.split([heads * width, groups * width, groups * width]), strict=True):
            found[name.replace("attention.query_key_value", f"self_attn.{part}_proj")] = rows
    return found


KINDS = {"llada_moe": "full", "llada2_moe": "block_causal"}


def mask_of(kind: str) -> Tensor | None:
    """The mask of a recorded pass: none, or blocks of eight that see themselves and earlier ones."""
    block = torch.arange(48) // 8
    return None if kind == "full" else (block[:, None] >= block[None])[None, None]


# What they compute


@families
def test_lists_compute_what_transformers_eager_stacks_compute(family: str) -> None:
    network = tiny.stacked(family)
    cast(Any, network).set_experts_implementation("eager")
    ids = tiny.ids(3, 20)
    wanted = logits(network, ids)
    largest = float(wanted.abs().max())
    found = logits(as_linears_(copy.deepcopy(network)), ids)
    torch.testing.assert_close(found, wanted, atol=1e-6 * largest, rtol=0)
    precise = cast(Any, network).double()
    with torch.inference_mode():
        wanted = precise(input_ids=ids).logits
        found = as_linears_(precise)(input_ids=ids).logits  # type: ignore[operator]
    torch.testing.assert_close(found, wanted, atol=1e-14 * largest, rtol=0)


@families
def test_an_expert_that_no_token_reaches_and_one_that_all_reach(family: str) -> None:
    network = tiny.stacked(family)
    stack = next(module for name, module in network.named_modules() if name.endswith("mlp.experts"))
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[1, 5], [5, 1], [5, 2], [6, 5], [5, 6], [5, 0], [4, 5]])  # 3 and 7 never, 5 always
    weights = torch.rand(7, 2, generator=torch.Generator().manual_seed(2))
    cast(Any, stack).config._experts_implementation = "eager"
    wanted = stack(hidden, index, weights)
    experts = expert_modules(tiny.of_network(network))[0]
    called: list[int] = []
    for number, expert in enumerate(experts):
        expert.register_forward_hook(lambda *_, number=number: called.append(number))
    found = experts(hidden, index, weights)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert called == [0, 1, 2, 4, 5, 6]


@pytest.mark.parametrize("name", ["llada_moe", "llada2_moe"])
@pytest.mark.parametrize("text", ["clean", "masked"])
def test_recorded_outputs_of_the_official_code(name: str, text: str) -> None:
    network, expected = recorded(name)
    as_linears_(network)
    ids, kind = expected[f"forward.{text}.input_ids"], KINDS[name]
    found = logits(network, ids, mask_of(kind))
    torch.testing.assert_close(found, expected[f"forward.{text}.{kind}.logits"], atol=RECORDED, rtol=0)


@pytest.mark.parametrize("name", ["llada_moe", "llada2_moe"])
def test_tokens_go_to_the_recorded_experts(name: str) -> None:
    network, expected = recorded(name)
    model = tiny.of_network(network)
    seen: list[Tensor] = []
    for experts in expert_modules(model):
        experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].sort(1).values))
    ids = expected["forward.masked.input_ids"]
    logits(model.network, ids, mask_of(KINDS[name]))
    keys = sorted(key for key in expected if key.startswith(f"forward.masked.{KINDS[name]}.experts.layer"))
    assert len(keys) == len(seen) == 2
    for key, found in zip(keys, seen, strict=True):
        assert torch.equal(found, expected[key].flatten(0, 1).long().sort(1).values)


def test_16_bit_outputs_are_summed_in_float32_and_rounded_once() -> None:
    """2^8 + 1 + 1 + ... : in bfloat16 each 1 is lost, and the sum stays at 256."""
    one = torch.eye(4, dtype=torch.bfloat16)
    experts = ExpertList([Expert(one, one, one, lambda values: torch.ones_like(values)) for _ in range(9)])
    hidden = torch.full((1, 4), 1.0, dtype=torch.bfloat16)
    weights = torch.tensor([[256.0] + [1.0] * 8], dtype=torch.bfloat16)
    assert experts(hidden, torch.arange(9)[None], weights).tolist() == [[264.0] * 4]


def test_float64_stays_float64() -> None:
    model = tiny.mixture("qwen3_moe")
    experts = expert_modules(model)[0].double()
    hidden = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    index, weights = torch.tensor([[0, 3]] * 5), torch.full((5, 2), 1 / 3, dtype=torch.float64)
    found = experts(hidden, index, weights)
    wanted = torch.stack([sum(experts[e](row[None])[0] / 3 for e in (0, 3)) for row in hidden])  # type: ignore[misc]
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=1e-12)


def test_routing_lists_tokens_by_expert_in_rising_order() -> None:
    found = routing_of(torch.tensor([[2, 0], [0, 2], [4, 0]]), experts=4)  # 4 is no expert of these
    assert found.counts == (3, 0, 2, 0)
    assert found.tokens.tolist() == [0, 1, 2, 0, 1]
    assert found.slots.tolist() == [1, 0, 1, 0, 1]
    assert [(expert, where.start, where.stop) for expert, where in found.parts()] == [(0, 0, 3), (2, 3, 5)]


# Views


@families
def test_matrices_are_views_and_changes_show_in_both(family: str) -> None:
    network = tiny.stacked(family)
    stacks = {name: value for name, value in network.named_parameters() if "experts." in name and value.dim() == 3}
    before = sum(value.numel() for value in network.parameters())
    model = tiny.of_network(network)
    assert stacks
    assert model.num_parameters == before
    for name, stack in stacks.items():
        block = int(name.split(".")[2])
        for layer in model.by_block[block]:
            if not isinstance(layer.expert, int):
                continue
            part = stack[layer.expert]
            rows = {"gate": slice(0, 16), "up": slice(16, 32), "down": slice(0, 32)}[layer.role]
            if (layer.role == "down") == name.endswith("down_proj"):
                assert layer.module.weight.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()
                layer.module.weight.data[3] = layer.expert + 0.5
                assert torch.equal(part[rows][3], torch.full_like(part[rows][3], layer.expert + 0.5))
                stack[layer.expert, rows.start + 4] = -1.0
                assert torch.equal(layer.module.weight[4], torch.full_like(layer.module.weight[4], -1.0))


def changed_alone(model: LanguageModel, ids: Tensor) -> None:
    """Every matrix of the table is what the network computes with: zeroing it in place moves the logits, if tokens reach it."""
    before = logits(model.network, ids)
    parameters = dict(model.network.named_parameters())
    for layer in model.layers:
        assert parameters[layer.name] is layer.module.weight
    down = [layer for layer in model.layers if layer.role == "down"]
    for layer in down:
        layer.module.weight.zero_()
    after = logits(model.network, ids)
    assert not torch.equal(before, after)
    for layer in down:  # and nothing else writes into the stream but attention
        assert not layer.module.weight.any()


@families
def test_copies_and_other_dtypes_keep_their_own_matrices(family: str) -> None:
    model, ids = tiny.mixture(family), tiny.ids(2, 12)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    twin = tiny.of_network(copy.deepcopy(model.network))
    assert torch.equal(logits(twin.network, ids), logits(model.network, ids))
    wide = tiny.of_network(cast(Any, copy.deepcopy(model.network)).to(torch.float64))
    assert {layer.module.weight.dtype for layer in wide.layers} == {torch.float64}
    torch.testing.assert_close(logits(wide.network, ids), logits(model.network, ids), atol=1e-5, rtol=1e-5)
    changed_alone(twin, ids)
    changed_alone(wide, ids)
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name])
    narrow = tiny.of_network(cast(Any, copy.deepcopy(model.network)).to(torch.bfloat16))
    assert logits(narrow.network, ids).isfinite().all()


@families
def test_a_spread_network_computes_with_the_matrices_of_its_table(family: str) -> None:
    model, ids = tiny.mixture(family), tiny.ids(2, 12)
    wanted = logits(model.network, ids)
    names = ["model.embed_tokens", *(f"model.layers.{block}" for block in range(3)), "model.norm", "model.rotary_emb", "lm_head"]
    spread.over_devices_(model.network, dict.fromkeys(names, "cpu"))
    assert torch.equal(logits(model.network, ids), wanted)
    changed_alone(tiny.of_network(model.network), ids)


def test_a_stack_that_is_not_gate_and_up_then_down_is_refused() -> None:
    for shapes in ({"gate_up_proj": (4, 16, 8), "down_proj": (4, 16, 8)}, {"weight": (4, 8, 8)}, {}):
        network = tiny.stacked("qwen3_moe")
        other = torch.nn.Module()
        for name, shape in shapes.items():
            other.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
        network.set_submodule("model.layers.2.mlp.experts", other)
        with pytest.raises(InputError, match=r"layers\.2\.mlp\.experts must stack gate and up rows"):
            as_linears_(network)


def test_a_stack_is_no_layer_table() -> None:
    with pytest.raises(InputError, match="call as_linears_ first"):
        linear_layers(tiny.stacked("qwen3_moe"))


# The table


@families
def test_the_table_lists_dense_blocks_experts_and_the_shared_one_and_no_router(family: str) -> None:
    model = tiny.mixture(family)
    dense_block = {"qwen3_moe": 1, "glm4_moe": 0}[family]
    attention = [(role, None) for role in "qkvo"]
    for block, layers in model.by_block.items():
        mlp: list[tuple[str, object]] = [(role, None) for role in ("gate", "up", "down")]
        if block != dense_block:
            places = [*range(8), *(["shared"] if family == "glm4_moe" else [])]
            mlp = [(role, expert) for expert in places for role in ("gate", "up", "down")]
        assert [(layer.role, layer.expert) for layer in layers] == [*attention, *mlp]
    named = {layer.name for layer in model.layers}
    others = [name for name, value in model.network.named_parameters() if name not in named and value.dim() == 2]
    routers = [f"model.layers.{block}.mlp.gate.weight" for block in range(3) if block != dense_block]
    assert sorted(others) == sorted(["lm_head.weight", "model.embed_tokens.weight", *routers])
    assert model.has_experts
    assert all(
        (experts_of(block) is None) == (number == dense_block)
        for number, block in enumerate(cast(Any, model.network.get_decoder()).layers)
    )


# Files


def changed(family: str) -> LanguageModel:
    """A model whose matrices differ from anything that a configuration could draw."""
    model = tiny.mixture(family)
    for number, layer in enumerate(model.layers):
        layer.module.weight.view(-1)[number % 7 :: 5] = 0.0
    return model


def written(model: LanguageModel, folder: Path, how: str) -> Path:
    if how == "save_pretrained":
        model.network.save_pretrained(folder)
    elif how == "plain":
        export.save_plain(model, folder)
    else:
        streaming.save(model, folder, max_shard_bytes={"stream": 2**29, "shards": 2**14}[how])
    return folder


@families
@pytest.mark.parametrize("how", ["save_pretrained", "plain", "stream", "shards"])
def test_every_writer_writes_what_transformers_alone_reads(family: str, how: str, tmp_path: Path) -> None:
    model, ids = changed(family), tiny.ids(2, 14)
    folder = written(model, tmp_path / "written", how)
    names = {name for path in folder.glob("*.safetensors") for name in safe_open(path, framework="pt").keys()}  # noqa: SIM118
    assert {layer.name for layer in model.layers} <= names
    assert not [name for name in names if name.endswith("gate_up_proj")]
    if family == "glm4_moe":
        assert "model.layers.2.mlp.gate.e_score_correction_bias" in names
    network = AutoModelForCausalLM.from_pretrained(folder)
    cast(Any, network).set_experts_implementation("eager")
    wanted = logits(model.network, ids)
    torch.testing.assert_close(logits(network, ids), wanted, atol=1e-6 * float(wanted.abs().max()), rtol=0)
    again = tiny.of_network(network.eval())
    assert torch.equal(logits(again.network, ids), logits(model.network, ids))
    for one, other in zip(again.layers, model.layers, strict=True):
        assert torch.equal(one.module.weight, other.module.weight)
    for name, value in model.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], value)
