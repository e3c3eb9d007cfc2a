"""Every recorded family against what its own code returned: logits, chosen experts, rotations and the view with two copies.

The checkpoints are tiny random ones in the families' own layouts; masks are given to the network as they were given to that code.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lib.attention import masses
from lib.checkpoints.families import FAMILIES
from lib.models import loading, streaming
from lib.models.language_model import LanguageModel
from tests import tiny

PARITY = Path(__file__).resolve().parent
ATOL = 1e-5  # float32 sums in another order; logits reach 25
# The same sums in other kernels: under a mask, over another shape, for experts, or where a family's code calls another attention.
# The recorded logits themselves are 1.5e-5 to 2.7e-5 from what float64 gives.
KERNEL_ATOL = 2e-5
MASS_ATOL = 1e-4  # sums of up to 48 x 8 x 3 probabilities
# Folder -> family, network, mask token, logit shift, attention, block length, where blocks begin, stop tokens.
KNOWN = {
    "dream_rope": ("dream", "Qwen2", 127, 1, "full", None, "prompt", (1,)),
    "fast_dllm_v2": ("fast-dllm-v2", "Qwen2", 127, 1, "block-causal", 32, "start", (1,)),
    "illada": ("illada", "Llama", 5, 0, "full", None, "prompt", (1,)),
    "llada2_moe": ("llada2", "Glm4Moe", 127, 0, "block-causal", 32, "start", (1,)),
    "llada_moe": ("llada-moe", "Qwen3Moe", 127, 0, "full", None, "prompt", (1,)),
    "llada_v": ("llada-v", "Llama", 127, 0, "full", None, "prompt", (1,)),
    "nemotron_labs_diffusion": ("nemotron-labs-diffusion", "Ministral3", 100, 0, "context-causal", 8, "prompt", (2,)),
    "sdar": ("sdar", "Qwen3", 127, 0, "block-causal", 4, "start", (1,)),
    "stable_diffcoder": ("stable-diffcoder", "Llama", 5, 0, "block-causal", 4, "start", (2,)),
}
MIXTURES = ("llada2_moe", "llada_moe")
DENSE = [name for name in KNOWN if name not in MIXTURES]


@pytest.fixture(scope="module", params=list(KNOWN))
def family(request: pytest.FixtureRequest) -> SimpleNamespace:
    return recorded(request.param)


def recorded(name: str) -> SimpleNamespace:
    """Load a checkpoint, what its family's code returned, and the settings of that."""
    folder = PARITY / name
    with safe_open(folder / "expected.safetensors", framework="pt") as file:
        settings = json.loads((file.metadata() or {})["settings"])
    expected = load_file(folder / "expected.safetensors")
    return SimpleNamespace(name=name, folder=folder, model=loading.load(folder), expected=expected, settings=settings)


def visible(kind: str, size: int, block: int) -> Tensor | None:
    """Who may look at whom; None where everybody may, as the network is called then."""
    position = torch.arange(size)
    query, key = position[:, None], position[None]
    return {"full": None, "causal": query >= key, "block_causal": query // block >= key // block}[kind]


def logits(model: LanguageModel, ids: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    given = None if mask is None else mask[None, None].expand(len(ids), 1, -1, -1)
    with torch.inference_mode():
        return model.network(input_ids=ids, attention_mask=given, use_cache=False, **options).logits


def tolerance(name: str, mask: str) -> float:
    return KERNEL_ATOL if mask != "full" or name in (*MIXTURES, "illada", "llada_v") else ATOL


def cases(family: SimpleNamespace) -> Iterator[tuple[str, str]]:
    """Which texts went in under which mask."""
    for key in family.expected:
        parts = key.split(".")
        if parts[0] == "forward" and parts[-1] == "logits" and len(parts) == 4:
            yield parts[1], parts[2]


def test_every_fact_is_that_of_the_release(family: SimpleNamespace) -> None:
    name, network, mask, shift, attention, length, origin, stops = KNOWN[family.name]
    model = family.model
    assert (model.family, type(model.network).__name__) == (name, f"{network}ForCausalLM")
    assert (model.mask_token_id, model.logit_shift, model.is_causal) == (mask, shift, False)
    assert (model.attention, model.block_length, model.block_origin) == (attention, length, origin)
    assert model.stop_token_ids == stops
    assert (model.describe()["family"], model.describe()["attention"]) == (name, attention)


def test_what_is_called_parity_tested_is_tested_here() -> None:
    tested = {name for name, *_ in KNOWN.values()} | {"llada", "llada2.1", "llama", "qwen2", "qwen3"}
    assert {name for name, record in FAMILIES.items() if record.state == "parity-tested"} == tested


def test_logits_equal_the_recorded_ones(family: SimpleNamespace) -> None:
    found = list(cases(family))
    assert {text for text, _ in found} == {"clean", "masked"}
    for text, mask in found:
        ids = family.expected[f"forward.{text}.input_ids"]
        got = logits(family.model, ids, visible(mask, ids.shape[1], family.settings.get("block_size", 1)))
        expected = family.expected[f"forward.{text}.{mask}.logits"]
        torch.testing.assert_close(got, expected, atol=tolerance(family.name, mask), rtol=0)


def test_the_recorded_masks_tell_networks_apart(family: SimpleNamespace) -> None:
    """A causal network, or one block length for another, would not give these logits."""
    text, mask = next(iter(cases(family)))
    ids, expected = family.expected[f"forward.{text}.input_ids"], family.expected[f"forward.{text}.{mask}.logits"]
    other = visible("causal" if mask != "causal" else "block_causal", ids.shape[1], 16)
    assert (logits(family.model, ids, other) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["sdar", "fast_dllm_v2"])
def test_the_view_with_two_copies_gives_the_noisy_half(name: str) -> None:
    family = recorded(name)
    masked, clean = (family.expected[f"forward.{text}.input_ids"] for text in ("masked", "clean"))
    places = torch.arange(masked.shape[1]).repeat(2)[None].expand(len(masked), -1)
    mask = family.expected["forward.two_stream.mask"].bool()
    got = logits(family.model, torch.cat([masked, clean], 1), mask, position_ids=places)[:, : masked.shape[1]]
    torch.testing.assert_close(got, family.expected["forward.two_stream.logits"], atol=KERNEL_ATOL, rtol=0)


def test_nemotrons_open_block_sees_its_context_and_itself() -> None:
    family = recorded("nemotron_labs_diffusion")
    ids, expected = family.expected["forward.context_block.input_ids"], family.expected["forward.context_block.logits"]
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    mask[32:, 32:] = True
    got = logits(family.model, ids, mask)[:, 32:]
    torch.testing.assert_close(got, expected, atol=KERNEL_ATOL, rtol=0)
    assert (logits(family.model, ids, visible("causal", 40, 8))[:, 32:] - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_choose_the_recorded_experts_with_their_weights(name: str) -> None:
    family, chosen = recorded(name), {}
    layers = cast(Any, family.model.network.get_decoder()).layers
    for number, layer in enumerate(layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(
                lambda _, given, number=number: chosen.update({number: (given[1].clone(), given[2].clone())})
            )
    for text, mask in cases(family):
        ids = family.expected[f"forward.{text}.input_ids"]
        logits(family.model, ids, visible(mask, ids.shape[1], family.settings.get("block_size", 1)))
        assert chosen
        for number, (experts, weights) in chosen.items():
            said = f"forward.{text}.{mask}.{{}}.layer{number}"
            expected = family.expected[said.format("experts")].flatten(0, 1).sort(-1)
            order = experts.sort(-1)
            assert torch.equal(order.values, expected.values)
            there = family.expected[said.format("expert_weights")].flatten(0, 1).gather(-1, expected.indices)
            torch.testing.assert_close(weights.gather(-1, order.indices), there, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["dream_rope", "nemotron_labs_diffusion"])
def test_rotations_are_scaled_as_the_familys_code_scales_them(name: str, tmp_path: Path) -> None:
    family = recorded(name)
    overrides = json.loads((family.folder / "rope_cases.json").read_text())
    assert {f"rope.{case}.logits" for case in overrides} <= family.expected.keys()
    ids = family.expected["forward.masked.input_ids"][:1]
    for case, changes in overrides.items():
        folder = tiny.edit_config(tiny.copied(family.folder, tmp_path / case), **changes)
        model = loading.load(folder)
        got, expected = logits(model, ids, None), family.expected[f"rope.{case}.logits"]
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0, msg=lambda said, case=case: f"{case}: {said}")
        saved = tmp_path / f"{case}-saved"
        model.network.save_pretrained(saved)
        assert torch.equal(logits(loading.load(saved), ids, None), got), case


@pytest.mark.parametrize(
    "name", [name for name in KNOWN if name not in ("fast_dllm_v2", "sdar", "stable_diffcoder", "llada2_moe")]
)
def test_masses_under_full_attention_equal_the_recorded_ones(name: str) -> None:
    family = recorded(name)
    ids = family.expected["forward.masked.input_ids"]
    everything = torch.ones((1, 1, ids.shape[1], ids.shape[1]), dtype=torch.bool)
    asked = {"attention_mask": everything, "by_viewer": False} if family.model.goes_by_blocks else {}
    mass = masses.sink_mass(family.model, ids, **asked).sum(dim=(0, 2))
    torch.testing.assert_close(mass, family.expected["forward.masked.full.attention_mass"], atol=MASS_ATOL, rtol=0)


@pytest.mark.parametrize("name", DENSE)
def test_a_streamed_model_is_the_whole_one(name: str) -> None:
    family = recorded(name)
    text, mask = next(iter(cases(family)))
    ids = family.expected[f"forward.{text}.input_ids"]
    streamed, seen = streaming.load(family.folder), visible(mask, ids.shape[1], family.settings.get("block_size", 1))
    assert torch.equal(logits(streamed, ids, seen), logits(family.model, ids, seen))
    assert [layer.name for layer in streamed.layers] == [layer.name for layer in family.model.layers]
