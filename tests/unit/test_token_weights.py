"""Token weights: what is taken out, how many, and that controls take out as many as there are sinks."""

import pytest
import torch

from lib import token_weights
from lib.config import InputError
from lib.token_weights import CONTROLS

SCORE = torch.tensor([[0.9, 0.1, 0.8, 0.0, 0.0, 0.2], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
IDS = torch.tensor([[9, 1, 2, 9, 9, 3], [9, 9, 1, 2, 3, 4]])
NORM = torch.tensor([[1.0, 5.0, 2.0, 7.0, 0.5, 3.0], [4.0, 1.0, 9.0, 2.0, 3.0, 0.0]])


def options(seed: int = 0) -> dict[str, object]:
    return {"input_ids": IDS, "mask_token_id": 9, "activation_norm": NORM, "generator": torch.Generator().manual_seed(seed)}


def test_down_and_up_are_mirror_images() -> None:
    assert torch.equal(token_weights.sinks_down(SCORE), 1 - SCORE)
    assert torch.equal(token_weights.sinks_up(SCORE, boost=2.0), 1 + 2 * SCORE)
    with pytest.raises(InputError, match="boost must be positive, got 0"):
        token_weights.sinks_up(SCORE, boost=0.0)


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_take_out_as_many_as_there_are_sinks(control: token_weights.Control) -> None:
    weights = token_weights.control_down(SCORE, control, **options())  # type: ignore[arg-type]
    assert ((weights == 0) | (weights == 1)).all()
    assert (weights == 0).sum(1).tolist() == [2, 1]


def test_each_control_takes_out_its_own_kind() -> None:
    def gone(control: token_weights.Control, seed: int = 0) -> list[list[int]]:
        weights = token_weights.control_down(SCORE, control, **options(seed))  # type: ignore[arg-type]
        return [row.nonzero()[:, 0].tolist() for row in weights == 0]

    assert gone("first") == [[0, 1], [0]]
    assert gone("norm") == [[1, 3], [2]]
    assert all(IDS[row, place] == 9 for row, places in enumerate(gone("mask")) for place in places)
    drawn = {tuple(gone("random", seed)[0]) for seed in range(60)}
    assert len(drawn) > 10  # of 15 pairs


def test_fewer_mask_tokens_than_sinks_are_all_taken_out() -> None:
    score = torch.ones(2, 6)
    weights = token_weights.control_down(score, "mask", **options())  # type: ignore[arg-type]
    assert torch.equal(weights == 0, IDS == 9)


def test_levels_are_averaged_per_window() -> None:
    weight = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]]])
    assert token_weights.average_over_levels(weight).tolist() == [[0.5, 0.0], [0.5, 1.0]]


@pytest.mark.parametrize(
    ("control", "missing"), [("random", "generator"), ("mask", "mask_token_id"), ("norm", "activation_norm")]
)
def test_what_a_control_needs_is_asked_for(control: token_weights.Control, missing: str) -> None:
    with pytest.raises(InputError, match=f"the control {control!r} must be given"):
        token_weights.control_down(SCORE, control, **{**options(), missing: None})  # type: ignore[arg-type]
