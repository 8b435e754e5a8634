"""`prism-megatron doctor`: versions against the tested ones, active acceleration, known bad pairs.

Optional packages are imported in processes of their own, because some of them break the importing
process when they don't fit the host.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console
from rich.table import Table

DISTRIBUTION = "prism-megatron"
ACCELERATION = {
    "Transformer Engine": "transformer_engine.pytorch",
    "Apex multi-tensor kernels": "amp_C",
    "Apex fused layer norm": "fused_layer_norm_cuda",
    "FlashAttention": "flash_attn",
    "FlashAttention-3": "flash_attn_3",
    "DeepEP": "deep_ep",
}
"""Optional kernels: the module that loads where they are active."""

ENGINES = ("transformer-engine", "transformer-engine-torch", "sglang", "vllm", "kernels", "apex")
"""Packages outside of our own requirements whose versions matter."""

IMPORT_TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Package:
    """An installed package next to the version that it was tested at (None if not pinned)."""

    name: str
    installed: str | None
    tested: str | None

    @property
    def remark(self) -> str:
        if self.installed is None:
            return "missing" if self.tested else ""
        untested = self.tested not in (None, self.installed.partition("+")[0])
        return "not the tested one" if untested else ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that doctor prints.

    acceleration: name -> "active", "not installed", or the error that importing it raised.
    """

    python: str
    platform: str
    devices: tuple[str, ...]
    packages: tuple[Package, ...]
    acceleration: dict[str, str]
    problems: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    """Print the diagnosis; 1 if something known to be bad was found."""
    parser = argparse.ArgumentParser(prog="prism-megatron doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)
    diagnosis = diagnose()
    if options.json:
        print(json.dumps(asdict(diagnosis), indent=2))
    else:
        _print(diagnosis)
    return 1 if diagnosis.problems else 0


def diagnose() -> Diagnosis:
    """Look at this host and environment."""
    tested = tested_versions()
    names = dict.fromkeys([*_required(), *ENGINES])
    packages = tuple(Package(name, _installed(name), tested.get(name)) for name in names)
    acceleration = {name: probe(module) for name, module in ACCELERATION.items()}
    versions = {p.name: Version(p.installed) for p in packages if p.installed}
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(),
        devices=tuple(accelerators()),
        packages=packages,
        acceleration=acceleration,
        problems=tuple(known_bad(versions, acceleration, distribution_files("apex"))),
    )


def known_bad(
    versions: Mapping[str, Version], acceleration: Mapping[str, str], apex_files: Collection[str]
) -> Iterator[str]:
    """What is known not to work together, each with its way out.

    versions: installed packages; acceleration: as in Diagnosis; apex_files: files of the installed
    distribution called apex.
    """

    def has(name: str, lowest: str, below: str = "9999") -> bool:
        return name in versions and Version(lowest) <= versions[name] < Version(below)

    if has("transformer-engine", "2.13") and has("torch", "2.11", "2.12"):
        yield (
            f"Transformer Engine {versions['transformer-engine']} needs a newer cuBLAS than torch "
            "2.11 brings and raises OSError at import; install transformer-engine 2.12.0"
        )
    if acceleration.get("Transformer Engine", "not installed") not in ("active", "not installed"):
        yield (
            "Transformer Engine is installed but does not load, which breaks the import of "
            f"megatron.core ({acceleration['Transformer Engine']}); repair or uninstall it"
        )
    if has("kernels", "0.17") and has("transformers", "5.6", "5.7"):
        yield f"kernels {versions['kernels']} breaks transformers 5.6; install kernels 0.14.1"
    if has("transformers", "0", "5"):
        yield (
            f"transformers {versions['transformers']} reads a checkpoint written by 5.x with "
            "rope_theta ten times off and without a warning; install transformers 5.6.0, and keep "
            "an engine that needs 4.x in an environment of its own"
        )
    if "apex" in versions and not any(file.startswith("apex/optimizers/") for file in apex_files):
        yield (
            "the installed package apex is not NVIDIA Apex, which is built from its source only; "
            "uninstall it"
        )


def probe(module: str) -> str:
    """Whether `module` imports in a process of its own: "active", "not installed" or the error."""
    if find_spec(module.partition(".")[0]) is None:
        return "not installed"
    try:
        imported = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"import took longer than {IMPORT_TIMEOUT_SECONDS} s"
    if imported.returncode == 0:
        return "active"
    lines = imported.stderr.strip().splitlines()
    return lines[-1] if lines else f"import ended with status {imported.returncode}"


def tested_versions() -> dict[str, str]:
    """Tested version of each package: the checkout's constraints, else the exact requirements."""
    constraints = Path(__file__).resolve().parents[1] / "constraints.txt"
    if constraints.is_file():
        lines = constraints.read_text().splitlines()
    else:
        lines = [line.partition(";")[0] for line in requires(DISTRIBUTION) or ()]
    pins = (re.fullmatch(r"([\w.-]+)==([\w.+!]+)", line.strip()) for line in lines)
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def accelerators() -> Iterator[str]:
    """One line a device: what torch can use, with the driver's own words where it has some."""
    import torch

    if not torch.accelerator.is_available():
        return
    kind = torch.accelerator.current_accelerator()
    yield f"{torch.accelerator.device_count()} x {kind}"
    command = ["nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return
    yield from listing.strip().splitlines()[1:]


def distribution_files(name: str) -> list[str]:
    """Files of an installed distribution; none if it isn't installed or doesn't record them."""
    try:
        return [str(file) for file in distribution(name).files or ()]
    except PackageNotFoundError:
        return []


def _required() -> list[str]:
    """Names of our own requirements, those of the extras left out."""
    parsed = map(Requirement, requires(DISTRIBUTION) or ())
    return [
        canonicalize_name(requirement.name)
        for requirement in parsed
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]


def _installed(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def _print(diagnosis: Diagnosis) -> None:
    console = Console()
    console.print(f"Python {diagnosis.python} on {diagnosis.platform}")
    console.print("devices: " + ("; ".join(diagnosis.devices) or "CPU only"))
    packages = Table("package", "installed", "tested", "")
    for package in diagnosis.packages:
        packages.add_row(package.name, package.installed or "-", package.tested, package.remark)
    console.print(packages)
    acceleration = Table("acceleration", "status")
    for name, status in diagnosis.acceleration.items():
        acceleration.add_row(name, status)
    console.print(acceleration)
    for problem in diagnosis.problems:
        console.print(f"known bad: {problem}", style="bold red")
    if not diagnosis.problems:
        console.print("nothing known to be bad")
