"""The report page: complete, self-contained, and clear about what is missing."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from lib.core import config
from lib.core.errors import InputError
from lib.report import page as html_report
from lib.report import tables
from lib.report.results import EVIDENCE, evidence_of, load_results
from tests.reporting import CLAIM, NAME, TITLE, begin, line_figure, record_everything


class Page(HTMLParser):
    """Collects tags, where they point, and the text between them; notices tags that are not closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Page:
    record_everything(begin(monkeypatch, tmp_path))
    return Page(html_report.build("quick").read_text(encoding="utf-8"))


def test_page_refers_to_nothing_outside(page: Page) -> None:
    assert all(set(script) == set() for script in page.of("script")), "what runs stands in the page"
    assert not page.of("link")
    ids = {attributes["id"] for _, attributes in page.tags if attributes.get("id")}
    for _, attributes in page.tags:
        for key in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(key)
            assert value is None or value.startswith("data:") or value[1:] in ids
    source = html_report.build("quick").read_text(encoding="utf-8")
    assert "http" not in source
    assert "url(" not in source
    assert "@import" not in source


def test_page_embeds_every_figure_with_a_text(page: Page, tmp_path: Path) -> None:
    record = json.loads((tmp_path / f"results/quick/{NAME}.json").read_text())
    images = {attributes["alt"]: str(attributes["src"]) for attributes in page.of("img") if attributes["alt"]}
    assert set(images) == {*(figure["caption"] for figure in record["figures"]), "Attention. One frame."}
    assert base64.b64decode(images["Attention. One frame."].split(",")[1]) == (tmp_path / "figures/quick/01_map.png").read_bytes()
    for figure in record["figures"]:
        kind, data = images[figure["caption"]].split(";base64,")
        assert kind == ("data:image/gif" if figure["kind"] == "animation" else "data:image/png")
        assert base64.b64decode(data) == (tmp_path / figure["file"]).read_bytes()


def test_a_verdict_leads_to_its_rule_table_and_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = begin(monkeypatch, tmp_path)
    run.table("rates", pd.DataFrame({"rate": [1.0]}), caption="Rates.")
    run.figure("rates", *line_figure(), caption="A figure of the table's name.")
    run.figure("position_by_step", *line_figure(), caption="Where.")
    run.claim("sinks-move", **CLAIM)
    run.claim("sinks-move", **{**CLAIM, "model": "dlm - ar"})
    run.finish()
    page = Page(html_report.build("quick").read_text(encoding="utf-8"))
    leads = [str(attributes["href"]) for attributes in page.of("a")]
    for model in ("dlm", "dlm-ar"):
        assert f"#claim-01-sinks-move-{model}" in leads
    assert leads.count("#n01-table-rates") == leads.count("#n01-figure-position_by_step") == 4
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids)) and {lead[1:] for lead in leads} <= set(ids)


def test_claims_of_the_digest_stand_apart_and_n_says_what_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = begin(monkeypatch, tmp_path)
    run.claim("fixed-sinks", **{**CLAIM, "statement": "A rule of a blog.", "source": "digest, section 2"})
    run.claim("sinks-move", **CLAIM)
    run.finish()
    text = Page(html_report.build("quick").read_text(encoding="utf-8")).text
    apart = text.index("Claims of the digest")
    assert text.index(str(CLAIM["statement"])) < apart < text.index("A rule of a blog.")
    assert "8 prompts" in text


def test_answers_come_before_figures_and_figures_before_tables(page: Page) -> None:
    places = [page.text.index(words) for words in ("What was found", "Figure: line", "Table: top", "Provenance of notebook")]
    assert places == sorted(places)


def test_captions_name_models_in_words(page: Page) -> None:
    assert "Mass along denoising. Models: dlm (9 M)." in page.text


def test_an_interactive_page_is_shown_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = begin(monkeypatch, tmp_path)
    inner = '<!DOCTYPE html><p title="a">1 &lt; 2</p>'
    run.page("explorer", inner, caption="To click.")
    run.finish()
    page = Page(html_report.build("quick").read_text(encoding="utf-8"))
    (frame,) = page.of("iframe")
    assert (frame["srcdoc"], frame["title"]) == (inner, "To click.")
    assert (tmp_path / "figures/quick/01_explorer.html").read_text() == inner


def test_every_verdict_of_the_committed_results_rests_on_a_table_that_is_there() -> None:
    for result in load_results("full", root=config.ROOT):
        without = [claim["key"] for claim in result["claims"] if "table" not in evidence_of(result, claim)]
        assert not without, "say in EVIDENCE where the numbers stand"


def test_the_verdict_about_heads_leads_to_the_overlaps_that_it_is_of() -> None:
    (result,) = [found for found in load_results("full", root=config.ROOT) if found["number"] == "02"]
    claims = [claim for claim in result["claims"] if claim["key"] == "heads-as-unstable"]
    assert len({claim["model"] for claim in claims}) == len(claims) > 1
    for claim in claims:
        name = evidence_of(result, claim)["table"]
        (file,) = [table["file"] for table in result["tables"] if table["name"] == name]
        table = pd.read_csv(config.ROOT / file).set_index(["model", "level", "kind"])["mean"]
        head, aggregate = (table[claim["model"], level, "beyond chance"] for level in ("head", "aggregate"))
        assert claim["estimate"] == pytest.approx(head - aggregate, abs=1e-5)


@pytest.mark.parametrize("number", list(EVIDENCE))
def test_tables_and_figures_that_verdicts_lead_to_are_made_by_the_notebook(number: str) -> None:
    """A name that no cell writes would be a link to nothing, in silence. A figure of a model bears its name behind its own."""
    cells = json.loads(config.notebooks()[number].read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for pattern, table, figure in EVIDENCE[number]:
        assert f'"{table}"' in code, f"{pattern}: no table {table}"
        assert not figure or f'"{figure}"' in code or f'f"{figure}_{{' in code, f"{pattern}: no figure {figure}"


def test_page_tells_everything(page: Page) -> None:
    assert not page.open
    assert TITLE in page.text
    for words in (
        "✓ reproduced", "– not tested", "Note: no file", "2.00 [1.50, 2.50]", "positions", "paper, abstract",
        "reproduced if the interval lies above 1", "Strongest sinks", "0.333", "–", "3.14", "<b>&", "9,000,000 parameters",
        "Fingerprint", "torch", "models/reference/dlm", "sink_traces",
    ):  # fmt: skip
        assert words in page.text, words
    assert len(page.of("details")) == 1
    assert {"#verdicts", "#n01"} <= {attributes["href"] for attributes in page.of("a")}


def test_tables_scroll_and_numbers_stand_right(page: Page) -> None:
    assert sum(attributes.get("class") == "scroll" for attributes in page.of("div")) == len(page.of("table")) == 3
    header = [attributes.get("class") for attributes in page.of("th")][-3:]
    assert header == [None, "number", "number"]  # words, whole numbers, fractions


def test_a_missing_number_is_a_dash_and_its_column_one_of_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = begin(monkeypatch, tmp_path)
    run.table(
        "gaps", pd.DataFrame({"word": ["NaN", "a"], "value": [0.25, float("nan")], "count": [1.0, float("nan")]}), caption="G."
    )
    run.finish()
    page = Page(html_report.build("quick").read_text(encoding="utf-8"))
    assert [attributes.get("class") for attributes in page.of("th")][-3:] == [None, "number", "number"]
    assert "0.25" in page.text and "–" in page.text and page.text.count("NaN") == 1  # the word stays


def test_a_table_without_rows_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = begin(monkeypatch, tmp_path)
    run.table("none", pd.DataFrame({"model": []}), caption="N.")
    run.finish()
    assert tables.NO_ROWS in Page(html_report.build("quick").read_text(encoding="utf-8")).text


def test_same_results_give_the_same_page(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "results/quick/report.html"
    first = path.read_bytes()
    html_report.build("quick")
    assert path.read_bytes() == first


def test_long_tables_are_cut_and_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = begin(monkeypatch, tmp_path)
    run.table("long", pd.DataFrame({"position": range(200)}), caption="All positions.")
    run.finish()
    text = Page(html_report.build("quick").read_text(encoding="utf-8")).text
    assert "The first 60 of 200 rows; all are in the file." in text
    assert " 59 " in text
    assert " 60 60" not in text


def test_columns_are_rounded_as_in_the_notebook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = begin(monkeypatch, tmp_path)
    frame = pd.DataFrame({"share": [20.0, 0.5], "n": [20, 1234567], "token": ["20.50", "nan"]})
    shown = run.table("mixed", frame, caption="Shares.")
    run.finish()
    text = Page(html_report.build("quick").read_text(encoding="utf-8")).text
    assert " 20.0 20 20.50 0.500 1234567 nan " in text
    assert shown.to_numpy().tolist() == [["20.0", 20, "20.50"], ["0.500", 1234567, "nan"]]


def test_page_without_results_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begin(monkeypatch, tmp_path)
    text = Page(html_report.build("full").read_text(encoding="utf-8")).text
    assert f"No results of the full profile yet for: {NAME}. Run ./run_all.sh full ." in text


def test_unknown_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="profile must be one of quick"):
        html_report.build("fast", root=tmp_path)


def test_damaged_result_file_is_named(page: Page, tmp_path: Path) -> None:
    path = tmp_path / f"results/quick/{NAME}.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(InputError, match="must be readable JSON") as caught:
        html_report.build("quick")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["figures/quick/01_line.png", "results/quick/01_top.csv"])
def test_missing_output_is_named(page: Page, tmp_path: Path, name: str) -> None:
    (config.output_root() / name).unlink()
    with pytest.raises(InputError, match="must exist") as caught:
        html_report.build("quick")
    assert str(tmp_path / name) in str(caught.value)
