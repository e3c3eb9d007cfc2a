"""How text is decoded: the four choices together, what goes with what, and what a decoded text took."""

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor

from lib.core.errors import InputError, require
from lib.decoding.commit import Commit, Quota
from lib.decoding.late_steps import Predictor
from lib.decoding.recompute import Adaptive, Blockwise, Recompute, Vicinity
from lib.decoding.remask import BlockEnds, NarrowOut, Remask, Shadows
from lib.decoding.view import View
from lib.decoding.visible import Visible


@dataclass(frozen=True)
class DecodingPlan:
    """How text is decoded, block by block: the four choices, and how texts and blocks end.

    Attributes:
        commit: which predictions of a pass are written.
        remask: what a pass takes back or changes of what is written in the block; None is nothing.
        recompute: which places a pass computes anew.
        visible: which places the network is given.
        early_stop: end a text when an end token is committed and nothing before it is masked; what follows becomes end tokens.
        late_share: when at most this share of the block is still masked, write the rest at once without another pass.
        late_step: what predicts those tokens; None is the best token of the last pass.
        ends: where blocks end.

    Raises:
        InputError: a value out of range, or options that do not go together.
    """

    commit: Commit = field(default_factory=Quota)
    remask: Remask | None = None
    recompute: Recompute = field(default_factory=Recompute)
    visible: Visible = field(default_factory=Visible)
    early_stop: bool = False
    late_share: float | None = None
    late_step: Predictor | None = field(default=None, repr=False, compare=False)
    ends: BlockEnds = field(default_factory=BlockEnds)

    def __post_init__(self) -> None:
        if self.late_share is not None and not 0 < self.late_share < 1:
            raise InputError(f"late_share must be a share in (0, 1), got {self.late_share}: use 0.25 for a quarter")
        if self.late_step is not None and self.late_share is None:
            raise InputError("late_step must go with late_share, got none: say from which share of masks on it is used")
        rule, remedy = "tokens that are written late must stay", "leave out late_share or remask"
        require(self.late_share is None or self.remask is None, rule, f"{self.remask} with late_share", remedy)
        shadows = isinstance(self.remask, NarrowOut) == isinstance(self.recompute, Shadows)
        require(shadows, "NarrowOut must go with Shadows", f"{self.remask} with {self.recompute}", "set both or none")
        dual = isinstance(self.recompute, Blockwise) and self.recompute == Blockwise()
        rule, remedy = "eviction must go with a dual cache without refresh", "use recompute=Blockwise()"
        require(dual or not self.visible.evicts, rule, f"{self.recompute}", remedy)
        outside = "tokens can be judged where a pass computes them all"
        fits = self.remask is None or isinstance(self.recompute, Adaptive | Blockwise | Vicinity) or not self.recompute.keeps
        require(fits, outside, f"{self.remask} with {self.recompute}", "use a blockwise cache or none")

    @property
    def alone(self) -> bool:
        """Tell whether rows are decoded one by one."""
        return self.remask is not None or self.commit.watches or self.recompute.alone or self.visible.alone or self.ends.alone


@dataclass(frozen=True)
class Decoded:
    """Decoded text and what it took.

    Attributes:
        ids: prompt and new tokens.
        forwards: passes through the network, each for all unfinished rows of the batch at once.
        computed_tokens: query positions that went through the network, summed over rows and passes.
    """

    ids: Int[Tensor, "batch position"]
    forwards: int
    computed_tokens: int


OnPass = Callable[[View], None]  # what is told of every pass, after its guess and before anything is written
