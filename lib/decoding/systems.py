"""Published decoders as plans: what each is made of, by the four choices."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from lib.core.errors import InputError
from lib.decoding import commit, recompute, remask
from lib.decoding.by_attention.commit import Independent
from lib.decoding.by_attention.control import Control
from lib.decoding.by_attention.evict import Evict
from lib.decoding.by_attention.recompute import D2Cache, Elastic, Focus
from lib.decoding.commit import Quota, Threshold
from lib.decoding.decoder import DecodingPlan
from lib.decoding.late_steps import Predictor
from lib.decoding.recompute import Adaptive, Blockwise, Recompute
from lib.decoding.speculation import Speculation
from lib.decoding.visible import Visible
from lib.models.language_model import LanguageModel

CacheKind = Literal["none", "prefix", "dual", "adaptive"]
LOOSE = 0.7  # probability above which WINO and LLaDA 2.1 commit, since they revise what they wrote


def fast_plan(
    cache: CacheKind = "none",
    *,
    threshold: float | None = None,
    steps_per_block: int | None = None,
    refresh_every: int | None = None,
    refresh_ratio: float | None = None,
    suffix_blocks: int | None = None,
    early_stop: bool = False,
    late_share: float | None = None,
    late_step: Predictor | None = None,
) -> DecodingPlan:
    """Return a plan of the most usual choices.

    Args:
        cache: `"none"`; `"prefix"` or `"dual"` as in `recompute.Blockwise`; `"adaptive"` as in `recompute.Adaptive`.
        threshold: commit every token above this probability, and the best one in any case; 1 is one token a step.
        steps_per_block: commit a fixed number of tokens a step instead, as `sampler.sample` does.
        refresh_every: passes from one full pass to the next within a block; None is one at the block's start.
        refresh_ratio: share of positions recomputed by an adaptive cache, in (0, 1].
        suffix_blocks: masked blocks after the current one that the network sees; None is all of them.
        early_stop, late_share, late_step: as in `DecodingPlan`.

    Raises:
        InputError: a value out of range, or options that do not go together.

    Source: Fast-dLLM (arXiv 2505.22618), dLLM-Cache (arXiv 2506.06295), Streaming-dLLM (arXiv 2601.17917).
    """
    if (threshold is None) == (steps_per_block is None):
        raise InputError(
            f"a plan must have either threshold or steps_per_block, got {threshold} and {steps_per_block}: set one of them"
        )
    if cache == "none" and refresh_every is not None:
        raise InputError(f"refresh_every must go with a cache, got {refresh_every} without: drop it or choose a cache")
    if (cache == "adaptive") != (refresh_ratio is not None):
        raise InputError(f"refresh_ratio must go with cache='adaptive', got {refresh_ratio} with {cache!r}: set both or none")
    if cache == "none":
        recompute = Recompute()
    elif refresh_ratio is not None:
        recompute = Adaptive(refresh_ratio, refresh_every)
    else:
        recompute = Blockwise(refresh_every, cache)  # type: ignore[arg-type]
    commit = Quota(steps_per_block) if threshold is None else Threshold(threshold)
    choices = {"commit": commit, "recompute": recompute, "visible": Visible(suffix_blocks=suffix_blocks)}
    return DecodingPlan(**choices, early_stop=early_stop, late_share=late_share, late_step=late_step)


@dataclass(frozen=True)
class System:
    """A published decoder.

    Attributes:
        name: as tables show it.
        plan: its four choices, or drafts.
        rival: name of the system that it differs from in one choice.
        choice: which of the four that is, or where blocks end.
    """

    name: str
    plan: DecodingPlan | Speculation
    rival: str
    choice: str

    @property
    def parts(self) -> dict[str, str]:
        """What each choice is."""
        if isinstance(self.plan, Speculation):
            return {"commit": f"drafts of {self.plan.drafts}", "remask": "", "recompute": "all", "visible": "all"}
        named = {name: type(getattr(self.plan, name)).__name__ for name in ("commit", "remask", "recompute", "visible")}
        usual = {"NoneType": "", "Recompute": "all", "Visible": "all"}
        return {name: usual.get(kind, kind) for name, kind in named.items()}

    def against(self, rival: "System") -> str:
        """Say in which choices it differs from another system, and how.

        >>> one, two = (System(name, fast_plan(cache, threshold=0.5), "", "") for name, cache in (("a", "none"), ("b", "dual")))
        >>> two.against(one)
        'recompute: Recompute -> Blockwise(refresh_every=None, kind=dual)'
        """
        if isinstance(self.plan, Speculation) or isinstance(rival.plan, Speculation):
            return "" if self.plan == rival.plan else f"drafts: {self.parts['commit']}"
        pairs = {each.name: (getattr(self.plan, each.name), getattr(rival.plan, each.name)) for each in fields(DecodingPlan)}
        return "; ".join(f"{name}: {_named(old)} -> {_told(new, old)}" for name, (new, old) in pairs.items() if new != old)


def _named(choice: object) -> str:
    return "none" if choice is None else type(choice).__name__


def dials(choice: Any) -> dict[str, Any]:
    """Return the settings of a choice by name, but for the control."""
    return {} if choice is None else {each.name: getattr(choice, each.name) for each in fields(choice) if each.name != "control"}


def _told(new: object, old: object) -> str:
    """Name a choice and the settings that another one has not, or has otherwise."""
    before = dials(old)
    own = {name: value for name, value in dials(new).items() if name not in before or before[name] != value}
    said = [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in own.items()]
    return f"{_named(new)}({', '.join(said)})" if said else _named(new)


def commits_by(threshold: float) -> dict[str, commit.Commit]:
    """Return the commit rules that have a threshold or the like, at a setting as strict as it.

    Args:
        threshold: probability; rules with another dial get the one that allows as much: a factor of 2 (1 - threshold) and an
            entropy bound of 1 - threshold.
    """
    loose = 1 - threshold
    return {
        "threshold": Threshold(threshold),
        "factor": commit.Factor(max(2 * loose, 0.0)),
        "adaptive threshold": commit.AdaptiveThreshold(threshold),
        "entropy bound": commit.EntropyBound(loose),
        "KLASS": commit.Klass(threshold),
        "hierarchy": commit.Hierarchy(threshold, min(0.4, threshold)),
        "credit": commit.Credit(threshold),
        "LocalLeap": commit.LocalLeap(threshold, 0.75 * threshold),
    }


def delimiters_of(model: LanguageModel) -> tuple[int, ...]:
    """Return the tokens of a full stop, a comma and a newline, where each is one token; none without a tokenizer."""
    if model.tokenizer is None:
        return ()
    encoded = [model.tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in (".", ",", "\n")]
    return tuple(ids[0] for ids in encoded if len(ids) == 1)


def ranked(control: Control, fixed: commit.Commit, *, threshold: float) -> dict[str, DecodingPlan]:
    """Return the systems that rank by attention, under a control.

    Args:
        control: see there.
        fixed: the commit rule of those that are not about committing.
        threshold: probability that a token needs where dependence chooses, as everywhere in the table.
    """
    dual = Blockwise()
    focus = Evict(keep=0.5, score="attention", pool=1, span=4, delay=0, prompt_only=True, control=control)
    return {
        "FOCUS": DecodingPlan(fixed, recompute=Focus(control=control)),
        "d2Cache": DecodingPlan(fixed, recompute=D2Cache(control=control)),
        "Elastic-Cache": DecodingPlan(fixed, recompute=Elastic(control=control)),
        "Sparse-dLLM": DecodingPlan(fixed, recompute=dual, visible=Evict(keep=0.5, control=control)),
        "Focus-dLLM": DecodingPlan(fixed, recompute=dual, visible=focus),
        "DAPD": DecodingPlan(Independent(threshold, control=control)),
    }


REFERENCE = {
    "Focus-dLLM": "sinks in"
}  # the setting of the control that a system has as it is published, where it is not the usual


def published(*, threshold: float, fixed: commit.Commit, delimiters: tuple[int, ...] = (), logit_shift: int = 0) -> list[System]:
    """Return every system, one choice away from its rival: settings that both have are equal.

    Args:
        threshold: of the commit rules that have one; `LOOSE` for systems that revise what they wrote.
        fixed: the commit rule of systems that are about something else.
        delimiters: token ids at which blocks may end; without them AdaBlock is left out.
        logit_shift: of the model; WINO's shadows stand where their token is predicted, so it is left out where there is a shift.
    """
    found = [System(name, DecodingPlan(rule), "threshold", "commit") for name, rule in commits_by(threshold).items()]
    found[0] = replace(found[0], rival="plain sampler")
    found += [System("certainty prior", DecodingPlan(commit.CertaintyPrior(per_block=fixed.steps)), "all, fixed", "commit")]
    found += [System("all, fixed", DecodingPlan(fixed), "plain sampler", "commit")]
    revised: dict[str, remask.Remask] = {"token to mask": remask.TokenToMask(), "top over all": remask.TopOverAll()}
    found += [System(name, DecodingPlan(fixed, rule), "all, fixed", "remask") for name, rule in revised.items()]
    loose, base = Threshold(LOOSE), f"threshold {LOOSE:g}"
    found += [System(base, DecodingPlan(loose), "plain sampler", "commit")]
    found += [System("LLaDA 2.1 edits", DecodingPlan(loose, remask.Edit()), base, "remask")]
    wide = remask.WideIn(LOOSE)
    found += [System("wide-in", DecodingPlan(wide), base, "commit")]
    if not logit_shift:
        found += [System("WINO", DecodingPlan(wide, remask.NarrowOut(), remask.Shadows()), "wide-in", "remask")]
    ends: dict[str, remask.BlockEnds] = {"When to Commit": remask.WhereFutureAgrees()}
    if delimiters:
        ends["AdaBlock"] = remask.AtDelimiter(delimiters)
    found += [
        System(name, DecodingPlan(Threshold(threshold), ends=rule), "threshold", "block ends") for name, rule in ends.items()
    ]
    computed: dict[str, Callable[[], Recompute]] = {
        "prefix": lambda: Blockwise(kind="prefix"),
        "dual": Blockwise,
        "dLLM-Cache": lambda: Adaptive(0.25, 4),
        "dKV-Cache": recompute.Delayed,
        "vicinity": recompute.Vicinity,
    }
    found += [System(name, DecodingPlan(fixed, recompute=make()), "all, fixed", "recompute") for name, make in computed.items()]
    found += [System("predicted queries", DecodingPlan(fixed, recompute=recompute.Predicted()), "dual", "recompute")]
    for name in ranked(Control(), fixed, threshold=threshold):
        plan = ranked(Control(REFERENCE.get(name, "as they fall")), fixed, threshold=threshold)[name]  # type: ignore[arg-type]
        rival = "threshold" if name == "DAPD" else "dual"
        choice = {"DAPD": "commit", "Sparse-dLLM": "visible", "Focus-dLLM": "visible"}.get(name, "recompute")
        found.append(System(name, plan, rival, choice))
    mage = Evict(keep=0.5, score="attention", pool=1, delay=0)
    found += [System("MAGE", DecodingPlan(fixed, recompute=Blockwise(), visible=mage), "dual", "visible")]
    for tail, name in ((None, "suffix cut"), ("last", "suffix, last place"), ("middle", "suffix, another place")):
        shown = Visible(suffix_tokens=4, tail=tail)
        found.append(System(name, DecodingPlan(fixed, visible=shown), "suffix cut" if tail else "all, fixed", "visible"))
    return [*found, *(System(f"FreeDave, {count} drafts", Speculation(count), "plain sampler", "lossless") for count in (2, 4))]
