"""torchrun, with the exit status of the rank that failed first: `python ranks.py` for `torchrun`.

torchrun itself ends with 1, whatever became of its ranks.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

EXPLAINED = (2, 75)
"""Statuses of a stage that has said what there is to say: a user's mistake, saved on request."""


def run() -> int:
    """As the shell has it: a rank that a signal ended gives 128 and the signal's number."""
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if status not in EXPLAINED:
            print(error, file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(run())
