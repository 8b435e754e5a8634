"""torchrun for jobs that end to be queued again.

    python -m prism_megatron.elastic [torchrun's arguments] -m prism_megatron STAGE ...

torchrun itself starts ranks that ended with status REQUEUE once more, exits with 1 whatever their
status, dies of SIGUSR1, and gives ranks 30 s to end after SIGTERM. Here it passes both signals on,
waits PRISM_GRACE_SECONDS (default 300), does not start them again after that, and its own status is
REQUEUE.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

from checkpoint_tools.command import REQUEUE


class Agent(LocalElasticAgent):
    """torchrun's, with the differences named above."""

    was_requeued = False
    """Whether a rank ended with REQUEUE after a signal came here."""

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and _is_requeue(result.failures):
            self._remaining_restarts = 0
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM) -> None:
        if self._pcontext:
            grace = int(os.environ.get("PRISM_GRACE_SECONDS", "300"))
            self._pcontext.close(death_sig, grace)
            ranks = self._pcontext.subprocess_handlers.values()
            Agent.was_requeued = any(rank.proc.returncode == REQUEUE for rank in ranks)
        super()._shutdown(death_sig)


def _is_requeue(failures: dict[int, Any]) -> bool:
    """Whether a rank ended to be started again; the others may have died of its end."""
    return any(failure.exitcode == REQUEUE for failure in failures.values())


def main(arguments: Sequence[str]) -> int:
    """Run until the ranks end; REQUEUE, 0, or 1 after a failure, whose reason is printed."""
    signals = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    api.LocalElasticAgent = Agent
    try:
        run.run(run.parse_args([*signals, *arguments]))
    except ChildFailedError as error:
        if _is_requeue(error.failures):
            return REQUEUE
        print(error, file=sys.stderr)
        return 1
    except SignalException as error:
        print(f"prism-megatron: {error}", file=sys.stderr)
        return REQUEUE if Agent.was_requeued else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
