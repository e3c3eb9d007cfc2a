"""lm_eval's options of a generation: each is honoured, or refused in one line; none is dropped."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib.core.errors import require

LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # names of one thing, see lm_eval's models/utils
# What chooses among tokens beside the best one, or what is computed but not its result: nothing to a greedy generation.
WITHOUT_EFFECT = ("top_p", "top_k", "min_p", "typical_p", "seed", "use_cache", "early_stopping")
# What would change a greedy generation, with the value at which it does not.
NEUTRAL: Mapping[str, float] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "n": 1,
    "best_of": 1,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "diversity_penalty": 0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_tokens": 0,
}
RULE = "a generation option must be one that is honoured here"


@dataclass(frozen=True)
class GenerationOptions:
    """What a request asks for.

    Attributes:
        new_tokens: most tokens to generate; None leaves it to the settings.
        until: stop strings.
    """

    new_tokens: int | None
    until: tuple[str, ...]


def read(options: Mapping[str, Any]) -> GenerationOptions:
    """Read the options of one request; those set to None count as left out.

    Args:
        options: a task's `generation_kwargs`. The length is `max_gen_toks` or one of its other names; `until` is a stop string or
            a list of them. Generation is greedy, so `do_sample` must be False, or the temperature 0; `do_sample: false` makes the
            temperature meaningless, as everywhere in lm_eval, while a temperature alone asks for sampling.

    Raises:
        InputError: random sampling, several lengths that differ, or an option that would change the answer and is not honoured.

    >>> read({"until": "\\n", "max_new_tokens": 8, "temperature": 0.0})
    GenerationOptions(new_tokens=8, until=('\\n',))
    """
    given = {name: value for name, value in options.items() if value is not None}
    _check_greedy(given)
    for name, value in given.items():
        if name in NEUTRAL:
            rule, remedy = f"{name} must be {NEUTRAL[name]}", "take it out of the task's generation_kwargs"
            require(value == NEUTRAL[name], rule, repr(value), remedy)
        elif name not in ("until", "do_sample", "temperature", *LENGTHS, *WITHOUT_EFFECT):
            also = ", for the length use max_new_tokens" if "length" in name else ""
            require(False, RULE, f"{name}: {value!r}", f"take it out of the task's generation_kwargs{also}")
    return GenerationOptions(_length(given), _stops(given.get("until", ())))


def _check_greedy(given: Mapping[str, Any]) -> None:
    """Refuse random sampling."""
    temperature, sampled = given.get("temperature"), given.get("do_sample")
    rule, remedy = "generation must be greedy", "set do_sample: false and temperature: 0 in the task"
    require(sampled in (None, True, False), "do_sample must be true or false", repr(sampled), remedy)
    is_number = isinstance(temperature, int | float) or temperature is None
    require(is_number and not (temperature or 0) < 0, "temperature must be a number from 0", repr(temperature), remedy)
    is_random = sampled is not False and (temperature > 0 if temperature is not None else bool(sampled))
    asked = ", ".join(f"{name} {given[name]}" for name in ("do_sample", "temperature") if name in given)
    require(not is_random, rule, asked, remedy)


def _length(given: Mapping[str, Any]) -> int | None:
    """Return the most tokens to generate."""
    named = {name: given[name] for name in LENGTHS if name in given}
    rule = "a generation must have one length"
    require(
        len(set(named.values())) <= 1, rule, ", ".join(f"{name} {value}" for name, value in named.items()), "keep one of them"
    )
    for name, value in named.items():
        is_whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
        require(is_whole and value >= 1, f"{name} must be a number of tokens from 1", repr(value), "correct the task")
        return int(value)
    return None


def _stops(until: Any) -> tuple[str, ...]:
    """Return the stop strings; an empty one stops nothing."""
    listed = [until] if isinstance(until, str) else until
    are_texts = isinstance(listed, list | tuple) and all(isinstance(stop, str) for stop in listed)
    require(are_texts, "until must be a text or a list of texts", repr(until), "quote it in the task")
    return tuple(stop for stop in listed if stop)
