"""What lies on disk when `sinks prune` or `quantize` is stopped, and that a loss is held out."""

import shutil
from pathlib import Path

import pytest

from lib.commands import command, session
from tests.unit.commands.conftest import answer

FEW = ["--windows", "4", "--length", "32", "--loss-windows", "3"]
COMMANDS = {"prune": ["--method", "wanda", "-o", "out", *FEW], "quantize": ["--bits", "4", "--group", "32", "-o", "out", *FEW]}


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_what_is_stopped_after_writing_leaves_nothing(
    name: str,
    stop: type[BaseException],
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The weights are written when the second loss begins: a folder with them alone would look done."""
    seen: list[list[str]] = []

    def stopped(*_: object, **__: object) -> None:
        seen.append([path.name for path in tmp_path.iterdir()])
        raise stop("No space left on device" if stop is OSError else "")

    monkeypatch.setattr(session, "reread", stopped)
    code = command.main([name, str(checkpoints / "llada"), *COMMANDS[name]])
    ((hidden,),) = seen
    assert hidden.startswith(".out.") and not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    if stop is KeyboardInterrupt:
        assert code == 130
        assert f"interrupted: {tmp_path / 'out'} was not written and nothing of it is left on disk" in said
    else:
        assert code == 1 and "the disk must have room" in said


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize("copied", [False, True])
def test_a_loss_on_the_text_of_the_calibration_is_refused(
    name: str, copied: bool, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.txt").write_text("water boils at some heat and steam goes up. " * 200)
    other = shutil.copy(tmp_path / "my.txt", tmp_path / "copy.txt") if copied else "my.txt"
    texts = ["--calibration", "my.txt", "--loss-text", str(other)]
    assert command.main([name, str(checkpoints / "llada"), *COMMANDS[name], *texts]) == 2
    assert "--loss-text must be another text than --calibration" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_result_says_how_its_losses_were_measured(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answer(capsys, "prune", checkpoints / "llada", "--method", "magnitude", "-o", "out", "--seed", 3, *FEW)
    told = said["loss_settings"]
    assert (told["text"], told["windows"], told["length"], told["seed"]) == ("articles", 3, 32, 3)
    assert told["dense model"] == said["model"]["fingerprint"]
    assert (tmp_path / "out" / "README.md").is_file()
