"""Folders that are being made: of one process at a time, and of one state of their sources."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from checkpoint_tools import files
from checkpoint_tools.command import exit_status
from checkpoint_tools.files import identity, prepare_staging, publish, staging_of

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from checkpoint_tools.files import prepare_staging, publish

out = Path(sys.argv[1])
staging = prepare_staging(out, {"from": {}, "who": "other"}, 0)
(staging / "shard").write_text("theirs")
print("ready", flush=True)
if input() == "publish":
    publish(staging, out)
"""


def _holder(out: Path) -> subprocess.Popen[str]:
    """Another process that writes `out`, and does what it reads."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    """Else the shards of one would count as the other's, or be cut while they are compared."""
    out = tmp_path / "out"
    other = _holder(out)
    for job in ({"from": {}, "who": "me"}, {"from": {}, "who": "other"}):
        with pytest.raises(ValueError, match=f"{out} is being written by another process"):
            prepare_staging(out, job, 0)
    assert (staging_of(out) / "shard").read_text() == "theirs"
    other.communicate("publish\n", timeout=60)
    assert [path.name for path in out.iterdir()] == ["shard"]
    assert not staging_of(out).exists()


def test_what_a_killed_process_held_is_free(tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = _holder(out)
    other.kill()
    other.wait()
    staging = prepare_staging(out, {"from": {}, "who": "other"}, 0)
    assert (staging / "shard").read_text() == "theirs"
    # an attempt in the same process may follow another; another job has nothing of that one
    (staging / "parts").mkdir()
    (staging / "parts" / "0.json").write_text("{}")
    assert prepare_staging(out, {"from": {}, "who": "me"}, 0) == staging
    assert {path.name for path in staging.iterdir()} == {files.JOB, files.LOCK}


def test_a_folder_that_got_its_name_meanwhile_is_not_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def late(stream: object, flags: int) -> None:
        os.replace(staging_of(out), out)

    with mock.patch.object(fcntl, "flock", late):
        with pytest.raises(ValueError, match="being written by another process"):
            prepare_staging(out, {"from": {}}, 0)


def test_a_disk_without_locks_is_used_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = OSError(errno.ENOSYS, "Function not implemented")
    with mock.patch.object(fcntl, "flock", side_effect=refused):
        publish(prepare_staging(tmp_path / "out", {"from": {}}, 0), tmp_path / "out")
    assert "can't be locked (Function not implemented)" in capsys.readouterr().err
    assert (tmp_path / "out").is_dir()


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "vocab.json"):
        (source / name).write_text(name)
    job = {"from": identity(source)}
    staging = prepare_staging(out, job, 0)
    (source / "model.safetensors").write_text("of the next export")
    with pytest.raises(ValueError, match="model.safetensors was changed while .*out was made"):
        publish(staging, out)
    assert not out.exists()
    # and what was made of it does not count for the next
    (staging / "shard").write_text("old")
    job = {"from": identity(source)}
    assert not (prepare_staging(out, job, 0) / "shard").exists()
    # training may remove what was read to its end
    (source / "model.safetensors").unlink()
    publish(staging, out)
    assert out.exists()


def test_what_a_disk_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert exit_status(lambda: prepare_staging(file / "out", {"from": {}}, 0)) == 2
    assert f"Not a directory: '{file}" in capsys.readouterr().err

    def full() -> None:
        with Path("/dev/full").open("w") as stream:
            stream.write("x")

    assert exit_status(full) == 2
    assert "No space left on device" in capsys.readouterr().err
    refused = OSError(errno.ECONNREFUSED, "Connection refused")
    with pytest.raises(OSError, match="refused"):
        exit_status(mock.Mock(side_effect=refused))
