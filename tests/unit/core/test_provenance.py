import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from lib.core import config, provenance, python_code


def write_notebook(path: Path, code: str, **changes: object) -> Path:
    cell = {"cell_type": "code", "source": code, "metadata": {}, "outputs": [], "execution_count": None} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small repository: one notebook that reaches two of three modules."""
    root = tmp_path / "project"
    (root / "lib" / "core").mkdir(parents=True)
    (root / "data").mkdir()
    (root / "lib" / "__init__.py").write_text("")
    (root / "lib" / "upper.py").write_text("def f():\n    from lib import lower\n    from lib.core import config\n")
    (root / "lib" / "core" / "__init__.py").write_text("")
    (root / "lib" / "core" / "config.py").write_text("")
    (root / "lib" / "lower.py").write_text("x = 1\n")
    (root / "lib" / "other.py").write_text("x = 1\n")
    (root / "data" / "text.txt").write_text("text")
    (root / "model").mkdir()
    (root / "model" / "weights").write_bytes(b"1")
    write_notebook(root / "notebooks" / "01_first.ipynb", "from lib.upper import f\nread('text')")
    write_notebook(root / "notebooks" / "02_second.ipynb", "import lib.other")
    return root


def fingerprint(root: Path, **changes: object) -> str:
    settings = {"seed": 0, "first": {"prompts": 1}, "second": {"prompts": 1}, "models": {"a": {"source": "model"}}} | changes
    return provenance.fingerprint(root / "notebooks" / "01_first.ipynb", config=settings, root=root)


def test_fingerprint_is_the_same_in_every_folder(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "clone"
    shutil.copytree(project, copy)
    assert fingerprint(copy) == fingerprint(project)


@pytest.mark.parametrize(
    "name", ["lib/upper.py", "lib/lower.py", "lib/core/__init__.py", "data/text.txt", "model/weights", "notebooks/01_first.ipynb"]
)
def test_every_input_moves_the_fingerprint(project: Path, name: str) -> None:
    before = fingerprint(project)
    path = project / name
    if path.suffix == ".ipynb":
        write_notebook(path, "from lib.upper import f  # changed")
    else:
        path.write_bytes(path.read_bytes() + b"\nchanged = 1")
    assert fingerprint(project) != before


@pytest.mark.parametrize(
    "name",
    ["lib/other.py", "lib/core/config.py", "data/unnamed.txt", "data/README.md", "model/README.md", "notebooks/02_second.ipynb"],
)
def test_what_cannot_change_a_number_does_not_move_it(project: Path, name: str) -> None:
    before = fingerprint(project)
    path = project / name
    content = path.read_text() if path.exists() else ""
    path.write_text(content + "\n# changed\n")
    (project / "lib" / "__pycache__").mkdir(exist_ok=True)
    (project / "lib" / "__pycache__" / "upper.pyc").write_bytes(b"x")
    assert fingerprint(project) == before


def test_data_count_by_name_or_by_their_folder(project: Path) -> None:
    (project / "data" / "sets").mkdir()
    (project / "data" / "sets" / "unnamed.txt").write_text("1")
    before = fingerprint(project)
    (project / "lib" / "lower.py").write_text("FOLDER = 'sets'\n")
    named = fingerprint(project)
    (project / "data" / "sets" / "unnamed.txt").write_text("2")
    assert len({before, named, fingerprint(project)}) == 3
    (project / "data" / "text.txt").rename(project / "data" / "texts.txt")
    gone = fingerprint(project)
    (project / "data" / "texts.txt").write_text("2")
    assert fingerprint(project) == gone  # "text" is another word


def test_settings_count_but_not_those_of_another_notebook(project: Path) -> None:
    assert fingerprint(project, seed=1) != fingerprint(project)
    assert fingerprint(project, first={"prompts": 2}) != fingerprint(project)
    assert fingerprint(project, second={"prompts": 2}) == fingerprint(project)


def test_missing_model_differs_from_present_one(project: Path) -> None:
    with_model = fingerprint(project)
    shutil.rmtree(project / "model")
    assert fingerprint(project) != with_model


def test_extra_models_count(project: Path) -> None:
    (project / "extra").mkdir()
    (project / "extra" / "weights").write_bytes(b"1")
    settings = {"prompts": 1, "extra_models": ["extra"]}
    before = fingerprint(project, first=settings)
    (project / "extra" / "weights").write_bytes(b"2")
    assert fingerprint(project, first=settings) != before


def test_a_model_counts_that_lies_where_the_command_was_typed(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = tmp_path / "typed"
    typed.mkdir()
    monkeypatch.setenv("SINKS_CWD", str(typed))
    (typed / "mine").mkdir()
    (typed / "mine" / "weights").write_bytes(b"1")
    chosen: list[dict[str, object]] = [
        {"first": {"prompts": 1, "extra_models": ["mine"]}}, {"models": {"a": {"source": "mine"}}}
    ]  # fmt: skip
    before = [fingerprint(project, **settings) for settings in chosen]
    (typed / "mine" / "weights").write_bytes(b"2")
    assert all(fingerprint(project, **settings) != old for settings, old in zip(chosen, before, strict=True))


def test_a_model_of_links_counts_by_what_they_lead_to(project: Path, tmp_path: Path) -> None:
    """As the hub's cache keeps a checkpoint, and as somebody who shares weights between folders does."""
    blob, folder = tmp_path / "blobs" / "1f", tmp_path / "snapshots" / "abc"
    for made in (blob, folder / "weights"):
        made.parent.mkdir(parents=True)
    blob.write_bytes(b"1")
    (folder / "weights").symlink_to(blob)
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        settings = {"prompts": 1, "extra_models": [str(path)]}
        blob.write_bytes(b"1")
        before = fingerprint(project, first=settings)
        blob.write_bytes(b"2")
        assert fingerprint(project, first=settings) != before


def test_notebook_outputs_do_not_count_but_tags_do(tmp_path: Path) -> None:
    path = tmp_path / "01_a.ipynb"
    plain = provenance.notebook_source_hash(write_notebook(path, "x = 1"))
    executed = write_notebook(
        path, "x = 1", execution_count=3, outputs=[{"output_type": "stream", "name": "stdout", "text": "1"}]
    )
    assert provenance.notebook_source_hash(executed) == plain
    assert provenance.notebook_source_hash(write_notebook(path, ["x = ", "1"])) == plain  # type: ignore[arg-type]
    assert provenance.notebook_source_hash(write_notebook(path, "x = 1", metadata={"tags": ["parameters"]})) != plain


def test_a_notebook_that_is_not_plain_python_reaches_everything(tmp_path: Path, project: Path) -> None:
    path = write_notebook(tmp_path / "01_a.ipynb", "!ls")
    assert set(provenance.modules_reached(path, lib=project / "lib")) == set((project / "lib").rglob("*.py"))


def test_what_only_people_read_in_a_module_does_not_count(project: Path) -> None:
    before, path = fingerprint(project), project / "lib" / "lower.py"
    path.write_text('"""What it is."""\n\n# why\nx = 1  # how\n')
    assert fingerprint(project) == before
    path.write_text("x = '# why'\n")
    assert fingerprint(project) != before


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ('"""One\n# two\n"""\nx = 1\n', "x = 1"),
        ('class A:\n    """What."""\n\n    y = """kept\n# kept"""  # gone\n', 'class A:\n    y = """kept\n# kept"""'),
        ("f('text')  # gone\n'text'\n", "f('text')"),
        ("x = (  # a\n    'text',  # b\n)\n", "x = (\n    'text',\n)"),
        ("x = f'{1:#x} # kept'\n", "x = f'{1:#x} # kept'"),
        ("if True:\n    x = 1\n'text'\n", "if True:\n    x = 1"),
        ('x = """a\n\n  b """  # gone\n\ny = 1\n', 'x = """a\n\n  b """\ny = 1'),
        ("x = (\n", "x = (\n"),
        ("x = 'a\\x0c'\n\x0c\ny = '\u2028'  # why\n", "x = 'a\\x0c'\ny = '\u2028'"),
    ],
)
def test_code_is_what_is_left_without_comments_and_docstrings(source: str, code: str) -> None:
    assert python_code.code_only(source) == code


@pytest.mark.parametrize(
    "path", sorted(provenance.LIB.rglob("*.py")), ids=lambda path: path.relative_to(provenance.LIB).as_posix()
)
def test_code_alone_is_the_same_program(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert program(with_bodies(python_code.code_only(source))) == program(source)


def with_bodies(code: str) -> str:
    """Code in which what had a docstring alone has a body again."""
    found, lines = [], [*code.splitlines(), ""]
    for line, following in pairwise(lines):
        found.append(line)
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith(("def ", "class ")) and line.endswith(":") and not following.startswith(" " * (indent + 1)):
            found.append(" " * (indent + 4) + "pass")
    return "\n".join(found)


def program(source: str) -> str:
    """The syntax tree of some code without its bare texts."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            kept = [part for part in node.body if not isinstance(part, ast.Expr) or not isinstance(part.value, ast.Constant)]
            node.body = kept or [ast.Pass()]
    return ast.dump(tree)


def test_folder_hash_knows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    first = provenance.folder_hash([tmp_path / "b", tmp_path / "a"], tmp_path)
    assert first == provenance.folder_hash([tmp_path / "a", tmp_path / "b"], tmp_path)
    (tmp_path / "a").write_text("2")
    (tmp_path / "b").write_text("1")
    assert provenance.folder_hash([tmp_path / "a", tmp_path / "b"], tmp_path) != first


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    provenance.write_text(path, "old")

    def fail() -> None:
        with provenance.replacing(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_kill_in_mid_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    provenance.write_text(path, "old")
    code = (
        "import os, signal, sys; from lib.core import provenance\n"
        "with provenance.replacing(sys.argv[1]) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=config.ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir() if provenance.PARTIAL not in entry.name] == ["table.csv"]


def test_written_files_have_usual_permissions(tmp_path: Path) -> None:
    provenance.write_text(tmp_path / "new" / "a.csv", "1")
    (tmp_path / "b.csv").write_text("1")
    assert os.stat(tmp_path / "new" / "a.csv").st_mode == os.stat(tmp_path / "b.csv").st_mode


def test_json_is_stable_and_refuses_nan(tmp_path: Path) -> None:
    provenance.write_json(tmp_path / "a.json", {"b": 1, "a": [2]})
    provenance.write_json(tmp_path / "b.json", {"a": [2], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        provenance.write_json(tmp_path / "c.json", float("nan"))
    assert not (tmp_path / "c.json").exists()


def test_versions_need_no_heavy_import() -> None:
    code = "import sys; from lib.core import provenance; provenance.versions(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, check=True)
    assert {"python", "torch", "numpy", "transformers"} <= set(provenance.versions())


def test_commit_names_what_the_code_is_of(tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(tmp_path)]
    for folder in ("lib", "results"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text("1")
    assert provenance.commit(tmp_path) == "unknown"
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout[:12]
    (tmp_path / "results" / "a").write_text("2")
    assert provenance.commit(tmp_path) == head
    (tmp_path / "lib" / "a").write_text("2")
    assert provenance.commit(tmp_path) == f"{head}+"
    assert provenance.commit(tmp_path / "lib") == "unknown"  # unpacked inside of somebody's other repository
