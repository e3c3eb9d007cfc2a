"""The Python of the docs runs as it stands there, on a tiny checkpoint in the place of the embedded model."""

import re
from pathlib import Path

import pytest

from lib.commands import command
from lib.core.environment import ROOT
from recipes import rehearsal_models

PAGES = {
    page: (ROOT / page).read_text(encoding="utf-8") for page in ("docs/library.md", "docs/checkpoints.md", "docs/commands.md")
}
BLOCKS = [block for text in PAGES.values() for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
CALLS = re.findall(r"^sinks (\w+)", PAGES["docs/commands.md"], re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[-1][:40] for block in BLOCKS])
def test_a_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SINKS_CWD", raising=False)
    rehearsal_models.write(tmp_path / "tiny", "llada", seed=0)
    code = block.replace("models/reference/dlm", "tiny").replace("Grid(4, 64", "Grid(4, 32")
    assert "tiny" in code
    exec(compile(code, "docs", "exec"), {})
    for folder in (path for path in tmp_path.iterdir() if path.name != "tiny"):
        assert (folder / "tokenizer.json").exists(), "a checkpoint without its tokenizer is half a checkpoint"


def test_the_commands_that_are_shown_are_those_that_there_are() -> None:
    assert list(command.COMMANDS) == CALLS
