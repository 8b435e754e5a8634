from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from prism_megatron import cli

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.s*"), ROOT / ".ci" / "run"])
QUICKSTART = ROOT / "launch" / "quickstart.sh"
TOOLS = ("bash", "cat", "cut", "dirname", "grep", "mkdir", "nproc", "realpath", "rm", "sed",
         "sha256sum", "touch")  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine without Python: a PATH of basic tools only, and an empty home."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tmp_path / "home").mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None, tool
        (tools / tool).symlink_to(found)
    return tmp_path


def checkout(machine: Path) -> Path:
    repo = machine / "repo"
    shutil.copytree(ROOT / "launch", repo / "launch")
    for file in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, repo)
    return repo


def bash(machine: Path, command: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(machine / "bin"), "HOME": str(machine / "home")}
    return subprocess.run(
        [str(machine / "bin" / "bash"), "-c", command],
        cwd=machine,
        env=environment,
        capture_output=True,
        text=True,
    )


def program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses(script: Path) -> None:
    ran = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_without_python_one_line_says_what_to_install(machine: Path) -> None:
    repo = checkout(machine)
    ran = bash(machine, f"bash {repo}/launch/quickstart.sh")
    assert ran.returncode == 1
    [line] = ran.stderr.splitlines()
    assert line.startswith("Python 3.12 not found")
    assert "apt install python3.12-venv" in line and "uv python install 3.12" in line


def test_python_is_found_in_pyenv_behind_a_shim_that_fails(machine: Path) -> None:
    repo = checkout(machine)
    program(
        machine / "bin" / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127"
    )
    program(machine / "bin" / "python3", "exit 1")
    inside = machine / "home" / ".pyenv" / "versions" / "3.12.9" / "bin"
    inside.mkdir(parents=True)
    (inside / "python3.12").symlink_to(sys.executable)
    ran = bash(machine, f"source {repo}/launch/_env.sh && find_python")
    assert ran.stdout.strip() == str(inside / "python3.12")


def test_python_is_found_through_uv(machine: Path) -> None:
    repo = checkout(machine)
    program(machine / "bin" / "uv", '[[ "$1 $2" == "python find" ]] && echo /opt/uv/python3.12')
    ran = bash(machine, f"source {repo}/launch/_env.sh && find_python")
    assert ran.stdout.strip() == "/opt/uv/python3.12"


def test_a_python_of_another_version_is_not_taken(machine: Path) -> None:
    repo = checkout(machine)
    program(machine / "bin" / "python3", "exit 1  # what `sys.version_info != 3.12` gives")
    ran = bash(machine, f"source {repo}/launch/_env.sh && find_python")
    assert ran.returncode != 0 and ran.stdout == ""


def test_a_python_without_venv_says_so(machine: Path) -> None:
    repo = checkout(machine)
    program(
        machine / "bin" / "python3.12",
        'case "$2" in *ensurepip*) exit 1 ;; *print*) echo /usr/bin/python3.12 ;; esac',
    )
    ran = bash(machine, f"bash {repo}/launch/quickstart.sh")
    assert ran.returncode == 1
    assert "/usr/bin/python3.12 has no venv module; install it" in ran.stderr


def environment_with_pip_log(machine: Path) -> Path:
    """A checkout whose .venv has a python that only writes down what it is asked."""
    repo = checkout(machine)
    program(repo / ".venv" / "bin" / "python", f'echo "$*" >>{machine}/pip.log')
    return repo


def test_an_environment_is_installed_once(machine: Path) -> None:
    repo = environment_with_pip_log(machine)
    command = f"source {repo}/launch/_env.sh && prepare_environment"
    for _ in range(2):
        assert bash(machine, command).returncode == 0
    installs = (machine / "pip.log").read_text().splitlines()
    assert len(installs) == 2
    assert "-c constraints.txt setuptools" in installs[0]
    assert installs[1].endswith("-c constraints.txt -e .")


def test_extras_and_changed_pins_are_installed(machine: Path) -> None:
    repo = environment_with_pip_log(machine)
    log = machine / "pip.log"
    command = f"source {repo}/launch/_env.sh && prepare_environment"
    assert bash(machine, f"{command} dev").returncode == 0
    assert log.read_text().splitlines()[-1].endswith("-e .[dev]")
    # the package itself came with the extra
    before = log.read_text()
    assert bash(machine, command).returncode == 0
    assert log.read_text() == before
    with (repo / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert bash(machine, f"{command} dev").returncode == 0
    assert len(log.read_text().splitlines()) == 4


def test_a_failed_installation_is_tried_again(machine: Path) -> None:
    repo = checkout(machine)
    program(repo / ".venv" / "bin" / "python", f"echo tried >>{machine}/pip.log; exit 1")
    command = f"source {repo}/launch/_env.sh && prepare_environment"
    assert [bash(machine, command).returncode for _ in range(2)] == [1, 1]
    assert (machine / "pip.log").read_text().split() == ["tried", "tried"]


def quickstart(machine: Path, arguments: str = "") -> subprocess.CompletedProcess[str]:
    return bash(machine, f"bash {machine}/repo/launch/quickstart.sh --dir run {arguments}")


@pytest.fixture
def rehearsal(machine: Path) -> Path:
    """A checkout where python and torchrun write their command down and make its result."""
    repo = checkout(machine)
    body = (
        f'echo "${{0##*/}} $*" >>{machine}/commands\n'
        f"cd {machine}/run && mkdir -p data tiny tiny-megatron pairs discriminator\n"
        'if [[ "$*" == *"${BROKEN:-no such stage}"* ]]; then exit 7; fi\n'
        "for stage in sft warmup align rlvr; do mkdir -p $stage/hf; touch $stage/eval.json; done\n"
        "touch report.html\n"
    )
    for tool in ("python", "torchrun"):
        program(repo / ".venv" / "bin" / tool, body)
    ran = bash(machine, f"source {repo}/launch/_env.sh && mkdir run && prepare_environment")
    assert ran.returncode == 0, ran.stderr
    (machine / "commands").unlink()
    return machine


def stages(machine: Path) -> list[str]:
    lines = (machine / "commands").read_text().splitlines()
    return [re.sub(r".*-m prism_megatron (\S+) .*", r"\1", line) for line in lines]


def test_the_quickstart_runs_every_stage_in_order(rehearsal: Path) -> None:
    ran = quickstart(rehearsal, "--seed 77")
    assert ran.returncode == 0, ran.stderr
    assert stages(rehearsal) == [
        "digit-sums", "tiny-model", "convert", "sft", "evaluate", "make-warmup-pairs", "upcycle",
        "warmup", "align", "evaluate", "rlvr", "evaluate", "report",
    ]  # fmt: skip
    lines = (rehearsal / "commands").read_text().splitlines()
    assert all("vars.seed=77" in line and f"vars.dir={rehearsal}/run" in line for line in lines)
    parallel = [line for line in lines if line.startswith("torchrun")]
    assert len(parallel) == 5 and all("--nproc-per-node 2" in line for line in parallel)
    assert "report.html" in ran.stdout.splitlines()[-1]


def test_every_stage_and_file_of_the_quickstart_exists(rehearsal: Path) -> None:
    assert quickstart(rehearsal, "--smoke").returncode == 0
    for line in (rehearsal / "commands").read_text().splitlines():
        files = re.findall(r"--config (\S+)", line)
        assert len(files) == 2 and files[1].endswith("smoke.yaml")
        assert all((ROOT / file).is_file() for file in files)
    for line in (rehearsal / "commands").read_text().splitlines():
        arguments = line.partition("-m prism_megatron ")[2].split()
        assert cli.main([*arguments, "--dry-run"]) == 0


def test_without_alignment_rlvr_starts_from_sft(rehearsal: Path) -> None:
    assert quickstart(rehearsal, "--without-alignment").returncode == 0
    ran = stages(rehearsal)
    assert not {"make-warmup-pairs", "upcycle", "warmup", "align"} & set(ran)
    lines = (rehearsal / "commands").read_text().splitlines()
    assert f"policy.path={rehearsal}/run/sft/hf" in lines[ran.index("rlvr")]
    assert "stages=[sft,rlvr]" in lines[ran.index("report")]


def test_a_stopped_run_goes_on_at_the_stage_that_was_not_finished(rehearsal: Path) -> None:
    os_environment = os.environ | {"BROKEN": "prism_megatron make-warmup-pairs"}
    broken = subprocess.run(
        ["bash", str(rehearsal / "repo/launch/quickstart.sh"), "--dir", "run"],
        cwd=rehearsal,
        env=os_environment | {"PATH": str(rehearsal / "bin")},
        capture_output=True,
        text=True,
    )
    assert broken.returncode == 7
    assert stages(rehearsal)[-1] == "make-warmup-pairs"
    (rehearsal / "commands").unlink()
    assert quickstart(rehearsal).returncode == 0
    assert stages(rehearsal)[0] == "make-warmup-pairs"
    (rehearsal / "commands").unlink()
    assert "report: finished before" in quickstart(rehearsal).stdout
    assert not (rehearsal / "commands").exists()


def test_a_folder_of_other_arguments_is_not_mixed_in(rehearsal: Path) -> None:
    assert quickstart(rehearsal, "--smoke").returncode == 0
    ran = quickstart(rehearsal)
    assert ran.returncode == 2
    assert "choose another --dir or remove it" in ran.stderr


def test_an_unknown_argument_shows_the_usage(rehearsal: Path) -> None:
    ran = quickstart(rehearsal, "--sede 3")
    assert ran.returncode == 2
    assert "unknown argument --sede" in ran.stderr and "--seed N" in ran.stderr
