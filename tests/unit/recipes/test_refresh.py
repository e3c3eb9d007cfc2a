"""What a refreshed notebook keeps of its outputs."""

from typing import Any

import nbformat

from recipes import refresh_notebooks


def stripped(data: dict[str, str], metadata: dict[str, Any]) -> Any:
    output = nbformat.v4.new_output("display_data", data=data, metadata=metadata)
    bar = nbformat.v4.new_output("stream", name="stderr", text="expected for this cell: about 40 s\n")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output, bar])])
    refresh_notebooks.strip_(notebook)
    (kept,) = notebook.cells[0].outputs
    return kept


def test_an_image_keeps_its_text_and_nothing_else() -> None:
    kept = stripped({"image/png": "aa"}, {"image/png": {"alt": "Mass.", "width": 3}, "isolated": True})
    assert kept.metadata == {"image/png": {"alt": "Mass."}} and kept.data == {"image/png": "aa"}


def test_of_an_interactive_page_the_name_is_kept() -> None:
    kept = stripped({"text/html": '<iframe srcdoc="&lt;p&gt;">', "text/plain": "figures/quick/01_x.html: To try."}, {})
    assert kept.data == {"text/plain": "figures/quick/01_x.html: To try."}
    assert stripped({"text/html": "<table></table>"}, {}).data == {"text/html": "<table></table>"}
