"""An SGLang server forgets requests that are cut off in its queue, round after round.

    python -m tests.gpu.check_cut_off DIR --out FILE        # DIR: of tests.gpu.served_models

The server is asked for more than it runs at once, with images, and everything is aborted. What its
table of requests then holds is read by a thread in it, which sitecustomize.py starts: what was cut
off at first, and nothing once that has been kept for as long as it is to be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from model_providers import backend as backends
from prism_megatron.bench import workload
from prism_megatron.config.schema import Sampling
from prism_megatron.types import Prompt, Rollout
from tests.gpu.check_sync import OPTIONS, ServerProcess, sample
from tests.gpu.served_models import questions

ROUNDS = 3
KEPT = 6.0
"""Seconds, instead of the ten minutes of a server."""
WATCH = """
import gc, os, sys, threading, time

def watch(file):
    manager = None
    while manager is None:
        time.sleep(0.5)
        module = sys.modules.get("prism_megatron.rollout.sglang_server.requests")
        if module is not None and hasattr(module, "forget_what_is_cut_off"):
            module.KEPT_SECONDS = float(os.environ["WATCH_KEPT"])
            kind = module.TokenizerManager
            manager = next((one for one in gc.get_objects() if type(one) is kind), None)
    while not hasattr(manager, "rid_to_state"):
        time.sleep(0.1)
    while True:
        with open(file + ".new", "w") as out:
            out.write(str(len(manager.rid_to_state)))
        os.replace(file + ".new", file)
        time.sleep(0.2)

if "prism_megatron.rollout.sglang_server" in sys.orig_argv:
    threading.Thread(target=watch, args=(os.environ["WATCH_FILE"],), daemon=True).start()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="of tests.gpu.served_models")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    prompts = []
    for number, (_, sequence) in enumerate(questions(options.directory)):
        ids = tuple(sequence.input_ids[: int((~sequence.response_mask).sum())].tolist())
        prompts.append(Prompt(str(number), ids, sequence.images))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(WATCH)
        table = Path(folder) / "table"
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
        os.environ |= {"WATCH_FILE": str(table), "WATCH_KEPT": str(KEPT)}
        model = Path(shutil.copytree(options.directory / "dense" / "bf16", Path(folder) / "model"))
        shutil.copy(options.directory / "tiny" / "generation_config.json", model)
        few = OPTIONS["sglang"].replace("running-requests 256", "running-requests 2").split()
        log = options.out.with_suffix(".server.log")
        server = ServerProcess("sglang", model, ["0"], few, log, 31400)
        try:
            started = server.wait(400)
            rounds = [_cut(server, prompts, table) for _ in range(ROUNDS)]
        finally:
            server.stop()
    result: dict[str, Any] = {"server_start_s": started, "kept_s": KEPT, "rounds": rounds}
    result |= workload.environment(backends.create("cuda"))
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(options.out.read_text())
    for found in rounds:
        assert found["cut_in_queue"] > 10, found
        assert found["table_at_once"] >= found["cut_in_queue"] and found["table"] == 0, found


def _cut(server: ServerProcess, prompts: list[Prompt], table: Path) -> dict[str, int]:
    """A round: of all that was asked for, what was cut off before it ran, and the table after."""

    async def run() -> list[list[Rollout]]:
        asked = asyncio.create_task(
            sample(server.engine, prompts, Sampling(n=4, max_new_tokens=512))
        )
        await asyncio.sleep(1.0)
        await server.engine.abort()
        return await asked

    rollouts = [rollout for group in asyncio.run(run()) for rollout in group]
    time.sleep(1.0)
    at_once = int(table.read_text())
    time.sleep(KEPT + 1.0)
    cut = [r for r in rollouts if r.finish_reason == "abort" and not r.ids]
    return {
        "responses": len(rollouts),
        "cut_in_queue": len(cut),
        "table_at_once": at_once,
        "table": int(table.read_text()),
    }


if __name__ == "__main__":
    main()
