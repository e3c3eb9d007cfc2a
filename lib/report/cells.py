"""What a notebook shows beside its code: pictures with a text, sentences, and how long its long cells will take."""

import base64
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.core import config, runtime
from lib.report.results import claim_sentence

LONG_SECONDS = 10.0


def sentences(claims: Sequence[Mapping[str, Any]]) -> str:
    """Write claims as a Markdown list, a sentence each."""
    return "\n".join([f"- {claim_sentence(claim)}" for claim in claims] or ["- It records no claim."])


def show_image(kind: str, data: bytes, text: str, *, alt: str) -> None:
    """Show an image in a notebook, with a text for those who cannot see it.

    The bytes are handed over as they are, not through `plt.show`, which warns without a screen and depends on the back end.

    Args:
        kind: media type.
        data: the file.
        text: where no image can be shown.
        alt: what the image says.
    """
    show({kind: base64.b64encode(data).decode(), "text/plain": text}, metadata={kind: {"alt": alt}})


def show(data: Mapping[str, str], *, metadata: Mapping[str, Any] | None = None) -> None:
    """Show something in a notebook, by media type; elsewhere do nothing."""
    shell = _shell()
    if shell is not None:
        sys.modules["IPython"].display.display(dict(data), raw=True, metadata=metadata)


def announce(name: str, profile: str) -> None:
    """Let a notebook that somebody watches say before each long cell about how long it takes.

    The seconds are those of the last run from the command line on this machine; before there is one, the page of profiles
    says how long the whole notebook took where it was measured. Nothing is said where nobody watches, so that nothing of it
    stays in outputs.

    Args:
        name: of the notebook.
        profile: that is run.
    """
    shell = _shell()
    if shell is None or not runtime.is_watched():
        return
    known = cell_seconds(config.output_root() / "runs" / profile / f"{name}.ipynb")
    total = f"{sum(known.values()):.0f} s here, last time" if known else documented(profile, name[:2])
    sys.stderr.write(f"expected for the whole notebook: {total}\n")

    def before(info: Any) -> None:
        """Look a cell up by what it says."""
        seconds = known.get(str(info.raw_cell).strip(), 0.0)
        if seconds >= LONG_SECONDS:
            sys.stderr.write(f"expected for this cell: about {seconds:.0f} s\n")

    for earlier in [each for each in shell.events.callbacks["pre_run_cell"] if each.__qualname__ == before.__qualname__]:
        shell.events.unregister("pre_run_cell", earlier)  # the setup cell was run again
    shell.events.register("pre_run_cell", before)


def cell_seconds(executed: Path) -> dict[str, float]:
    """Read how long each cell of an executed copy took, by its source; empty where there is none."""
    try:
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
        return {
            "".join(cell["source"]).strip(): float(cell["metadata"]["papermill"]["duration"] or 0)
            for cell in cells
            if cell["cell_type"] == "code" and "papermill" in cell["metadata"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def documented(profile: str, number: str) -> str:
    """Return what the page of profiles says a notebook takes.

    >>> documented("full", "01").endswith(", by docs/profiles.md")
    True
    >>> documented("no such profile", "01")
    'not known'
    """
    text = (config.ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{profile}` \|(.*)\|$", text, re.MULTILINE)
    cells = [cell.strip() for cell in row.group(1).split("|")] if row else []
    place = int(number)  # after the column of models
    return f"{cells[place]}, by docs/profiles.md" if len(cells) > place else "not known"


def _shell() -> Any:
    """Return the running IPython, if there is one."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()
