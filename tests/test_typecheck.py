"""The checker of the test run: it finds wrong shapes and types, also of what is returned and of fields."""

from typing import cast

import jaxtyping
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from torch import Tensor

from lib.attention import sinks
from lib.diffusion import traces
from lib.evaluation.components import Components
from tests.typecheck import checked, sparing


def turned(x: Float[Tensor, "a b"]) -> Float[Tensor, "b a"]:
    """Say that it turns a matrix, and return it as it is."""
    return x


def test_wrong_shapes_and_types_are_found_in_lib() -> None:
    with pytest.raises(BeartypeCallHintViolation):
        sinks.aggregate(torch.zeros(3, 4))  # [layer, batch, head, key]
    with pytest.raises(BeartypeCallHintViolation):
        sinks.per_viewer(torch.ones(2, 5), torch.ones(4, dtype=torch.int64))  # one axis of two lengths
    with pytest.raises(BeartypeCallHintViolation):
        sinks.aggregate(torch.zeros(1, 2, 3, 4, dtype=torch.int64))
    with pytest.raises(BeartypeCallHintViolation):
        traces.mark_steps(cast(int, "56"))  # no arrays in its annotations
    with pytest.raises(jaxtyping.TypeCheckError):
        Components(1.0, 2.0, 3.0, 4.0, cast(float, "5"))


def test_what_is_returned_has_the_shape_that_the_arguments_give_it() -> None:
    decorated = sparing(typechecker=checked)(turned)
    assert decorated(torch.ones(2, 2)).shape == (2, 2)
    with pytest.raises(BeartypeCallHintViolation):
        decorated(torch.ones(2, 3))
