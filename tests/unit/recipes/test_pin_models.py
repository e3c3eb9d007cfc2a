"""Pinning: revisions change, everything else in the file stays."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from lib.core.config import ROOT
from recipes import pin_models

PAPER = (ROOT / "configs" / "paper.yaml").read_text(encoding="utf-8")


def test_every_hub_checkpoint_of_the_paper_profile_is_pinned_anew() -> None:
    raw = yaml.safe_load(PAPER)
    wanted = [m["source"] for part in (raw["models"], raw["grid"]["models"], raw["grid"]["references"]) for m in part.values()]
    wanted = [source for source in wanted if not source.startswith(("models/", "wheel:"))]
    asked: list[str] = []

    def resolve(source: str) -> str:
        asked.append(source)
        return source.encode().hex()[:40].ljust(40, "0")

    text, said = pin_models.pinned(PAPER, resolve=resolve)
    assert asked == wanted and len(asked) >= 7 and len(said) == len(asked)
    new = yaml.safe_load(text)
    for part in ("models", "references"):
        for model in new["grid"][part].values():
            assert model["revision"] == model["source"].encode().hex()[:40].ljust(40, "0")
    old_words, new_words = PAPER.split(), text.split()
    changed = [(a, b) for a, b in zip(old_words, new_words, strict=True) if a != b]
    assert len(changed) == len(asked) and all(len(b.rstrip("},")) == 40 for _, b in changed)


def test_what_cannot_be_asked_for_keeps_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(source: str) -> str:
        if source == "gone/model":
            raise OSError("401 Client Error\nmore")
        return "b" * 40

    text = "x: {source: gone/model, revision: aa}\ny: {source: o/n, revision: null}\nz: {source: models/here}\n"
    new, said = pin_models.pinned(text, resolve=resolve)
    assert new == text.replace("null", "b" * 40)
    assert said == ["gone/model: kept aa, 401 Client Error", f"o/n: null -> {'b' * 40}"]


def test_check_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("x: {source: o/n, revision: aa}\n")
    before = pin_models.newest
    monkeypatch.setattr(pin_models, "pinned", lambda text: (text.replace("aa", "b" * 40), ["o/n: changed"]))
    assert pin_models.main([str(file), "--check"]) == 0 and file.read_text() == "x: {source: o/n, revision: aa}\n"
    assert pin_models.main([str(file)]) == 0 and file.read_text() == f"x: {{source: o/n, revision: {'b' * 40}}}\n"
    assert capsys.readouterr().out == "o/n: changed\n" * 2 and pin_models.newest is before


def test_offline_nothing_changes() -> None:
    new, said = pin_models.pinned(PAPER)  # the tests run with the hub switched off
    assert new == PAPER and all("kept" in line for line in said)


def test_without_a_network_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="refused"):
        pin_models.newest("o/n")
