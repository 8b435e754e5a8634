"""A fleet of real Ray actors on two ranks, whose engines are killed while they generate.

One Ray instance and one fleet serve all tests; they follow one another, as the steps of a run do.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from prism_megatron.config import schema
from prism_megatron.config.schema import Sampling
from prism_megatron.rollout.actors import ActorClient
from prism_megatron.rollout.engine import EngineClient
from prism_megatron.rollout.local import LocalEngine
from prism_megatron.rollout.ray_fleet import RayFleet, send_through_ray
from prism_megatron.rollout.router import Lease
from prism_megatron.rollout.weight_sync import SyncFailed
from prism_megatron.types import Prompt, Rollout
from tests.dist.ranks import Ranks
from tests.engine_contract import CASES, SEEDED, VERSION, WEIGHTS_SEED
from tests.processes import gone
from tests.unit.test_local_engine import full_forward_logprobs, prompts, save, tiny_model

ROOT = Path(__file__).resolve().parents[2]
SEED = 7
SAMPLING = Sampling(n=3, max_new_tokens=32, batch_size=64)
ENGINES = schema.Rollout(
    kind="local",
    engines=2,
    health_interval=1,
    health_timeout=20,
    # two prompts at a time, so that ranks wait for room
    max_outstanding_tokens=400,
    max_attempts=10,
    ahead=True,
    partial=True,
)
LONG = Sampling(n=3, max_new_tokens=250, batch_size=64, temperature=0.01)
"""Few of them end by themselves."""

# of a rank process; the version of the weights says which model the policy is
_fleet: RayFleet
_version = 0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Ray on this machine, for all tests of this file."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # the engines' processes import this checkout
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT) if before is None else f"{ROOT}:{before}"
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
    )
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fleet(address: str, hf_dir: Path) -> Iterator[Ranks]:
    """Two ranks with a fleet of two engines, that have the weights of version 1."""
    world = Ranks(2, sweeps=False)
    world.run(_open, address, hf_dir)
    yield world
    world.run(_leave)
    world.close()


def _open(address: str, hf_dir: Path) -> None:
    global _fleet
    os.environ["RAY_ADDRESS"] = address
    refit = send_through_ray(lambda: tiny_model(seed=_version).named_parameters())
    _fleet = RayFleet(ENGINES, refit, model=hf_dir, seed=SEED, logs=hf_dir / "engines")
    _sync(1)


def _leave() -> None:
    _fleet.close()
    ray.shutdown()


def _sync(version: int) -> None:
    global _version
    _version = version
    _fleet.sync(version)


def step_prompts() -> list[Prompt]:
    """An odd number, images of every size and texts, one of them twice."""
    base = prompts()
    many = [Prompt(f"{p.row_id}{i}", p.input_ids, p.images) for i in range(3) for p in base]
    return [*many, many[0]]


def status() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ray.get(_fleet._manager.status.remote())
    return found


def pids() -> list[int]:
    return [ray.get(e["actor"].__ray_call__.remote(lambda _: os.getpid())) for e in status()]


def expected(hf_dir: Path, version: int, step: int) -> list[list[Rollout]]:
    """What an engine of this process samples for the same step, share by share."""
    engine = LocalEngine(hf_dir, seed=SEED, pretrained=False)
    engine.load_weights(tiny_model(seed=version).named_parameters(), version)
    answers: list[list[Rollout]] = [[]] * len(step_prompts())
    for rank in range(2):
        answers[rank::2] = engine.generate(step_prompts()[rank::2], SAMPLING, step)
    return answers


def assert_same(found: list[list[Rollout]], wanted: list[list[Rollout]]) -> None:
    """The same tokens with the same version; log-probabilities as near as batches of another size
    leave them."""
    assert [[r.ids for r in group] for group in found] == [[r.ids for r in g] for g in wanted]
    pairs = (zip(*groups, strict=True) for groups in zip(found, wanted, strict=True))
    for rollout, other in chain.from_iterable(pairs):
        assert rollout.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert rollout.weight_version == other.weight_version
        assert rollout.finish_reason == other.finish_reason


def _generate(step: int) -> list[list[Rollout]]:
    _fleet.submit(step_prompts(), SAMPLING, step)
    return _fleet.collect(_fleet.weight_version)


def test_all_ranks_get_what_one_engine_would_sample(fleet: Ranks, hf_dir: Path) -> None:
    for found in fleet.run(_generate, 0):
        assert_same(found, expected(hf_dir, 1, 0))


def _scramble_and_sync() -> list[list[str]]:
    """What the check of weights finds in the engines before and after a sync."""
    kept = [_fleet.check("snapshot"), _fleet.check("reset_tensors"), _fleet.check("compare")]
    _sync(1)
    return [*kept, _fleet.check("compare")]


def test_every_engine_is_checked_for_its_weights(fleet: Ranks) -> None:
    first, other = fleet.run(_scramble_and_sync)
    assert first == other
    snapshot, reset, scrambled, synced = first
    assert snapshot == reset == synced == []
    assert sorted(words.partition(":")[0] for words in scrambled) == ["engine 0", "engine 1"]
    assert all("tensors differ" in words for words in scrambled)


def _generate_and_kill(step: int, victims: int, seed: int) -> tuple[list[list[Rollout]], float]:
    """On the first rank, kill engines at a random moment while prompts are out; the answers, and
    the seconds from the kill until all engines were healthy or, with one alone, up."""
    if dist.get_rank():
        return _generate(step), 0.0
    killed: list[float] = []

    def kill() -> None:
        targets = random.Random(seed).sample(pids(), victims)
        while not all(engine["outstanding"] for engine in status()):
            time.sleep(0.01)
        time.sleep(random.Random(seed).random() * 0.3)
        for pid in targets:
            os.kill(pid, signal.SIGKILL)
        killed.append(time.monotonic())

    killer = threading.Thread(target=kill)
    killer.start()
    answers = _generate(step)
    killer.join()
    assert killed, "nothing was killed while prompts were out"
    while not all(engine["state"] in ("healthy", "stale") for engine in status()):
        time.sleep(0.1)
    return answers, time.monotonic() - killed[0]


def test_an_engine_that_dies_takes_no_answer_with_it(fleet: Ranks, hf_dir: Path) -> None:
    [(found, seconds), (others, _)] = fleet.run(_generate_and_kill, 1, 1, 3)
    print(f"the engine was up again after {seconds:.1f} s")
    assert found == others
    assert_same(found, expected(hf_dir, 1, 1))
    [states, _] = fleet.run(_states)
    assert sorted(states) == [("healthy", 1), ("stale", 2)]


def _states() -> list[tuple[str, int]]:
    return [(engine["state"], engine["incarnation"]) for engine in status()]


def _sync_and_generate(version: int, step: int) -> list[list[Rollout]]:
    _sync(version)
    return _generate(step)


def test_the_next_sync_brings_the_restarted_engine_back(fleet: Ranks, hf_dir: Path) -> None:
    for found in fleet.run(_sync_and_generate, 2, 2):
        assert_same(found, expected(hf_dir, 2, 2))
    [states, _] = fleet.run(_states)
    assert sorted(states) == [("healthy", 1), ("healthy", 2)]


def test_ranks_wait_for_a_restart_when_no_engine_is_left(fleet: Ranks, hf_dir: Path) -> None:
    [(found, seconds), (others, _)] = fleet.run(_generate_and_kill, 3, 2, 4)
    print(f"both engines were up again after {seconds:.1f} s")
    assert found == others
    assert_same(found, expected(hf_dir, 2, 3))
    [states, _] = fleet.run(_states)
    assert sorted(incarnation for _, incarnation in states) == [2, 3]


def _generate_beside_a_stale_engine(step: int) -> list[list[Rollout]]:
    """One engine gets the weights of version 1 behind the fleet's back."""
    _sync(3)
    if dist.get_rank() == 0:
        old = list(tiny_model(seed=1).named_parameters())
        ray.get(status()[0]["actor"].load_weights.remote(old, 1))
    dist.barrier()
    return _generate(step)


def test_an_answer_with_older_weights_is_refused(fleet: Ranks, hf_dir: Path) -> None:
    for found in fleet.run(_generate_beside_a_stale_engine, 4):
        assert_same(found, expected(hf_dir, 3, 4))
    [states, _] = fleet.run(_states)
    assert [state for state, _ in states] == ["stale", "healthy"]


def _interrupted(step: int) -> list[list[Rollout]]:
    """Two syncs come while prompts are out."""
    _sync(10)
    _fleet.submit(step_prompts(), LONG, step)
    for version in (11, 12):
        time.sleep(0.7)
        _sync(version)
    return _fleet.collect(_version)


def test_a_sync_lets_rollouts_go_on_with_the_new_weights(fleet: Ranks, hf_dir: Path) -> None:
    found, others = fleet.run(_interrupted, 7)
    assert found == others
    split = 0
    for group in found:
        assert len(group) == LONG.n
        for rollout in group:
            assert rollout.finish_reason == ("length" if len(rollout.ids) == 250 else "stop")
            split += len(set(rollout.token_versions)) > 1
    print(f"{split} rollouts were interrupted")
    assert split > LONG.n
    # how much is sampled between two syncs is the machine's affair
    assert len(versions_with_their_logprobs(found)) > 1


def _interrupted_late(step: int) -> tuple[list[str], int]:
    """The second rank comes to the sync after the first; what it holds against engines, and how
    many tokens it has kept."""
    _sync(10)
    _fleet.submit(step_prompts(), LONG, step)
    time.sleep(0.7 + 2 * dist.get_rank())
    refit, kept = _fleet._refit, []

    def count(leases: Any, version: int) -> dict[str, float]:
        assert _fleet._work is not None
        kept.extend(_fleet._work.jobs)
        return refit(leases, version)

    _fleet._refit = count
    _sync(11)
    _fleet._refit = refit
    _fleet.collect(_version)
    faults = [fault for job in kept for fault in job.faults]
    return faults, sum(len(rollout.ids) for job in kept for rollout in job.begun)


def test_a_rank_that_comes_later_to_a_sync_keeps_its_rollouts(fleet: Ranks) -> None:
    for faults, kept in fleet.run(_interrupted_late, 13):
        assert faults == []
        assert kept > 0


def _cut_off(step: int) -> tuple[list[list[Rollout]], list[str]]:
    """Somebody else has an engine cut off what it samples; answers, and faults of engines."""
    _sync(10)
    _fleet.submit(step_prompts(), LONG, step)
    if dist.get_rank() == 0:
        time.sleep(0.5)
        ray.get([engine["actor"].abort.remote() for engine in status()])
    dist.barrier()
    found = [engine["fault"] for engine in status()]
    return _fleet.collect(_version), found


def test_what_is_cut_off_is_no_fault_of_the_engine(fleet: Ranks) -> None:
    [(found, faults), _] = fleet.run(_cut_off, 14)
    assert all(r.finish_reason in ("stop", "length") for group in found for r in group)
    assert not any("cut off" in fault for fault in faults)


def versions_with_their_logprobs(found: list[list[Rollout]]) -> set[int]:
    """Each token has the log-probability that the weights of its version give; the versions."""
    models: dict[int, PreTrainedModel] = {}
    for prompt, group in zip(step_prompts(), found, strict=True):
        for rollout in group:
            told = rollout.token_versions
            assert list(told) == sorted(told) and len(told) == len(rollout.ids)
            for version in set(told):
                if version not in models:
                    models[version] = tiny_model(seed=version)
                own = torch.tensor([v == version for v in told])
                wanted = full_forward_logprobs(models[version], prompt, rollout)[own]
                logprobs = torch.tensor(rollout.logprobs)[own]
                torch.testing.assert_close(logprobs, wanted, atol=1e-4, rtol=0)
    return set(models)


def _train_and_kill(step: int) -> list[list[Rollout]]:
    """The policy changes while prompts are out, and then all engines die."""
    global _version
    _sync(13)
    before = _fleet.restarts
    _fleet.submit(step_prompts(), LONG, step)
    _version = 14
    if dist.get_rank() == 0:
        assert _fleet._work is not None
        while all(answer is None for answer in _fleet._work.answers):
            time.sleep(0.01)
        for pid in pids():
            os.kill(pid, signal.SIGKILL)
    answers = _fleet.collect(_version)
    assert _fleet.restarts > before
    return answers


def test_engines_that_lost_their_weights_get_those_of_now(fleet: Ranks) -> None:
    found, others = fleet.run(_train_and_kill, 8)
    assert found == others
    assert versions_with_their_logprobs(found) == {13, 14}


def _refused() -> str:
    """A prompt with a placeholder and no image, on the second rank alone."""
    _sync(4)
    wrong = Prompt("wrong", prompts()[0].input_ids, ())
    _fleet.submit([prompts()[0], wrong], SAMPLING, 5)
    try:
        _fleet.collect(_version)
    except (RuntimeError, ValueError) as error:
        _fleet._work = None
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_prompt_that_no_engine_can_take_stops_all_ranks(fleet: Ranks) -> None:
    first, second = fleet.run(_refused)
    wrong = "ValueError: row wrong has 10 image tokens, but its 0 images need 0"
    assert second == wrong
    assert first == f"RuntimeError: rank 1 could not sample: {wrong}"


def _generate_without_weights() -> str:
    """The weights of a new version reach no engine."""
    refit, _fleet._refit = _fleet._refit, lambda leases, version: {}
    try:
        _fleet.sync(5)
        _generate(6)
    except RuntimeError as error:
        _fleet._work, _fleet._refit = None, refit
        return str(error)
    return "no error"


def test_old_weights_never_serve_and_waiting_for_new_ones_ends(fleet: Ranks) -> None:
    for error in fleet.run(_generate_without_weights):
        assert "no engine has weights of version 5 after 10 syncs in a row" in error


def _go_back_without_weights(step: int) -> list[list[Rollout]]:
    """The run goes back to an earlier version, whose weights reach no engine at first."""
    _sync(9)
    refit, _fleet._refit = _fleet._refit, lambda leases, version: {}
    _sync(6)
    _fleet._refit = refit
    return _generate(step)


def test_an_engine_that_keeps_weights_of_a_run_that_went_back_is_started_again(
    fleet: Ranks,
) -> None:
    [before, _] = fleet.run(_states)
    for found in fleet.run(_go_back_without_weights, 9):
        assert versions_with_their_logprobs(found) == {6}
    [after, _] = fleet.run(_states)
    assert all(new[1] > old[1] for old, new in zip(before, after, strict=True))


def _generate_after_a_sync_that_breaks_an_engine(step: int) -> list[list[Rollout]]:
    """It has the new version, as the other engine, but a rank knows that it lacks weights."""
    refit = _fleet._refit

    def breaks(leases: Sequence[Lease], version: int) -> dict[str, float]:
        refit(leases, version)
        raise SyncFailed("engine 0 lacks weights", {0: "rank 1: no room"})

    _fleet._refit = breaks
    _sync(7)
    _fleet._refit = refit
    found = _generate(step)
    while not all(engine["state"] in ("healthy", "stale") for engine in status()):
        time.sleep(0.1)
    return found


def test_an_engine_that_a_sync_broke_is_started_again(fleet: Ranks) -> None:
    [before, _] = fleet.run(_states)
    for found in fleet.run(_generate_after_a_sync_that_breaks_an_engine, 10):
        assert versions_with_their_logprobs(found) == {7}
    [after, _] = fleet.run(_states)
    assert [new[1] - old[1] for old, new in zip(before, after, strict=True)] == [1, 0]


def _out_of_memory() -> str:
    def fails(leases: Sequence[Lease], version: int) -> dict[str, float]:
        raise torch.OutOfMemoryError("no room")

    refit, _fleet._refit = _fleet._refit, fails
    try:
        _sync(8)
    except torch.OutOfMemoryError as error:
        return str(error)
    finally:
        _fleet._refit = refit
    return "no error"


def test_an_error_of_a_rank_itself_ends_the_run(fleet: Ranks) -> None:
    assert fleet.run(_out_of_memory) == ["no room"] * 2


@pytest.mark.parametrize("case", [*CASES, *SEEDED], ids=lambda case: case.__name__)
def test_contract_of_the_client_of_an_actor(
    fleet: Ranks, case: Callable[[EngineClient], Awaitable[None]]
) -> None:
    fleet.run(_keeps_contract, [*CASES, *SEEDED].index(case))


def _keeps_contract(case: int) -> None:
    if _version != WEIGHTS_SEED:
        _sync(WEIGHTS_SEED)
    if dist.get_rank() == 0:
        actor = status()[0]["actor"]
        weights = list(tiny_model(seed=WEIGHTS_SEED).named_parameters())
        ray.get(actor.load_weights.remote(weights, VERSION))
        asyncio.run(asyncio.wait_for([*CASES, *SEEDED][case](ActorClient(actor)), 60))
    dist.barrier()


def _readmit_and_generate(step: int) -> list[list[Rollout]]:
    _fleet.readmit()
    return _generate(step)


def test_a_restarted_engine_is_given_the_same_weights_again(fleet: Ranks, hf_dir: Path) -> None:
    fleet.run(_sync, 20)
    [before, _] = fleet.run(_states)
    fleet.run(_generate_and_kill, 11, 1, 5)
    [states, _] = fleet.run(_states)
    assert sorted(state for state, _ in states) == ["healthy", "stale"]
    for found in fleet.run(_readmit_and_generate, 12):
        assert_same(found, expected(hf_dir, 20, 12))
    [after, _] = fleet.run(_states)
    assert [state for state, _ in after] == ["healthy", "healthy"]
    assert sum(new[1] - old[1] for old, new in zip(before, after, strict=True)) == 1


def test_a_closed_fleet_leaves_no_process(fleet: Ranks) -> None:
    [found, _] = fleet.run(pids)
    assert len(found) == 2
    fleet.run(_close)
    assert gone(found)


def _close() -> None:
    _fleet.close()


JOB = """
import os, signal, sys, time
from functools import partial
from pathlib import Path
import ray
from model_providers import backend
from prism_megatron.config.schema import Rollout
from prism_megatron.rollout.ray_fleet import RayFleet
from prism_megatron.rollout.server import ServerKind
from tests.unit.test_server import Client, ask, command

signal.alarm(240)
backend.create("cpu").init_process_group()
config = Rollout(kind="sglang", engines=2, gpus=(4, 6), health_interval=0.2, sleep=True)
server = ServerKind(partial(command, "serve"), Client)
leases, released = [], []
def refit(found, version):
    leases.append(found)
    asleep.append([ask(lease.address, lease.address.api_key, "refit")["asked"] for lease in found])
    return {}
asleep = []
fleet = RayFleet(
    config, refit, model=Path("none"), seed=0, logs=Path(sys.argv[1]), server=server,
    release=lambda: released.append(1),
)
assert len(released) == 1
servers = lambda: [ask(lease.address, lease.address.api_key) for lease in leases[-1]]
status = lambda: ray.get(fleet._manager.status.remote())
states = lambda: [(engine["state"], engine["incarnation"]) for engine in status()]
fleet.sync(0)
assert states() == [("healthy", 1), ("healthy", 1)], states()
first = servers()
assert [found["gpus"] for found in first] == ["4", "6"]
os.kill(first[1]["pids"][0], signal.SIGKILL)
while states() != [("healthy", 1), ("stale", 2)]:
    time.sleep(0.02)
fleet.sync(0)
assert states() == [("healthy", 1), ("healthy", 2)], states()
pids = {pid for found in first + servers() for pid in found["pids"]}
assert len(pids) == 6
# awake engines are not woken
assert asleep[-1] == [["/refit", "/refit"], ["/refit"]], asleep
assert set(fleet.sleep()) == {"sleep_s"}
os.kill(servers()[1]["pids"][0], signal.SIGKILL)
while states() != [("healthy", 1), ("dead", 2)]:
    time.sleep(0.02)
# no engine takes memory while the trainers have it
time.sleep(2)
assert states() == [("healthy", 1), ("dead", 2)], states()
fleet.sync(1)
assert len(released) == 4
# the weights' memory first, then the sync, then the rest
[only] = servers()
assert only["asked"][2:] == ["/sleep", "/weights", "/refit", "/kv_cache"], only["asked"]
while states()[1] != ("stale", 3):
    time.sleep(0.02)
fleet.sync(1)
pids |= {pid for found in servers() for pid in found["pids"]}
assert len(pids) == 8
print(*pids, flush=True)
time.sleep(1000)
"""


def test_servers_sleep_are_restarted_and_end_with_a_job_that_is_killed(
    address: str, tmp_path: Path
) -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    found = [int(pid) for pid in job.stdout.readline().split()]
    assert len(found) == 8
    assert sum(psutil.pid_exists(pid) for pid in found) == 4
    job.kill()
    assert gone(found, within=30)
    job.communicate()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "engine_0_1.log",
        "engine_1_1.log",
        "engine_1_2.log",
        "engine_1_3.log",
    ]
