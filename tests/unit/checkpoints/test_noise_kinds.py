"""The noise that a configuration states: read, refused, kept by every way of saving."""

from pathlib import Path
from typing import Any

import pytest

from lib.checkpoints import facts
from lib.checkpoints.facts import MASKED, NoiseKind
from lib.checkpoints.families import FAMILIES
from lib.core.errors import InputError
from lib.models import export, loading, streaming
from lib.models.gguf import export as gguf_export
from tests import tiny

WANTED = {
    "masked": (MASKED, tiny.MASK),
    "uniform": (NoiseKind("uniform", 1.0, tiny.MASK), None),
    "mixed": (NoiseKind("mixed", 0.1), tiny.MASK),
}


@pytest.mark.parametrize("kind", WANTED)
def test_the_noise_is_read_kept_and_told(kind: str, tmp_path: Path) -> None:
    model = tiny.of_noise(tmp_path / "first", kind)
    streamed = streaming.load(tmp_path / "first")
    again = loading.load(export.save_plain(model, tmp_path / "plain"))
    third = loading.load(export.save_plain(streamed, tmp_path / "streamed"))
    for found in (model, streamed, again, third):
        assert (found.noise, found.mask_token_id) == WANTED[kind]
    words = {"masked": "masked diffusion", "uniform": "uniform diffusion", "mixed": "mixed (uniform 0.1) diffusion"}
    assert model.describe()["kind"] == words[kind]


def test_uniform_noise_needs_no_mask_token(tmp_path: Path) -> None:
    tiny.folder(tmp_path, causal=False)
    tiny.edit_config(tmp_path, noise={"kind": "uniform"}, mask_token_id=None)
    model = loading.load(tmp_path)
    assert (model.noise, model.mask_token_id) == (NoiseKind("uniform", 1.0), None)
    with pytest.raises(InputError, match="must name its mask token, got none"):
        loading.load(tiny.edit_config(tmp_path, noise={"kind": "mixed", "uniform": 0.1}))


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        ({"kind": "gaussian"}, "whose kind is one of masked, uniform, mixed, got {'kind': 'gaussian'}"),
        ("uniform", "noise must be a table"),
        ({"kind": ["mixed"]}, "noise must be a table"),
        ({"kind": "mixed"}, "mixed noise must state kind and uniform"),
        ({"kind": "uniform", "uniform": 1.0}, "uniform noise must state kind, got"),
        ({"kind": "mixed", "uniform": 10}, r"must be in \(0, 1\), got 10"),
        ({"kind": "mixed", "uniform": "0.1"}, r"must be in \(0, 1\), got '0.1'"),
        ({"kind": "mixed", "uniform": True}, r"must be in \(0, 1\), got True"),
    ],
)
def test_other_noises_are_refused_in_one_line(noise: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as caught:
        loading.load(tiny.edit_config(tiny.folder(tmp_path, causal=False), noise=noise))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_noise_must_fit_the_attention(tmp_path: Path) -> None:
    said: dict[str, Any] = {"noise": {"kind": "uniform"}, "mask_token_id": 7}
    given: dict[str, Any] = {"vocabulary": 100, "folder": Path("there"), "generation": {}}
    with pytest.raises(InputError, match="attention by blocks must go with masked noise"):
        facts.read(said, FAMILIES["sdar"], None, **given)
    with pytest.raises(InputError, match="noise must be that of a diffusion model"):
        facts.read(said, FAMILIES["llama"], None, **given)
    # a plain folder that says its noise, but not whether it is causal, is not taken for an autoregressive one
    raw = tiny.edit_config(tiny.folder(tmp_path), noise={"kind": "uniform"}, is_causal=None)
    with pytest.raises(InputError, match="must say whether it is one, got noise"):
        loading.load(raw)


@pytest.mark.parametrize("kind", tiny.NOISES)
def test_what_cannot_write_so_is_no_target(kind: str, tmp_path: Path) -> None:
    model = tiny.of_noise(tmp_path / "model", kind)
    with pytest.raises(InputError, match=f"llama.cpp must write by filling masks in, got {kind}"):
        gguf_export.save_gguf(model, tmp_path / "model.gguf")
