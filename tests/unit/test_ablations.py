from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ablations import (
    CURVES,
    METRICS,
    ROOT,
    Arm,
    Job,
    Planner,
    forget_outdated,
    markdown,
    merged,
    read_arms,
    results,
    write_results,
)

SIZES, ARMS = read_arms(ROOT / "tests" / "ablations.yaml")
SEEDS = (3, 4)
BY_NAME = {arm.name: arm for arm in ARMS}


def end(job: Job, seconds: float = 1.0) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    job.record.write_text(json.dumps({"seconds": seconds}))


def evaluated(job: Job, accuracy: float) -> None:
    metrics = {name: {"value": accuracy, "count": 50} for name in METRICS}
    text = json.dumps({"metrics": metrics, "git_commit": "c0ffee"})
    (job.folder / "eval.json").write_text(text)


def finish(jobs: dict[str, Job], accuracy: float) -> None:
    """Leave what the arm's stages would leave."""
    for name, job in jobs.items():
        end(job)
        if name.startswith("evaluate-"):
            evaluated(job, accuracy)
    if "align" in jobs:
        lines = [{"step": step, "time": 1.0} | dict.fromkeys(CURVES, 0.75) for step in (1, 2, 3)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (jobs["align"].folder / "metrics.jsonl").write_text(text)


def test_arms_share_the_stages_that_are_the_same_to_them(tmp_path: Path) -> None:
    planner = Planner(tmp_path, SIZES, "cpu")
    plan = {arm.name: planner.arm(arm, 3) for arm in ARMS}
    own = plan["corrected"]
    for name, jobs in plan.items():
        assert jobs["sft"] is own["sft"] and jobs["evaluate-sft"] is own["evaluate-sft"]
        changed = [stage for stage in jobs if jobs[stage] is not own[stage]]
        assert set(BY_NAME[name].changes) <= set(changed)
    assert plan["dapo"]["align"] is own["align"] and plan["dapo"]["rlvr"] is not own["rlvr"]
    assert plan["pair_counts"]["warmup"] is own["warmup"]
    assert plan["dense"]["warmup"] is not own["warmup"], "it warms up another discriminator"
    assert "align" not in plan["without_alignment"]


def test_all_arms_take_as_many_steps(tmp_path: Path) -> None:
    planner = Planner(tmp_path, SIZES, "cpu")
    sizes = dict(size.removeprefix("vars.").split("=") for size in SIZES)
    longer = int(sizes["rlvr_steps"]) + int(sizes["align_steps"])
    for arm in ARMS:
        jobs = planner.arm(arm, 3)
        assert ("rlvr" in jobs) == arm.rlvr and ("align" in jobs) == arm.alignment
        if not arm.rlvr:
            continue
        told = jobs["rlvr"].arguments
        steps = [a for a in told if a.startswith("train.steps=")]
        assert steps == ([f"train.steps={longer}"] if arm.name.endswith("_longer") else [])


def test_a_refused_arm_is_named_before_anything_runs(tmp_path: Path) -> None:
    arm = Arm("x", "g", True, True, {}, {"align": ["pair_count=reference"]})
    with pytest.raises(ValueError, match="did you mean pair_counts"):
        Planner(tmp_path, SIZES, "cpu").arm(arm, 3)
    (tmp_path / "arms.yaml").write_text("vars: {}\narms: {x: {group: g, algn: [a=1]}}")
    with pytest.raises(ValueError, match="algn"):
        read_arms(tmp_path / "arms.yaml")


def test_what_is_built_on_an_unfinished_stage_is_forgotten(tmp_path: Path) -> None:
    planner = Planner(tmp_path, SIZES, "cpu")
    jobs, other = (planner.arm(BY_NAME[name], 3) for name in ("reference", "dapo"))
    for job in planner.jobs.values():
        end(job)
    jobs["warmup"].record.unlink()
    forget_outdated(list(planner.jobs.values()))
    gone = {"align", "evaluate-align", "rlvr", "evaluate-rlvr"}
    assert not any(jobs[name].folder.exists() or jobs[name].finished for name in gone)
    assert jobs["warmup"].folder.exists(), "its checkpoints are what it goes on from"
    assert jobs["upcycle"].finished and all(job.finished for job in other.values())


def test_differences_are_paired_by_seed_and_failures_shown(tmp_path: Path) -> None:
    arms = [BY_NAME[name] for name in ("corrected", "without_alignment", "dense")]
    planner = Planner(tmp_path, SIZES, "cpu")
    plan = {(arm.name, seed): planner.arm(arm, seed) for arm in arms for seed in SEEDS}
    for seed, accuracy in zip(SEEDS, (0.5, 0.7), strict=True):
        finish(plan["corrected", seed], accuracy)
    for seed, accuracy in zip(SEEDS, (0.6, 0.9), strict=True):
        jobs = plan["without_alignment", seed]
        finish({name: job for name, job in jobs.items() if not job.finished}, accuracy)
    finish(plan["dense", 3], 0.5)
    end(plan["dense", 4]["upcycle"])
    plan["dense", 4]["warmup"].log.write_text("Traceback\nValueError: no room\n")

    result = results(arms, SEEDS, plan)
    found = result["arms"]["without_alignment"]["summary"]["rlvr/answer_accuracy"]
    assert found["mean"] == pytest.approx(0.75)
    assert found["difference"] == pytest.approx(0.15)
    assert found["standard_error"] == pytest.approx(0.05)
    dense = result["arms"]["dense"]
    assert dense["failures"]["4"]["stage"] == "warmup"
    assert dense["runs"]["3"]["curves"]["score_gap"] == [[1, 0.75], [2, 0.75], [3, 0.75]]

    write_results(result, tmp_path / "out")
    text = markdown(result)
    assert "| recipe | without_alignment | +15.0 ± 5.0 |" in text
    assert "| recipe | without_alignment | 75.0 ± 21.2 |" in text
    assert "All have: align train.micro_batch_tokens=512; rlvr" in text
    assert "- without_alignment: no alignment\n- dense: upcycle architecture=dense; no RLVR" in text
    after_rlvr, after_alignment = text.split("## After alignment: mean", 1)
    assert "| dense |" in after_alignment and "| dense |" not in after_rlvr
    assert "## FAILED: dense, seed 4, stage warmup" in text and "ValueError: no room" in text
    assert "| 1, 1 FAILED |" in text
    for name in ("ablations_rlvr.png", "ablations_align.png", "ablations_curves.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000


def test_arms_that_run_later_are_compared_with_the_first_one_as_it_was(tmp_path: Path) -> None:
    planner = Planner(tmp_path, SIZES, "cpu")
    plan = {(arm.name, 3): planner.arm(arm, 3) for arm in ARMS}
    finish(plan["corrected", 3], 0.5)
    before = results([BY_NAME["corrected"]], [3], plan)
    jobs = plan["gspo", 3]
    finish({name: job for name, job in jobs.items() if not job.finished}, 0.6)
    base = before["arms"]["corrected"]["runs"]
    later = results([BY_NAME["gspo"]], [3], plan, base)
    found = merged(later, before | {"commits": ["decade"]}, [arm.name for arm in ARMS])
    assert list(found["arms"]) == ["corrected", "gspo"]
    assert found["arms"]["gspo"]["summary"]["rlvr/answer_accuracy"]["difference"] == pytest.approx(
        0.1
    )
    assert found["commits"] == ["c0ffee", "decade"]
    after_rlvr, after_alignment = markdown(found).split("## After alignment: mean", 1)
    assert "| gspo |" in after_rlvr and "| gspo |" not in after_alignment
