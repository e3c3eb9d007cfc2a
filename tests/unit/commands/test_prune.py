"""`sinks prune`, `quantize` and `export` on tiny checkpoints: what they print, write and refuse."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib.commands import command, prune
from lib.models import containers, loading
from lib.pruning import pruner
from tests.unit.commands.conftest import answer

FEW = ["--windows", "4", "--length", "32", "--loss-windows", "3"]


def test_every_method_of_the_help_is_known() -> None:
    assert len({id(prune.method_of(name)) for name in prune.NAMES}) == len(prune.NAMES)
    assert prune.method_of("sink_wanda") == prune.method_of("sink-aware (Wanda)")


@pytest.mark.parametrize(("name", "method"), [("llada", "sink-wanda"), ("dream", "sparsegpt"), ("llama", "sink-wanda")])
def test_prune_writes_what_it_says(
    name: str, method: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answer(capsys, "prune", checkpoints / name, "--method", method, "--sparsity", 0.25, "-o", "out", *FEW)
    assert said["output"] == str(tmp_path / "out")
    written, base = loading.load(tmp_path / "out"), loading.load(checkpoints / name)
    assert (written.family, written.logit_shift) == (base.family, base.logit_shift)
    assert written.tokenizer is not None
    assert said["sparsity"] == pruner.measured_sparsity(written) == pytest.approx(0.25, abs=0.01)
    assert said["loss_after"] == pytest.approx(sum(said["losses_after"]) / 3) and said["loss_after"] != said["loss_before"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "25.00% exact zeros" in card and f"{said['loss_after']:.4g}" in card and f"{said['loss_before']:.4g}" in card
    assert str(checkpoints) not in card
    own = {"llada": "In the layout of its base (llada)", "dream": "In the layout of its base (dream)", "llama": "from_pretrained"}
    assert own[name] in card


def test_a_pattern_holds_and_a_file_calibrates(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.txt").write_text("water boils at some heat and steam goes up. " * 200)
    (tmp_path / "other.txt").write_text("ice melts at some heat and water runs down. " * 200)
    words = ["--pattern", "2:4", "--calibration", "my.txt", "--loss-text", "other.txt"]
    said = answer(capsys, "prune", checkpoints / "llada", "-o", "out", *words, *FEW)
    assert (said["sparsity"], said["pattern"]) == (0.5, "2:4")
    for layer in loading.load(tmp_path / "out").layers:
        assert bool(((layer.module.weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all())
    assert "a file, my.txt" in (tmp_path / "out" / "README.md").read_text()


def test_lines_for_people_hold_sparsity_both_losses_and_an_absolute_path(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["prune", str(checkpoints / "llada"), "--method", "magnitude", "-o", "out", *FEW]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("llada: magnitude, 50.00% of the weights of its linear layers are zero")
    assert lines[1].startswith("loss ") and " -> " in lines[1] and "on 3 windows of articles" in lines[1]
    assert lines[2].startswith(f"wrote {tmp_path / 'out'} (in the layout of llada")
    assert lines[3].startswith("total ")


@pytest.mark.parametrize(
    ("name", "words", "shown"),
    [
        ("dream", ["--bits", "4"], {"GPTQ", "4 bits, symmetric, 32 neighbours share a scale", "windows | 4 of 32"}),
        ("llama", ["--bits", "3", "--nearest"], {"rounding to the nearest", "| calibration | none |"}),
        ("llada", ["--bits", "8", "--prune", "wanda", "--sparsity", "0.25"], {"GPTQ", "Wanda", "25.0% of every", "| order |"}),
    ],
)  # fmt: skip
def test_quantize_writes_a_card_of_what_it_did_and_measured(
    name: str, words: list[str], shown: set[str], checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bits and sizes are those of the files, losses those that are printed; nothing of pruning where nothing was pruned."""
    said = answer(capsys, "quantize", checkpoints / name, *words, "--group", 32, "-o", "q", *FEW)
    card, folder = (tmp_path / "q" / "README.md").read_text(), tmp_path / "q"
    assert not {each for each in shown if each not in card}
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    stored = {key: value for key, value in tensors.items() if key.endswith(("_packed", "_scale"))}
    bits = 8 * sum(value.numel() * value.element_size() for value in stored.values())
    layers = loading.load(folder).layers
    assert said["bits_a_weight"] == bits / sum(layer.module.weight.numel() for layer in layers)
    row = next(line for line in card.splitlines() if line.startswith("| bits a weight |"))
    assert float(row.split("|")[2]) == float(f"{said['bits_a_weight']:.4g}") > said["bits"]
    loss = next(line for line in card.splitlines() if line.startswith("| loss, nats per token |"))
    assert f"| {said['loss_after']:.4g} |" in loss and f"| {said['loss_before']:.4g} |" in loss
    assert ("pruned" in card) == ("sparsity asked for" in card) == ("--prune" in words) and "quantized" in card
    assert str(checkpoints) not in card and "compressed-tensors" in card


def test_codes_go_through_every_form_unchanged(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--bits", "4", "--group", "32", "--prune", "sparsegpt"]
    said = answer(capsys, "quantize", checkpoints / "llada", *words, "-o", "q", *FEW)
    assert said["order"] == "joint" and said["zeros"] >= 0.5
    codes = containers.read_codes(tmp_path / "q")
    assert len(codes) == len(loading.load(tmp_path / "q").layers)
    answer(capsys, "export", "q", "--as", "packed", "-o", "again")
    again = containers.read_codes(tmp_path / "again")
    assert all(torch.equal(codes[name].codes, again[name].codes) and codes[name].bits == again[name].bits for name in codes)
    told = answer(capsys, "export", "q", "--as", "gguf", "-o", "q.gguf")
    assert told["codes"] == told["exact"] == len(codes) and told["tokenizer_mismatch"] == 0.0
    answer(capsys, "export", "q", "--as", "llada", "-o", "own")
    first, second = loading.load(tmp_path / "q"), loading.load(tmp_path / "own")
    assert all(torch.equal(a.module.weight, b.module.weight) for a, b in zip(first.layers, second.layers, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["sparse", "gguf", "packed", "transformers"])
def test_a_rounded_model_computes_the_same_in_every_form(
    form: str, bits: int, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--nearest", "--group", "32", "--prune", "magnitude", "--sparsity", "0.25"]
    answer(capsys, "quantize", checkpoints / "llada", "--bits", bits, *words, "-o", "q", *FEW)
    path = "q.gguf" if form == "gguf" else form
    said = answer(capsys, "export", "q", "--as", form, "-o", path)
    first, second = loading.load(tmp_path / "q"), loading.load(tmp_path / path)
    for one, other in zip(first.layers, second.layers, strict=True):
        found = other.module.weight
        # The folder's scales are bfloat16, and its network rounds codes times scales to that; a GGUF file does not.
        found = found.bfloat16().float() if form == "gguf" else found
        torch.testing.assert_close(found, one.module.weight, rtol=0, atol=0)
    assert said["codes"] == (0 if form == "transformers" else len(first.layers))
    if form == "gguf":
        assert said["exact"] == len(first.layers)


@pytest.mark.parametrize("form", ["transformers", "llada", "sparse"])
def test_a_pruned_model_stays_what_it_is_in_every_form(
    form: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(capsys, "prune", checkpoints / "llada", "--method", "magnitude", "-o", "pruned", *FEW)
    answer(capsys, "export", "pruned", "--as", form, "-o", form)
    first, second = loading.load(tmp_path / "pruned"), loading.load(tmp_path / form)
    assert all(torch.equal(a.module.weight, b.module.weight) for a, b in zip(first.layers, second.layers, strict=True))
    cards = [(tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("pruned", form)]
    assert cards[1].startswith(cards[0].rstrip()) and f"--as {form}" in cards[1]
