"""Records are named by what they hold and refused when they do not; claims have one holder."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lib.core.errors import InputError
from lib.grid.store import Record, Store, cell_id

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
settings_of_cells = st.dictionaries(st.text(), plain, max_size=4)


def reverse(value: object) -> object:
    """The same value with every dictionary written down from behind."""
    if isinstance(value, dict):
        return {key: reverse(value[key]) for key in reversed(value)}
    return [reverse(inner) for inner in value] if isinstance(value, list) else value


@given(settings_of_cells)
def test_order_of_keys_does_not_matter(settings: dict) -> None:
    turned = reverse(settings)
    assert isinstance(turned, dict)
    assert cell_id(turned, code="c", data="d") == cell_id(settings, code="c", data="d")
    assert re.fullmatch("[0-9a-f]{24}", cell_id(settings, code="c", data="d"))


@given(settings_of_cells, settings_of_cells)
def test_other_settings_have_another_id(first: dict, second: dict) -> None:
    assume(json.dumps(first, sort_keys=True) != json.dumps(second, sort_keys=True))
    assert cell_id(first, code="c", data="d") != cell_id(second, code="c", data="d")


@given(st.text(), st.text(), st.text())
def test_code_and_data_count_each_for_itself(code: str, data: str, other: str) -> None:
    assume(other not in (code, data))
    ids = {cell_id({}, code=code, data=data), cell_id({}, code=other, data=data), cell_id({}, code=code, data=other)}
    assert len(ids) == 3


@pytest.mark.parametrize(("first", "second"), [(1, 1.0), (1, True), (0, False), ("1", 1), (None, "null"), ([], {}), (0.5, 50)])
def test_values_that_python_takes_for_alike_differ(first: object, second: object) -> None:
    assert cell_id({"a": first}, code="c", data="d") != cell_id({"a": second}, code="c", data="d")


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, float("nan"), float("inf"), Path("a"), {1, 2}])
def test_settings_that_json_would_change_are_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"must be plain JSON values, got \{'a': .+: use str"):
        cell_id({"a": value}, code="c", data="d")


def record(number: int = 1, **changes: object) -> Record:
    fields = {"settings": {"number": number}, "code": "c", "data": "d", "status": "done", "result": {"x": 0.1 + 0.2}} | changes
    return Record(**fields)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.mark.parametrize(
    "whole",
    [record(), record(status="failed", result=None, reason="why"), record(status="not tested", result=None, reason="gate")],
)
def test_a_record_comes_back_as_it_was(store: Store, whole: Record) -> None:
    name = store.write(whole)
    assert name == cell_id(whole.settings, code="c", data="d")
    assert store.read(name) == whole
    assert store.ids() == [name]
    assert [path.name for path in store.folder.iterdir()] == [f"{name}.json"]


def test_a_store_without_a_folder_is_empty(store: Store) -> None:
    assert store.ids() == []
    assert store.read("0" * 24) is None
    store.tidy()
    assert not store.folder.exists(), "reading makes nothing"


def test_missing_cells_keep_their_order_and_a_dropped_one_is_missing_again(store: Store) -> None:
    names = [store.write(record(number)) for number in (1, 2)]
    other = cell_id({"number": 3}, code="c", data="d")
    cells = [{"id": name} for name in (names[1], other, names[0])]
    assert store.missing(cells) == [{"id": other}]
    store.log(names[0]).parent.mkdir()
    store.log(names[0]).write_text("traceback")
    store.drop(names[0])
    store.drop(names[0])
    assert store.missing(cells) == [{"id": other}, {"id": names[0]}]
    assert not store.log(names[0]).exists()


def test_two_stores_with_the_same_records_have_the_same_bytes(tmp_path: Path) -> None:
    turned = Record({"b": [1, {"d": 2, "c": 3}], "a": 1}, "c", "d", "done", {"y": 1, "x": 2})
    same = Record({"a": 1, "b": [1, {"c": 3, "d": 2}]}, "c", "d", "done", {"x": 2, "y": 1})
    first, second = Store(tmp_path / "first"), Store(tmp_path / "second")
    name = first.write(turned)
    assert second.write(same) == name
    assert (first.folder / f"{name}.json").read_bytes() == (second.folder / f"{name}.json").read_bytes()


@pytest.mark.parametrize(
    "broken",
    [
        record(status="done", result=None),
        record(reason="but"),
        record(status="failed", result={"x": 1}, reason="why"),
        record(status="failed", result=None),
        record(result={"x": float("nan")}),
    ],
)
def test_a_record_that_is_not_whole_is_not_written(store: Store, broken: Record) -> None:
    with pytest.raises(ValueError, match=r"status '\w+' with the result|not JSON compliant"):
        store.write(broken)
    assert store.ids() == []


def changed(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGES = {
    "half a file": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "half a file, or no JSON": lambda path: path.write_bytes(b""),
    "no JSON": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a file of another kind": lambda path: path.write_text("[1, 2]"),
    "of another kind": lambda path: path.write_text('{"settings": {"number": 1}}'),
    "another kind": lambda path: changed(path, format="cell of a pruning grid, version 2"),
    "file of another kind": lambda path: changed(path, extra=1),
    "fields of another kind": lambda path: changed(path, result=[1]),
    "fields of another": lambda path: changed(path, settings="number"),
    "status 'done' with the result None": lambda path: changed(path, result=None),
    "of another kind: delete": lambda path: changed(path, status="finished"),
    "the record of [0-9a-f]{24}": lambda path: changed(path, settings={"number": 2}),
    "the record of": lambda path: changed(path, code="newer"),
    "settings of a cell must be plain": lambda path: path.write_text(path.read_text().replace('"number": 1', '"number": NaN')),
}


@pytest.mark.parametrize("got", DAMAGES)
def test_a_damaged_or_foreign_file_is_refused_in_one_line(store: Store, got: str) -> None:
    name = store.write(record())
    path = store.folder / f"{name}.json"
    DAMAGES[got](path)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))} must be the record of its cell, got .*{got}") as error:
        store.read(name)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(": delete it and run again")


def test_every_cut_of_a_record_is_refused(store: Store) -> None:
    name = store.write(record())
    path = store.folder / f"{name}.json"
    whole = path.read_bytes()
    for length in range(len(whole) - 2):  # the last two are the brace and the end of the line
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="must be the record of its cell"):
            store.read(name)


def test_a_renamed_record_is_refused(store: Store) -> None:
    name = store.write(record())
    (store.folder / f"{name}.json").rename(store.folder / f"{'0' * 24}.json")
    with pytest.raises(InputError, match=f"got the record of {name}: delete it"):
        store.read("0" * 24)


FOREIGN = [".DS_Store", ".nfs000000000123", "notes.json", f"{'0' * 23}.json", f"{'0' * 24} copy.json", f"{'0' * 24}.json~"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_not_named_like_a_record_is_ignored(store: Store, name: str) -> None:
    cell = store.write(record())
    (store.folder / name).write_text("{")
    assert store.ids() == [cell]
    store.tidy()
    assert (store.folder / name).read_text() == "{"


def test_parts_of_killed_writers_are_ignored_and_cleaned_up(store: Store) -> None:
    name = store.write(record())
    finished, old, fresh = (store.folder / f".{cell}.77.partial.json" for cell in (name, "1" * 24, "2" * 24))
    for path in (finished, old, fresh):
        path.write_text("{")
    os.utime(old, (1, 1))
    assert store.ids() == [name]
    store.tidy()
    assert [path.exists() for path in (finished, old, fresh)] == [False, False, True], "the third may be written right now"
