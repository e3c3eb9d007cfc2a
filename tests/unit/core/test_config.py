"""Profiles and overrides: what is accepted, and what is refused with one clear line."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from lib.core import config
from lib.core.config import PROFILES, ROOT, ModelSource
from lib.core.errors import InputError
from lib.launch.command import GRID_PROFILES


def keys(value: object, prefix: str = "") -> set[str]:
    """Dotted names of all settings; the models of a profile may differ."""
    if not isinstance(value, dict) or prefix == "models.":
        return {prefix}
    return {name for key, item in value.items() for name in keys(item, f"{prefix}{key}.")}


def raw(profile: str) -> dict:
    return yaml.safe_load((ROOT / "configs" / f"{profile}.yaml").read_text())


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads_and_is_complete(profile: str) -> None:
    loaded = config.load(profile)
    assert loaded.profile == profile
    assert {key for key in keys(raw(profile)) if not key.startswith("grid.")} == keys(raw("quick"))
    assert {key for key in keys(config.to_dict(loaded)) if not key.startswith("grid.")} == keys(raw("quick")) | {"models."}
    assert (loaded.grid is not None) == (profile in GRID_PROFILES) == ("grid" in config.to_dict(loaded))


def test_quick_uses_the_embedded_models() -> None:
    models = config.load("quick").models
    assert models["dlm"] == ModelSource("models/reference/dlm")
    assert models["ar"] == ModelSource("models/reference/ar")


@pytest.mark.parametrize(("profile", "models"), [("paper", (4, 2)), ("laptop", (1, 1))])
def test_every_hub_id_of_a_profile_has_a_full_commit(profile: str, models: tuple[int, int]) -> None:
    loaded = config.load(profile)
    assert loaded.grid is not None and (len(loaded.grid.models), len(loaded.grid.references)) == models
    for source in (*loaded.models.values(), *loaded.grid.models.values(), *loaded.grid.references.values()):
        if not source.source.startswith(("models/", "wheel:")):
            assert len(source.revision or "") == 40


def test_settings_cannot_be_changed() -> None:
    loaded = config.load("quick")
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.seed = 3  # pyright: ignore
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.sink_traces.prompts = 3  # pyright: ignore


def test_overrides_do_not_leak_into_the_next_load() -> None:
    first = config.load("quick")
    config.load("quick", seed=9, overrides={"sink_traces.prompts": 3, "models.dlm.source": "elsewhere"})
    assert config.load("quick") == first


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("sink_traces.prompts", "3", 3),
        ("sink_traces.temperature", "0.5", 0.5),
        ("sink_traces.temperature", "1", 1.0),
        ("sink_traces.temperature", "1.0e-3", 1e-3),
        ("sink_traces.temperature", "1e-3", 1e-3),
        ("sink_traces.temperature", "1E+0", 1.0),
        ("sink_traces.temperature", ".5", 0.5),
        ("sink_traces.prompts", "010", 10),
        ("sink_traces.prompts", "08", 8),
        ("sink_traces.prompts", "+1_000", 1000),
        (
            "sink_traces.extra_models",
            "[2:4, 1:30, yes, off, 2024-01-01, 0x10]",
            ("2:4", "1:30", "yes", "off", "2024-01-01", "0x10"),
        ),
        ("sink_traces.block_length", "null", None),
        ("sink_traces.block_length", "56", 56),
        ("sink_traces.extra_models", "[a, b/c@d]", ("a", "b/c@d")),
    ],
)
def test_an_override_may_be_text_from_the_command_line(key: str, text: str, value: object) -> None:
    got = getattr(config.load("quick", overrides={key: text}).sink_traces, key.split(".")[1])
    assert got == value
    assert type(got) is type(value)


def test_a_file_is_read_as_people_mean_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    text = (ROOT / "configs" / "paper.yaml").read_text()
    for plain, meant in {
        "\nseed: 0 ": "\nseed: 010 ",
        '["2:4", "4:8"]': "[2:4, 4:8]",
        "other_sparsity: 0.5": "other_sparsity: 5e-1",
    }.items():
        assert plain in text
        text = text.replace(plain, meant)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    (tmp_path / "configs" / "paper.yaml").write_text(text)
    loaded = config.load("paper")
    assert loaded.grid is not None and (loaded.seed, loaded.grid.other_sparsity) == (10, 0.5)
    assert loaded.grid.patterns == loaded.pruning_baselines.patterns == ("2:4", "4:8")
    (tmp_path / "configs" / "paper.yaml").write_text(text.replace("keep_weights: false", "keep_weights: no"))
    with pytest.raises(InputError, match=r"grid\.keep_weights must be true or false, got 'no'"):
        config.load("paper")


def test_an_override_may_be_a_value() -> None:
    loaded = config.load("quick", overrides={"seed": 4, "sink_traces.extra_models": ["x"]})
    assert (loaded.seed, loaded.sink_traces.extra_models) == (4, ("x",))


def test_seed_has_the_last_word() -> None:
    assert config.load("quick", seed=7, overrides={"seed": 4}).seed == 7


def test_a_model_may_be_added_or_moved() -> None:
    loaded = config.load("quick", overrides={"models.mine.source": "some/folder", "models.dlm.revision": "abc"})
    assert loaded.models["mine"] == ModelSource("some/folder")
    assert loaded.models["dlm"] == ModelSource("models/reference/dlm", "abc")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"sink_traces.promts": 4}, ["sink_traces.promts", "did you mean 'prompts'"]),
        ({"sink_trace.prompts": 4}, ["sink_trace", "did you mean 'sink_traces'"]),
        ({"sed": 4}, ["'sed'", "did you mean 'seed'"]),
        ({"sink_traces.prompts.more": 4}, ["more dots"]),
        ({"seed.x": 4}, ["more dots"]),
        ({"models.mine.sorce": "x"}, ["models.mine.sorce", "did you mean 'source'"]),
        ({"sink_traces.prompts": "many"}, ["sink_traces.prompts must be a whole number", "'many'"]),
        ({"sink_traces.prompts": 2.5}, ["whole number", "2.5"]),
        ({"sink_traces.prompts": "true"}, ["whole number", "True"]),
        ({"sink_traces.prompts": None}, ["whole number", "None"]),
        ({"sink_traces.temperature": "hot"}, ["sink_traces.temperature must be a number", "'hot'"]),
        ({"sink_traces.temperature": "1e999"}, ["[0.0, 10.0]", "inf"]),
        ({"sink_traces.temperature": ".nan"}, ["must be a number", "'.nan'"]),
        ({"sink_traces.temperature": "1:30"}, ["must be a number", "'1:30'"]),
        ({"sink_traces.prompts": "1:30"}, ["whole number", "'1:30'"]),
        ({"sink_traces.prompts": "0x10"}, ["whole number", "'0x10'"]),
        ({"sink_traces.prompts": "0o17"}, ["whole number", "'0o17'"]),
        ({"sink_traces.prompts": "1e2"}, ["whole number", "100.0"]),
        ({"sink_traces.prompts": "yes"}, ["whole number", "'yes'"]),
        ({"sink_traces.prompts": "9" * 5000}, ["sink_traces.prompts must be YAML"]),
        ({"pruning_baselines.patterns": "2:4"}, ["list or group", "'2:4'"]),
        ({"models.dlm.revision": "0123456"}, ["models.dlm.revision must be text", "put it in quotes"]),
        ({"models": "{1: {source: x}}"}, ["every name of models must be text, got 1", "put it in quotes"]),
        ({"models": {"dlm": {"source": "x", "revison": "y"}}}, ["'models.dlm.revison'", "did you mean 'revision'"]),
        ({"sink_traces.extra_models": ["a", 2]}, ["every value of sink_traces.extra_models must be text, got 2"]),
        ({"sink_traces.extra_models": {"a": 1}}, ["list or group"]),
        ({"sink_traces.extra_models": "one"}, ["list or group", "'one'"]),
        ({"device": 3}, ["device must be text"]),
        ({"device": "tpu"}, ["device must be one of auto, cpu, cuda", "'tpu'"]),
        ({"dtype": "float16"}, ["dtype must be one of"]),
        ({"sink_traces": 3}, ["sink_traces must be a group", "3"]),
        ({"models.dlm": "somewhere"}, ["models.dlm must be a group"]),
        ({"models": {"dlm": {}}}, ["no models.dlm.source"]),
        ({"sink_traces.prompts": 0}, ["[1, 1024]", "got 0"]),
        ({"sink_traces.temperature": -0.1}, ["[0.0, 10.0]", "-0.1"]),
        ({"sink_traces.temperature": float("nan")}, ["[0.0, 10.0]", "nan"]),
        ({"seed": -1}, ["seed must be in [0,", "-1"]),
        ({"sink_traces.steps": 113}, ["steps must be at most positions - prompt_tokens", "113 steps for 112"]),
        ({"sink_traces.block_length": 30}, ["block_length must divide"]),
        ({"sink_traces.block_length": 16, "sink_traces.steps": 50}, ["number of blocks must divide steps"]),
        (
            {"sink_traces.top_k": 12, "sink_traces.positions": 20, "sink_traces.prompt_tokens": 8, "sink_traces.steps": 4},
            ["top_k must be at most the 11 tokens of the first step, got 12"],
        ),
        ({"seed": "[1"}, ["must be YAML", "'[1'"]),
        ({"profile": "full"}, ["profile"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(overrides: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        config.load("quick", overrides=overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# The rules between the settings of notebook 02, apart from what the profile happens to say.
VARIANCE = {
    "prompts": 8, "seeds": 2, "prompt_tokens": 32, "positions": 128, "tokens_per_step": 2, "temperature": 1.0, "top_k": 5,
    "mask_ratios": [0.9, 0.1], "factor_prompts": 4, "block_lengths": [32, 8], "other_tokens_per_step": [1, 4],
    "other_prompt_tokens": [16, 64], "blocked_keys": [1, 5], "digest_thresholds": [0.5, 0.9],
}  # fmt: skip


def load_variance(changes: dict[str, object]) -> config.VarianceAnalysis:
    overrides = {f"variance_analysis.{name}": value for name, value in {**VARIANCE, **changes}.items()}
    return config.load("quick", overrides=overrides).variance_analysis


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_step": 5}, "tokens_per_step must divide the 96 tokens to generate, got 5"),
        ({"other_tokens_per_step": [1, 5]}, "other_tokens_per_step must divide the 96 tokens to generate, got 5"),
        ({"block_lengths": [32, 20]}, "block_lengths must divide the 96 tokens to generate, got 20"),
        ({"block_lengths": [32, 3]}, "tokens_per_step (for every block length) must divide the 3 tokens to generate, got 2"),
        ({"other_prompt_tokens": [16, 65]}, "tokens_per_step (for every prompt length) must divide the 63 tokens"),
        ({"positions": 64}, "positions must be above every prompt, got 64"),
        ({"prompt_tokens": 128}, "positions must be above every prompt, got 128"),
        ({"other_prompt_tokens": [130, 16]}, "positions must be above every prompt, got 128"),
        ({"temperature": 0.0}, "seeds must be 1 at temperature 0, got 2"),
        ({"top_k": 32}, "top_k must be below prompt_tokens, got 32"),
        (
            {"positions": 96, "tokens_per_step": 64, "block_lengths": [], "other_prompt_tokens": [], "other_tokens_per_step": []},
            "every generation must take at least 2 steps, got 1",
        ),
        ({"other_tokens_per_step": [1, 96]}, "other_tokens_per_step must be in [1, 64], got 96"),
        ({"positions": 80, "other_tokens_per_step": [48], "block_lengths": []}, "every generation must take at least 2 steps"),
        ({"other_prompt_tokens": [126]}, "every generation must take at least 2 steps, got 1"),
        ({"factor_prompts": 9}, "factor_prompts must be at most prompts, got 9"),
        ({"mask_ratios": []}, "mask_ratios must hold a value, got none"),
        ({"blocked_keys": []}, "blocked_keys must hold a value, got none"),
        ({"digest_thresholds": []}, "digest_thresholds must hold a value, got none"),
        ({"mask_ratios": [0.9, 1.0]}, "mask_ratios must be in [0.01, 0.99], got 1.0"),
        ({"blocked_keys": [1, 0]}, "blocked_keys must be in [1, 1024], got 0"),
        ({"digest_thresholds": [0.5, 1]}, "digest_thresholds must be in [0.0, 0.999], got 1.0"),
        ({"block_lengths": [32, 8.0]}, "block_lengths must be a whole number, got 8.0"),
        ({"mask_ratios": 0.5}, "mask_ratios must be a list or group, got 0.5"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"variance_analysis.{message}")) as caught:
        load_variance(changes)
    assert "\n" not in str(caught.value)


def test_as_many_largest_keys_as_the_first_step_has_are_accepted() -> None:
    few = {"prompt_tokens": 1, "positions": 29, "steps": 7, "top_k": 5}
    assert config.load("quick", overrides={f"sink_traces.{name}": value for name, value in few.items()}).sink_traces.top_k == 5


def test_settings_at_the_border_are_accepted() -> None:
    loaded = load_variance({
        "temperature": 0, "seeds": 1, "top_k": 31, "factor_prompts": 8, "block_lengths": [96, 2], "mask_ratios": "[0.01, 0.99]",
        "other_prompt_tokens": [124], "other_tokens_per_step": [48],
    })  # fmt: skip
    assert loaded.mask_ratios == (0.01, 0.99) and loaded.block_lengths == (96, 2)
    assert loaded.other_tokens_per_step == (48,) and loaded.temperature == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": [8]}, "bits must hold 4, rounding_bits 3, and sparsities 0.5, got [8]"),
        ({"rounding_bits": [4]}, "bits must hold 4, rounding_bits 3, and sparsities 0.5, got [4], [4]"),
        ({"sparsities": [0.25]}, "bits must hold 4, rounding_bits 3, and sparsities 0.5"),
        ({"bits": [4, 5]}, "bits must be among 2, 3, 4, 8, got 5"),
        ({"rounding_bits": [4, 3, 1]}, "rounding_bits must be in [2, 8], got 1"),
        ({"group_size": 48}, "group_size must be one of group_sizes, got 48"),
        ({"byte_budgets": [30]}, "byte_budgets must be in [0.01, 1.0], got 30"),
    ],
)
def test_compression_settings_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    plain: dict[str, object] = {"bits": [4], "rounding_bits": [4, 3], "sparsities": [0.5], "group_size": 64, "group_sizes": [64]}
    with pytest.raises(InputError, match=re.escape(f"joint_quantization.{message}")):
        config.load("quick", overrides={f"joint_quantization.{name}": value for name, value in (plain | changes).items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_tokens": 40}, "block_length must divide the 40 new_tokens, got 16"),
        ({"late_share": 0.05}, "late_share must leave 1 to 15 tokens of a block of 16, got 0.05: use 0.0625 for one of them"),
        ({"timed_prompts": 5}, "timed_prompts must be at most the 4 prompts, got 5"),
        ({"task_names": []}, "task_names must be different names, at least one, got []: name a task once"),
        ({"task_names": ["a", "b", "a"]}, "task_names must be different names, at least one, got ['a', 'b', 'a']"),
        ({"system_blocks": [3]}, "system_blocks must divide the 8 system_tokens, got 3"),
        ({"system_tokens_a_step": 3}, "system_tokens_a_step must divide the 8 tokens of a block, got 3"),
    ],
)
def test_timing_settings_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    plain: dict[str, object] = {"new_tokens": 32, "block_length": 16, "late_share": 0.0625, "prompts": 4, "timed_prompts": 4}
    config.load("quick", overrides={f"timing.{name}": value for name, value in plain.items()})
    with pytest.raises(InputError, match=re.escape(f"timing.{message}")):
        config.load("quick", overrides={f"timing.{name}": value for name, value in (plain | changes).items()})


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("pruning_baselines", "task_seeds"),
        *(("sink_aware_pruning", name) for name in ("control_seeds", "dose_seeds", "task_seeds")),
    ],
)
def test_no_more_calibrations_are_asked_for_than_there_are(section: str, name: str) -> None:
    config.load("quick", overrides={f"{section}.seeds": 2, f"{section}.{name}": 2})
    with pytest.raises(InputError, match=f"{section}.{name} must be at most seeds, got 3"):
        config.load("quick", overrides={f"{section}.seeds": 2, f"{section}.{name}": 3})


def test_an_unknown_profile_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"quick, full, laptop, paper, rehearsal, got 'quik': did you mean 'quick'"):
        config.load("quik")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "readable YAML"),
        ("- 1", "must hold settings by name, got list"),
        ("profile: full", "must say profile: quick"),
        ("profile: quick\nseed: 0", "got no device"),
        (None, "readable YAML"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    if content is not None:
        (tmp_path / "configs" / "quick.yaml").write_text(content)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        config.load("quick")
    assert "\n" not in str(caught.value)


def test_output_goes_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINKS_OUTPUT", str(tmp_path))
    assert config.output_root() == tmp_path.resolve()
    monkeypatch.delenv("SINKS_OUTPUT")
    assert config.output_root() == ROOT


def test_notebooks_are_found_by_number(tmp_path: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in ("02_b.ipynb", "01_a.ipynb", "x.ipynb", "1_c.ipynb", "03_d.txt"):
        (folder / name).touch()
    assert config.notebooks(tmp_path) == {"01": folder / "01_a.ipynb", "02": folder / "02_b.ipynb"}
    assert list(config.notebooks(tmp_path)) == ["01", "02"]


def test_answering_models_must_be_models_of_the_settings() -> None:
    with pytest.raises(
        InputError, match=r"answering_models must be among dlm, udlm, bd, ar, smollm2, got \['dlmm'\]: .*extra_models"
    ):
        config.load("quick", overrides={"variance_analysis.answering_models": "[dlmm]"})
    none = config.load("quick", overrides={"variance_analysis.answering_models": "[]"})
    assert none.variance_analysis.answering_models == ()


@pytest.mark.parametrize("name", ["mask_ratios", "blocked_keys", "digest_thresholds"])
def test_swept_lists_may_not_be_empty(name: str) -> None:
    with pytest.raises(InputError, match=f"variance_analysis.{name} must hold a value, got none"):
        config.load("quick", overrides={f"variance_analysis.{name}": "[]"})


def test_lists_of_factors_may_be_empty_and_texts_must_be_longer_than_their_prompts() -> None:
    assert config.load("quick", overrides={"variance_analysis.block_lengths": "[]"}).variance_analysis.block_lengths == ()
    with pytest.raises(InputError, match="positions must be above every prompt, got 128: raise it"):
        config.load("quick", overrides={"variance_analysis.other_prompt_tokens": "[128]"})
