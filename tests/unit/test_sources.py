"""Data by the names that users have for it: files, patterns, LLaMA-Factory's list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config import schema
from prism_megatron.data.rows import ImageSource, Message, RowError, SFTRow, read_prompts, read_sft
from prism_megatron.data.sources import Source, find_row, open_sources


def opened(path: Path | str, **options: Any) -> Source[SFTRow]:
    [source] = open_sources(schema.Data(path=Path(path), **options), read_sft)
    return source


def shard(path: Path, first: int, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>q"},
                {"role": "assistant", "content": str(number)},
            ],
            "images": [f"{number}.png"],
        }
        for number in range(first, first + count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """12 rows in three files."""
    for number, (first, count) in enumerate([(0, 5), (5, 1), (6, 6)]):
        shard(tmp_path / "shards" / f"part-{number}.jsonl", first, count)
    return tmp_path / "shards"


def test_files_of_a_pattern_come_one_after_the_other(shards: Path) -> None:
    source = opened(shards / "part-*.jsonl")
    assert len(source) == 12
    assert [source[i].response for i in range(12)] == [str(i) for i in range(12)]
    places = [source.place(i) for i in (0, 5, 11)]
    assert [(file.path.name, i) for file, i in places] == [
        ("part-0.jsonl", 0),
        ("part-1.jsonl", 0),
        ("part-2.jsonl", 5),
    ]
    assert source[11].images == (ImageSource(path=shards / "11.png"),)
    with pytest.raises(IndexError):
        source[12]


def test_rows_of_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """A checkpoint names the rows whose responses it carries along."""
    for number, folder in enumerate(["charts", "geometry", "geometry/more"]):
        shard(tmp_path / folder / "train.jsonl", 10 * number, 3)
    sections = (
        schema.Source(path=tmp_path / "charts" / "train.jsonl", name="charts"),
        schema.Source(path=tmp_path / "geometry" / "**" / "train.jsonl", name="geometry"),
        schema.Source(path=tmp_path / "geometry" / "train.jsonl"),
    )
    sources = open_sources(schema.Data(sources=sections), read_sft)
    rows = [source[index] for source in sources for index in range(len(source))]
    assert len({row.row_id for row in rows}) == len(rows) > 6
    assert [find_row(sources, row.row_id) for row in rows] == rows
    for gone in ("charts:3", "train", "train:-1", "shapes:0"):
        with pytest.raises(ValueError, match=f"no row is called {gone}, which a checkpoint"):
            find_row(sources, gone)


def test_what_is_not_there_says_what_would_be(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file is named"):
        opened(shards / "*.parquet")
    with pytest.raises(FileNotFoundError, match=r"gone\.json does not exist"):
        opened(tmp_path / "gone.json")
    with pytest.raises(FileNotFoundError, match=r"runs/gone\.json does not exist"):
        opened("runs/gone.json")
    with pytest.raises(ValueError, match=r"is a folder; name its files: .*/\*\.parquet"):
        opened(shards)


def test_a_source_has_options_of_its_own(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be brief.\n")
    path = shards / "*.jsonl"
    sections = (
        schema.Source(path=path, name="all", weight=2.5),
        schema.Source(path=path, name="few", num_samples=4, media_dir=tmp_path / "media"),
        schema.Source(path=shards / "part-1.jsonl", system_prompt=tmp_path / "system.txt"),
    )
    sources = open_sources(schema.Data(sources=sections), read_sft)
    assert [(s.name, s.weight, len(s)) for s in sources] == [
        ("all", 2.5, 12),
        ("few", 1.0, 4),
        ("part-1", 1.0, 1),
    ]
    few = [int(sources[1][i].response) for i in range(4)]
    assert few == sorted(set(few)) and few != [0, 1, 2, 3]
    again = open_sources(schema.Data(sources=sections), read_sft)[1]
    assert [int(again[i].response) for i in range(4)] == few
    assert sources[1][0].images == (ImageSource(path=tmp_path / "media" / f"{few[0]}.png"),)
    assert sources[2][0].messages == (Message("system", "Be brief."), Message("user", "<image>q"))
    assert sources[0][5].messages == (Message("user", "<image>q"),)


def test_sources_need_names_of_their_own(shards: Path) -> None:
    section = schema.Source(path=shards / "part-1.jsonl")
    with pytest.raises(ValueError, match=r"several of data.sources are called \['part-1'\]"):
        open_sources(schema.Data(sources=(section, section)), read_sft)


LIST: dict[str, Any] = {
    "demo": {
        "file_name": "demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "images": "pictures", "system": "rules"},
        "tags": {
            "role_tag": "who",
            "content_tag": "said",
            "user_tag": "person",
            "assistant_tag": "model",
            "system_tag": "boss",
        },
    },
    "defaults": {"file_name": "defaults.json", "formatting": "sharegpt"},
    "alpaca": {
        "file_name": "alpaca.json",
        "columns": {"response": "answer"},
        "num_samples": 1,
    },
    "parts": {"file_name": "parts", "formatting": "sharegpt"},
    "ranked": {"file_name": "demo.json", "ranking": True},
    "scripted": {"script_url": "x.py"},
    "split": {"hf_hub_url": "team/set", "split": "test"},
}


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    turns = [
        {"who": "boss", "said": "rule"},
        {"who": "person", "said": "<image>q"},
        {"who": "model", "said": "a"},
    ]
    plain = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    files: dict[str, Any] = {
        "dataset_info.json": LIST,
        "demo.json": [
            {"turns": turns, "pictures": ["x.png"]},
            {"turns": turns[1:], "pictures": ["y.png"], "rules": "column"},
            {"turns": "no list"},
        ],
        "defaults.json": [{"conversations": plain}],
        "parts/a.json": [{"conversations": plain}],
        "parts/b.json": [{"conversations": plain}, {"conversations": plain}],
        "alpaca.json": [
            {"instruction": "add", "input": "1, 2", "answer": "3", "history": [["hi", "hello"]]},
            {"instruction": "add", "input": "", "answer": "0"},
            {"instruction": "add", "answer": "0", "history": ["hi"]},
        ],
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path / "dataset_info.json"


def test_columns_and_tags_of_the_list_are_followed(listed: Path) -> None:
    source = opened(f"{listed}:demo")
    assert source.name == "demo" and len(source) == 3
    assert source[0].messages == (Message("system", "rule"), Message("user", "<image>q"))
    assert source[0].response == "a"
    assert source[0].images == (ImageSource(path=listed.parent / "x.png"),)
    assert source[1].messages[0] == Message("system", "column")
    with pytest.raises(RowError, match="missing required column 'messages'"):
        source[2]


def test_entries_without_columns_have_the_defaults_of_llama_factory(listed: Path) -> None:
    row = opened(f"{listed}:defaults")[0]
    assert (row.messages, row.response) == ((Message("user", "q"),), "a")
    assert len(opened(f"{listed}:parts")) == 3


def test_alpaca_entries_become_conversations(listed: Path) -> None:
    info = json.loads(listed.read_text())
    source = opened(f"{listed}:alpaca")
    assert len(source) == 1, "num_samples of the list"
    del info["alpaca"]["num_samples"]
    listed.write_text(json.dumps(info))
    first, second = (opened(f"{listed}:alpaca")[i] for i in (0, 1))
    assert first.messages == (
        Message("user", "hi"),
        Message("assistant", "hello"),
        Message("user", "add\n1, 2"),
    )
    assert first.response == "3"
    assert (second.messages, second.response) == ((Message("user", "add"),), "0")
    with pytest.raises(RowError, match="malformed"):
        opened(f"{listed}:alpaca")[2]


def test_several_entries_are_blended(listed: Path) -> None:
    weights = [("demo", 3.0), ("parts", 1.0)]
    sections = [{"path": f"{listed}:{name}", "weight": weight} for name, weight in weights]
    data = schema.Data.model_validate({"sources": sections})
    assert [(s.name, s.weight) for s in open_sources(data, read_sft)] == weights


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nothing", "no entry 'nothing'; name one as .*:ENTRY of demo, defaults"),
        ("", "no entry ''; name one"),
        ("ranked", "is a ranking set"),
        ("scripted", r"neither file_name nor hf_hub_url, but \['script_url'\]"),
        ("split", "asks for a subset or split"),
    ],
)
def test_entries_that_can_not_be_used_say_why(listed: Path, entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(f"{listed}:{entry}" if entry else listed)


def test_the_list_is_for_demonstrations(listed: Path) -> None:
    with pytest.raises(ValueError, match=r"no row of .*has the keys \['prompt'"):
        open_sources(schema.Data(path=Path(f"{listed}:demo")), read_prompts)


def test_data_has_one_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path is None and 0 sources are given"):
        schema.Data()
    with pytest.raises(ValueError, match="and 1 sources are given"):
        schema.Data(path=tmp_path, sources=(schema.Source(path=tmp_path),))
