"""The interactive page of sinks: what is in it, and what it does in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright

from lib.attention import sinks
from lib.core.errors import InputError
from lib.report import explorer
from lib.report.explorer import Scene

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


def made(name: str, *, steps: int, layers: int, heads: int, positions: int, grows: bool) -> Scene:
    """A scene with one strong key a step and head, at a place that tells step, layer and head apart."""
    mass = np.full((steps, layers, heads, positions), 0.5)
    for step, layer, head in np.ndindex(steps, layers, heads):
        mass[step, layer, head, (3 * step + 5 * layer + 7 * head) % 8] = 6.0
    masked = np.arange(positions)[None] >= 8 + 2 * np.arange(steps)[:, None]
    keys = 8 + 2 * np.arange(steps) if grows else np.full(steps, positions)
    tokens = [[f"w{position} " for position in range(positions)] for _ in range(steps)]
    return Scene(
        name=name, steps=[f"step {step + 1}" for step in range(steps)], layers=[f"layer {layer}" for layer in range(layers)],
        depth=layers, tokens=tokens, masked=masked & (not grows), keys=keys, mass=mass,
    )  # fmt: skip


SCENES = [
    made("dlm (masked diffusion, 9 M)", steps=4, layers=3, heads=2, positions=16, grows=False),
    made("ar (autoregressive, 9 M)", steps=3, layers=2, heads=4, positions=14, grows=True),
]


def expected(scene: Scene, *, step: int, layer: int | None, head: int | None) -> list[int]:
    """The sinks that the library marks, of the mean over what is chosen."""
    layers, heads = slice(layer, None if layer is None else layer + 1), slice(head, None if head is None else head + 1)
    row = torch.from_numpy(scene.mass[step, layers, heads, : scene.keys[step]]).mean(dim=(0, 1))
    return sinks.sinks_mean_std(row).nonzero()[:, 0].tolist()


def test_page_is_whole_small_and_the_same_each_time() -> None:
    text = explorer.render(SCENES, title="Sinks", footer="profile quick")
    assert text == explorer.render(SCENES, title="Sinks", footer="profile quick")
    assert len(text.encode()) < 2_000_000 < explorer.MAX_BYTES
    assert not re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=""", text)


def test_a_token_cannot_end_the_script() -> None:
    scene = made("x", steps=2, layers=1, heads=1, positions=12, grows=False)
    evil = Scene(**{**vars(scene), "tokens": [["</script><b>"] * 12] * 2})
    text = explorer.render([evil], title="<b>", footer="&")
    assert "</script><b>" not in text and "<title>&lt;b&gt;</title>" in text


def test_masses_are_stored_to_a_ten_thousandth() -> None:
    text = explorer.render(SCENES[:1], title="Sinks", footer="")
    (stored,) = json.loads(re.findall(r'<script id="scenes" type="application/json">(.*?)</script>', text)[0])
    import base64

    back = np.frombuffer(base64.b64decode(stored["mass"]), "<u2") * stored["scale"]
    np.testing.assert_allclose(back.reshape(SCENES[0].mass.shape), SCENES[0].mass, atol=2e-4)


def test_too_much_and_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="at most 5000000 bytes, got"):
        explorer.render([made("x", steps=20, layers=30, heads=32, positions=128, grows=False)], title="", footer="")
    with pytest.raises(InputError, match="must have a model to show, got none"):
        explorer.render([], title="", footer="")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM)
        yield started
        started.close()


@pytest.fixture(params=[1280, 390])
def opened(request: pytest.FixtureRequest, browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """The page in a window of a desk and of a phone; an error of its script fails the test."""
    (tmp_path / "sinks.html").write_text(explorer.render(SCENES, title="Sinks", footer=""), encoding="utf-8")
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "sinks.html").as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=120_000)
    yield page
    assert errors == []
    page.close()


def shown_sinks(page: Page) -> list[int]:
    found = page.eval_on_selector_all("#text span", "all => all.map((one, at) => one.className.includes('sink') ? at : -1)")
    return [place for place in found if place >= 0]


@needs_browser
def test_page_is_clicked_through_in_a_browser(opened: Page) -> None:
    dlm, ar = SCENES
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing hangs over the edge"
    assert shown_sinks(opened) == expected(dlm, step=0, layer=None, head=None)
    assert opened.inner_text("#text").count("▒") == dlm.masked[0].sum()

    opened.fill("#step", "2")
    assert opened.inner_text("#said") == "step 3"
    assert opened.inner_text("#text").count("▒") == dlm.masked[2].sum()
    opened.select_option("#layer", label="layer 1")
    opened.select_option("#head", label="head 1")
    (place,) = expected(dlm, step=2, layer=1, head=1)
    assert shown_sinks(opened) == [place] == [(3 * 2 + 5 + 7) % 8]
    assert f"{place} w{place} (6.00)" in opened.inner_text("#found")
    drawn = "Bokeh.documents[0].roots()[0].renderers.map(each => each.data_source)"
    assert opened.evaluate(f"Array.from({drawn}.find(each => each.name === 'sinks').data.x)") == [place]
    row = opened.evaluate(f"Array.from({drawn}.find(each => each.name === 'masses').data.image[0]).slice(32, 48)")
    np.testing.assert_allclose(row, dlm.mass[2, 1, 1], atol=2e-4)

    opened.select_option("#model", label=ar.name)
    assert opened.eval_on_selector_all("#layer option", "all => all.map(one => one.text)") == ["mean over all", *ar.layers]
    assert opened.input_value("#step") == "2"
    assert opened.locator("#text span").count() == ar.keys[2] and "▒" not in opened.inner_text("#text")
    assert shown_sinks(opened) == expected(ar, step=2, layer=None, head=None)
    opened.focus("#step")
    opened.keyboard.press("ArrowLeft")
    assert opened.inner_text("#said") == "step 2" and opened.locator("#text span").count() == ar.keys[1]
