"""Which family a configuration is of: every collision of names, every refusal in one line, and what a mute folder may not be."""

from dataclasses import replace
from typing import Any

import pytest

from lib.checkpoints import families, recognition
from lib.checkpoints.families import DIFFUSION, ENCODERS, FAMILIES, PLAIN
from lib.core.errors import InputError


def named(architecture: str | None = None, model_type: str | None = None, **more: Any) -> dict[str, Any]:
    """A configuration with only what it says of itself, and what else is given."""
    said: dict[str, Any] = {"architectures": [architecture]} if architecture else {}
    return said | ({"model_type": model_type} if model_type else {}) | more


def refusal(raw: dict[str, Any], **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        recognition.recognise(raw, **options)
    message = str(caught.value)
    assert "\n" not in message and ", got" in message and ": " in message
    assert "download" not in message
    return message


@pytest.mark.parametrize(
    ("raw", "family"),
    [
        (named("LLaDAModelLM", "llada", d_model=8), "llada"),
        (named(None, "llada", d_model=8), "llada"),
        (named("LLaDAMoEModelLM", "llada", hidden_size=8, num_experts=4), "llada-moe"),
        (named(None, "llada", hidden_size=8, num_experts=4), "llada-moe"),
        (named("LlavaLLaDAModelLM", "llava_llada", hidden_size=8), "llada-v"),
        (named("LlavaLLaDAModelLM", "llada", hidden_size=8), "llada-v"),
        (named(None, "llada", hidden_size=8), "llada-v"),
        (named("LlavaLladaForMaskedDiffusion", "llava_llada", d_model=8), "llada"),
        (named("MMadaModelLM", "mmada", d_model=8), "mmada"),
        (named("MMadaModelLM", "llada", d_model=8), "mmada"),
        (named("ILLaDAForCausalLM", "anything"), "illada"),
        (named("DreamModel", "Dream"), "dream"),
        (named(None, "Dream"), "dream"),
        (named("LlamaForCausalLM", "llama"), "llama"),
        (named("StableDiffcoderForCausalLM", "llama"), "stable-diffcoder"),
        (named("A2DLlamaLMHeadModel", "a2d-llama"), "a2d-llama"),
        (named("LlamaForCausalLM", "a2d-llama"), "a2d-llama"),
        (named("A2DQwen2LMHeadModel", "a2d-qwen2"), "a2d-qwen2"),
        (named("A2DQwen3LMHeadModel", "a2d-qwen3"), "a2d-qwen3"),
        (named("SDARForCausalLM", "sdar"), "sdar"),
        (named("SDARMoeForCausalLM", "sdar_moe"), "sdar-moe"),
        (named("Fast_dLLM_QwenForCausalLM", "Fast_dLLM_Qwen"), "fast-dllm-v2"),
        (named("NemotronLabsDiffusionModel", "nemotron_labs_diffusion"), "nemotron-labs-diffusion"),
        (named("LLaDA2MoeModelLM", "llada2_moe"), "llada2"),
        (named("LLaDA2MoeModelLM", "llada2_moe_veomni"), "llada2"),
        (named("RND1LM", "rnd1"), "rnd1"),
        (named("Qwen2ForCausalLM", "qwen2"), "qwen2"),
        (named("Qwen3ForCausalLM", "qwen3"), "qwen3"),
        (named(None, "qwen3"), "qwen3"),
    ],
)
def test_names_that_two_families_share_are_told_apart(raw: dict[str, Any], family: str) -> None:
    assert recognition.recognise(raw).name == family


@pytest.mark.parametrize(
    ("name", "raw", "family", "length"),
    [
        ("LLaDA2.0-mini", named("LLaDA2MoeModelLM", "llada2_moe"), "llada2", 32),
        ("models--inclusionAI--LLaDA2.1-mini", named("LLaDA2MoeModelLM", "llada2_moe"), "llada2.1", 32),
        ("SDAR-4B-Chat", named("SDARForCausalLM", "sdar"), "sdar", 4),
        ("JetLM/SDAR-8B-Chat-b32", named("SDARForCausalLM", "sdar"), "sdar", 32),
        ("SDAR-1.7B-Chat-b8-Math", named("SDARForCausalLM", "sdar"), "sdar", 8),
        ("SDAR-8B-Chat-b32", named("SDARForCausalLM", "sdar", block_size=16), "sdar", 16),
        ("Fast_dLLM_v2_7B", named("Fast_dLLM_QwenForCausalLM", "Fast_dLLM_Qwen", bd_size=8, block_size=4), "fast-dllm-v2", 32),
        ("Qwen3-0.6B-diffusion-mdlm-v0.1", named("A2DQwen3LMHeadModel", "a2d-qwen3"), "a2d-qwen3", None),
        ("Qwen3-0.6B-diffusion-bd3lm-v0.1", named("A2DQwen3LMHeadModel", "a2d-qwen3", block_size=16), "a2d-qwen3", 16),
        ("fredzzp/open-dcoder-0.5B", named("Qwen2ForCausalLM", "qwen2"), "open-dcoder", None),
        ("diffusionfamily/diffullama", named("LlamaForCausalLM", "llama"), "diffullama", None),
        ("open-dcoder-0.5B", named("LlamaForCausalLM", "llama"), "llama", None),
    ],
)
def test_a_name_tells_what_the_configuration_does_not(name: str, raw: dict[str, Any], family: str, length: int | None) -> None:
    found = recognition.recognise(raw, name=name)
    assert (found.name, found.block_length) == (family, length)
    assert found.attention == ("block-causal" if length else FAMILIES[family].attention)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (named("BD3LM", "bd3lm"), "a BD3-LM, a DiT"),
        (named("MDLM", "mdlm"), "an MDLM, a DiT"),
        (named("DUO", "duo"), "a Duo model"),
        (named("GiddForDiffusionLM", "gidd"), "a GIDD model"),
        (named("WeDLMForCausalLM", "wedlm"), "a WeDLM"),
        (named("ArcLMForCausalLM", "arclm"), "an arcLM"),
        (named("A2DQwen3_5LMHeadModel", "a2d-qwen3", layer_types=["linear_attention", "full_attention"]), "linear attention"),
        (named("Lfm2BidirectionalModel", "lfm2"), "an LFM2, whose convolutions"),
        (named("SteerlingForCausalLM", "steerling"), "a Steerling"),
        (named("DiffusionGemmaForBlockDiffusion", "diffusion_gemma"), "a DiffusionGemma"),
        (named("DiffEncoderModel", "nemotron"), "a Nemotron-Diffusion-Research"),
        (named("LLaDA2MoeModelLM", "llada2_moe", block_routing=True), "LLaDA 2.2"),
        (named("LLaDA2MoeModelLM", "llada2_moe", delete_token_id=3), "LLaDA 2.2"),
    ],
)
def test_families_that_no_class_computes_are_refused_by_name(raw: dict[str, Any], what: str) -> None:
    assert what in refusal(raw)


def test_llada_22_is_known_by_its_name_alone() -> None:
    assert "LLaDA 2.2" in refusal(named("LLaDA2MoeModelLM", "llada2_moe"), name="LLaDA2.2-flash")


def test_a_bd3lm_of_dllm_must_say_its_blocks() -> None:
    raw = named("A2DQwen3LMHeadModel", "a2d-qwen3")
    assert "must say its block length" in refusal(raw, name="Qwen3-0.6B-diffusion-bd3lm-v0.1")


@pytest.mark.parametrize(("keys", "network"), [(["model.layers.0.self_attn.q_norm.weight"], "Qwen3"), ([], "Qwen2")])
def test_norms_of_queries_are_not_a_dream(keys: list[str], network: str) -> None:
    raw = named("DreamModel", "Dream")
    if network == "Qwen2":
        assert recognition.recognise(raw, keys=["model.layers.0.self_attn.q_proj.weight"]).name == "dream"
    else:
        assert "DreamReasoner" in refusal(raw, keys=keys)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        *((name, key, "odd") for name in ("llada", "mmada") for key in families.LLADA_OPTIONS),
        ("illada", "layer_norm_eps", 1e-5),
        ("llada-moe", "shared_expert_intermediate_size", 64),
        ("llada-moe", "moe_router_enable_expert_bias", True),
        ("llada-moe", "partial_rotary_factor", 0.5),
        ("llada-moe", "moe_layer_freq", [0, 1, 1]),
        ("llada-moe", "norm_topk_prob", True),
        ("llada2", "score_function", "softmax"),
        ("llada2", "moe_router_enable_expert_bias", False),
        ("dream", "use_sliding_window", True),
        ("fast-dllm-v2", "layer_types", ["full_attention", "sliding_attention"]),
        ("nemotron-labs-diffusion", "attention_bias", True),
    ],
)
def test_variants_that_the_class_cannot_express_are_refused(family: str, key: str, value: object) -> None:
    record = FAMILIES[family]
    raw = {**named(record.architectures[0]), **dict.fromkeys(record.fields, 4)}
    assert recognition.recognise(raw).name == family
    message = refusal({**raw, key: value})
    assert f"a checkpoint of {family} must have {key}" in message and "not supported" in message


@pytest.mark.parametrize("record", [each for each in DIFFUSION if each.architectures], ids=lambda each: each.name)
def test_scaled_rotations_are_applied_or_refused(record: families.Family) -> None:
    raw = {**named(record.architectures[0]), **dict.fromkeys(record.fields, 4)}
    for kind in ("linear", "dynamic", "llama3", "yarn", "longrope", "su"):
        for scaling in ({"rope_type": kind, "factor": 2.0}, {"type": kind, "factor": 2.0}):
            if kind in record.rope_types:
                recognition.recognise({**raw, "rope_scaling": scaling})
            else:
                assert f"got '{kind}'" in refusal({**raw, "rope_scaling": scaling})
    for absent in (None, {}, {"rope_type": "default"}):
        recognition.recognise({**raw, "rope_scaling": absent})


@pytest.mark.parametrize("kind", [each.name for each in PLAIN])
@pytest.mark.parametrize(
    ("sign", "options"),
    [
        ({"mask_token_id": 5}, {}),
        ({"logit_shift": 1}, {}),
        ({"attention_kind": "full"}, {}),
        ({"block_length": 4}, {}),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, {}),
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, {}),
        ({"architectures": ["SomethingForMaskedDiffusion"]}, {}),
        ({}, {"mask_token": "[MASK]"}),
    ],
)
def test_a_plain_folder_that_looks_like_a_diffusion_model_must_say(kind: str, sign: dict[str, Any], options: Any) -> None:
    """Each of these was read as an autoregressive model without a word."""
    raw = {**named(f"{FAMILIES[kind].network}ForCausalLM", kind), **sign}
    message = refusal(raw, **options)
    assert "must say whether it is one" in message and "is_causal" in message
    told = recognition.recognise({**raw, "is_causal": True}, **options)
    assert (told.name, told.attention) == (kind, "causal")
    told = recognition.recognise({**raw, "is_causal": False, "block_length": None, "attention_kind": None}, **options)
    assert (told.name, told.attention, told.network) == (kind, "full", FAMILIES[kind].network)


def test_what_is_no_sign() -> None:
    plain = named("LlamaForCausalLM", "llama", mask_token_id=None, auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    assert recognition.recognise(plain).attention == "causal"


@pytest.mark.parametrize("name", [each.name for each in DIFFUSION])
def test_a_saved_family_is_read_by_its_plain_class(name: str) -> None:
    record = FAMILIES[name]
    plain = next(each for each in PLAIN if each.network == record.network)
    saved = named(plain.architectures[0], plain.name, is_causal=False, family=name)
    found = recognition.recognise(saved)
    assert (found.name, found.layout, found.network, found.tokenizer) == (name, "plain", record.network, "auto")
    same = ["mask_token_id", "logit_shift", "attention", "block_length", "sampler"]
    same += ["block_origin"] if record.block_length else []
    assert [getattr(found, field) for field in same] == [getattr(record, field) for field in same]
    other = {"attention_kind": "block-causal", "block_length": 8, "block_origin": "start"}
    found = recognition.recognise({**saved, **other})
    assert (found.attention, found.block_length, found.block_origin) == ("block-causal", 8, "start")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"attention_kind": "sideways"}, "attention_kind must be one of"),
        ({"attention_kind": "block-causal"}, "must have a block length"),
        ({"attention_kind": "block-causal", "block_length": 0}, "positive whole number"),
        ({"attention_kind": "block-causal", "block_length": 4, "block_origin": "middle"}, "block_origin must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], rule: str) -> None:
    assert rule in refusal(named("LlamaForCausalLM", "llama", is_causal=False, **changes))


@pytest.mark.parametrize(
    ("kind", "windows"),
    [
        ("qwen2", {"use_sliding_window": True}),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("ministral3", {"sliding_window": 8}),
    ],
)
def test_windows_do_not_go_with_blocks(kind: str, windows: dict[str, Any]) -> None:
    """A ready mask took their place without a word."""
    plain = named(f"{FAMILIES[kind].network}ForCausalLM", kind, is_causal=False, **windows)
    assert recognition.recognise(plain).attention == "full"
    blocks = {"attention_kind": "block-causal", "block_length": 4}
    assert "this variant is not supported" in refusal({**plain, **blocks})
    none = {"use_sliding_window": False, "layer_types": ["full_attention"], "sliding_window": None}
    assert recognition.recognise({**plain, **blocks, **none}).attention == "block-causal"


@pytest.mark.parametrize(
    ("raw", "keys", "close"),
    [
        (named("LLaDA3ModelLM", "llada3"), [], "the closest is llada"),
        (named("SDARVLForCausalLM", "sdar_vl"), [], "the closest is sdar"),
        (named("MistralForCausalLM", "mistral"), [], "the closest is ministral3"),
        (named("FooForCausalLM", "foo"), ["model.transformer.blocks.0.q_proj.weight"], "named as llada's"),
        (named("FooForCausalLM", "foo"), ["model.layers.0.attention.query_key_value.weight"], "named as llada2's"),
        (named("FooForCausalLM", "foo"), ["model.layers.0.self_attn.q_norm.weight"], "named as qwen3's"),
        (named("FooForCausalLM", "foo"), ["model.layers.0.self_attn.q_proj.weight"], "named as llama's"),
        (named("FooForCausalLM", "foo"), [], "none is close"),
        ({}, [], "got architectures None and model_type None"),
    ],
)
def test_an_unknown_family_is_named_with_its_closest(raw: dict[str, Any], keys: list[str], close: str) -> None:
    assert close in refusal(raw, keys=keys)


def test_every_record_is_whole() -> None:
    for record in DIFFUSION:
        assert record.attention in ("full", "block-causal", "context-causal"), record.name
        assert (record.block_length is None) == (record.attention == "full")
        assert record.releases or record.name == "a2d-llama"
        assert record.sampler == families.sampler_of(record.name)
    assert families.sampler_of("nobody's") == families.SamplerDefaults()
    assert len(FAMILIES) == len(DIFFUSION) + len(PLAIN) + len(ENCODERS)
    two = replace(FAMILIES["llada2.1"], name="llada2", called="", sampler=FAMILIES["llada2"].sampler)
    assert replace(two, releases=FAMILIES["llada2"].releases) == FAMILIES["llada2"], "2.1 differs in its sampler only"
