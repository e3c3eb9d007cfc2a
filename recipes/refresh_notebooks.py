"""Execute the notebooks in place with their defaults, strip what changes from run to run, update the pages' verdicts.

Each notebook's metadata say what its outputs were computed from, so that a test notices stale ones.

Run `python -m recipes.refresh_notebooks`, or with numbers (`01 04`) for some of them. Run twice on one machine, it gives the same
bytes, so that a difference in a commit is a difference in results.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from lib.core import config, provenance, variables
from lib.launch import lanes
from lib.report import markdown, results
from recipes.pages import marks

KEPT_METADATA = ("tags",)
LANGUAGE = {"name": "python"}


def execute(path: Path) -> Any:
    """Run a notebook in its folder, as JupyterLab and nbval do.

    Args:
        path: the notebook.

    Returns:
        The executed notebook node.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name=notebook.metadata.kernelspec.name,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    client.execute()
    return notebook


def inputs_of(path: Path) -> dict[str, Any]:
    """Say what the outputs of a notebook that was just executed were computed from.

    Args:
        path: the notebook.

    Returns:
        Profile, seed, overrides and fingerprint, as its run recorded them.

    Raises:
        InputError: the run wrote no result file.
    """
    result = results.read_result(config.output_root() / "results" / "quick" / f"{path.stem}.json")
    return {key: result[key] for key in ("profile", "seed", "overrides", "fingerprint")}


def strip_(notebook: Any) -> None:
    """Take out of a notebook, in place, what has no meaning for a reader: times, versions, ids, messages on stderr.

    Args:
        notebook: an executed notebook node; outputs, counts and tags stay.
    """
    kernel = notebook.metadata.get("kernelspec", {})
    display = {"display_name": "Python 3", "language": "python", "name": kernel.get("name", "python3")}
    notebook.metadata = nbformat.from_dict({"kernelspec": display, "language_info": LANGUAGE})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index + 1:02d}"
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in KEPT_METADATA if key in cell.metadata})
        if cell.cell_type == "code":
            cell.outputs = [_stripped(output) for output in _joined(cell.outputs) if output.get("name") != "stderr"]


def _joined(outputs: list[Any]) -> list[Any]:
    """Join neighbouring pieces of one stream: where a stream is cut depends on timing."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last is not None and output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _stripped(output: Any) -> Any:
    """Keep what an output shows and its text for those who cannot see it; of a whole page in a frame, the name of its file."""
    if "metadata" in output:
        alt = {kind: {"alt": said["alt"]} for kind, said in output.metadata.items() if isinstance(said, dict) and "alt" in said}
        output.metadata = nbformat.from_dict(alt)
    if "<iframe srcdoc=" in output.get("data", {}).get("text/html", ""):
        del output.data["text/html"]
    return output


def refresh(path: Path) -> bool:
    """Execute a notebook and put the result in its place in one step.

    Args:
        path: the notebook.

    Returns:
        Whether the file changed.
    """
    before = path.read_bytes()
    notebook = execute(path)
    strip_(notebook)
    notebook.metadata["sinks"] = nbformat.from_dict(inputs_of(path))
    nbformat.validate(notebook)
    after = (nbformat.writes(notebook).rstrip("\n") + "\n").encode()
    if after != before:
        provenance.write_bytes(path, after)
    return after != before


def refresh_each(numbers: list[str]) -> int:
    """Refresh notebooks in processes of their own, as many at one time as the launcher runs, with as many threads each.

    Returns:
        Exit code, 0 when all succeeded.
    """
    threads = lanes.threads_given()
    beside = [number for number in numbers if number not in lanes.ALONE]
    at_once = lanes.lanes_for(len(beside), threads=threads, has_gpu=False)

    def run(number: str) -> int:
        own = threads if number in lanes.ALONE else threads // at_once
        environ = {**os.environ, "OMP_NUM_THREADS": str(own)}
        words = [sys.executable, "-m", "recipes.refresh_notebooks", "--outputs-only", number]
        return subprocess.run(words, env=environ, check=False).returncode

    with ThreadPoolExecutor(at_once) as pool:
        failed = list(pool.map(run, beside))
    failed += [run(number) for number in numbers if number in lanes.ALONE]
    return int(any(failed))


def main(arguments: list[str] | None = None) -> int:
    """Refresh the notebooks named on the command line, or all.

    Args:
        arguments: numbers; those of the process when None.

    Returns:
        Exit code.
    """
    known = config.notebooks()
    parser = argparse.ArgumentParser(prog="python -m recipes.refresh_notebooks", description=__doc__)
    parser.add_argument("numbers", nargs="*", help="such as 01 04; default: all")
    parser.add_argument("--outputs-only", action="store_true", help="leave the generated blocks alone")
    given = parser.parse_args(arguments)
    chosen = given.numbers or list(known)
    for number in chosen:
        if number not in known:
            parser.error(f"numbers must be among {', '.join(known)}, got {number!r}")
    # In force for the kernels, which inherit them.
    os.environ.update(variables.settings())
    failed = 0
    if len(chosen) > 1:
        failed = refresh_each(chosen)
    else:
        changed = refresh(known[chosen[0]])
        sys.stdout.write(f"{known[chosen[0]].name}: {'changed' if changed else 'unchanged'}\n")
    # Once all are written, or one would undo another.
    for page in [] if given.outputs_only else [*markdown.update(config.ROOT), *marks.update(config.ROOT)]:
        sys.stdout.write(f"{page}: changed\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
