"""The lm_eval adapters: likelihoods, generation and chats of a diffusion or autoregressive model, one process, any task."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from lib.core.errors import require
from lib.core.runtime import progress
from lib.diffusion import ragged, sampler
from lib.evaluation import generation_options
from lib.evaluation.scoring import EvaluationSettings, Passage, batched, grouped, score
from lib.models.language_model import LanguageModel, tokenizer_of
from lib.texts.encoding import encode, encode_pair, first_tokens, is_merged

Messages = list[dict[str, str]]
Request = tuple[Sequence[int], int, list[str]]  # prompt ids, tokens to generate, stop strings


class HarnessModel(LM):
    """A `LanguageModel` as lm_eval sees it, at world size 1.

    Attributes:
        truncated: how many requests lost the beginning of their context so far, because the model takes no more.
        merged: how many continuations so far were scored with tokens of their context's end, which the tokenizer writes as one
            token with their beginning.
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
        sampler.check_noise(model, cfg_scale=settings.cfg_scale)
        self.model, self.settings, self.truncated, self.merged = model, settings, 0, 0
        self.tokenizer = tokenizer_of(model)
        longest = int(cast(Any, model.network.config).max_position_embeddings)
        self.max_length = min(longest, settings.max_length or longest)
        self._chats: set[str] = set()  # prompts that came out of the template

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Score continuations given contexts.

        Args:
            requests: with (context, continuation); white space at the end of a context counts as the continuation's, and so does
                a token that both share (counted in `merged`).

        Returns:
            (nats, greedy) of each continuation. An autoregressive model gives both exactly. A diffusion model gives LLaDA's
            Monte-Carlo lower bound (exact for one token under masked noise), and always False: whether decoding would produce
            the continuation depends on the sampler and is not computed.

        Raises:
            InputError: a continuation without tokens, or longer than the model's length.
        """
        passages = []
        for request in requests:
            context, continuation = cast(tuple[str, str], request.args)
            ids, target = encode_pair(self.tokenizer, context, continuation)
            self.merged += is_merged(self.tokenizer, context, ids)
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
            requests: with (context, options); options as `generation_options.read` takes them, the length up to `gen_length`. An
                answer to a prompt of `apply_chat_template` also ends where that template ends the assistant's turn.

        Returns:
            Texts in the order of the requests, cut at the first end-of-text token and the first of the stop strings. Neither
            order nor batch size changes them.

        Raises:
            InputError: an option that is not honoured, random sampling among them, or the tokens to generate leave no room for a
                prompt.
        """
        asked = [self._generation(*cast(tuple[str, dict[str, Any]], request.args)) for request in requests]
        answers = [""] * len(requests)
        bar = progress(total=len(requests), desc="generations", unit="text")
        for part in self._batches(asked):
            rows = self._generate([asked[index][0] for index in part], asked[part[0]][1])
            for index, row in zip(part, rows.tolist(), strict=True):
                answers[index] = self._text(row, asked[index][2])
            bar.update(len(part))
        bar.close()
        return answers

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        """Write messages as the model's chat template does, specials such as BOS included.

        Args:
            chat_history: messages with `role` and `content`, as lm_eval makes them.
            add_generation_prompt: end with the beginning of the assistant's turn; else the last message is one to go on with.

        Returns:
            The prompt, which `generate_until` then tokenises as it stands: nothing is put before it a second time.

        Raises:
            InputError: the tokenizer has no template.
        """
        ending = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        text = self._rendered(chat_history, **ending)
        self._chats.add(text)
        return text

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, as lm_eval's own models give it."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def turn_end(self) -> list[str]:
        """Return the special token with which the template ends the assistant's turn, if it is one.

        The end-of-text token need not be it: LLaDA's turns end with `<|eot_id|>`, and its tokenizer names another end.

        Raises:
            InputError: the tokenizer has no template.
        """
        content = "The answer is 7"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
        behind = self._rendered(turns, add_generation_prompt=False).rpartition(content)[2]
        first = encode(self.tokenizer, behind.lstrip(), special=False)[:1]
        is_special = bool(first) and first[0] in self.tokenizer.added_tokens_decoder
        return [cast(str, self.tokenizer.decode(first))] if is_special else []

    def _rendered(self, messages: Messages, **ending: bool) -> str:
        """Write messages as the template does."""
        require(
            self.tokenizer.chat_template is not None,
            "a chat must go to a model whose tokenizer has a chat template",
            f"none with {self.model.name}",
            "use its instruction-tuned version, or leave the template out",
        )
        return cast(Any, self.tokenizer).apply_chat_template(messages, tokenize=False, **ending)

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

    def _generation(self, context: str, options: dict[str, Any]) -> Request:
        """Read one request; a chat has its BOS, if any, already."""
        asked = generation_options.read(options)
        new = min(asked.new_tokens or self.settings.gen_length, self.settings.gen_length)
        length = new if self.model.is_causal else denoising_plan(new, self.settings)[0]
        room = self.max_length - length
        require(room >= 1, f"gen_length must leave room in the model's {self.max_length} tokens", str(length), "lower it")
        stops = list(asked.until)
        if context in self._chats:
            return self._fit(encode(self.tokenizer, context, special=False), room), new, [*stops, *self.turn_end()]
        return self._fit(encode(self.tokenizer, context) or first_tokens(self.tokenizer), room), new, stops

    def _batches(self, asked: Sequence[Request]) -> Iterator[list[int]]:
        """Yield the requests that are answered together: prompts of one length and equally many tokens."""
        for group in grouped([(len(prompt), new) for prompt, new, _ in asked]):
            yield from batched(group, self.settings.batch_size)

    def _generate(self, prompts: Sequence[Sequence[int]], new: int) -> Int[Tensor, "batch new"]:
        """Generate `new` tokens after prompts of equal length."""
        ids, start = torch.tensor(prompts), len(prompts[0])
        if self.model.is_causal:
            return sampler.continue_text(self.model, ids, new_tokens=new)[:, start:]
        length, steps, block = denoising_plan(new, self.settings)
        own = None if self.model.goes_by_blocks else block
        guidance = self.settings.cfg_scale
        ids = sampler.sample(self.model, ids, new_tokens=length, steps=steps, block_length=own, cfg_scale=guidance)
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


class BatchedHarness(HarnessModel):
    """A `HarnessModel` that generates `batch_size` texts at a time whatever their lengths.

    Texts are those of `HarnessModel` but for rounding: at reduced precision, where two tokens are almost equally likely,
    attention with a mask may prefer the other one.
    """

    def _batches(self, asked: Sequence[Request]) -> Iterator[list[int]]:
        """Yield requests for equally many tokens together, longest first so that too little memory shows at once."""
        for group in reversed(grouped([new for _, new, _ in asked])):
            longest_first = sorted(group, key=lambda index: len(asked[index][0]), reverse=True)
            yield from batched(longest_first, self.settings.batch_size)

    def _generate(self, prompts: Sequence[Sequence[int]], new: int) -> Int[Tensor, "batch new"]:
        """Generate `new` tokens after prompts of any lengths."""
        if self.model.is_causal:
            return ragged.continue_texts(self.model, prompts, new_tokens=new)
        length, steps, block = denoising_plan(new, self.settings)
        plan = {"new_tokens": length, "steps": steps, "block_length": None if self.model.goes_by_blocks else block}
        return ragged.denoise(self.model, prompts, **plan, cfg_scale=self.settings.cfg_scale)[:, :new]


def denoising_plan(new_tokens: int, settings: EvaluationSettings) -> tuple[int, int, int]:
    """Fit a request for fewer tokens to the settings: equal blocks, and as many steps per token as `gen_length` gets.

    Rounded up to whole blocks, an answer would be written in a longer text than was asked for, and a model may have learnt how
    long its answers are. So blocks get shorter instead: to the longest that divides the request, if that is more than half as
    long, or to what leaves the least surplus.

    Returns:
        (tokens to denoise, of which the surplus is cut off afterwards; steps; block length).

    >>> denoising_plan(6, EvaluationSettings(gen_length=64, steps=32, block_length=16))
    (6, 3, 6)
    >>> denoising_plan(20, EvaluationSettings(gen_length=64, steps=32, block_length=16))
    (20, 10, 10)
    >>> denoising_plan(23, EvaluationSettings(gen_length=64, block_length=16))
    (24, 24, 12)
    """
    most = min(settings.block_length, new_tokens)
    dividing = (length for length in range(most, most // 2, -1) if new_tokens % length == 0)
    even = -(-new_tokens // -(-new_tokens // most))
    block = next(dividing, even)
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
