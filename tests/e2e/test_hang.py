"""A rank that never comes: the others say which one, show their stacks, and end."""

from __future__ import annotations

import sys
from pathlib import Path

from prism_megatron.training.watchdog import Answer, missing, report
from tests.e2e.stages import Job, metrics, prepare, sft


def test_a_hung_run_names_the_missing_rank_and_ends(tmp_path: Path) -> None:
    prepare(tmp_path)
    out = tmp_path / "out"
    stage = sft(tmp_path, out, 10**6, "run.hang_timeout=15", "batch_size=6")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=3", "-m", "tests.e2e.hangs", *stage]
    status, output = Job(command).end()
    assert status == 1, output[-6000:]
    assert output.count("MISSING") == 1
    [words] = [line for line in output.splitlines() if "MISSING" in line]
    assert words.startswith("MISSING rank 1 on ") and "step 3, the beginning of the step" in words
    assert (out / "stacks" / "hang.txt").read_text() in output
    assert len(metrics(out)) == 2
    for rank in range(3):
        stacks = (out / "stacks" / f"rank_{rank}.txt").read_text()
        assert stacks.startswith(f"rank {rank} on ") and "step 3" in stacks
        # the main thread is the last one
        innermost = stacks.split("(most recent call first):\n")[-1].splitlines()[0]
        assert ("hangs.py" if rank == 1 else "torch/distributed") in innermost
        assert f"rank {rank} on" in output


def answer(step: int = 4, waits: bool = True, **collectives: int) -> Answer:
    groups = {name.replace("_", ","): number for name, number in collectives.items()}
    return Answer("host", 1, step, "an update", 9.0, waits, "a.py:1 (f)", groups)


def test_who_is_missing_is_who_entered_fewer_collectives_and_waits_in_none() -> None:
    # rank 3 is missing in its tensor group, whose other rank is therefore missing in its data group
    answers = {
        0: answer(_0_1=7, _0_2=5),
        1: answer(_0_1=7, _1_3=4),
        2: answer(_2_3=7, _0_2=4),
        3: answer(waits=False, _2_3=6, _1_3=3),
    }
    assert missing(answers) == [3]
    # without collectives it is the one in an earlier step, or that does not wait
    assert missing({0: answer(4, _0_1=3), 1: answer(3, _0_1=3)}) == [1]
    assert missing({0: answer(), 1: answer(waits=False), 2: answer()}) == [1]
    assert missing({0: answer(waits=False), 1: answer(waits=False)}) == []
    assert "all wait for something outside" in report({0: answer(), 1: answer()}, 2)
    words = report({0: answer(), 2: answer()}, 3)
    assert "MISSING rank 1: its process does not answer" in words
