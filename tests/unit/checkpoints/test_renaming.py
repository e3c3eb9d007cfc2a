"""Plans: names, rows of a fused matrix, experts in either form, and what is missing or too much."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lib.checkpoints import renaming
from lib.checkpoints.families import FAMILIES
from lib.core.errors import InputError

CONFIG = SimpleNamespace(num_attention_heads=3, num_key_value_heads=1, head_dim=2, num_experts=2, num_local_experts=None)
FUSED = "model.layers.1.attention.query_key_value.weight"
EXPERTS = "model.layers.1.mlp.experts"


def stored(shape: tuple[int, ...], start: int = 0) -> Tensor:
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def joined(tensors: dict[str, Tensor], family: str = "llada2") -> dict[str, Tensor]:
    """Put all together, the shapes said beforehand being those that come out."""
    made = renaming.plan(tensors, FAMILIES[family], CONFIG, folder="there")
    result = {name: renaming.join(pieces, tensors.__getitem__) for name, pieces in made.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert {name: renaming.shape(pieces, shapes) for name, pieces in made.items()} == {
        name: tuple(tensor.shape) for name, tensor in result.items()
    }
    return result


def one_by_one() -> dict[str, Tensor]:
    """Two experts of width 3 over 4 features, in no order."""
    names = [f"{EXPERTS}.{expert}.{role}_proj.weight" for expert in (1, 0) for role in ("down", "up", "gate")]
    return {name: stored((4, 3) if "down" in name else (3, 4), 100 * place) for place, name in enumerate(names)}


def test_a_fused_projection_is_split_by_heads_into_memory_of_its_own() -> None:
    fused = stored((10, 4))
    made = joined({FUSED: fused})
    parts = [made[f"model.layers.1.self_attn.{role}_proj.weight"] for role in "qkv"]
    assert [len(part) for part in parts] == [6, 2, 2]
    assert torch.equal(torch.cat(parts), fused)
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 3


def test_names_of_llada2() -> None:
    names = {
        "model.word_embeddings.weight": "model.embed_tokens.weight",
        "model.layers.0.attention.dense.weight": "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.attention.query_layernorm.weight": "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.attention.key_layernorm.weight": "model.layers.0.self_attn.k_norm.weight",
        "model.layers.1.mlp.gate.expert_bias": "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.gate.weight": "model.layers.1.mlp.gate.weight",
        "model.layers.0.mlp.gate_proj.weight": "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight": "model.layers.1.mlp.shared_experts.up_proj.weight",
        "lm_head.weight": "lm_head.weight",
    }
    assert joined({old: stored((2,), place) for place, old in enumerate(names)}).keys() == set(names.values())


@pytest.mark.parametrize("family", ["llada2", "llada-moe", "sdar-moe", "rnd1", "qwen3_moe", "glm4_moe"])
def test_experts_are_stacked_gate_before_up(family: str) -> None:
    tensors = one_by_one()
    made = joined(tensors, family)
    assert made.keys() == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    for expert in range(2):
        gate, up, down = (tensors[f"{EXPERTS}.{expert}.{role}_proj.weight"] for role in ("gate", "up", "down"))
        assert torch.equal(made[f"{EXPERTS}.gate_up_proj"][expert], torch.cat([gate, up]))
        assert torch.equal(made[f"{EXPERTS}.down_proj"][expert], down)


@pytest.mark.parametrize("ending", ["", ".weight"])
def test_merged_experts_of_dfactory_are_the_same(ending: str) -> None:
    tensors = one_by_one()
    merged = {
        f"{EXPERTS}.{role}_proj{ending}": torch.stack([tensors[f"{EXPERTS}.{expert}.{role}_proj.weight"] for expert in range(2)])
        for role in ("up", "gate", "down")
    }
    expected, made = joined(tensors), joined(merged)
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)


def test_experts_as_the_network_has_them_stay() -> None:
    whole = joined(one_by_one())
    again = joined(whole, "glm4_moe")
    assert all(again[name] is whole[name] for name in whole)


@pytest.mark.parametrize(
    ("lost", "problem"),
    [
        (f"{EXPERTS}.1.up_proj.weight", "got no matrix of expert 1 in model.layers.1.mlp.experts.gate_up_proj"),
        (f"{EXPERTS}.0.down_proj.weight", "got no matrix of expert 0 in model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_an_incomplete_expert_is_refused(lost: str, problem: str) -> None:
    tensors = one_by_one()
    del tensors[lost]
    with pytest.raises(InputError, match=problem):
        joined(tensors)


def test_a_surplus_expert_is_refused() -> None:
    with pytest.raises(InputError, match="got a surplus matrix of expert 2"):
        joined({**one_by_one(), f"{EXPERTS}.2.down_proj.weight": stored((4, 3))})


def test_what_reads_images_is_left_out_of_llada_v_only() -> None:
    vision = ["model.vision_tower.a.weight", "model.mm_projector.0.bias", "model.image_newline"]
    tensors = {name: stored((2,)) for name in [*vision, "model.norm.weight"]}
    assert joined(tensors, "llada-v").keys() == {"model.norm.weight"}
    assert joined(tensors, "illada").keys() == tensors.keys()


def test_nemotrons_trunk_is_called_an_encoder() -> None:
    tensors = {
        name: stored((2,)) for name in ("encoder.norm.weight", "encoder.layers.0.mlp.up_proj.weight", "diffusion_head.weight")
    }
    expected = {"model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"}
    assert joined(tensors, "nemotron-labs-diffusion").keys() == expected
