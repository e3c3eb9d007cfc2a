"""A slow transformer written from the papers, on the checkpoints' own tensor names and in any dtype.

Independent of `lib` and of transformers: plain matrix products, an explicit repeat of key-value heads, a full attention matrix.
The norms and the rotary tables are computed in float32, as both original networks do.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

NAMES = {
    "llada": {
        "embed": "model.transformer.wte.weight",
        "norm": "model.transformer.ln_f.weight",
        "head": "model.transformer.ff_out.weight",
        "block": "model.transformer.blocks.{}.",
        "parts": "q_proj k_proj v_proj attn_out ff_proj up_proj ff_out attn_norm ff_norm".split(),
    },
    "Dream": {
        "embed": "model.embed_tokens.weight",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
        "block": "model.layers.{}.",
        "parts": (
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj "
            "input_layernorm post_attention_layernorm"
        ).split(),
    },
}
NAMES["mmada"] = NAMES["llada"]


def forward(folder: Path, input_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (logits, attention `[layer, batch, head, query, key]`) of a bidirectional checkpoint."""
    raw = json.loads((folder / "config.json").read_text())
    names = NAMES[raw["model_type"]]
    shards = [load_file(file) for file in folder.glob("model*.safetensors")]
    weights = {key: value.to(dtype) for shard in shards for key, value in shard.items()}
    head = weights.get(names["head"], weights[names["embed"]])  # a tied head is the embedding
    heads = raw.get("n_heads") or raw["num_attention_heads"]
    kv_heads = raw.get("n_kv_heads") or raw["num_key_value_heads"]
    layers = raw.get("n_layers") or raw["num_hidden_layers"]
    hidden = weights[names["embed"]][input_ids]
    maps = []
    for layer in range(layers):
        q, k, v, o, gate, up, down, norm1, norm2 = (names["block"].format(layer) + part for part in names["parts"])
        x = rms(hidden, weights[norm1 + ".weight"], raw["rms_norm_eps"])
        query, key, value = (
            split(x @ weights[n + ".weight"].T + weights.get(n + ".bias", torch.zeros((), dtype=dtype)), count)
            for n, count in ((q, heads), (k, kv_heads), (v, kv_heads))
        )
        query, key = rotate(query, raw["rope_theta"]), rotate(key, raw["rope_theta"])
        key, value = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (key, value))
        probs = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        maps.append(probs)
        hidden = hidden + (probs @ value).transpose(1, 2).flatten(2) @ weights[o + ".weight"].T
        x = rms(hidden, weights[norm2 + ".weight"], raw["rms_norm_eps"])
        gated = x @ weights[gate + ".weight"].T
        hidden = hidden + (gated * gated.sigmoid() * (x @ weights[up + ".weight"].T)) @ weights[down + ".weight"].T
    return rms(hidden, weights[names["norm"]], raw["rms_norm_eps"]) @ head.T, torch.stack(maps)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square, in float32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def split(x: Tensor, heads: int) -> Tensor:
    """`[batch, position, heads * dim]` to `[batch, head, position, dim]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Apply the rotary embedding, halves rotated against each other."""
    width = x.shape[-1]
    frequency = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    angle = torch.arange(x.shape[2]).float()[:, None] * frequency[None, :]
    angle = torch.cat([angle, angle], dim=-1)
    turned = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1)
    return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)
