"""Where rows begin and end, in JSON written every way that JSON can be written, and the cache."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_megatron.data import files
from prism_megatron.data.files import open_items, scan_lines, scan_list

NASTY: list[Any] = [
    {"text": 'brackets ]}[{ and , commas, "quotes" and \\ backslashes \\\\ at the end \\'},
    {"text": 'quote at the end \\"', "nested": [[1, {"a": []}], {"b": [{}, "],["]}]},
    {"text": "Übergröße 漢字 🙂 \u2028 line\nfeed\ttab \x7f", "null": None, "": ""},
    {"escapes": "\\\\\\\\", "odd": '\\\\\\"', "slash": "</caption>\\/"},
    "a bare string with ] and ,",
    [],
    {},
    [1, [2, [3]]],
    -1.5e10,
    None,
    True,
]


def texts(items: list[Any]) -> list[str]:
    """The same list as different writers put it."""
    compact = json.dumps(items, separators=(",", ":"))
    return [
        json.dumps(items),
        compact,
        json.dumps(items, ensure_ascii=False),
        json.dumps(items, indent=2, ensure_ascii=False),
        f"\n \t{compact} \r\n",
        "\ufeff" + compact,
    ]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 2**20])
def test_list_elements_are_found_whatever_they_hold(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    for number, text in enumerate(texts(NASTY)):
        path = tmp_path / f"{number}.json"
        path.write_text(text, encoding="utf-8")
        items = open_items(path)
        assert [items[i] for i in range(len(items))] == NASTY


def random_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(6 if depth else 3)
    if kind == 0:
        return rng.choice([None, True, 7, -0.5])
    if kind <= 2:
        return "".join(rng.choices('ab"\\[]{},: \n\u00e9\U0001f642', k=rng.randrange(12)))
    if kind <= 4:
        keys = ["".join(rng.choices('k"\\]', k=3)) for _ in range(rng.randrange(4))]
        return {key: random_value(rng, depth - 1) for key in keys}
    return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]


def test_lists_of_random_values_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    path = tmp_path / "random.json"
    for _ in range(150):
        monkeypatch.setattr(files, "CHUNK", rng.choice([5, 16, 33]))
        values = [random_value(rng, 3) for _ in range(rng.randrange(1, 9))]
        path.write_text(json.dumps(values, ensure_ascii=rng.random() < 0.5))
        bounds = scan_list(path)
        content = path.read_bytes()
        assert [json.loads(content[start:end]) for start, end in bounds] == values


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
def test_lines_are_found_and_blank_ones_left_out(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(item, ensure_ascii=False) for item in NASTY]
    path.write_text("\ufeff" + "\n\n".join(lines) + "\r\n  \n\n", encoding="utf-8")
    items = open_items(path)
    assert [items[i] for i in range(len(items))] == NASTY
    path.write_text(lines[0])
    assert len(scan_lines(path)) == 1


@pytest.mark.parametrize("text", ["[]", "[ \n ]", " "])
def test_files_without_rows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert len(open_items(path)) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": 2', "not a whole JSON list: it ends within row 1, after 18 bytes"),
        ('[{"a": "1}]', "not a whole JSON list: it ends within row 0"),
        ('[{"a": 1}] [2]', "its list ends at byte 9, and more follows"),
        ("[1]]", "its list ends at byte 2, and more follows"),
        ("[1] x", "its list ends at byte 2, and more follows"),
        ("hello", "neither parquet nor JSON"),
    ],
)
@pytest.mark.parametrize("chunk", [2, 2**20])
def test_files_that_are_not_whole_say_so(
    tmp_path: Path, text: str, message: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        open_items(path)


def test_a_bad_element_is_its_own_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": nope}, {"a": 3}]')
    items = open_items(path)
    assert (items[0], items[2]) == ({"a": 1}, {"a": 3})
    with pytest.raises(ValueError):
        items[1]


def rows_of(path: Path, cache: Path) -> list[Any]:
    items = open_items(path, cache)
    return [items[i] for i in range(len(items))]


def test_a_large_file_is_scanned_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SMALL_FILE", 10)
    path, cache = tmp_path / "rows.json", tmp_path / "cache"
    path.write_text(json.dumps([{"a": i} for i in range(20)]))
    assert rows_of(path, cache) == [{"a": i} for i in range(20)]
    (index,) = cache.glob("*.npy")

    def scanned_again(path: Path) -> Any:
        raise AssertionError("scanned again")

    with monkeypatch.context() as patch:
        patch.setattr(files, "scan_list", scanned_again)
        assert rows_of(path, cache) == [{"a": i} for i in range(20)]
        os.utime(path, ns=(1, 1))
        with pytest.raises(AssertionError, match="scanned again"):
            open_items(path, cache)
    path.write_text(json.dumps([{"b": i} for i in range(3)]))
    assert rows_of(path, cache) == [{"b": i} for i in range(3)]
    assert not index.exists() and len(list(cache.glob("*.npy"))) == 1


def test_a_stopped_scan_leaves_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SMALL_FILE", 10)
    path, cache = tmp_path / "rows.json", tmp_path / "cache"
    path.write_text(json.dumps([{"a": i} for i in range(20)]))

    def full_disk(*arguments: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(files.np, "save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            open_items(path, cache)
    assert not list(cache.glob("[!.]*.npy"))
    assert len(rows_of(path, cache)) == 20
    assert not [file for file in cache.iterdir() if file.name.startswith(".")]


def test_parquet_rows_by_group_and_through_a_copy_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [{"n": i, "images": [{"bytes": bytes([i]) * 9, "path": None}]} for i in range(150)]
    small, large = tmp_path / "small.parquet", tmp_path / "large.parquet"
    pq.write_table(pa.Table.from_pylist(items), small, row_group_size=7)
    pq.write_table(pa.Table.from_pylist(items), large, row_group_size=100)
    cache = tmp_path / "cache"
    assert rows_of(small, cache) == items
    assert not cache.exists()
    monkeypatch.setattr(files, "LARGE_GROUP", 1000)
    found = open_items(large, cache)
    assert [found[i] for i in (149, 0, 64, 63, 100, 99)] == [
        items[i] for i in (149, 0, 64, 63, 100, 99)
    ]
    assert found.columns == ["n", "images"]
    assert len(list(cache.glob("*.arrow"))) == 1
    large.write_bytes(large.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"large\.parquet is not a whole parquet file"):
        open_items(large, cache)
