"""The lm_eval adapter for generation in full batches: prompts of unequal length together, and chat templates."""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, cast

from jaxtyping import Int
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate as run_harness
from torch import Tensor
from tqdm import tqdm

from lib.core.errors import InputError, require
from lib.diffusion import ragged
from lib.evaluation import tasks
from lib.evaluation.harness import HarnessModel, denoising_plan
from lib.evaluation.scoring import EvaluationSettings, batched, grouped
from lib.evaluation.tasks import LoadedTask, TaskResult
from lib.models.language_model import LanguageModel
from lib.texts.encoding import encode

Messages = list[dict[str, str]]


class BatchedHarness(HarnessModel):
    """A `HarnessModel` that generates `batch_size` texts at a time whatever their lengths, and writes prompts as a chat.

    Likelihoods are those of `HarnessModel`. Generated texts are too, but for rounding: at reduced precision, where two tokens are
    almost equally likely, attention with a mask may prefer the other one.
    """

    def __init__(self, model: LanguageModel, *, settings: EvaluationSettings) -> None:
        super().__init__(model, settings=settings)
        self._chats: set[str] = set()  # prompts that came out of the template

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate greedily, requests for equally many tokens together, longest first so that too little memory shows at once.

        Args:
            requests: with (context, options); `until` and `max_gen_toks` are obeyed, the latter up to `gen_length`. An answer to
                a prompt of `apply_chat_template` also ends where that template ends the assistant's turn.

        Returns:
            Texts in the order of the requests, cut at the first end-of-text token and the first of the stop strings. Neither
            order nor batch size changes them.

        Raises:
            InputError: random sampling is asked for, or the tokens to generate leave no room for a prompt.
        """
        asked = [self._generation(*cast(tuple[str, dict[str, Any]], request.args)) for request in requests]
        answers = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="generations", unit="text", disable=None, leave=False)
        for group in reversed(grouped([new for _, new, _ in asked])):
            longest_first = sorted(group, key=lambda index: len(asked[index][0]), reverse=True)
            for part in batched(longest_first, self.settings.batch_size):
                rows = self._generate_ragged([asked[index][0] for index in part], asked[part[0]][1])
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

    def _generation(self, context: str, options: dict[str, Any]) -> tuple[Sequence[int], int, list[str]]:
        """Return (prompt ids, tokens to generate, stop strings) of one request; a chat has its BOS, if any, already."""
        if context not in self._chats:
            return super()._generation(context, options)
        _, new, until = super()._generation("", options)
        length = new if self.model.is_causal else denoising_plan(new, self.settings)[0]
        prompt = self._fit(encode(self.tokenizer, context, special=False), self.max_length - length)
        return prompt, new, [*until, *self.turn_end()]

    def _generate_ragged(self, prompts: Sequence[Sequence[int]], new: int) -> Int[Tensor, "batch new"]:
        """Generate `new` tokens after prompts of any lengths."""
        if self.model.is_causal:
            return ragged.continue_texts(self.model, prompts, new_tokens=new)
        length, steps, block = denoising_plan(new, self.settings)
        plan = {"new_tokens": length, "steps": steps, "block_length": block}
        return ragged.denoise(self.model, prompts, **plan, cfg_scale=self.settings.cfg_scale)[:, :new]


def evaluate(
    model: LanguageModel,
    task: LoadedTask,
    *,
    settings: EvaluationSettings,
    chat_template: bool = False,
    limit: int | None = None,
) -> TaskResult:
    """Evaluate a model on one task as `tasks.evaluate` does, but with texts generated in full batches.

    Args:
        model: diffusion or autoregressive.
        task: as `tasks.load_tasks` or `standins.load` returns it.
        settings: how requests are answered.
        chat_template: write prompts as a chat, each example as a turn of its own; for generation only.
        limit: only the first documents of each part of the task.

    Returns:
        Right or wrong, document by document.

    Raises:
        InputError: a limit below 1, a chat for likelihoods or for a tokenizer without a template, or a task without its metric.
    """
    require(limit is None or limit >= 1, "limit must be a number of documents from 1", str(limit), "raise it or leave it out")
    if chat_template:
        _check_generated(task)
    adapter = BatchedHarness(model, settings=settings)
    for part in task.parts.values():
        # The sampler of examples goes on where the last model left it; every model must be shown the same ones.
        part.set_fewshot_seed(tasks.FEWSHOT_SEED)
    with tasks.quiet():
        given: dict[str, Any] = {"limit": limit, "bootstrap_iters": 0, "log_samples": True}
        given |= {"apply_chat_template": chat_template, "fewshot_as_multiturn": chat_template}
        samples = cast(dict[str, Any], run_harness(adapter, {"tasks": dict(task.parts)}, **given))["samples"]
    scores = tasks.document_scores(task, samples)
    if task.metric not in scores:
        raise InputError(f"the score of {task.name} must be one of {', '.join(scores)}, got {task.metric}: change its metric")
    found = (scores[task.metric], MappingProxyType(scores), task.chance, adapter.truncated, settings)
    return TaskResult(task.name, task.metric, *found)


def _check_generated(task: LoadedTask) -> None:
    """Refuse a chat for likelihoods: the published numbers that a task is compared with have none."""
    for name, part in task.parts.items():
        kind = str(part.OUTPUT_TYPE)
        rule = "a chat template must go with a task that is generated"
        require(kind == "generate_until", rule, f"{name}, which is {kind}", "leave chat_template out")
