"""The lm_eval adapter: likelihoods and generation of a diffusion or autoregressive model, one process, any task."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from lib.core.errors import require
from lib.diffusion import sampler
from lib.evaluation.scoring import EvaluationSettings, Passage, batched, grouped, score
from lib.models.language_model import LanguageModel, tokenizer_of
from lib.texts.encoding import encode, encode_pair, first_tokens


class HarnessModel(LM):
    """A `LanguageModel` as lm_eval sees it, at world size 1.

    Attributes:
        truncated: how many requests lost the beginning of their context so far, because the model takes no more.
    """

    def __init__(self, model: LanguageModel, *, settings: EvaluationSettings) -> None:
        super().__init__()
        self._device = model.device  # `device` itself is read-only since lm_eval 0.4.12
        require(
            not (model.is_causal and settings.cfg_scale > 0),
            "guidance must go with a diffusion model",
            f"cfg_scale {settings.cfg_scale} for {model.name}",
            "set cfg_scale to 0",
        )
        self.model, self.settings, self.truncated = model, settings, 0
        self.tokenizer = tokenizer_of(model)
        longest = int(cast(Any, model.network.config).max_position_embeddings)
        self.max_length = min(longest, settings.max_length or longest)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Score continuations given contexts.

        Args:
            requests: with (context, continuation); white space at the end of a context counts as the continuation's.

        Returns:
            (nats, greedy) of each continuation. An autoregressive model gives both exactly. A diffusion model gives LLaDA's
            Monte-Carlo lower bound (exact for one token), and always False: whether decoding would produce the continuation
            depends on the sampler and is not computed.

        Raises:
            InputError: a continuation without tokens, or longer than the model's length.
        """
        passages = []
        for request in requests:
            context, continuation = cast(tuple[str, str], request.args)
            ids, target = encode_pair(self.tokenizer, context, continuation)
            passages.append(self._passage(ids, target, ("likelihood", context, continuation)))
        return score(self.model, passages, settings=self.settings)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return what lm_eval calls the log-likelihood of whole texts, in nats.

        For an autoregressive model it is exact; for a diffusion model it is **minus the NELBO** of `minus_nelbo`, so that a
        "perplexity" made of it is an upper bound with Monte-Carlo noise, not a perplexity.
        """
        return self.minus_nelbo([cast(str, request.args[0]) for request in requests])

    def minus_nelbo(self, texts: Sequence[str]) -> list[float]:
        """Return minus the negative evidence lower bound of texts (the exact log-likelihood of an autoregressive model).

        Args:
            texts: cut into windows of the model's length that share no scored token; the first one begins with BOS, the others
                with one token of their past (the last one with as many as fit).

        Returns:
            Nats of each whole text.
        """
        passages, owners = [], []
        for owner, text in enumerate(texts):
            ids = encode(self.tokenizer, text, special=False)
            prefix = first_tokens(self.tokenizer)[-1]
            # One less than the model's length: here the last token of a window is read too, masked.
            windows = get_rolling_token_windows(ids, prefix, self.max_length - 1, 1)
            for number, (past, target) in enumerate(map(make_disjoint_window, windows)):
                passages.append(self._passage(past, target, ("rolling", text, number)))
                owners.append(owner)
        totals = [0.0] * len(texts)
        for owner, (value, _) in zip(owners, score(self.model, passages, settings=self.settings), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate greedily, requests with prompts of one length together.

        Args:
            requests: with (context, options); `until` and `max_gen_toks` are obeyed, the latter up to `gen_length`.

        Returns:
            Texts, cut at the first end-of-text token and the first of the stop strings.

        Raises:
            InputError: random sampling is asked for, or the tokens to generate leave no room for a prompt.
        """
        asked = [self._generation(*cast(tuple[str, dict[str, Any]], request.args)) for request in requests]
        answers = [""] * len(requests)
        for indices in grouped([(len(prompt), new) for prompt, new, _ in asked]):
            for part in batched(indices, self.settings.batch_size):
                new = asked[part[0]][1]
                prompts = torch.tensor([asked[index][0] for index in part])
                for index, row in zip(part, self._generate(prompts, new).tolist(), strict=True):
                    answers[index] = self._text(row, asked[index][2])
        return answers

    def _passage(self, context: Sequence[int], target: Sequence[int], stream: tuple[str | int, ...]) -> Passage:
        """Put a context before a target, without its beginning when both are too long."""
        room = self.max_length - len(target)
        require(len(target) > 0, "a continuation must have at least one token", repr(stream[-1]), "give it text")
        require(
            room >= int(self.model.is_causal),
            f"a continuation must fit into the model's {self.max_length} tokens (one less if it is autoregressive)",
            f"{len(target)} tokens",
            "shorten it",
        )
        return Passage((*self._fit(context, room), *target), min(room, len(context)), stream)

    def _fit(self, context: Sequence[int], room: int) -> Sequence[int]:
        """Drop the beginning of a context that is longer than `room`, and count that."""
        self.truncated += len(context) > room
        return context[max(0, len(context) - room) :]

    def _generation(self, context: str, options: dict[str, Any]) -> tuple[Sequence[int], int, list[str]]:
        """Return (prompt ids, tokens to generate, stop strings) of one request."""
        random = bool(options.get("do_sample")) and float(options.get("temperature", 1.0)) > 0
        require(not random, "generation must be greedy", f"do_sample with {options}", "set temperature: 0 in the task")
        new = min(int(options.get("max_gen_toks", self.settings.gen_length)), self.settings.gen_length)
        length = new if self.model.is_causal else denoising_plan(new, self.settings)[0]
        room = self.max_length - length
        require(room >= 1, f"gen_length must leave room in the model's {self.max_length} tokens", str(length), "lower it")
        until = options.get("until") or []
        prompt = encode(self.tokenizer, context) or first_tokens(self.tokenizer)
        return self._fit(prompt, room), new, [until] if isinstance(until, str) else list(until)

    def _generate(self, prompts: Int[Tensor, "batch prompt"], new: int) -> Int[Tensor, "batch new"]:
        """Generate `new` tokens after prompts of equal length."""
        start = prompts.shape[1]
        if self.model.is_causal:
            return sampler.continue_text(self.model, prompts, new_tokens=new)[:, start:]
        length, steps, block = denoising_plan(new, self.settings)
        guidance = self.settings.cfg_scale
        ids = sampler.sample(self.model, prompts, new_tokens=length, steps=steps, block_length=block, cfg_scale=guidance)
        return ids[:, start : start + new]

    def _text(self, ids: list[int], until: Sequence[str]) -> str:
        """Decode generated tokens up to the end of the text or a stop string."""
        ends = end_tokens(self.model)
        kept = list(itertools.takewhile(lambda token: token not in ends, ids))
        # Special tokens go last: a stop string may be one of them.
        text = cut(cast(str, self.tokenizer.decode(kept)), until)
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text


def denoising_plan(new_tokens: int, settings: EvaluationSettings) -> tuple[int, int, int]:
    """Fit a request for fewer tokens to the settings: whole blocks, and as many steps per token as `gen_length` gets.

    Returns:
        (tokens to denoise, of which the surplus is cut off afterwards; steps; block length).

    >>> denoising_plan(6, EvaluationSettings(gen_length=64, steps=32, block_length=16))
    (6, 3, 6)
    >>> denoising_plan(20, EvaluationSettings(gen_length=64, steps=32, block_length=16))
    (32, 16, 16)
    """
    block = min(settings.block_length, new_tokens)
    blocks = -(-new_tokens // block)
    per_block = max(1, round(settings.steps * block / settings.gen_length))
    return blocks * block, blocks * per_block, block


def cut(text: str, until: Iterable[str]) -> str:
    r"""Cut a text before the first of the stop strings.

    >>> cut("12\n\nQuestion: 3", ["Question:", "\n"])
    '12'
    """
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text


def end_tokens(model: LanguageModel) -> set[int]:
    """Return the ids that end a text, from the tokenizer and the configuration."""
    configured = getattr(model.network.config, "eos_token_id", None)
    listed = configured if isinstance(configured, list | tuple) else [configured]
    return {token for token in (tokenizer_of(model).eos_token_id, *listed) if isinstance(token, int)}
