"""The masks of block models against the recorded outputs of the families' own code."""

import pytest
import torch

from lib.attention import masses
from lib.models import language_model, visibility
from tests.parity.blockwise import BLOCKWISE, recorded

LOGITS_ATOL = 2e-5  # float32 sums in another order; logits reach 25, a trial gave at most 8e-6 (mixtures of experts)
MASS_ATOL = 2e-4  # sums of up to 48 x 8 x 3 float32 probabilities
CAUSAL_BY_BLOCK = [name for name in BLOCKWISE if name != "nemotron_labs_diffusion"]


@pytest.mark.parametrize("name", CAUSAL_BY_BLOCK)
@pytest.mark.parametrize("kind", ["clean", "masked"])
def test_a_block_model_computes_under_its_own_mask_without_being_told(name: str, kind: str) -> None:
    case = recorded(name)
    ids, expected = case.expected[f"forward.{kind}.input_ids"], case.expected[f"forward.{kind}.block_causal.logits"]
    hidden = language_model.network_body(case.model)(input_ids=ids, use_cache=False).last_hidden_state
    logits = case.model.network.get_output_embeddings()(hidden)
    torch.testing.assert_close(logits, expected, atol=LOGITS_ATOL, rtol=0)
    plain = case.model.network(input_ids=ids).logits  # what a caller that goes round the mask would get
    assert (plain - expected).abs().max() > 1


@pytest.mark.parametrize("name", CAUSAL_BY_BLOCK)
def test_masses_of_a_block_model_are_the_recorded_ones(name: str) -> None:
    case = recorded(name)
    mass = masses.sink_mass(case.model, case.expected["forward.masked.input_ids"], by_viewer=False)
    torch.testing.assert_close(
        mass.sum((0, 2)), case.expected["forward.masked.block_causal.attention_mass"], atol=MASS_ATOL, rtol=0
    )


@pytest.mark.parametrize("name", BLOCKWISE)
def test_the_two_copy_mask_is_the_recorded_one(name: str) -> None:
    case = recorded(name)
    if "forward.two_stream.mask" not in case.expected:
        pytest.skip("not recorded")
    blocks = visibility.block_numbers(48, block_length=case.settings["block_size"])
    mask = visibility.two_copies(blocks, causal_context=case.model.attention == "context-causal")
    assert torch.equal(mask[0, 0], case.expected["forward.two_stream.mask"].bool())


@pytest.mark.parametrize("name", ["sdar", "fast_dllm_v2", "llada2_moe"])
def test_the_noisy_copy_gives_the_recorded_logits(name: str) -> None:
    case = recorded(name)
    clean, noisy = case.expected["forward.clean.input_ids"], case.expected["forward.masked.input_ids"]
    mask = visibility.two_copies(visibility.block_numbers(48, block_length=case.settings["block_size"]))
    output = language_model.network_body(case.model)(
        input_ids=torch.cat([noisy, clean], 1),
        attention_mask=mask,
        position_ids=torch.arange(48).repeat(2)[None],
        use_cache=False,
    )
    logits = case.model.network.get_output_embeddings()(output.last_hidden_state[:, :48])
    torch.testing.assert_close(logits, case.expected["forward.two_stream.logits"], atol=LOGITS_ATOL, rtol=0)


def test_the_open_block_sees_itself_behind_a_causal_context() -> None:
    case = recorded("nemotron_labs_diffusion")
    ids = case.expected["forward.context_block.input_ids"]
    mask = visibility.open_block(torch.arange(40)[None] >= 32)
    hidden = language_model.network_body(case.model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = case.model.network.get_output_embeddings()(hidden[:, 32:])
    torch.testing.assert_close(logits, case.expected["forward.context_block.logits"], atol=LOGITS_ATOL, rtol=0)


@pytest.mark.parametrize("kind", ["clean"])
def test_a_context_without_masks_is_read_causally(kind: str) -> None:
    case = recorded("nemotron_labs_diffusion")
    hidden = language_model.network_body(case.model)(input_ids=case.expected[f"forward.{kind}.input_ids"]).last_hidden_state
    logits = case.model.network.get_output_embeddings()(hidden)
    expected = case.expected[f"forward.{kind}.causal.logits"]
    masked = (case.expected[f"forward.{kind}.input_ids"] == case.model.mask_token_id).any()
    assert not masked, "the recorded clean text happens to hold the mask's id"
    torch.testing.assert_close(logits, expected, atol=LOGITS_ATOL, rtol=0)
