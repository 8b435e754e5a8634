"""`prism-megatron score`: what responses in a file earn, without training and without torch.

JSON lines --some at a time--> Scorer --> one JSON line each, in the same order
         `--unusable: named with its number, counted, exit status 1
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import batched
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ValidationError

from prism_megatron.config.schema import Rewards
from prism_megatron.objectives.rewards.scorer import Scorer
from prism_megatron.objectives.rewards.types import FAILURES, RewardItem

LINES_AT_ONCE = 256


class ExtraInfo(BaseModel):
    """What of a line's extra_info is read."""

    equivalent_answers: tuple[str, ...] | None = None
    question: str = ""


class Line(BaseModel):
    """A line of the input; other keys are ignored."""

    id: str | int
    response: str
    ground_truth: str
    data_source: str
    extra_info: ExtraInfo | None = None

    def item(self) -> RewardItem:
        extra = self.extra_info or ExtraInfo()
        return RewardItem(
            response=self.response,
            ground_truth=self.ground_truth,
            data_source=self.data_source,
            equivalent_answers=extra.equivalent_answers or (),
            question=extra.question,
        )


def main(arguments: Sequence[str]) -> int:
    """Score a file; 1 if a line was unusable."""
    parser = argparse.ArgumentParser(prog="prism-megatron score", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        help="JSON lines {id, response, ground_truth, data_source, extra_info}; the last is "
        "optional and may hold equivalent_answers",
    )
    parser.add_argument(
        "--output", type=Path, help="file of {id, score, accuracy, format, rule}; stdout if not set"
    )
    parser.add_argument(
        "--rules",
        choices=("corrected", "reference"),
        default="corrected",
        help="the answer comparison: by meaning, or the reference's with its errors",
    )
    options = parser.parse_args(arguments)
    if not options.input.is_file():
        raise FileNotFoundError(f"{options.input} does not exist")
    scorer = Scorer(Rewards(rules=options.rules))
    try:
        with options.input.open("rb") as lines, _written(options.output) as output:
            counts = _score(lines, options.input, scorer, output)
    finally:
        scorer.close()
    print(f"{options.input}: {_summary(counts)}", file=sys.stderr)
    return 1 if counts["unusable"] else 0


def _score(lines: IO[bytes], path: Path, scorer: Scorer, output: IO[str]) -> Counter[str]:
    """Counts of scored and unusable lines, right answers, right formats and failures."""
    counts: Counter[str] = Counter()
    for batch in batched(_read(lines, path, counts), LINES_AT_ONCE):
        rewards = scorer.score([line.item() for line in batch])
        for line, reward in zip(batch, rewards, strict=True):
            written = {
                "id": line.id,
                "score": reward.total,
                "accuracy": reward.accuracy,
                "format": reward.format,
                "rule": reward.rule,
            }
            print(json.dumps(written, ensure_ascii=False), file=output)
            counts.update(scored=1, right=int(reward.accuracy), well_formed=int(reward.format))
            counts[reward.rule] += reward.rule in FAILURES
        output.flush()
    return counts


def _read(lines: Iterable[bytes], path: Path, counts: Counter[str]) -> Iterator[Line]:
    for number, line in enumerate(lines, 1):
        try:
            yield Line.model_validate_json(line)
        except ValidationError as error:
            counts["unusable"] += 1
            reasons = [
                ": ".join([*map(str, details["loc"]), details["msg"]]) for details in error.errors()
            ]
            print(f"{path}:{number}: {'; '.join(reasons)}", file=sys.stderr)


def _summary(counts: Counter[str]) -> str:
    failures = [f"{counts[rule]} {rule}" for rule in FAILURES if counts[rule]]
    said = [
        f"{counts['scored']} scored",
        f"{counts['right']} right",
        f"{counts['well_formed']} well-formed",
        *failures,
        f"{counts['unusable']} lines unusable",
    ]
    return ", ".join(said)


@contextmanager
def _written(path: Path | None) -> Iterator[IO[str]]:
    """A stream to a file that has its name only when complete; stdout without one."""
    if path is None:
        yield sys.stdout
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            yield stream
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
