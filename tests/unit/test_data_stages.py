"""The stages between the training stages: pairs, difficulty, alignment set, statistics."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from transformers import AutoProcessor

from checkpoint_tools import tiny_qwen3vl
from prism_megatron import data_stats
from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.data.rows import TEACHER_SECTIONS, read_pairs, read_prompts
from prism_megatron.objectives.sections import sections_of
from prism_megatron.pipelines import filter_difficulty, make_alignment_set, make_warmup_pairs
from prism_megatron.rollout import fleet
from prism_megatron.types import Prompt, Rollout

NUM_PROMPTS, NUM_RESPONSES = 12, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    digit_sums.build(schema.DigitSums(out=out, train_rows=NUM_PROMPTS, heldout_rows=2))
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "hf"
    texts = [digit_sums.demonstration("sum", (a, b)) for a in range(10) for b in range(10)]
    tiny_qwen3vl.create(out, texts, "Answer in sections.", vocab_size=320, seed=3)
    return out


class ScriptedEngine:
    """A Fleet whose responses are written down; it goes away at its batch `dies_at`, with the first
    answer of it given."""

    weight_version = 0

    def __init__(
        self, model: Path, answers: Callable[[int, int], tuple[str, bool]], dies_at: int = -1
    ) -> None:
        self._tokenizer = AutoProcessor.from_pretrained(model).tokenizer
        self._answers = answers
        self._calls, self._dies_at = 0, dies_at
        self._out: list[list[Rollout]] = []
        self.asked: list[str] = []

    def readmit(self) -> None:
        assert not self._out, "prompts are out"

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: schema.Sampling,
        step: int,
        answered: fleet.Answered | None = None,
    ) -> None:
        assert answered is not None and not self._out and prompts and step == 0
        self._calls += 1
        self._answered = answered
        numbers = [int(prompt.row_id.split(":")[1]) for prompt in prompts]
        self._out = [
            [self._rollout(*self._answers(i, k)) for k in range(sampling.n)] for i in numbers
        ]
        self._ids = [prompt.row_id for prompt in prompts]

    def collect(self, version: int) -> list[list[Rollout]]:
        # the last prompt first, as engines may
        for place in reversed(range(len(self._out))):
            self.asked.append(self._ids[place])
            self._answered(place, self._out[place])
            if self._calls == self._dies_at:
                raise KeyboardInterrupt
        found, self._out = self._out, []
        return found

    def sync(self, version: int) -> dict[str, float]:
        raise AssertionError("nothing is trained here")

    def sleep(self) -> dict[str, float]:
        raise AssertionError("nothing is trained here")

    def check(self, action: Any) -> list[str]:
        raise AssertionError("nothing is trained here")

    def _rollout(self, text: str, finished: bool) -> Rollout:
        text += "<|im_end|>" if finished else ""
        ids = tuple(self._tokenizer(text, add_special_tokens=False).input_ids)
        return Rollout(ids, (-1.0,) * len(ids), "stop" if finished else "length", 0)


def difficulty(out: Path, folder: Path, policy: Path, **changes: Any) -> schema.FilterDifficulty:
    values = {
        "run": {"dir": out / "run"},
        "data": {"path": folder / "prompts.parquet", "max_bad_share": 0.2},
        "model": policy,
        "sampling": {"n": NUM_RESPONSES, "max_new_tokens": 64, "batch_size": 10},
        "rewards": {"workers": 1},
        "out": out / "kept.parquet",
    }
    return schema.FilterDifficulty.model_validate(values | changes)


def answers_of(data: Path) -> Callable[[int, int], tuple[str, bool]]:
    """Prompt i has min(i, 5) right responses of five; a right and a wrong one are cut off."""
    rows = pq.read_table(data / "prompts.parquet").to_pylist()

    def answer(prompt: int, number: int) -> tuple[str, bool]:
        right = rows[prompt]["teacher_response"]
        wrong = right.replace("<answer>", "<answer>9")
        return (right if number < prompt else wrong, (prompt, number) not in ((4, 3), (0, 2)))

    return answer


def test_prompts_of_middle_difficulty_are_kept_as_they_were(
    tmp_path: Path, data: Path, model: Path
) -> None:
    engine = ScriptedEngine(model, answers_of(data))
    filter_difficulty.filter_prompts(difficulty(tmp_path, data, model), engine)
    before = pq.read_table(data / "prompts.parquet").to_pylist()
    after = pq.read_table(tmp_path / "kept.parquet")
    rates = {1: 0.2, 2: 0.4, 3: 0.6, 4: 0.6}
    rows = after.to_pylist()
    assert [row.pop("pass_rate") for row in rows] == list(rates.values())
    assert rows == [before[i] for i in rates]
    assert [len(row.images[0].read()) > 50 for row in read_prompts(tmp_path / "kept.parquet")]
    result = json.loads((tmp_path / "run/difficulty.json").read_text())
    assert (result["kept"], result["too_hard"], result["too_easy"]) == (4, 1, 7)
    assert result["pass_rates"] == {"0": 1, "0.2": 1, "0.4": 1, "0.6": 2, "1": 7}


def test_a_killed_filter_samples_only_what_is_missing(
    tmp_path: Path, data: Path, model: Path
) -> None:
    asked: list[str] = []
    for dies_at in (3, 2, -1):
        engine = ScriptedEngine(model, answers_of(data), dies_at)
        config = difficulty(tmp_path, data, model)
        try:
            filter_difficulty.filter_prompts(config, engine)
        except KeyboardInterrupt:
            assert dies_at > 0 and not config.out.exists()
        asked += engine.asked
    assert Counter(asked) == {f"prompts:{i}": 1 for i in range(NUM_PROMPTS)}
    # answers that had come of a batch that broke off are there
    assert engine.asked[0] == f"prompts:{4 + 2}"
    whole = difficulty(tmp_path / "whole", data, model)
    filter_difficulty.filter_prompts(whole, ScriptedEngine(model, answers_of(data)))
    assert pq.read_table(config.out) == pq.read_table(whole.out)


def test_a_half_written_line_is_sampled_again(tmp_path: Path, data: Path, model: Path) -> None:
    config = difficulty(tmp_path, data, model)
    filter_difficulty.filter_prompts(config, ScriptedEngine(model, answers_of(data)))
    file = config.run.dir / "responses.jsonl"
    row = json.loads(file.read_text().splitlines()[-1])["row"]
    file.write_bytes(file.read_bytes()[:-7])
    engine = ScriptedEngine(model, answers_of(data))
    filter_difficulty.filter_prompts(config, engine)
    assert engine.asked == [f"prompts:{row}"]
    assert len(file.read_text().splitlines()) == NUM_PROMPTS + 1


def test_responses_of_another_policy_are_not_gone_on_with(
    tmp_path: Path, data: Path, model: Path
) -> None:
    engine = ScriptedEngine(model, answers_of(data))
    filter_difficulty.filter_prompts(difficulty(tmp_path, data, model), engine)
    sampling = {"n": NUM_RESPONSES, "max_new_tokens": 63, "batch_size": 10}
    other = difficulty(tmp_path, data, model, sampling=sampling)
    with pytest.raises(ValueError, match="holds responses of another model"):
        filter_difficulty.filter_prompts(other, engine)
    same = sampling | {"max_new_tokens": 64, "batch_size": 15}
    filter_difficulty.filter_prompts(difficulty(tmp_path, data, model, sampling=same), engine)
    assert len(engine.asked) == NUM_PROMPTS


def test_rows_of_several_files_with_images_as_paths_are_kept_with_the_images(
    tmp_path: Path, data: Path, model: Path
) -> None:
    items = pq.read_table(data / "prompts.parquet").to_pylist()[:4]
    for number, item in enumerate(items):
        (tmp_path / f"{number}.png").write_bytes(item["images"][0]["bytes"])
        item |= {"images": [f"{number}.png"], "extra": number}
    pq.write_table(pa.Table.from_pylist(items[2:]), tmp_path / "prompts.parquet")
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, items[:2])))
    sources = [{"path": tmp_path / "lines.jsonl"}, {"path": tmp_path / "prompts.parquet"}]
    config = difficulty(tmp_path, data, model, data={"sources": sources}, low=0.0, high=1.0)
    filter_difficulty.filter_prompts(config, ScriptedEngine(model, answers_of(data)))
    rows = pq.read_table(config.out).to_pylist()
    assert [row["extra"] for row in rows] == [0, 1, 2, 3]
    for number, row in enumerate(rows):
        assert row["images"] == [{"bytes": (tmp_path / f"{number}.png").read_bytes(), "path": None}]


def test_the_reference_rules_do_not_see_control_tokens(
    tmp_path: Path, data: Path, model: Path
) -> None:
    rows = pq.read_table(data / "prompts.parquet").to_pylist()

    def answer(prompt: int, number: int) -> tuple[str, bool]:
        return rows[prompt]["teacher_response"].replace("<answer>", "<answer><|im_start|>"), True

    engine, rates = ScriptedEngine(model, answer), {}
    for rules in ("corrected", "reference"):
        rewards = {"rules": rules, "workers": 1}
        config = difficulty(tmp_path, data, model, rewards=rewards, low=0.0, high=1.0)
        filter_difficulty.filter_prompts(config, engine)
        rates[rules] = json.loads((config.run.dir / "difficulty.json").read_text())["pass_rates"]
    assert rates == {"corrected": {"0": NUM_PROMPTS}, "reference": {"1": NUM_PROMPTS}}
    # other rules need no other responses
    assert len(engine.asked) == NUM_PROMPTS


def test_a_megatron_checkpoint_is_refused_with_what_exports_it(
    tmp_path: Path, data: Path, model: Path
) -> None:
    shutil.copytree(model, tmp_path / "ckpt" / "hf")
    (tmp_path / "ckpt" / "metadata.json").write_text("{}")
    config = difficulty(tmp_path, data, tmp_path / "ckpt")
    with pytest.raises(ValueError, match=r"megatron-to-hf --ckpt \S+/ckpt --out \S+/ckpt-hf"):
        filter_difficulty.run(config)


def test_one_process_samples(
    tmp_path: Path, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"3 were started.*NPROC_PER_NODE=1.*rollout.engines"):
        filter_difficulty.run(difficulty(tmp_path, data, model))


@pytest.mark.parametrize(
    ("rollout", "backend", "said"),
    [
        ({"kind": "sglang", "gpus": [0], "sleep": True}, "cpu", "rollout.sleep: about weights"),
        ({"kind": "sglang", "gpus": [0], "quantization": "fp8-block"}, "cpu", "quantize` wrote"),
        ({"kind": "vllm", "gpus": [0], "sync_folder": "x"}, "cpu", "rollout.sync_folder: about"),
        (
            {"kind": "local", "ahead": True, "partial": True},
            "cpu",
            "ahead, rollout.partial",
        ),
        ({"kind": "local"}, "cuda", "backend=cuda .* rollout.kind=local has devices of its own"),
    ],
)
def test_what_engines_that_are_not_trained_have_no_use_for(
    tmp_path: Path, rollout: dict[str, Any], backend: str, said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        difficulty(tmp_path, tmp_path, tmp_path, rollout=rollout, backend=backend)


def test_pairs_are_the_policys_sections_beside_the_teachers(
    tmp_path: Path, data: Path, model: Path
) -> None:
    items = pq.read_table(data / "prompts.parquet").to_pylist()
    items[1]["prompt"].insert(0, {"role": "system", "content": "The row's own."})
    items[3]["teacher_cot"] = "no sections"
    items[4]["prompt"] = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
        *items[4]["prompt"],
    ]
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "prompts.parquet")
    values = difficulty(tmp_path, tmp_path, model).model_dump(exclude={"low", "high", "rewards"})
    config = schema.MakeWarmupPairs.model_validate(values | {"out": tmp_path / "pairs.jsonl"})

    asked = []
    for dies_at in (3, -1):
        engine = ScriptedEngine(model, answers_of(data), dies_at)
        try:
            make_warmup_pairs.make_pairs(config, engine)
        except KeyboardInterrupt:
            assert not config.out.exists()
        asked += engine.asked
    # rows with a broken teacher, or with more turns than a pair holds, are not sampled for
    usable = [i for i in range(NUM_PROMPTS) if i not in (3, 4)]
    assert sorted(asked) == sorted(f"prompts:{i}" for i in usable)
    reasons = (tmp_path / "run" / "quarantine.jsonl").read_text()
    assert reasons.count("several turns") == 1
    rows = [row for row in read_pairs(config.out)]
    # right responses equal the teacher's, and a wrong one of prompt 0 is cut off
    assert Counter(row.row_id.split("/")[0] for row in rows) == {
        f"prompts:{i}": wrong for i, wrong in enumerate([4, 4, 3]) if wrong
    }
    assert "<answer>9" in rows[0].student_cot and "<answer>9" not in rows[0].teacher_cot
    systems = [row.row_id for row in rows if row.messages[0].role == "system"]
    assert systems == [f"prompts:1/{k}" for k in range(1, 5)]
    assert rows[0].student_caption == rows[0].teacher_caption == items[0]["teacher_caption"]


def alignment_config(out: Path, path: Path, **changes: Any) -> schema.MakeAlignmentSet:
    values = {
        "run": {"dir": out / "run", "seed": 4},
        "data": {"path": path, "max_bad_share": 0.5},
        "heldout_share": 0.4,
        "out": out / "set",
    }
    return schema.MakeAlignmentSet.model_validate(values | changes)


def alignment_rows(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        name: pq.read_table(out / "set" / f"{name}.parquet").to_pylist()
        for name in ("train", "heldout")
    }


def test_demonstrations_become_alignment_rows(tmp_path: Path, data: Path) -> None:
    items = json.loads((data / "sft.json").read_text())
    items[1]["messages"][1]["content"] += " and more"
    items[2]["messages"][1]["content"] = items[2]["messages"][1]["content"].replace("think>", "x>")
    items[3]["images"] = ["images/gone.png"]
    (data / "changed.json").write_text(json.dumps(items))
    make_alignment_set.run(alignment_config(tmp_path, data / "changed.json"))
    found = alignment_rows(tmp_path)
    rows = {row["extra_info"]["index"]: row for part in found.values() for row in part}
    assert set(rows) == {f"changed:{i}" for i in range(NUM_PROMPTS) if i not in (1, 2, 3)}
    assert found["train"] and found["heldout"]
    for name, row in rows.items():
        item = items[int(name.split(":")[1])]
        response = item["messages"][1]["content"]
        assert row["teacher_response"] == response
        sections = sections_of(row["teacher_caption"], row["teacher_cot"])
        assert sections is not None and sections.caption in response
        assert row["reward_model"]["ground_truth"] == row["answer"] == sections.answer
        assert row["images"][0]["bytes"] == (data / item["images"][0]).read_bytes()
        assert row["data_source"] == "mm_gad"
    read = read_prompts(tmp_path / "set" / "train.parquet", required=TEACHER_SECTIONS)
    assert read[0].question == found["train"][0]["prompt"][-1]["content"]
    reasons = (tmp_path / "run" / "quarantine.jsonl").read_text()
    assert reasons.count("malformed response") == 2 and reasons.count("missing image") == 1


def test_the_split_follows_the_seed_and_keeps_images_together(tmp_path: Path, data: Path) -> None:
    items = json.loads((data / "sft.json").read_text())
    # each image is asked about three times
    items += [item | {"images": items[i - 1]["images"]} for i, item in enumerate(items)] * 2
    (data / "thrice.json").write_text(json.dumps(items))
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        config = alignment_config(
            tmp_path / name, data / "thrice.json", run={"dir": tmp_path / name, "seed": seed}
        )
        make_alignment_set.run(config)
    a, b, c = (alignment_rows(tmp_path / name) for name in "abc")
    assert a == b != c
    shown = {
        part: {hashlib.sha256(row["images"][0]["bytes"]).digest() for row in rows}
        for part, rows in a.items()
    }
    assert shown["train"] and shown["heldout"] and not shown["train"] & shown["heldout"]
    assert len(a["train"]) + len(a["heldout"]) == 3 * NUM_PROMPTS


def test_rows_that_share_an_image_are_on_one_side(tmp_path: Path, data: Path) -> None:
    items = json.loads((data / "sft.json").read_text())
    images = [item["images"][0] for item in items]
    # pairs of neighbours, each of which connects two questions about one image; four connect none
    for first in range(0, NUM_PROMPTS - 4, 2):
        turns = [{"role": "user", "content": "<image><image>Same?"}, items[first]["messages"][1]]
        items.append({"messages": turns, "images": images[first : first + 2]})
    sets = []
    for name, rows in (("a", items), ("b", items[::-1])):
        (data / f"{name}.json").write_text(json.dumps(rows))
        make_alignment_set.run(alignment_config(tmp_path / name, data / f"{name}.json"))
        shown = {
            part: {image["bytes"] for row in rows for image in row["images"]}
            for part, rows in alignment_rows(tmp_path / name).items()
        }
        assert shown["train"] and shown["heldout"] and not shown["train"] & shown["heldout"]
        sets.append(shown)
    assert sets[0] == sets[1]


def test_groups_are_what_digests_connect_in_any_order() -> None:
    rows = [[b"d", b"e"], [b"a"], [b"c", b"b"], [b"e", b"c"], [b"f"], [b"f", b"f"]]
    wanted = [b"b", b"a", b"b", b"b", b"f", b"f"]
    for order in permutations(range(len(rows))):
        found = make_alignment_set.groups([rows[i] for i in order])
        assert found == [wanted[i] for i in order]


def test_a_set_without_training_rows_is_refused(tmp_path: Path, data: Path) -> None:
    config = alignment_config(tmp_path, data / "sft.json", heldout_share=1 - 1e-9)
    with pytest.raises(ValueError, match="all 12 rows would be held out .*lower heldout_share"):
        make_alignment_set.run(config)


def test_a_teachers_responses_to_prompts_become_alignment_rows(tmp_path: Path, data: Path) -> None:
    items = pq.read_table(data / "prompts.parquet").to_pylist()
    for item in items:
        del item["teacher_caption"], item["teacher_cot"]
        item["reward_model"] = {"ground_truth": "known", "equivalent_answers": ["K", "k."]}
    items[0]["extra_info"] |= {"level": 3}
    items[5]["teacher_response"] = None
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "p.parquet")
    config = alignment_config(tmp_path, tmp_path / "p.parquet", rows="prompts", heldout_share=0.0)
    make_alignment_set.run(config)
    rows = alignment_rows(tmp_path)
    assert len(rows["train"]) == NUM_PROMPTS - 1 and not rows["heldout"]
    assert {row["reward_model"]["ground_truth"] for row in rows["train"]} == {"known"}
    assert {row["data_source"] for row in rows["train"]} == {digit_sums.DATA_SOURCE}
    assert rows["train"][0]["teacher_caption"].startswith("<caption>")
    read = read_prompts(tmp_path / "set" / "train.parquet")
    assert {read[i].equivalents for i in range(len(read))} == {("K", "k.")}
    assert read[0].extra_info == items[0]["extra_info"] | {"index": "p:0"}
    assert read[1].extra_info == items[1]["extra_info"] | {"index": "p:1", "level": None}


def test_extra_info_that_parquet_can_not_hold(tmp_path: Path, data: Path) -> None:
    response = json.loads((data / "sft.json").read_text())[0]["messages"][1]["content"]
    rows = [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "reward_model": {"ground_truth": "1"},
            "teacher_response": response,
            "extra_info": {"level": level},
        }
        for level in (1, [1, "a"], None, "hard")
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows[:3])))
    config = alignment_config(tmp_path, path, rows="prompts", heldout_share=0.0)
    make_alignment_set.run(config)
    found = alignment_rows(tmp_path)["train"]
    assert [row["extra_info"]["level"] for row in found] == [1, None]
    assert "malformed extra_info" in (tmp_path / "run" / "quarantine.jsonl").read_text()
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="extra_info can't be written to one file: .*level"):
        make_alignment_set.run(config)


def stats(out: Path, model: Path, **values: Any) -> dict[str, Any]:
    config = schema.DataStats.model_validate({"run": {"dir": out}, "model": model} | values)
    out.mkdir(exist_ok=True)
    data_stats.run(config)
    result: dict[str, Any] = json.loads((out / "data_stats.json").read_text())
    return result


def test_statistics_of_demonstrations(
    tmp_path: Path, data: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = json.loads((data / "sft.json").read_text())[:6]
    text = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"}]}
    items += [text, text, text | {"images": ["gone.png"]}]
    (data / "mixed.json").write_text(json.dumps(items))
    sources = [{"path": data / "mixed.json"}, {"path": data / "sft.json", "name": "plain"}]
    result = stats(tmp_path / "run", model, data={"sources": sources})
    mixed, plain = result["sources"]["mixed"], result["sources"]["plain"]
    assert (mixed["rows"], mixed["usable"]) == (9, 8)
    assert mixed["quarantined"] == {"placeholder count": 1} and not plain["quarantined"]
    assert mixed["counts"]["images"] == {
        "mean": 0.75, "min": 0, "5 %": 0, "median": 1, "95 %": 1, "99 %": 1, "max": 1,
    }  # fmt: skip
    # 64 x 32 pixels in patches of 16, four patches a token
    assert plain["counts"]["image_tokens"]["min"] == plain["counts"]["image_tokens"]["max"] == 2
    assert mixed["counts"]["response_tokens"]["min"] <= 3
    assert plain["truncated_share"] == 0
    assert (tmp_path / "run/data_stats.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "mixed: 8 of 9 rows usable" in printed and "placeholder count: 1" in printed


def test_statistics_say_how_much_is_cut_off(tmp_path: Path, data: Path, model: Path) -> None:
    limits = {"path": data / "sft.json", "max_response_tokens": 9}
    cut = stats(tmp_path / "a", model, data=limits | {"overlong": "truncate_response"})
    assert cut["sources"]["sft"]["truncated_share"] == 1
    assert cut["sources"]["sft"]["counts"]["response_tokens"]["min"] == 9
    left_out = stats(tmp_path / "b", model, data=limits)
    assert left_out["sources"]["sft"]["quarantined"] == {"overlong response": NUM_PROMPTS}
    assert left_out["sources"]["sft"]["usable"] == 0


@pytest.mark.parametrize("kind", ["prompts", "pairs"])
def test_statistics_of_what_the_discriminator_reads(
    tmp_path: Path, data: Path, model: Path, kind: str
) -> None:
    row = pq.read_table(data / "prompts.parquet").to_pylist()[0]
    line = {name: row[name] for name in TEACHER_SECTIONS}
    line |= {"prompt": "q", "student_caption": "<caption>1</caption>", "student_cot": "<think>"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    path = {"prompts": data / "prompts.parquet", "pairs": tmp_path / "pairs.jsonl"}[kind]
    result = stats(tmp_path / "run", model, data={"path": path}, rows=kind)
    [source] = result["sources"].values()
    sections = ["teacher_caption", "teacher_cot"]
    sections += ["student_caption", "student_cot"] if kind == "pairs" else []
    assert {f"{name}_tokens" for name in sections} <= source["counts"].keys()
    assert source["counts"]["teacher_caption_tokens"]["min"] > 3


def test_statistics_of_one_file_twice_are_apart(tmp_path: Path, data: Path, model: Path) -> None:
    path = data / "sft.json"
    sources = [{"path": path}, {"path": path, "name": "few", "num_samples": 4}]
    limits = {"sources": sources, "max_prompt_tokens": 5}
    found = stats(tmp_path / "run", model, data=limits)["sources"]
    counts = {name: values["quarantined"]["overlong prompt"] for name, values in found.items()}
    assert counts == {"sft": NUM_PROMPTS, "few": 4}
