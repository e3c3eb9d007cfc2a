"""The code and the words by which a model card says how its checkpoint is loaded and read."""

from pathlib import Path

from lib.checkpoints import lookup
from lib.checkpoints.files import SPARSE, WHOLE, read_json
from lib.models.language_model import LanguageModel, tokenizer_of

START = """\
import torch
from transformers import AutoModelForCausalLM, {tokenizer}

folder = "."  # this folder, or the checkpoint's id on the hub
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
tokenizer = {tokenizer}.from_pretrained(folder)
ids = tokenizer("Water boils at", return_tensors="pt").input_ids
"""
DIFFUSION = """\
start, new, mask, shift = ids.shape[1], 8, model.config.mask_token_id, model.config.logit_shift
ids = torch.cat([ids, torch.full((1, new), mask)], dim=1)
for _ in range(new):  # one token a step, the surest first
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits.double()
    logits = torch.cat([logits[:, :shift], logits[:, : logits.shape[1] - shift]], dim=1)
    surest, tokens = logits.softmax(-1).max(-1)
    position = surest.masked_fill(ids != mask, -1.0).argmax()
    ids[0, position] = tokens[0, position]
"""
NOISED = """\
start, new, mask, shift = ids.shape[1], 8, model.config.mask_token_id, model.config.logit_shift
noise = torch.ones(model.config.vocab_size).double()  # what tokens become: others, masks, or either
if mask is not None and model.config.noise["kind"] == "uniform":
    noise[mask] = 0.0
noise *= model.config.noise.get("uniform", 1.0) / noise.sum()
if model.config.noise["kind"] == "mixed":
    noise[mask] += 1.0 - model.config.noise["uniform"]
ids = torch.cat([ids, torch.multinomial(noise, new, replacement=True)[None]], dim=1)
for step in range(new):  # one more token is kept in every step, the surest; the others are drawn anew
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    logits = torch.cat([logits[:shift], logits[: len(logits) - shift]])[start:]
    if mask is not None:
        logits[:, mask] = -torch.inf
    t, seen = 1.0 - step / new, ids[0, start:]
    chance = t * noise[seen][:, None] + (1.0 - t) * torch.nn.functional.one_hot(seen, len(noise))  # of what is seen
    posterior = logits.softmax(-1) * chance
    surest, ids[0, start:] = (posterior / posterior.sum(-1, keepdim=True)).max(-1)
    left = start + surest.argsort()[: new - step - 1].sort().values
    if len(left):
        ids[0, left] = torch.multinomial(noise, len(left), replacement=True)
"""
BY_BLOCKS = """\
start, new, mask, shift = ids.shape[1], 8, model.config.mask_token_id, model.config.logit_shift
ids = torch.cat([ids, torch.full((1, new), mask)], dim=1)
places, origin = torch.arange(ids.shape[1]), start if model.config.block_origin == "prompt" else 0
blocks = torch.div(places - origin, model.config.block_length, rounding_mode="floor").clamp(min=-1)
for _ in range(new):  # one token a step, the surest of the first block that has masks
    block = blocks == blocks[(ids[0] == mask).int().argmax()]
    sees = SEES
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=sees[None, None], use_cache=False).logits.double()
    logits = torch.cat([logits[:, :shift], logits[:, : logits.shape[1] - shift]], dim=1)
    surest, tokens = logits.softmax(-1).max(-1)
    position = surest.masked_fill((ids != mask) | ~block, -1.0).argmax()
    ids[0, position] = tokens[0, position]
"""
SEES = {
    "block-causal": "blocks[:, None] >= blocks  # its own block and those before it",
    "context-causal": "(places[:, None] >= places) | (block[:, None] & block)  # what is before it, and its open block",
}
LOOKS = {
    "full": "every token sees all others",
    "block-causal": "a token sees its whole block of {length} tokens and all before it (blocks are counted from {origin})",
    "context-causal": "a token sees what stands before it and, in the block of {length} that is being written, the whole block",
}
CAUSAL = """\
ids = model.generate(ids, max_new_tokens=8, do_sample=False)
"""
END = """\
print(tokenizer.decode(ids[0]))
"""
PACKED = "Needs the package compressed-tensors beside transformers, which then unpacks the codes by itself.\n"
OWN = """\
from lib import models  # of the repository that wrote it; runs none of the family's code

model = models.load(".")  # this folder
"""


def how_to_load(model: LanguageModel, folder: Path) -> list[str]:
    """Show the code that loads a checkpoint: transformers alone, unless it is in a layout that transformers does not know."""
    if (folder / SPARSE).exists():
        return ["A container that stores no zeros, which this project alone reads.\n", f"```python\n{OWN}```\n"]
    family = lookup.family_of(folder)
    if family.layout != "plain":
        return [
            f"In the layout of its base ({family.name}): whatever loads the base loads this folder, the family's own code too.\n",
            f"```python\n{OWN}```\n",
        ]
    needs = [PACKED] if "quantization_config" in read_json(folder / "config.json") else []
    return [*needs, f"```python\n{_program(model, folder)}```\n", _loading(model)]


def _program(model: LanguageModel, folder: Path) -> str:
    """Return code that loads the checkpoint and writes with it, under the model's own mask and noise."""
    # AutoTokenizer puts another class's rules round the words of some folders, such as those of a Qwen2.
    whole = (folder / WHOLE).exists()
    start = START.replace("{tokenizer}", "PreTrainedTokenizerFast" if whole else "AutoTokenizer")
    return start + _loop(model) + END


def _loop(model: LanguageModel) -> str:
    """Return the code that writes with a model of its kind."""
    if model.is_causal:
        return CAUSAL
    if not model.noise.is_masked:
        return NOISED
    return BY_BLOCKS.replace("SEES", SEES[model.attention]) if model.goes_by_blocks else DIFFUSION


def _loading(model: LanguageModel) -> str:
    """Say what a reader must know about the network; `START` and the rest show it."""
    if model.is_causal:
        return "An autoregressive model like its base: `generate` works as ever.\n"
    place = "at the position before it (`logit_shift: 1`)" if model.logit_shift else "at its own position (`logit_shift: 0`)"
    if not model.noise.is_masked:
        return (
            f"A diffusion model of {model.noise} noise (`config.noise`): `config.is_causal` is false, so attention looks both\n"
            "ways, and `generate` of transformers does not apply. Text begins as noise, and any token may be replaced until the\n"
            f"last step; what belongs somewhere given all other positions is predicted {place}.\n"
        )
    mask = tokenizer_of(model).convert_ids_to_tokens(model.mask_token_id)  # type: ignore[arg-type]
    origin = "the first token" if model.block_origin == "start" else "the end of the prompt"
    looks = LOOKS[model.attention].format(length=model.block_length, origin=origin)
    need = " That mask must be given to the network at every pass." if model.goes_by_blocks else ""
    loop = "one block after the other" if model.goes_by_blocks else "no blocks"
    return (
        f"A masked diffusion model: `config.is_causal` is false, {looks}, and `generate` of transformers\n"
        f"does not apply.{need} A token to be written is the mask token {model.mask_token_id} (`{mask}`);\n"
        f"it is predicted {place}.\n"
        f"The loop above is LLaDA's sampler (low-confidence remasking, {loop}, no temperature).\n"
    )
