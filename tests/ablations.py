"""What each choice of the recipe changes: arms that differ in one of them, over several seeds.

    python -m tests.ablations --dir DIR --out OUT [--arms FILE] [--only ARM ...] [--seeds 3]
                              [--jobs 1] [--backend cuda]

The arms are in tests/ablations.yaml, as overrides of the quickstart's configurations. An arm, which
may end after alignment:

    digit-sums -> tiny-model -> convert -> SFT -> pairs, upcycle -> warm-up -> alignment -> RLVR
                                            `-> evaluate                       `-> evaluate ...

Each stage is a process of one rank and one thread, `--jobs` at once (with --backend cuda all on one
GPU). Each has a folder, DIR/seed-N/STAGE-HASH with a log beside it, named after its resolved
configuration and thereby its inputs, so that arms share what is the same to them. A run that was
stopped goes on: stages with a record (STAGE-HASH.json) are finished, others go on from their
checkpoints. If a record is removed, its stage runs again, and all that build on it. With --only the
arms named run, and the first one if OUT has none; what OUT has of the others, of the same sizes,
seeds and backend, is kept, so that arms may be run at different times.

OUT gets ablations.json, ablations.md, ablations_align.png and ablations_rlvr.png with differences
to the first arm, and ablations_curves.png. Exit status 1 if a
stage failed; the arms that need it are shown as failed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from checkpoint_tools.files import write_atomically
from prism_megatron import cli, plots, report
from prism_megatron.config.load import STAGES, load, provenance

ROOT = Path(__file__).resolve().parents[1]
FIRST_SEED = 1234

_PROMPTS, _ONE_RANK = "data.path={digit-sums}/prompts.parquet", "policy.parallel.tensor=1"
# every policy is evaluated at its end, which is what is compared
_UNWATCHED = ("validation=null", "samples_every=0")
COMMANDS: dict[str, tuple[str, ...]] = {
    "digit-sums": ("out={here}",),
    "tiny-model": ("out={here}", "data={digit-sums}/sft.json"),
    "convert": ("out={here}", "hf={tiny-model}"),
    "sft": (
        "run.dir={here}",
        "data.path={digit-sums}/sft.json",
        "model.path={convert}",
        "model.parallel.tensor=1",
    ),
    "make-warmup-pairs": ("run.dir={here}", "out={here}/pairs.jsonl", _PROMPTS, "model={sft}/hf"),
    "upcycle": ("out={here}", "hf={sft}/hf"),
    "warmup": (
        "run.dir={here}",
        "data.path={make-warmup-pairs}/pairs.jsonl",
        "model.path={upcycle}",
        "model.parallel.expert=1",
    ),
    "align": (
        "run.dir={here}",
        _PROMPTS,
        "policy.path={policy}/hf",
        "discriminator.path={warmup}/hf",
        "discriminator.parallel.expert=1",
        _ONE_RANK,
        *_UNWATCHED,
    ),
    "rlvr": ("run.dir={here}", _PROMPTS, "policy.path={policy}/hf", _ONE_RANK, *_UNWATCHED),
    "evaluate": (
        "run.dir={here}",
        "data.path={digit-sums}/heldout.parquet",
        "model={policy}/hf",
    ),
}
"""What each stage of the command line is told of folders: its own ({here}), those of stages before
it by name, and that of the policy as the last stage left it ({policy})."""
ALIGNMENT = ("make-warmup-pairs", "upcycle", "warmup", "align")
POLICIES = ("sft", "align", "rlvr")
"""Stages that export a policy, each of which is evaluated."""

METRICS = {
    name: report.METRICS[name]
    for name in (
        "answer_accuracy",
        "perception_accuracy",
        "reasoning_given_perception_accuracy",
        "format_rate",
        "response_tokens",
    )
}
CURVES = {"discriminator_accuracy": "discriminator accuracy", "score_gap": "score gap"}
"""Training metrics of alignment that are kept step by step."""

SHOWN = {
    "rlvr": ("RLVR", "rlvr", METRICS),
    "align": ("alignment", "alignment", METRICS | CURVES),
}
"""Policy to its name, the arms that have it, and the metrics of its tables."""

LOG_LINES = 15
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # what loads under transformers comes from this run, never from the network
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    # every stage asks git for the commit, and must not lock the index of whoever works meanwhile
    "GIT_OPTIONAL_LOCKS": "0",
    "TRANSFORMERS_VERBOSITY": "error",
}
PRELOADED = (
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    *(entry_point.partition(":")[0] for entry_point in cli.ENTRY_POINTS.values()),
)


@dataclass(frozen=True)
class Arm:
    """One line of the file: overrides and overlays of stages, of all arms and its own."""

    name: str
    group: str
    alignment: bool
    rlvr: bool
    common: Mapping[str, list[str]]
    changes: Mapping[str, list[str]]


def read_arms(path: Path) -> tuple[list[str], list[Arm]]:
    """The sizes as overrides, and the arms, with what is common to all before each one's own
    changes; ValueError names a key that means nothing."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    common = content.get("common", {})
    arms = []
    for name, entry in content["arms"].items():
        left_out = [stage for stage in ("align", "rlvr") if entry.get(stage) is False]
        own = {key: entry[key] for key in entry if key in COMMANDS and key not in left_out}
        if unknown := {*entry, *common} - COMMANDS.keys() - {"group"}:
            raise ValueError(f"{path}: arm {name}: {sorted(unknown)} is no stage and no option")
        ends = {"alignment": "align" not in left_out, "rlvr": "rlvr" not in left_out}
        arms.append(Arm(name, entry["group"], common=common, changes=own, **ends))
    return [f"vars.{name}={value}" for name, value in content["vars"].items()], arms


@dataclass(eq=False)
class Job:
    """A stage in its folder; arms whose configuration of it is the same share it."""

    stage: str
    folder: Path
    arguments: list[str]
    needs: list[Job]
    arms: list[str] = field(default_factory=list)

    @property
    def record(self) -> Path:
        """Written when the stage has ended well: what it was told, and its seconds."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def finished(self) -> bool:
        return self.record.exists() and self.folder.exists()

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def title(self) -> str:
        shared = f"{len(self.arms)} arms" if len(self.arms) > 1 else self.arms[0]
        return f"{self.folder.parent.name} {self.stage} ({shared})"

    def ancestors(self) -> Iterator[Job]:
        """All that this one builds on, itself last; some more than once."""
        for job in self.needs:
            yield from job.ancestors()
        yield self


Plan = dict[tuple[str, int], dict[str, Job]]
"""(arm, seed) -> its jobs; evaluations are named evaluate-POLICY."""


class Planner:
    """Turns arms into jobs, each once."""

    def __init__(self, directory: Path, sizes: list[str], backend: str) -> None:
        self.directory, self.sizes, self.backend = directory, sizes, backend
        self.jobs: dict[Path, Job] = {}
        """In an order in which they can run."""

    def arm(self, arm: Arm, seed: int) -> dict[str, Job]:
        """The arm's jobs; ValueError if a configuration is refused."""
        jobs: dict[str, Job] = {}
        for stage in COMMANDS:
            if stage == "evaluate" or (stage in ALIGNMENT and not arm.alignment):
                continue
            if stage == "rlvr" and not arm.rlvr:
                continue
            jobs[stage] = self._job(arm, seed, stage, jobs)
            if stage in POLICIES:
                jobs["policy"] = jobs[stage]
                name = f"evaluate-{stage}"
                jobs[name] = self._job(arm, seed, "evaluate", jobs, f"vars.stage={stage}")
        return jobs

    def _job(self, arm: Arm, seed: int, stage: str, before: Mapping[str, Job], *more: str) -> Job:
        changes = [*arm.common.get(stage, ()), *arm.changes.get(stage, ())]
        overlays = [change for change in changes if change.endswith(".yaml")]
        files = [f"configs/quickstart/{stage}.yaml", *overlays]
        on_device = "backend" in STAGES[stage].model_fields
        overrides = [
            *self.sizes,
            f"vars.seed={seed}",
            *more,
            *([f"backend={self.backend}"] if on_device else []),
        ]
        changed = [change for change in changes if change not in overlays]

        def told(here: str) -> list[str]:
            folders = {name: str(job.folder) for name, job in before.items()} | {"here": here}
            return [*overrides, *(t.format_map(folders) for t in COMMANDS[stage]), *changed]

        paths = [ROOT / file for file in files]
        config = load(stage, paths, told("HERE")).model_dump(mode="json", exclude_defaults=True)
        # the folder may be moved, and a key that is new in the code has its default
        resolved = json.dumps(config, sort_keys=True).replace(str(self.directory), "")
        name = f"{stage}-{hashlib.sha256(resolved.encode()).hexdigest()[:8]}"
        folder = self.directory / f"seed-{seed}" / name
        if folder not in self.jobs:
            options = [argument for path in paths for argument in ("--config", str(path))]
            needed = {text.partition("{")[2].partition("}")[0] for text in COMMANDS[stage]}
            needs = [before[name] for name in sorted(needed - {"here", ""})]
            arguments = [stage, *options, *told(str(folder))]
            self.jobs[folder] = Job(stage, folder, arguments, needs)
        job = self.jobs[folder]
        if arm.name not in job.arms:
            job.arms.append(arm.name)
        return job


def forget_outdated(jobs: Sequence[Job]) -> None:
    """Remove what was built on stages that are not finished (any more)."""
    for job in jobs:
        if all(other.finished for other in job.needs):
            continue
        job.record.unlink(missing_ok=True)
        if job.folder.exists():
            shutil.rmtree(job.folder)


def execute(jobs: Sequence[Job], at_once: int) -> list[Job]:
    """Run the jobs that are not finished, in order, `at_once` at a time; those that failed.

    A job whose inputs could not be made is not tried.
    """
    waiting = [job for job in jobs if not job.finished]
    total, failed = len(jobs), list[Job]()
    running: dict[Job, tuple[BaseProcess, float]] = {}
    print(f"{len(waiting)} of {total} stages to run, {at_once} at once", flush=True)
    try:
        while waiting or running:
            ready = [job for job in waiting if all(n.finished for n in job.needs)]
            for job in ready[: at_once - len(running)]:
                waiting.remove(job)
                running[job] = _start(job), time.monotonic()
            wait([process.sentinel for process, _ in running.values()])
            for job, (process, started) in list(running.items()):
                status = process.exitcode
                if status is None:
                    continue
                del running[job]
                seconds = time.monotonic() - started
                if status:
                    failed.append(job)
                    waiting = [other for other in waiting if job not in other.ancestors()]
                    end = f"FAILED with status {status}, see {job.log}"
                    # one that was killed left no last words
                    with job.log.open("a") as log:
                        log.write(f"ended with status {status}\n")
                else:
                    told = {"arguments": job.arguments, "seconds": round(seconds, 1)}
                    write_atomically(job.record, json.dumps(told, indent=2) + "\n")
                    # a finished stage has its export, and there are hundreds of them
                    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
                    end = f"{seconds:.0f} s"
                done = sum(job.finished for job in jobs)
                left = _time_left(jobs, waiting, running, at_once)
                print(f"[{done}/{total}] {job.title}: {end}; {left}", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()
    return failed


def _start(job: Job) -> BaseProcess:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_stage, args=(job,))
    process.start()
    return process


def _stage(job: Job) -> None:
    """In a process of its own, whose output is the log: what `prism-megatron STAGE` does."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # several attempts at a stage follow each other
    with job.log.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(ROOT)
    sys.argv = ["prism-megatron", *job.arguments]
    sys.exit(cli.main(job.arguments))


def _time_left(
    jobs: Sequence[Job],
    waiting: Sequence[Job],
    running: Mapping[Job, tuple[BaseProcess, float]],
    at_once: int,
) -> str:
    """By the mean seconds of each stage so far; "at least" while one has not been measured."""
    measured = defaultdict(list)
    for job in jobs:
        if job.finished:
            measured[job.stage].append(json.loads(job.record.read_text())["seconds"])
    known = {stage: mean(seconds) for stage, seconds in measured.items()}
    seconds = sum(known.get(job.stage, 0.0) for job in waiting)
    for job, (_, started) in running.items():
        seconds += max(0.0, known.get(job.stage, 0.0) - (time.monotonic() - started))
    least = "" if all(job.stage in known for job in (*waiting, *running)) else "at least "
    return f"{least}{seconds / at_once / 60:.0f} min left"


def results(
    arms: Sequence[Arm], seeds: Sequence[int], plan: Plan, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Every arm's evaluations, curves and summaries, and the end of the log of what failed; base:
    runs of the first arm, if it is not among them."""
    entries: dict[str, dict[str, Any]] = {}
    commits = set()
    for arm in arms:
        runs, failures = {}, {}
        for seed in seeds:
            jobs = plan[arm.name, seed]
            missing = [job for job in dict.fromkeys(jobs.values()) if not job.finished]
            if not missing:
                runs[str(seed)] = _run(jobs)
                commits |= {_evaluation(jobs, stage)["git_commit"] for stage in _policies(jobs)}
                continue
            failed = next(job for job in missing if all(n.finished for n in job.needs))
            log = failed.log.read_text(errors="replace").splitlines()
            failures[str(seed)] = {"stage": failed.stage, "log": log[-LOG_LINES:]}
        entries[arm.name] = {
            "group": arm.group,
            "alignment": arm.alignment,
            "rlvr": arm.rlvr,
            "changes": arm.changes,
            "runs": runs,
            "failures": failures,
        }
    base = base or entries[arms[0].name]["runs"]
    for entry in entries.values():
        entry["summary"] = _summary(entry["runs"], base)
    return {
        "seeds": list(seeds),
        "common": arms[0].common,
        "arms": entries,
        "commits": sorted(map(str, commits)),
    }


def _policies(jobs: Mapping[str, Job]) -> list[str]:
    return [stage for stage in POLICIES if stage in jobs]


def _evaluation(jobs: Mapping[str, Job], stage: str) -> dict[str, Any]:
    path = jobs[f"evaluate-{stage}"].folder / "eval.json"
    evaluation: dict[str, Any] = json.loads(path.read_text())
    return evaluation


def _run(jobs: Mapping[str, Job]) -> dict[str, Any]:
    """An arm with one seed. metrics: POLICY/METRIC of evaluations, align/CURVE of the last tenth of
    alignment; curves: [step, value] of every step that has one."""
    metrics: dict[str, float | None] = {}
    for stage in _policies(jobs):
        found = _evaluation(jobs, stage)["metrics"]
        metrics |= {f"{stage}/{m}": found[m]["value"] if m in found else None for m in METRICS}
    curves: dict[str, list[list[float]]] = {}
    if "align" in jobs:
        lines = report.by_step(report.read_jsonl(jobs["align"].folder / "metrics.jsonl"))
        end = report.training_summary(lines)["last_tenth"]
        metrics |= {f"align/{name}": end.get(name) for name in CURVES}
        curves = {name: [[x["step"], x[name]] for x in lines if name in x] for name in CURVES}
    folders = {name: job for name, job in jobs.items() if name != "policy"}
    return {
        "metrics": metrics,
        "curves": curves,
        "folders": {n: f"{j.folder.parent.name}/{j.folder.name}" for n, j in folders.items()},
        "seconds": {n: json.loads(j.record.read_text())["seconds"] for n, j in folders.items()},
    }


def _summary(runs: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and deviation of each metric over the seeds, and the mean over the seeds of the
    difference to the same seed of the first arm with its standard error; None where a seed has no
    such metric, or where a single seed tells no deviation."""
    names = dict.fromkeys(name for run in runs.values() for name in run["metrics"])
    summary = {}
    for name in names:
        values = [run["metrics"][name] for run in runs.values()]
        if None in values:
            summary[name] = dict.fromkeys(("mean", "std", "difference", "standard_error"))
            continue
        pairs = [
            (run["metrics"][name], base[seed]["metrics"].get(name))
            for seed, run in runs.items()
            if seed in base
        ]
        gaps = [own - other for own, other in pairs if other is not None]
        summary[name] = {
            "mean": mean(values),
            "std": stdev(values) if len(values) > 1 else None,
            "difference": mean(gaps) if gaps else None,
            "standard_error": stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None,
        }
    return summary


def merged(result: dict[str, Any], before: Mapping[str, Any], order: Sequence[str]) -> Any:
    """With what was there `before` of arms that did not run now, in `order`."""
    arms = before["arms"] | result["arms"]
    return result | {
        "arms": {name: arms[name] for name in order if name in arms},
        "commits": sorted({*before["commits"], *result["commits"]}),
    }


def _differing(arms: Mapping[str, Any], stage: str, ran: str) -> dict[str, Any]:
    """Arms that have the stage, without those that share the first one's runs of it."""
    own = {
        name: [run["folders"].get(stage) for run in arm["runs"].values()]
        for name, arm in arms.items()
    }
    first = next(iter(arms))
    return {
        name: arm
        for name, arm in arms.items()
        if arm[ran] and (name == first or arm["failures"] or own[name] != own[first])
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The tables, what each arm changes, and what failed."""
    arms, seeds = result["arms"], result["seeds"]
    first = next(iter(arms))
    values, changes = ("mean", "std"), ("difference", "standard_error")
    lines = [
        f"Held-out rows after each stage, greedy decoding, {len(seeds)} seeds; shares in percent."
    ]
    for stage, (title, ran, names) in SHOWN.items():
        shown = _differing(arms, stage, ran)
        columns = [(f"{stage}/{name}", heading) for name, heading in names.items()]
        lines += ["", f"## After {title}: mean and standard deviation over seeds", ""]
        lines += _table(shown, columns, values)
        about = f"difference to `{first}`, of the same seed, and its standard error"
        lines += ["", f"## After {title}: {about}", "", *_table(shown, columns, changes)]
    lines += ["", "Scores are means over the last tenth of alignment.", "", "## After SFT", ""]
    lines += _table({first: arms[first]}, [(f"sft/{n}", h) for n, h in METRICS.items()], values)
    lines += ["", "## What the arms change", ""]
    lines += [f"All have: {_told({'changes': result['common']})}.", ""]
    lines += [f"- {name}: {_told(arm)}" for name, arm in arms.items()]
    for name, arm in arms.items():
        for seed, failure in arm["failures"].items():
            lines += ["", f"## FAILED: {name}, seed {seed}, stage {failure['stage']}", "", "```"]
            lines += [*failure["log"], "```"]
    lines += ["", f"Commits: {', '.join(result['commits'])}"]
    return "\n".join(lines) + "\n"


def _told(arm: Mapping[str, Any]) -> str:
    told = [f"{stage} {' '.join(items)}" for stage, items in arm["changes"].items()]
    told += ["no alignment"] * (not arm.get("alignment", True))
    return "; ".join(told + ["no RLVR"] * (not arm.get("rlvr", True))) or "nothing"


def _table(
    arms: Mapping[str, Any], columns: Sequence[tuple[str, str]], shown: tuple[str, str]
) -> list[str]:
    """A row an arm, with a metric's two values of `shown` in a column."""
    heads = ["group", "arm", *(heading for _, heading in columns), "seeds"]
    lines = ["| " + " | ".join(head.replace("|", "given") for head in heads) + " |"]
    lines.append("|---" * len(heads) + "|")
    for name, arm in arms.items():
        cells = [_cell(arm["summary"].get(metric), metric, shown) for metric, _ in columns]
        failed = f", {len(arm['failures'])} FAILED" if arm["failures"] else ""
        cells = [arm["group"], name, *cells, f"{len(arm['runs'])}{failed}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(summary: Mapping[str, float | None] | None, metric: str, shown: tuple[str, str]) -> str:
    if summary is None or summary[shown[0]] is None:
        return "n/a"
    value, deviation = (summary[name] for name in shown)
    is_share = metric.endswith(("accuracy", "rate"))
    scale, places = (100, 1) if is_share else (1, 2)
    sign = "+" if shown[0] == "difference" else ""
    around = "" if deviation is None else f" ± {scale * deviation:.{places}f}"
    return f"{scale * (value or 0.0):{sign}.{places}f}{around}"


def write_results(result: Mapping[str, Any], out: Path) -> None:
    """The four files; no curves without an arm that aligns."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "ablations.json", json.dumps(result, indent=1) + "\n")
    write_atomically(out / "ablations.md", markdown(result))
    arms = result["arms"]
    for stage, (_, ran, _) in SHOWN.items():
        rows = {
            name: {
                heading: (summary["difference"], summary["standard_error"])
                for metric, heading in plots.BARS.items()
                if (summary := arm["summary"].get(f"{stage}/{metric}"))
            }
            for name, arm in _differing(arms, stage, ran).items()
        }
        write_atomically(out / f"ablations_{stage}.png", plots.differences_png(rows))
    curves = {
        name: {
            heading: [run["curves"][metric] for run in arm["runs"].values()]
            for metric, heading in CURVES.items()
        }
        for name, arm in _differing(arms, "align", "alignment").items()
    }
    if curves:
        write_atomically(out / "ablations_curves.png", plots.arm_curves_png(curves))


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="folder of the stages")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--arms", type=Path, default=ROOT / "tests" / "ablations.yaml")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="run these alone")
    parser.add_argument("--seeds", type=int, default=3, help=f"how many, from {FIRST_SEED}")
    parser.add_argument("--jobs", type=int, default=1, help="stages that run at once")
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    sizes, arms = read_arms(options.arms)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    told = {"sizes": sizes, "backend": options.backend}
    order, before, base = [arm.name for arm in arms], None, None
    if options.only is not None:
        if unknown := {*options.only} - {*order}:
            parser.error(f"--only: {', '.join(sorted(unknown))} is not in {options.arms}")
        chosen = {*options.only}
        if (file := options.out / "ablations.json").exists():
            before = json.loads(file.read_text())
            now = told | {"seeds": [*seeds], "common": arms[0].common}
            if other := [name for name in now if before[name] != now[name]]:
                parser.error(f"{file} has other {', '.join(other)}; give another --out")
            base = before["arms"][order[0]]["runs"]
        if base is None or order[0] in chosen:
            base, chosen = None, chosen | {order[0]}
        arms = [arm for arm in arms if arm.name in chosen]
    directory = options.dir.resolve()
    planner = Planner(directory, sizes, options.backend)
    # all seeds of an arm before the next arm
    plan = {(arm.name, seed): planner.arm(arm, seed) for arm in arms for seed in seeds}
    jobs = list(planner.jobs.values())
    directory.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT)
    # notes of libraries to their own developers
    warnings.simplefilter("ignore")
    if options.backend == "cpu":
        # stages are forked from what has imported them; CUDA does not outlive a fork
        for module in PRELOADED:
            import_module(module)
    # so that `finally` ends what runs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with (directory / ".lock").open("w") as lock:
        try:
            # stages hold it too, and may outlive this process if it is killed
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{directory}: stages are running already; wait for them or end them")
        forget_outdated(jobs)
        failed = execute(jobs, options.jobs)
    result = results(arms, seeds, plan, base) | told
    if before is not None:
        result = merged(result, before, order)
    write_results(result | provenance(), options.out)
    print(markdown(result))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
