"""The generated blocks of README.md, docs/verdicts.md and the notebooks' titles, from result files and the models' recipes."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lib.core import config, provenance
from lib.core.errors import InputError
from lib.report import cells
from lib.report.results import SIGNS, in_words, interval_text, load_results
from lib.report.tables import significant

PROFILE = "full"  # the only profile with enough prompts, windows and calibrations for a verdict, and whose results git tracks
README, VERDICT_PAGE = "README.md", "docs/verdicts.md"
# What the first page shows of all claims: notebook, key, model.
HEADLINES = (
    ("01", "ar-sinks-stay-first", "smollm2"),
    ("01", "dlm-sinks-move", "dlm"),
    ("02", "blocking-dlm-sinks", "dlm"),
    ("04", "recipe-gains", "dlm"),
    ("04", "sinks-beat-random", "dlm"),
    ("04", "sink-aware-beats-sparsegpt", "dlm"),
    ("05", "prune-first", "dlm"),
    ("06", "cache", "dlm"),
)
HEADLINE_HEADER = ("claim", "verdict", "estimate [95 % interval]", "model", "notebook")
COUNTED = {"points": "documents", "share of documents": "documents", "times": "repeats", "ratio": "repeats"}  # by unit
LOSSES = ("03", "04", "05")  # notebooks whose claims are about held-out windows
DIGEST = "digest"  # the source of claims of a blog post that contradicts the paper, which stand apart
OF_THE_DIGEST = "**Claims of the digest**, a blog post that contradicts the paper:"
HEADER = ("claim", "verdict", "estimate [95 % interval]", "n", "model", "source", "rule", "note")


def headline_block(*, root: Path | None = None) -> str:
    """Write the table of the few claims that the first page shows; one that was not run has no row.

    Args:
        root: folder that holds `results/`; the output folder when None.
    """
    found = {
        (result["number"], claim["key"], claim["model"]): (claim, result)
        for result in load_results(PROFILE, root=root)
        for claim in result["claims"]
    }
    chosen = [found[key] for key in HEADLINES if key in found]
    if not chosen:
        return _nothing_yet()
    table = _markdown_table(HEADLINE_HEADER, [_headline_row(*each) for each in chosen])
    old = {(claim["model"], result["number"]) for claim, result in chosen if claim["model"] in replaced(result, root=root)}
    names = [f"{name} (in {', '.join(sorted(at for of, at in old if of == name))})" for name in sorted({name for name, _ in old})]
    said = f"\n\nOf models since replaced by others of the same name: {', '.join(names)}." if names else ""
    return table + said


def verdict_block(*, root: Path | None = None) -> str:
    """Write the table of all claims, those of the digest in one of their own, and one line a notebook, from the `full` results.

    Args:
        root: folder that holds `results/`; the output folder when None.

    Returns:
        Markdown without the two marks; the same results give the same text.

    Raises:
        InputError: a result file is damaged.
    """
    results = load_results(PROFILE, root=root)
    if not results:
        return _nothing_yet()
    rows: dict[bool, list[tuple[str, ...]]] = {False: [], True: []}
    for result in results:
        for claim in result["claims"]:
            rows[is_of_the_digest(claim)].append(_claim_row(claim, result["number"]))
    parts = [_markdown_table(HEADER, rows[False]) if rows[False] else "No claim has been tested yet."]
    parts += [f"{OF_THE_DIGEST}\n\n{_markdown_table(HEADER, rows[True])}"] if rows[True] else []
    return "\n\n".join([*parts, "\n".join(_notebook_line(result, root) for result in results)])


def models_block(*, root: Path | None = None) -> str:
    """Write what the embedded models are: their weights and the tokens that they were trained on; those alike stand together.

    Args:
        root: folder that holds `models/`; the repository when None.
    """
    folder = (root or config.ROOT) / "models" / "reference"
    alike: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/recipe.json")):
        recipe, measured = (json.loads(each.read_text(encoding="utf-8")) for each in (path, path.with_name("evaluation.json")))
        tokens, base = recipe.get("trained_tokens", recipe.get("tokens")) / 1e6, recipe.get("base")
        size = measured["parameters"] / 1e6
        words = f"{size:.1f} M parameters, {significant(tokens, 2)} M training tokens"
        words = words if base is None else f"{words} beyond those of the weights it began with"
        alike.setdefault(words, []).append(f"`{path.parent.name}`")
    each = [f"{', '.join(names)} ({words}{' each' if len(names) > 1 else ''})" for words, names in alike.items()]
    return f"The embedded models: {'; '.join(sorted(each))}."


def found_block(notebook: str, *, root: Path | None = None) -> str:
    """Write what the `full` run of one notebook found, a sentence a claim, with its commit.

    Args:
        notebook: its name, such as `01_sink_traces`.
        root: folder that holds `results/`; the output folder when None.
    """
    for result in load_results(PROFILE, root=root):
        if result["notebook"] == notebook:
            models = ", ".join(map(in_words, result["models"]))
            where = f"commit {result['commit']}; models: {models}{_replaced_words(result, root, before=', ')}"
            rules = "rules and notes: [verdicts](../docs/verdicts.md)"
            return f"**What the {PROFILE} run found** ({where}; {rules})\n\n{cells.sentences(result['claims'])}"
    return _nothing_yet()


def replaced(result: Mapping[str, Any], *, root: Path | None = None) -> list[str]:
    """Name the embedded models of a run whose folders hold other weights by now.

    Args:
        result: the result file of a notebook.
        root: folder that holds `models/`; the repository when None.
    """
    found = []
    for model in result["models"]:
        path = (root or config.ROOT) / str(model.get("source") or "-") / "evaluation.json"
        if path.is_file():
            now = str(json.loads(path.read_text(encoding="utf-8")).get("fingerprint", ""))
            if not now.startswith(str(model.get("fingerprint") or "")):
                found.append(str(model["name"]))
    return found


def _replaced_words(result: Mapping[str, Any], root: Path | None, *, before: str) -> str:
    """Say which of a run's models were replaced, behind other words; "" when none was."""
    names = replaced(result, root=root)
    return f"{before}since replaced by others of the same name: {', '.join(names)}" if names else ""


BLOCKS: dict[tuple[str, str], Callable[..., str]] = {
    (README, "models"): models_block,
    (README, "headlines"): headline_block,
    (VERDICT_PAGE, "verdicts"): verdict_block,
}


def update(folder: Path, *, root: Path | None = None) -> list[str]:
    """Put the current blocks between their marks.

    Args:
        folder: folder that holds the pages.
        root: folder that holds `results/` and `models/`; the output folder and the repository when None.

    Returns:
        The pages that changed, as paths below `folder`.

    Raises:
        InputError: a page lacks its marks, or a result file is damaged.
    """
    changed = []
    for (page, name), block in _blocks(folder).items():
        path = folder / page
        before, current, after = _parts(path, name)
        text = f"\n{block(root=root)}\n"
        if text != current:
            _put(path, before + _begin(name) + text + _end(name) + after)
            changed.append(page)
    return sorted(set(changed))


def stale(folder: Path, *, root: Path | None = None) -> list[str]:
    """Return the blocks that `update` would change, as `page: block`."""
    blocks = _blocks(folder).items()
    return [f"{page}: {name}" for (page, name), block in blocks if _parts(folder / page, name)[1] != f"\n{block(root=root)}\n"]


def _blocks(folder: Path) -> dict[tuple[str, str], Callable[..., str]]:
    """List all blocks: those of the pages, and one under the title of each notebook that is there."""
    notebooks = sorted((folder / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return {**BLOCKS, **{(f"notebooks/{path.name}", "found"): partial(found_block, path.stem) for path in notebooks}}


def _text(path: Path) -> str:
    """Read a page, of a notebook the first cell."""
    text = path.read_text(encoding="utf-8")
    return "".join(json.loads(text)["cells"][0]["source"]) if path.suffix == ".ipynb" else text


def _put(path: Path, text: str) -> None:
    """Write a page anew, of a notebook the first cell; all else stays byte for byte, as nbformat writes."""
    if path.suffix == ".ipynb":
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"][0]["source"] = text.splitlines(keepends=True)
        text = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    provenance.write_text(path, text)


def _begin(name: str) -> str:
    return f"<!-- {name}:begin -->"


def _end(name: str) -> str:
    return f"<!-- {name}:end -->"


def _nothing_yet() -> str:
    return f"No results yet: `./run_all.sh {PROFILE}` makes them."


def _parts(path: Path, name: str) -> tuple[str, str, str]:
    try:
        text = _text(path)
    except OSError as error:
        raise InputError(f"{path.name} must be a readable file, got {error.strerror}: restore it") from error
    begin, end = _begin(name), _end(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise InputError(f"{path.name} must hold {begin} and {end} once each in this order, got something else: put them in")
    before, rest = text.split(begin)
    block, after = rest.split(end)
    return before, block, after


def _headline_row(claim: dict[str, Any], result: dict[str, Any]) -> tuple[str, ...]:
    link = f"[{result['number']}](notebooks/{result['notebook']}.ipynb)"
    return claim["statement"], _verdict(claim), _estimate(claim), claim["model"], link


def _claim_row(claim: dict[str, Any], number: str) -> tuple[str, ...]:
    return (
        claim["statement"],
        _verdict(claim),
        _estimate(claim),
        counted(claim, number),
        claim["model"],
        claim["source"],
        claim["rule"],
        claim["note"],
    )


def is_of_the_digest(claim: Mapping[str, Any]) -> bool:
    """Tell whether a claim is the blog post's."""
    return claim["source"].startswith(DIGEST)


def counted(claim: Mapping[str, Any], number: str) -> str:
    """Say how many of what the interval of a claim is over.

    Args:
        claim: as recorded.
        number: of its notebook.

    >>> claims = {"key": "blocking-x", "n": 8, "unit": "nats"}, {"key": "x", "n": 8, "unit": "mass"}
    >>> [counted(claim, "02") for claim in claims], counted({"key": "x", "n": 9, "unit": "points"}, "04")
    (['8 windows', '8 prompts'], '9 documents')
    """
    what = COUNTED.get(claim["unit"]) or ("windows" if claim["key"].startswith("blocking-") or number in LOSSES else "prompts")
    return f"{claim['n']} {what}" if claim["n"] else "0"


def _verdict(claim: dict[str, Any]) -> str:
    return f"{SIGNS[claim['verdict']]} **{claim['verdict']}**"


def _estimate(claim: dict[str, Any]) -> str:
    unit = f" {claim['unit']}" if claim["unit"] and claim["estimate"] is not None else ""
    return interval_text(claim["estimate"], claim["interval"]) + unit


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _dense_losses(result: dict[str, Any], root: Path | None) -> str:
    """Say the losses that gains in nats are measured from, "" where no table holds them."""
    for table in result["tables"]:
        if {"model", "method", "loss"} <= set(table["columns"]):
            with ((root or config.output_root()) / table["file"]).open(encoding="utf-8", newline="") as file:
                found = {row["model"]: row["loss"] for row in csv.DictReader(file) if row["method"] == "dense"}
            said = ", ".join(f"`{model}` {significant(float(loss))}" for model, loss in found.items())
            return f"; loss of the dense models, nats per token: {said}" if found else ""
    return ""


def _notebook_line(result: dict[str, Any], root: Path | None) -> str:
    name = result["notebook"]
    counts = ", ".join(
        f"{len(result[kind])} {kind if len(result[kind]) != 1 else kind[:-1]}" for kind in ("tables", "figures", "claims")
    )
    old = _replaced_words(result, root, before="; models ")
    links = f"[numbers](../results/{PROFILE}/{name}.json), [figures](../figures/{PROFILE})"
    made = f"{PROFILE}, commit {result['commit']}: {counts}; {links}{_dense_losses(result, root)}{old}"
    return f"- [Notebook {result['number']}](../notebooks/{name}.ipynb), {result['title']} ({made})"
