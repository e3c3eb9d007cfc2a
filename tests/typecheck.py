"""The checks that every function of lib gets under pytest: types by beartype, shapes by jaxtyping where arrays are annotated."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

ARRAYS = re.compile(r"jaxtyping|\b(?:Bool|Complex|Float|Inexact|Int|Integer|Num|Real|Shaped|UInt8)\[")
QUOTED = re.compile(r"^'|\['|ForwardRef")  # names that are imported for type checkers alone, which beartype would look for
thorough = jaxtyping.jaxtyped

# As type checkers do, an int passes where a float is asked for.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def sparing(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """Decorate as `jaxtyping.jaxtyped` does, but bind shapes only where annotations name arrays, and once a call.

    A function within a function that takes none is left alone: it would be taken apart anew for every call of the outer one.
    """

    def decorate(made: Any) -> Any:
        said = [] if isinstance(made, type) else [repr(annotation) for annotation in made.__annotations__.values()]
        late = not isinstance(made, type) and inspect.isgeneratorfunction(made)  # its body runs after the call, shapes and all
        if isinstance(made, type) or late or any(map(QUOTED.search, said)):
            return thorough(made, typechecker=typechecker)
        if any(map(ARRAYS.search, said)):
            return thorough(typechecker(made), typechecker=None)
        return made if "<locals>" in made.__qualname__ else typechecker(made)

    return decorate
