"""What the code base promises about itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("prism_megatron", "checkpoint_tools", "model_providers")
DEVICE_FILES = {"model_providers/backend.py", "model_providers/megatron_cpu.py"}
DEVICE_NAMES = re.compile(
    r"torch\.cuda|[\"']cuda[:\"']|[\"']nccl[\"']|parallel_state\.get_|\.cuda\(\)"
)
# a backend is chosen by name, in the configuration and on the command line
CHOICE_OF_BACKEND = re.compile(r"(Literal\[|choices=\()\"cpu\", \"cuda\"[\])]")
LONGEST_FILE = 700


def sources(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    )


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_devices_and_collectives_are_named_in_the_backend_only() -> None:
    found = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in sources(*PACKAGES)
        if name(path) not in DEVICE_FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if DEVICE_NAMES.search(CHOICE_OF_BACKEND.sub("", line))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.cuda.synchronize()",
        'x.to("cuda")',
        'torch.device("cuda:0")',
        'init_process_group("nccl")',
        "parallel_state.get_tensor_model_parallel_rank()",
        "model.cuda()",
    ],
)
def test_the_rule_on_device_names_finds_what_it_is_for(line: str) -> None:
    assert DEVICE_NAMES.search(CHOICE_OF_BACKEND.sub("", line))


def test_imports_go_one_way() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    ran = subprocess.run([str(linter), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert "Contracts: 5 kept, 0 broken" in ran.stdout


def test_no_file_is_too_long_to_read() -> None:
    long = {
        name(path): lines
        for path in sources(*PACKAGES, "tests", "launch", suffixes=(".py", ".sh"))
        if (lines := len(path.read_text().splitlines())) > LONGEST_FILE
    }
    assert long == {}


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name(path)
        for path in sources(*PACKAGES)
        if path.read_text().strip() and not path.read_text().lstrip("r").startswith('"""')
    ]
    assert silent == []


def test_nothing_names_a_machine_or_a_package_host() -> None:
    # put together here, so that this file does not name them either
    words = ["/" + "work/", "/" + "root/", "pypi" + ".org", "python" + "hosted", "file:" + "///"]
    folders = (*PACKAGES, "tests", "launch", "configs", "docs", ".ci")
    suffixes = (".py", ".sh", ".sbatch", ".yaml", ".txt", ".md", ".json", ".html", "")
    files = [path for path in sources(*folders, suffixes=suffixes) if path.is_file()]
    files += [
        path
        for path in ROOT.iterdir()
        if path.suffix in (".md", ".toml", ".txt", ".yaml") and path.is_file()
    ]
    assert len(files) > 50
    found = [
        f"{name(path)}: {word}" for path in files for word in words if word in path.read_text()
    ]
    assert found == []


def test_the_configuration_comes_without_torch() -> None:
    code = "import sys, prism_megatron.config.load as c; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
