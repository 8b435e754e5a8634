from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_megatron.data.rows import (
    BatchStream,
    ImageSource,
    Message,
    PairRow,
    Quarantine,
    RowError,
    convert_all,
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
    ],
)
def test_bad_sft_row_says_why(tmp_path: Path, item: Any, reason: str) -> None:
    rows = read_sft(write_sft(tmp_path / "sft.json", [sft_item(0), item]))
    assert rows[0].response == "answer 0"
    with pytest.raises(RowError, match=reason):
        rows[1]


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
    with pytest.raises(ValueError, match="not JSON"):
        read_sft(path)
    with pytest.raises(ValueError, match="not a parquet file"):
        read_prompts(path)
    path.write_text('{"prompt": "q"}\n')
    with pytest.raises(ValueError, match=r"student_cot.*the first has.*prompt"):
        read_pairs(path)


def test_parquet_without_a_required_column_names_it(tmp_path: Path) -> None:
    items = [{k: v for k, v in prompt_item(0).items() if k != "teacher_cot"}]
    path = write_parquet(tmp_path / "p.parquet", items)
    assert len(read_prompts(path)) == 1
    with pytest.raises(ValueError, match=r"lacks the columns \['teacher_cot'\]; it has \['prompt'"):
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


def test_missing_image_file_is_a_row_error(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"missing image: .*gone\.png"):
        ImageSource(path=tmp_path / "gone.png").read()


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


PAIR = {
    "teacher_caption": "<caption>t</caption>",
    "student_caption": "<caption>s</caption>",
    "teacher_cot": "<think>t</think><answer>1</answer>",
    "student_cot": "<think>s</think><answer>2</answer>",
}


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
    written = [
        PairRow(f"row-{i}", (Message("user", text),), images, **PAIR)
        for i, (text, images) in enumerate(zip(texts, sources, strict=True))
    ]
    path = tmp_path / "out" / "pairs.jsonl"
    assert write_pairs(path, written) == 4
    rows = read_pairs(path)
    for row, want in zip([rows[i] for i in range(len(rows))], written, strict=True):
        assert (row.row_id, row.messages) == (want.row_id, want.messages)
        assert (row.teacher_cot, row.student_caption) == (want.teacher_cot, want.student_caption)
        assert [i.read() for i in row.images] == [i.read() for i in want.images]
    assert len(list((tmp_path / "out" / "pairs_images").iterdir())) == 1


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


def test_quarantine_writes_counts_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    first = Quarantine(path, 0.5)
    assert first.summary() == "0 rows quarantined"
    first.add("a:1", Path("a"), "overlong prompt: 9 tokens")
    first.add("a:2", Path("a"), "overlong prompt: 8 tokens")
    first.add("a:2", Path("a"), "overlong prompt: 8 tokens")
    again = Quarantine(path, 0.5)
    again.add("a:2", Path("a"), "overlong prompt: 8 tokens")
    again.add("b:2", Path("b"), "missing image: x.png")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == ["a:1", "a:2", "b:2"]
    assert lines[2] == {"row": "b:2", "source": "b", "reason": "missing image: x.png"}
    assert again.total == 3
    assert again.counts == {"overlong prompt": 2, "missing image": 1}
    assert "3 rows quarantined (overlong prompt: 2, missing image: 1)" in again.summary()


def test_quarantine_stops_a_run_with_too_many_bad_rows(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.1, write=False)
    quarantine.add("a:1", Path("a"), "missing image: x.png")
    quarantine.check(10)
    with pytest.raises(ValueError, match=r"1 of 9 rows.*max_bad_share=0\.1.*missing image: 1"):
        quarantine.check(9)
    assert not (tmp_path / "q.jsonl").exists()


class Numbers:
    """Rows 0 to n-1, some of which can't be read."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()):
        self.source = Path("numbers")
        self.count = count
        self.bad = bad

    def __len__(self) -> int:
        return self.count

    def row_id(self, index: int) -> str:
        return f"numbers:{index}"

    def __getitem__(self, index: int) -> int:
        if index in self.bad:
            raise RowError(f"bad number: {index}")
        return index


def stream(rows: Numbers, tmp_path: Path, share: float = 0.5, **kwargs: int) -> BatchStream:
    quarantine = Quarantine(tmp_path / "q.jsonl", share)
    options = {"batch_size": 3, "seed": 1} | kwargs
    return BatchStream(rows, lambda number: number * 10, quarantine, **options)


def test_stream_gives_every_row_once_an_epoch_in_a_new_order(tmp_path: Path) -> None:
    batches = stream(Numbers(12), tmp_path)
    epochs = [[n for _ in range(4) for n in batches.next_batch()] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [n * 10 for n in range(12)]
    assert epochs[0] != epochs[1]
    assert stream(Numbers(12), tmp_path).next_batch() == epochs[0][:3]
    assert stream(Numbers(12), tmp_path, seed=2).next_batch() != epochs[0][:3]


def test_stream_fills_batches_past_bad_rows(tmp_path: Path) -> None:
    rows = Numbers(10, bad=(2, 5))
    batches = stream(rows, tmp_path, batch_size=4)
    drawn = [batches.next_batch() for _ in range(6)]
    assert all(len(batch) == 4 for batch in drawn)
    assert {n for batch in drawn for n in batch} == {n * 10 for n in range(10)} - {20, 50}
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 2


def test_stream_goes_on_from_its_position(tmp_path: Path) -> None:
    rows = Numbers(10, bad=(4,))
    whole = stream(rows, tmp_path)
    for _ in range(5):
        whole.next_batch()
    resumed = stream(rows, tmp_path)
    resumed.position = whole.position
    assert [resumed.next_batch() for _ in range(4)] == [whole.next_batch() for _ in range(4)]


def test_stream_stops_when_too_many_rows_are_bad(tmp_path: Path) -> None:
    batches = stream(Numbers(10, bad=(1, 2, 3)), tmp_path, share=0.2)
    with pytest.raises(ValueError, match="3 of 10 rows can't be used"):
        for _ in range(10):
            batches.next_batch()


def test_stream_ends_when_no_row_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row of numbers"):
        stream(Numbers(2, bad=(0, 1)), tmp_path, share=1.0).next_batch()


def test_convert_all_keeps_file_order(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.5)
    assert convert_all(Numbers(5, bad=(1,)), str, quarantine) == ["0", "2", "3", "4"]
    assert quarantine.counts == {"bad number": 1}
