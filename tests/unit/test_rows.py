from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_megatron.data.rows import (
    PROMPT_FIELDS,
    FileOptions,
    FileRows,
    ImageSource,
    Message,
    PairRow,
    RowError,
    prompt_writer,
    read_pairs,
    read_prompts,
    read_sft,
    write_pairs,
)


def prompt_item(number: int, **changes: Any) -> dict[str, Any]:
    item = {
        "prompt": [{"role": "user", "content": f"<image>\nquestion {number}"}],
        "images": [{"bytes": b"encoded %d" % number, "path": None}],
        "teacher_caption": f"<caption>{number}</caption>",
        "teacher_cot": "<think>t</think><answer>a</answer>",
        "data_source": "mm_gad",
        "reward_model": {"ground_truth": str(number), "style": "rule"},
        "extra_info": {"index": number},
    }
    return item | changes


def write_parquet(path: Path, items: list[dict[str, Any]], row_group_size: int = 3) -> Path:
    pq.write_table(pa.Table.from_pylist(items), path, row_group_size=row_group_size)
    return path


def write_sft(path: Path, items: list[Any]) -> Path:
    path.write_text(json.dumps(items))
    return path


def sft_item(number: int) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"<image>\nquestion {number}"},
        {"role": "assistant", "content": f"answer {number}"},
    ]
    return {"messages": messages, "images": [f"images/{number}.png"]}


def test_sft_row_splits_prompt_and_response(tmp_path: Path) -> None:
    rows = read_sft(write_sft(tmp_path / "sft.json", [sft_item(0), sft_item(1)]))
    assert len(rows) == 2
    row = rows[1]
    assert row.row_id == "sft:1"
    assert row.messages == (Message("user", "<image>\nquestion 1"),)
    assert row.response == "answer 1"
    assert row.images == (ImageSource(path=tmp_path / "images/1.png"),)


def test_sft_reads_the_conversations_dialect_and_the_system_column(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = write_sft(tmp_path / "sft.json", [{"conversations": turns, "system": "be brief"}])
    row = read_sft(path)[0]
    assert row.messages == (Message("system", "be brief"), Message("user", "q"))
    assert row.response == "a"


PAIR = {
    "teacher_caption": "<caption>t</caption>",
    "student_caption": "<caption>s</caption>",
    "teacher_cot": "<think>t</think><answer>1</answer>",
    "student_cot": "<think>s</think><answer>2</answer>",
}


def json_prompt(number: int) -> dict[str, Any]:
    return prompt_item(number, images=[f"images/{number}.png"])


def pair_item(number: int) -> dict[str, Any]:
    return {"prompt": f"question {number}", "image": f"images/{number}.png", **PAIR}


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"images": []}, "missing required column 'conversations'"),
        ({"messages": []}, "missing required column 'messages'"),
        ({"messages": [{"role": "user", "content": "q"}]}, "end with an assistant turn"),
        (
            {"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]},
            "role and a text",
        ),
        ({"messages": ["q", "a"]}, "a turn is an object"),
        ("text", "a JSON object is wanted"),
        (sft_item(0) | {"images": ["https://host/a.png"]}, "remote image"),
        (sft_item(0) | {"images": [7]}, "bytes or a path is wanted"),
        (sft_item(0) | {"images": 5}, "'images': a list is wanted, not int"),
        (sft_item(0) | {"images": {"path": "a.png"}}, "'images': a list is wanted, not dict"),
        (sft_item(0) | {"system": ["be brief"]}, "'system': a text is wanted, not list"),
        (sft_item(0) | {"system": "half a pair: \ud83d"}, "surrogates not allowed"),
        (sft_item(0) | {"images": ["\ud800.png"]}, "surrogates not allowed"),
        (sft_item(0) | {"unused": {"\udc00": [1]}}, "surrogates not allowed"),
    ],
)
def test_bad_sft_row_says_why(tmp_path: Path, item: Any, reason: str) -> None:
    rows = read_sft(write_sft(tmp_path / "sft.json", [sft_item(0), item]))
    assert rows[0].response == "answer 0"
    with pytest.raises(RowError, match=reason):
        rows[1]


@pytest.mark.parametrize(
    ("read", "item"), [(read_sft, sft_item), (read_prompts, json_prompt), (read_pairs, pair_item)]
)
def test_a_row_nested_too_deep_says_so(
    tmp_path: Path, read: Callable[[Path], FileRows[Any]], item: Callable[[int], dict[str, Any]]
) -> None:
    """Deeper than Python reads JSON, and about as deep as it walks through what it has read."""
    path = tmp_path / "deep.jsonl"
    good = json.dumps(item(0))
    lines = [good[:-1] + f', "unused": {"[" * depth}{"]" * depth}}}' for depth in range(900, 999)]
    path.write_text("\n".join([good, good[:-1] + f', "unused": {"[" * 10**5}', *lines]) + "\n")
    rows = read(path)
    assert rows[0]
    with pytest.raises(RowError, match="malformed row: not a JSON object: maximum recursion"):
        rows[1]
    for index in range(2, len(rows)):
        try:
            rows[index]
        except RowError as error:
            assert "recursion" in str(error)


@pytest.mark.parametrize("read", [read_sft, read_pairs])
def test_empty_file_is_an_error_that_names_it(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "data.json"
    path.write_text("[]" if read is read_sft else "\n")
    with pytest.raises(ValueError, match=r"data\.json has no rows"):
        read(path)


def test_empty_parquet_is_an_error_that_names_it(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([prompt_item(0)]).slice(0, 0)
    pq.write_table(table, tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none\.parquet has no rows"):
        read_prompts(tmp_path / "none.parquet")


def test_file_of_another_format_names_wanted_and_found(tmp_path: Path) -> None:
    path = write_sft(tmp_path / "other.json", [{"text": "a", "label": 1}])
    with pytest.raises(ValueError, match=r"messages or conversations.*text.*label"):
        read_sft(path)
    path.write_text("not json")
    with pytest.raises(ValueError, match=r"neither parquet nor JSON.*begins with b'not json'"):
        read_prompts(path)
    path.write_text('{"prompt": "q"}\n')
    with pytest.raises(ValueError, match=r"student_cot.*the first has.*prompt"):
        read_pairs(path)


def test_parquet_without_a_required_column_names_it(tmp_path: Path) -> None:
    items = [{k: v for k, v in prompt_item(0).items() if k != "teacher_cot"}]
    path = write_parquet(tmp_path / "p.parquet", items)
    assert len(read_prompts(path)) == 1
    with pytest.raises(ValueError, match=r"no row of .*teacher_cot.*the first has \[\['prompt'"):
        read_prompts(path, required=("teacher_caption", "teacher_cot"))


def test_prompt_rows_across_row_groups(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p.parquet", [prompt_item(i) for i in range(8)])
    rows = read_prompts(path, required=("teacher_caption", "teacher_cot"))
    assert len(rows) == 8
    for number in (7, 0, 3, 2, 5):
        row = rows[number]
        assert row.row_id == f"p:{number}"
        assert row.question == f"<image>\nquestion {number}"
        assert row.images[0].read() == b"encoded %d" % number
        assert row.ground_truth == str(number)
        assert row.teacher_caption == f"<caption>{number}</caption>"
        assert row.teacher_response is None
        assert row.extra_info == {"index": number}
    with pytest.raises(IndexError):
        rows[8]


def test_images_as_bytes_or_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"from file")
    as_bytes = write_parquet(tmp_path / "b.parquet", [prompt_item(0, images=[b"direct"])])
    as_path = write_parquet(tmp_path / "p.parquet", [prompt_item(0, images=["a.png"])])
    assert read_prompts(as_bytes)[0].images[0].read() == b"direct"
    assert read_prompts(as_path)[0].images[0].read() == b"from file"


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png"])
def test_a_path_that_no_file_can_have_is_a_row_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(RowError, match="missing image"):
        ImageSource(path=tmp_path / name).read()


def test_missing_image_file_is_a_row_error(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"missing image: .*gone\.png"):
        ImageSource(path=tmp_path / "gone.png").read()


@pytest.mark.parametrize(
    ("reason", "attempts"),
    [(errno.ESTALE, 4), (errno.EIO, 4), (errno.ENOENT, 1), (errno.EACCES, 1)],
)
def test_storage_that_is_away_for_a_while_costs_no_row(
    monkeypatch: pytest.MonkeyPatch, reason: int, attempts: int
) -> None:
    failures, slept = [OSError(reason, os.strerror(reason)) for _ in range(4)], []
    reads = iter([*failures, *failures[:3], b"image"])

    def read(path: Path) -> bytes:
        found = next(reads)
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr("time.sleep", slept.append)
    source = ImageSource(path=Path("x.png"))
    with pytest.raises(RowError, match=f"missing image: x.png .{os.strerror(reason)}"):
        source.read()
    assert slept == [0.5, 2.0, 8.0][: attempts - 1]
    if attempts > 1:
        assert source.read() == b"image"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": None}, "missing required column 'prompt'"),
        ({"teacher_cot": None}, "missing required column 'teacher_cot'"),
        ({"teacher_cot": ""}, "missing required column 'teacher_cot'"),
        ({"reward_model": {"ground_truth": None, "style": "rule"}}, "reward_model.ground_truth"),
        ({"prompt": [{"role": "assistant", "content": "hi"}]}, "end with a user turn"),
        ({"videos": ["clip.mp4"]}, "only images"),
    ],
)
def test_bad_prompt_row_says_why(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = write_parquet(tmp_path / "p.parquet", [prompt_item(0), prompt_item(1, **changes)])
    if "videos" in changes:
        path = write_parquet(path, [prompt_item(0, videos=[]), prompt_item(1, **changes)])
    rows = read_prompts(path, required=("teacher_caption", "teacher_cot"))
    assert rows[0].ground_truth == "0"
    with pytest.raises(RowError, match=reason):
        rows[1]


@pytest.mark.parametrize(
    ("read", "item", "reason"),
    [
        (read_prompts, json_prompt(1) | {"images": "a.png"}, "'images': a list is wanted, not str"),
        (read_prompts, json_prompt(1) | {"teacher_cot": [5]}, "'teacher_cot': a text is wanted"),
        (read_prompts, json_prompt(1) | {"data_source": 5}, "'data_source': a text is wanted"),
        (read_prompts, json_prompt(1) | {"teacher_caption": "\ud83d"}, "surrogates not allowed"),
        (
            read_prompts,
            json_prompt(1) | {"reward_model": {"ground_truth": "1", "equivalent_answers": 5}},
            "'equivalent_answers': a list is wanted, not int",
        ),
        (
            read_prompts,
            json_prompt(1) | {"reward_model": {"ground_truth": "\udc00"}},
            "surrogates not allowed",
        ),
        (read_pairs, pair_item(1) | {"image": 5}, "bytes or a path is wanted, not int"),
        (read_pairs, pair_item(1) | {"student_cot": ["s"]}, "missing required column"),
        (read_pairs, pair_item(1) | {"student_cot": "s\udfff"}, "surrogates not allowed"),
    ],
)
def test_what_json_can_spell_but_no_row_can_hold(
    tmp_path: Path, read: Callable[[Path], FileRows[Any]], item: dict[str, Any], reason: str
) -> None:
    good = json_prompt(0) if read is read_prompts else pair_item(0)
    rows = read(write_sft(tmp_path / "rows.json", [good, item]))
    assert rows[0].row_id
    with pytest.raises(RowError, match=reason):
        rows[1]


def test_pairs_survive_writing_and_reading(tmp_path: Path) -> None:
    stored = tmp_path / "elsewhere.png"
    stored.write_bytes(b"third")
    sources = [
        (ImageSource(data=b"one"),),
        (ImageSource(data=b"one"),),
        (),
        (ImageSource(path=stored),),
    ]
    texts = ["<image>\nfirst\u2028line", "<image>\nsecond", "no image", "<image>\nfourth"]
    systems = [(), (Message("system", "The row's own."),), (), ()]
    written = [
        PairRow(f"row-{i}", (*system, Message("user", text)), images, **PAIR)
        for i, (system, text, images) in enumerate(zip(systems, texts, sources, strict=True))
    ]
    path = tmp_path / "out" / "pairs.jsonl"
    assert write_pairs(path, written) == 4
    rows = read_pairs(path)
    for row, want in zip([rows[i] for i in range(len(rows))], written, strict=True):
        assert (row.row_id, row.messages) == (want.row_id, want.messages)
        assert (row.teacher_cot, row.student_caption) == (want.teacher_cot, want.student_caption)
        assert [i.read() for i in row.images] == [i.read() for i in want.images]
    assert len(list((tmp_path / "out" / "pairs_images").iterdir())) == 1


@pytest.mark.parametrize(
    ("roles", "images", "reason"),
    [
        (("user", "assistant", "user"), 0, "several turns: user, assistant, user; a warm-up pair"),
        (("system", "user", "user"), 1, "several turns: system, user, user;"),
        (("user",), 2, "several images: 2; a warm-up pair holds one"),
    ],
)
def test_pairs_that_the_format_has_no_room_for_are_refused(
    tmp_path: Path, roles: tuple[str, ...], images: int, reason: str
) -> None:
    messages = tuple(Message(role, "text") for role in roles)
    row = PairRow("row", messages, (ImageSource(data=b"one"),) * images, **PAIR)
    with pytest.raises(RowError, match=reason):
        write_pairs(tmp_path / "pairs.jsonl", [row])


def test_published_pair_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"id": 7, "question": "what?", "image": "a.png", **PAIR},
        {"prompt": "what?", **PAIR, "student_cot": ""},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\nbroken\n")
    rows = read_pairs(path)
    assert rows[0].row_id == "7" and rows[0].question == "<image>\nwhat?"
    assert rows[0].images == (ImageSource(path=tmp_path / "a.png"),)
    with pytest.raises(RowError, match="missing required column 'student_cot'"):
        rows[1]
    with pytest.raises(RowError, match="not a JSON object"):
        rows[2]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_every_kind_of_rows_may_be_in_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    def write(name: str, items: list[dict[str, Any]]) -> Path:
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            return write_parquet(path, items)
        whole = suffix == "json"
        path.write_text(json.dumps(items) if whole else "\n".join(map(json.dumps, items)))
        return path

    prompts = [prompt_item(i, images=["a.png"]) for i in range(4)]
    pairs = [{"id": str(i), "prompt": "q", **PAIR} for i in range(5)]
    assert read_prompts(write("prompts", prompts))[3].ground_truth == "3"
    assert read_pairs(write("pairs", pairs))[4].row_id == "4"
    assert read_sft(write("sft", [sft_item(i) for i in range(6)]))[5].response == "answer 5"


def test_demonstrations_with_their_images_in_parquet(tmp_path: Path) -> None:
    images = [{"bytes": b"encoded", "path": "1.png"}]
    path = write_parquet(tmp_path / "sft.parquet", [sft_item(0) | {"images": images}])
    row = read_sft(path)[0]
    assert row.images == (ImageSource(data=b"encoded"),)
    assert row.response == "answer 0"


def test_images_may_lie_in_another_folder(tmp_path: Path) -> None:
    path = write_sft(tmp_path / "sft.json", [sft_item(0)])
    rows = read_sft(path, FileOptions(media_dir=tmp_path / "media"))
    assert rows[0].images == (ImageSource(path=tmp_path / "media/images/0.png"),)


def test_a_prompt_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "out" / "p.parquet"
    schema = pa.schema([*PROMPT_FIELDS])
    with pytest.raises(RuntimeError, match="stop"), prompt_writer(path, schema) as add:
        for number in range(70):
            add(prompt_item(number))
        raise RuntimeError("stop")
    assert list(path.parent.iterdir()) == []
    with prompt_writer(path, schema) as add:
        for number in range(70):
            add(prompt_item(number))
    rows = read_prompts(path)
    assert [rows[i].ground_truth for i in range(len(rows))] == [str(i) for i in range(70)]
    assert rows[69].images[0].read() == b"encoded 69"
    assert pq.ParquetFile(path).num_row_groups == 2
    assert [file.name for file in path.parent.iterdir()] == ["p.parquet"]
