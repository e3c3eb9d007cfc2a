"""The registry of checkpoint families: one record says how a family is recognised, translated and decoded.

Adding a family is adding one record here and one recorded test. A record names its translation in `layouts` and its renaming in
`renaming`; most new families share one that is there. Facts are those of the families' own modelling code and samplers. A record
is `parity-tested` when recorded outputs of that code are compared in tests/parity, else `experimental`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

# Who may look at whom: everybody at everybody; at the own and earlier blocks; causally, but for the open block, which sees itself
# whole; at earlier positions only.
Attention = Literal["full", "block-causal", "context-causal", "causal"]
BlockOrigin = Literal["start", "prompt"]
# Which tokens a step commits: its quota of the most confident, or of those of lowest entropy; all above the threshold if they are
# the quota at least, else the quota's best; all above, or all at or above it, and always the best.
Rule = Literal["quota", "entropy", "threshold or quota", "above or best", "at least or best"]
Network = Literal["Llama", "Qwen2", "Qwen3", "Ministral3", "Qwen3Moe", "Glm4Moe", "DistilBert"]
Layout = Literal["plain", "encoder", "llada", "dream", "llava", "copy", "nemotron", "llada-moe", "llada2", "qwen3-moe"]
Tokenizer = Literal["auto", "qwen2"]
SAME_EVERYWHERE = ("default", "linear", "dynamic", "llama3")  # rotations that every version of transformers reads alike


@dataclass(frozen=True)
class SamplerDefaults:
    """How a family's own sampler decodes unless it is told otherwise.

    Attributes:
        rule: which tokens a step commits.
        block_length: positions decoded together; None for the whole answer.
        steps: steps of a block, which set the quota; None for one token a step.
        threshold: of the probability of a token.
        edit_threshold: of the probability of another token in the place of one that is written; None for no edits.
        max_post_steps: steps that may edit a block after its last mask.
        sub_block_length: parts of a block that are decoded from left to right.
        seeded: whether the first token of a block comes from the output before the block.
        cut_last: whether the last block ends with the text; else it is written as a whole, and cut afterwards.
        temperature: 0 for the most probable token.
        top_p: share of the probability that is drawn from.
    """

    rule: Rule = "quota"
    block_length: int | None = None
    steps: int | None = None
    threshold: float | None = None
    edit_threshold: float | None = None
    max_post_steps: int = 16
    sub_block_length: int | None = None
    seeded: bool = False
    cut_last: bool = False
    temperature: float = 0.0
    top_p: float | None = None


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
        name: in `LanguageModel.family`.
        network: class of transformers without `ForCausalLM`, or an encoder's without `ForMaskedLM`.
        layout: name of the translation and of the renaming.
        architectures: what `architectures[0]` says.
        model_types: what `model_type` says; may be another family's too.
        fields: settings that tell this family from others of the same `model_type`.
        called: pattern of the checkpoint's name, where nothing else tells this family from another.
        releases: checkpoints of the family, for people.
        mask_token_id: known from the family's code, where neither configuration nor tokenizer say it.
        logit_shift: 1 when the output at position i - 1 predicts position i.
        attention: which keys a query may see.
        block_length: where attention goes by blocks.
        block_field: setting that changes it.
        block_origin: where blocks are counted from.
        stop_token_ids: known from the family's code; the configuration's and the tokenizer's are added.
        tokenizer: class that reads it where there is no `tokenizer.json`; `"auto"` is what the folder says, see `tokenizers`.
        sampler: the family's own.
        options: settings and the values that the network can express; a missing one is the first. Each item of a list is checked.
        rope_types: kinds of `rope_scaling` that are applied as the family's code does.
        state: whether recorded outputs of the family's code are compared.
    """

    name: str
    network: Network
    layout: Layout
    architectures: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    called: str = ""
    releases: tuple[str, ...] = ()
    mask_token_id: int | None = None
    logit_shift: int = 0
    attention: Attention = "full"
    block_length: int | None = None
    block_field: str = ""
    block_origin: BlockOrigin = "prompt"
    stop_token_ids: tuple[int, ...] = ()
    tokenizer: Tokenizer = "auto"
    sampler: SamplerDefaults = SamplerDefaults()
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default",)
    state: Literal["parity-tested", "experimental"] = "experimental"


LLADA_OPTIONS: dict[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "activation_type": ("silu", "swiglu"),
    "block_type": ("llama",),
}
NO_WINDOW = {"use_sliding_window": (False, None), "layer_types": ("full_attention", None)}
LLADA_MOE_OPTIONS: dict[str, tuple[Any, ...]] = {
    "shared_expert_intermediate_size": (None, 0),
    "moe_router_enable_expert_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "moe_layer_freq": (1, None),
    "norm_topk_prob": (None, False),
    "routed_scaling_factor": (1, None),
    "moe_router_score_function": ("softmax", None),
    "qk_layernorm": (True,),
    "clip_qkv": (None,),
    "router_num_group": (None, 1),
}
LLADA2_OPTIONS: dict[str, tuple[Any, ...]] = {
    "score_function": ("sigmoid",),
    "use_bias": (False, None),
    "use_qkv_bias": (False, None),
    "moe_router_enable_expert_bias": (True,),
}
LLADA_SAMPLER = SamplerDefaults(block_length=32)
SDAR_SAMPLER = SamplerDefaults("threshold or quota", block_length=4, steps=4, threshold=0.85, temperature=1.0)
LLADA2_SAMPLER = SamplerDefaults("threshold or quota", block_length=32, threshold=0.95)
LLADA21_SAMPLER = replace(LLADA2_SAMPLER, threshold=0.7, edit_threshold=0.5, max_post_steps=16)
QWEN_ENDS = (151645, 151643)

DLLM: tuple[tuple[str, Network, Tokenizer, tuple[str, ...]], ...] = (
    ("llama", "Llama", "auto", ()),
    ("qwen2", "Qwen2", "qwen2", ("Qwen2.5-Coder-0.5B-diffusion-mdlm",)),
    ("qwen3", "Qwen3", "qwen2", ("Qwen3-0.6B-diffusion-mdlm", "Qwen3-0.6B-diffusion-bd3lm")),
)
PLAIN_NETWORKS: dict[str, Network] = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "ministral3": "Ministral3",
    "qwen3_moe": "Qwen3Moe",
    "glm4_moe": "Glm4Moe",
}

DIFFUSION = (
    Family(
        "llada", "Llama", "llada", ("LLaDAModelLM",), ("llada", "llava_llada"), fields=("d_model",),
        releases=("LLaDA-8B", "LLaDA-1.5", "UltraLLaDA"), mask_token_id=126336, stop_token_ids=(126081,),
        sampler=LLADA_SAMPLER, options=LLADA_OPTIONS, state="parity-tested",
    ),
    Family(
        "mmada", "Llama", "llada", ("MMadaModelLM",), ("mmada",), releases=("MMaDA-8B",), mask_token_id=126336,
        stop_token_ids=(126081,), sampler=LLADA_SAMPLER, options=LLADA_OPTIONS,
    ),
    Family(
        "llada-v", "Llama", "llava", ("LlavaLLaDAModelLM",), ("llava_llada", "llada"), fields=("hidden_size",),
        releases=("LLaDA-V",), mask_token_id=126336, stop_token_ids=(126081,), sampler=LLADA_SAMPLER, state="parity-tested",
    ),
    Family(
        "illada", "Llama", "copy", ("ILLaDAForCausalLM",), ("illada",), releases=("iLLaDA-8B",), mask_token_id=5,
        sampler=LLADA_SAMPLER, options={"layer_norm_eps": (None,)}, state="parity-tested",
    ),
    Family(
        "dream", "Qwen2", "dream", ("DreamModel",), ("Dream",), releases=("Dream-7B", "Dream-Coder-7B", "DiffuCoder-7B"),
        mask_token_id=151666, logit_shift=1, stop_token_ids=(151643,), tokenizer="qwen2", sampler=SamplerDefaults("entropy"),
        options={**NO_WINDOW, "original_max_position_embeddings": (None,)}, state="parity-tested",
        rope_types=(*SAME_EVERYWHERE, "yarn", "longrope"),
    ),
    Family(
        "open-dcoder", "Qwen2", "copy", called="open-?dcoder", releases=("Open-dCoder-0.5B",), logit_shift=1, tokenizer="qwen2",
        sampler=SamplerDefaults("quota"), options=NO_WINDOW, rope_types=SAME_EVERYWHERE,
    ),
    Family(
        "diffullama", "Llama", "copy", called="diffullama", releases=("DiffuLLaMA-7B",), logit_shift=1,
        rope_types=SAME_EVERYWHERE,
    ),
    *(
        Family(
            f"a2d-{kind}", network, "copy", (f"A2D{network}LMHeadModel",), (f"a2d-{kind}",), releases=releases,
            block_field="block_size", block_origin="start", tokenizer=tokenizer, sampler=LLADA_SAMPLER, options=NO_WINDOW,
            rope_types=SAME_EVERYWHERE,
        )
        for kind, network, tokenizer, releases in DLLM
    ),
    Family(
        "sdar", "Qwen3", "copy", ("SDARForCausalLM",), ("sdar",), releases=("SDAR", "TraDo", "DiRL"), mask_token_id=151669,
        attention="block-causal", block_length=4, block_field="block_size", block_origin="start", stop_token_ids=QWEN_ENDS,
        tokenizer="qwen2", sampler=SDAR_SAMPLER, options=NO_WINDOW, rope_types=SAME_EVERYWHERE, state="parity-tested",
    ),
    Family(
        "sdar-moe", "Qwen3Moe", "qwen3-moe", ("SDARMoeForCausalLM",), ("sdar_moe",), releases=("SDAR-30B-A3B",),
        mask_token_id=151669, attention="block-causal", block_length=4, block_field="block_size", block_origin="start",
        stop_token_ids=QWEN_ENDS, tokenizer="qwen2", sampler=SDAR_SAMPLER, options=NO_WINDOW, rope_types=SAME_EVERYWHERE,
    ),
    # Its code builds masks with the argument block_size, 32 by default, and never reads its own setting bd_size.
    Family(
        "fast-dllm-v2", "Qwen2", "copy", ("Fast_dLLM_QwenForCausalLM",), ("Fast_dLLM_Qwen",), releases=("Fast_dLLM_v2",),
        mask_token_id=151665, logit_shift=1, attention="block-causal", block_length=32, block_origin="start",
        stop_token_ids=(151645,), tokenizer="qwen2", options=NO_WINDOW, rope_types=SAME_EVERYWHERE, state="parity-tested",
        sampler=SamplerDefaults("above or best", block_length=32, threshold=0.95, sub_block_length=8, seeded=True, top_p=0.95),
    ),
    Family(
        "stable-diffcoder", "Llama", "copy", ("StableDiffcoderForCausalLM",), releases=("Stable-DiffCoder-8B",), mask_token_id=5,
        attention="block-causal", block_length=4, block_origin="start", state="parity-tested",
        sampler=SamplerDefaults("at least or best", block_length=4, threshold=0.95, cut_last=True),
        rope_types=(*SAME_EVERYWHERE, "yarn", "longrope"),
    ),
    Family(
        "nemotron-labs-diffusion", "Ministral3", "nemotron", ("NemotronLabsDiffusionModel",), ("nemotron_labs_diffusion",),
        releases=("Nemotron-Labs-Diffusion",), mask_token_id=100, attention="context-causal", block_length=32,
        block_field="block_size", block_origin="prompt", rope_types=("default", "yarn"), state="parity-tested",
        sampler=SamplerDefaults("at least or best", block_length=32, threshold=0.9, seeded=True),
        options={"attention_bias": (False, None), "mlp_bias": (False, None), "sliding_window": (None,)},
    ),
    Family(
        "llada-moe", "Qwen3Moe", "llada-moe", ("LLaDAMoEModelLM", "LLaDAMoEModel"), ("llada", "lladamoe", "llada_moe"),
        fields=("hidden_size", "num_experts"), releases=("LLaDA-MoE-7B-A1B",), mask_token_id=156895, stop_token_ids=(156892,),
        sampler=LLADA_SAMPLER, options=LLADA_MOE_OPTIONS, rope_types=SAME_EVERYWHERE, state="parity-tested",
    ),
    *(
        Family(
            name, "Glm4Moe", "llada2", ("LLaDA2MoeModelLM",), ("llada2_moe", "llada2_moe_veomni"), called=called,
            releases=(f"{release}-mini", f"{release}-flash"), mask_token_id=156895, attention="block-causal", block_length=32,
            block_origin="start", stop_token_ids=(156892,), options=LLADA2_OPTIONS, sampler=sampler, state="parity-tested",
        )
        for name, called, release, sampler in (
            ("llada2", "", "LLaDA2.0", LLADA2_SAMPLER), ("llada2.1", r"llada2\.1", "LLaDA2.1", LLADA21_SAMPLER),
        )
    ),
    Family(
        "rnd1", "Qwen3Moe", "qwen3-moe", ("RND1LM",), ("rnd1", "RND1"), releases=("RND1-Base-0910",), mask_token_id=151669,
        logit_shift=1, stop_token_ids=(151645,), tokenizer="qwen2", sampler=SamplerDefaults("entropy"), options=NO_WINDOW,
        rope_types=SAME_EVERYWHERE,
    ),
)  # fmt: skip
# Folders of transformers' own classes: autoregressive, or a diffusion model whose config.json says what no class of its own does.
PLAIN = tuple(
    Family(
        kind,
        network,
        "plain",
        (f"{network}ForCausalLM",),
        (kind,),
        logit_shift=1,
        attention="causal",
        state="parity-tested" if kind in ("llama", "qwen2", "qwen3") else "experimental",
    )
    for kind, network in PLAIN_NETWORKS.items()
)
# Encoders that were trained to fill in masks: transformers' own classes, with the whole of their masked head.
ENCODERS = (
    Family(
        "distilbert", "DistilBert", "encoder", ("DistilBertForMaskedLM",), ("distilbert",), releases=("distilbert-base-cased",)
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in (*DIFFUSION, *PLAIN, *ENCODERS)}


def sampler_of(name: str) -> SamplerDefaults:
    """Return how a family's own sampler decodes; an unknown or autoregressive family's is the plain one.

    >>> sampler_of("sdar").threshold
    0.85
    """
    return FAMILIES[name].sampler if name in FAMILIES else SamplerDefaults()
