"""How the core's tasks are answered: likelihoods by racing, generation with kept keys and values, on a sample of documents."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Int
from lm_eval.api.instance import Instance
from torch import Tensor

from lib.core.runtime import generator
from lib.decoding.decoder import decode
from lib.decoding.plan import DecodingPlan
from lib.decoding.recompute import Blockwise
from lib.diffusion import likelihood
from lib.evaluation import tasks
from lib.evaluation.harness import HarnessModel, denoising_plan
from lib.evaluation.scoring import EvaluationSettings, Passage, Row, batched, grouped, log_likelihoods
from lib.evaluation.tasks import LoadedTask, TaskResult
from lib.grid.core import racing
from lib.grid.core.racing import Choice, Race, Raced
from lib.models.language_model import LanguageModel
from lib.texts.encoding import encode_pair, is_merged

Cache = Literal["none", "prefix", "dual"]


@dataclass(frozen=True)
class Answers:
    """What a task of the core found.

    Attributes:
        shown: at the end of every document's race.
        final: the same after all draws for audited documents.
        race: what was drawn; None where nothing is raced.
        rows: that passed through the network to score likelihoods.
        asked: documents of the whole benchmark.
    """

    shown: TaskResult
    final: TaskResult
    race: Raced | None
    rows: int
    asked: int


class RacedHarness(HarnessModel):
    """A `HarnessModel` that races likelihoods and generates with kept keys and values.

    Attributes:
        found: of the last race, none before there was one.
        rows: through the network so far.
        final: answer with the scores after all draws, which `found` holds, instead of racing.
    """

    def __init__(self, model: LanguageModel, *, settings: EvaluationSettings, rule: Race | None, cache: Cache) -> None:
        super().__init__(model, settings=settings)
        self.rule, self.cache = rule, cache
        self.found: Raced | None = None
        self.rows, self.final = 0, False

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Score the choices of documents by a race; a model that reads in one direction or goes by blocks makes all draws.

        Args:
            requests: as `HarnessModel.loglikelihood` takes them, those of one document side by side.

        Returns:
            (nats, False) of each continuation: a choice that dropped out has the score that it had then.
        """
        rule = self.rule
        if rule is None or self.model.is_causal or self.model.goes_by_blocks or not self.model.noise.is_masked:
            return super().loglikelihood(requests)
        documents = [(request.task_name, request.doc_id) for request in requests]
        if not self.final:
            own = [self._read(request) for request in requests]
            questions = [[own[index] for index in indices] for indices in _side_by_side(documents)]
            self.found = self._race(questions, rule)
        scores = cast(Raced, self.found).final if self.final else cast(Raced, self.found).shown
        return [(value, False) for document in scores for value in document]

    def _read(self, request: Instance) -> Passage:
        """Tokenise one request, its stream of masks named as `HarnessModel` names it."""
        context, continuation = cast(tuple[str, str], request.args)
        ids, target = encode_pair(self.tokenizer, context, continuation)
        self.merged += is_merged(self.tokenizer, context, ids)
        return self._passage(ids, target, ("likelihood", context, continuation))

    def _race(self, questions: Sequence[Sequence[Passage]], rule: Race) -> Raced:
        known: dict[Choice, dict[bytes, float]] = {}

        def draw(due: Sequence[Choice], look: int, count: int) -> list[list[float]]:
            return self._draws({choice: questions[choice[0]][choice[1]] for choice in due}, known, look=look, count=count)

        exact = [[len(passage.ids) - passage.start == 1 for passage in passages] for passages in questions]
        audited = [racing.is_audited(self.settings.seed, rule, *passages[0].stream) for passages in questions]
        return racing.race(exact, draw, rule=rule, draws=self.settings.draws, audited=audited)

    def _draws(
        self, due: Mapping[Choice, Passage], known: dict[Choice, dict[bytes, float]], *, look: int, count: int
    ) -> list[list[float]]:
        """Draw masks for passages; one that a passage has had before does not pass through the network again."""
        masks = {choice: _masks(passage, look, count, seed=self.settings.seed) for choice, passage in due.items()}
        new = list(_new_rows(due, masks, known))
        for indices in grouped([len(row.ids) for _, row in new]):
            for part in batched([new[index] for index in indices], self.settings.batch_size):
                values, _ = log_likelihoods(self.model, [row for _, row in part], cfg_scale=self.settings.cfg_scale)
                for (choice, row), value in zip(part, values.tolist(), strict=True):
                    known[choice][_name(row.where, row.start)] = row.weight * value
        self.rows += len(new)
        return [[known[choice][_name(mask, passage.start)] for mask in masks[choice]] for choice, passage in due.items()]

    def _generate(self, prompts: Sequence[Sequence[int]], new: int) -> Int[Tensor, "batch new"]:
        """Generate after prompts of equal length, block by block with kept keys and values."""
        if self.cache == "none" or self.model.is_causal or self.model.goes_by_blocks:
            return super()._generate(prompts, new)
        length, _, block = denoising_plan(new, self.settings)
        kind: Literal["prefix", "dual"] = "prefix" if self.cache == "prefix" else "dual"
        plan, start = DecodingPlan(recompute=Blockwise(kind=kind)), len(prompts[0])
        made = decode(self.model, torch.tensor(prompts), new_tokens=length, block_length=block, plan=plan)
        return made.ids[:, start : start + new]


def answer(
    model: LanguageModel,
    task: LoadedTask,
    *,
    settings: EvaluationSettings,
    rule: Race | None,
    cache: Cache,
    documents: int | None,
    chat_template: bool = False,
) -> Answers:
    """Answer a task of the core.

    Args:
        model: diffusion or autoregressive.
        task: what is asked.
        settings: of its answers.
        rule: of races; None makes all draws.
        cache: what generation keeps between passes.
        documents: that are asked, drawn without replacement from each part by the seed alone; None is all.
        chat_template: as `tasks.evaluate` takes it.

    Raises:
        InputError: as `tasks.evaluate`.
    """
    adapter = RacedHarness(model, settings=settings, rule=rule, cache=cache)
    chosen = sample(task, documents, seed=settings.seed)
    given: dict[str, Any] = {"settings": settings, "documents": chosen, "chat_template": chat_template}
    shown = _asked(model, task, adapter, given)
    asked = sum(len(list(part.eval_docs)) for part in task.parts.values())
    if adapter.found is None:
        return Answers(shown, shown, None, adapter.rows, asked)
    adapter.final = True  # lm_eval marks the scores of all draws, too
    return Answers(shown, _asked(model, task, adapter, given), adapter.found, adapter.rows, asked)


def _asked(model: LanguageModel, task: LoadedTask, adapter: RacedHarness, given: Mapping[str, Any]) -> TaskResult:
    return tasks.evaluate(model, {task.name: task}, **given, adapter=lambda *_, **__: adapter)[task.name]


def sample(task: LoadedTask, documents: int | None, *, seed: int) -> dict[str, list[int]] | None:
    """Draw the documents of each part that are asked, the same for every model; None is all.

    Args:
        task: its parts.
        documents: of each part.
        seed: of the draw.
    """
    if documents is None:
        return None
    chosen = {}
    for name, part in task.parts.items():
        count = len(list(part.eval_docs))
        order = torch.randperm(count, generator=generator(seed, "documents", name))
        chosen[name] = sorted(order[:documents].tolist())
    return chosen


def _side_by_side(documents: Sequence[tuple[str | None, int | None]]) -> list[list[int]]:
    """Group the indices of neighbours that are equal."""
    found: list[list[int]] = []
    for index, document in enumerate(documents):
        if index and documents[index - 1] == document:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def _masks(passage: Passage, look: int, count: int, *, seed: int) -> Tensor:
    """Draw the masks of one look, stratified by themselves; they know the text, the seed and the look, and no model."""
    target = torch.arange(len(passage.ids)) >= passage.start
    if int(target.sum()) == 1:
        return target[None]
    return likelihood.exact_count_masks(target, count, generator=generator(seed, *passage.stream, "look", look))


def _new_rows(
    due: Mapping[Choice, Passage], masks: Mapping[Choice, Tensor], known: dict[Choice, dict[bytes, float]]
) -> Iterator[tuple[Choice, Row]]:
    """Yield the rows whose value is not known yet."""
    for number, (choice, passage) in enumerate(due.items()):
        had, ids, length = known.setdefault(choice, {}), torch.tensor(passage.ids), len(passage.ids) - passage.start
        for mask in masks[choice]:
            if (name := _name(mask, passage.start)) not in had:
                had[name] = 0.0  # its place is taken; the value comes with its row
                yield choice, Row(number, ids, mask, passage.start, length / int(mask.sum()))


def _name(mask: Tensor, start: int) -> bytes:
    return mask[start:].numpy().tobytes()
