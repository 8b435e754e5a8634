"""Configuration files to checked sections: bases, overlays, interpolation, overrides, one error.

    base files --> file --> overlay files --> section.field=value  --resolve ${...}-->  pydantic

A file is a YAML mapping of one stage's keys. `base:` names files it builds on, `vars:` holds values
for interpolation only. No function here imports torch, so a configuration is checked in no time.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeGuard, get_args

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from checkpoint_tools.files import write_atomically
from prism_megatron.config import schema
from prism_megatron.config.schema import Parallel, Section

STAGES: dict[str, type[Section]] = {
    "digit-sums": schema.DigitSums,
    "tiny-model": schema.TinyModel,
    "convert": schema.Convert,
    "sft": schema.SFT,
    "upcycle": schema.Upcycle,
    "data-stats": schema.DataStats,
    "make-warmup-pairs": schema.MakeWarmupPairs,
    "make-alignment-set": schema.MakeAlignmentSet,
    "warmup": schema.Warmup,
    "align": schema.Align,
    "filter-difficulty": schema.FilterDifficulty,
    "rlvr": schema.RLVR,
    "sync-check": schema.SyncCheck,
    "evaluate": schema.Evaluate,
    "report": schema.Report,
}
"""Stage name to the class of its configuration, in the order of a whole run."""

RECORDED_PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
)
COMMAND_LINE = "the command line"


def load(stage: str, files: Path | str | Sequence[Path | str], overrides: Sequence[str]) -> Section:
    """The checked configuration of `stage`.

    files: one YAML file, or a file and its overlays, of which a later one wins.
    overrides: "section.field=value" with YAML values; they win over the files.

    Raises ValueError that lists every problem, and FileNotFoundError for a missing file.
    """
    if stage not in STAGES:
        raise ValueError(unknown("stage", stage, list(STAGES)))
    paths = [files] if isinstance(files, Path | str) else files
    layers = [layer for path in paths for layer in _layers(Path(path), ())]
    layers.append((COMMAND_LINE, _parse_overrides(overrides)))
    _check_vars(layers)
    values = _merge(layers)
    try:
        # strict JSON rules: a path may be a string, but "12" isn't a number and 1 isn't a boolean
        return STAGES[stage].model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ValueError(_explain(stage, error, layers)) from None


def _layers(path: Path, including: tuple[Path, ...]) -> Iterator[tuple[str, DictConfig]]:
    """(file name, its keys) of the file's bases, depth first, and of the file itself."""
    resolved = path.resolve()
    if resolved in including:
        chain = " -> ".join(file.name for file in (*including, resolved))
        raise ValueError(f"configuration files include each other in a circle: {chain}")
    values = _read(path, including)
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list | ListConfig) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: base: {bases!r} given, a file name or a list of them wanted")
    for base in bases:
        yield from _layers(path.parent / base, (*including, resolved))
    yield str(path), values


def _read(path: Path, including: tuple[Path, ...]) -> DictConfig:
    if not path.is_file():
        source = f", named as base in {including[-1]}" if including else ""
        raise FileNotFoundError(f"configuration file {path} does not exist{source}")
    try:
        values = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(values, DictConfig):
        raise ValueError(f"{path} must hold `key: value` lines, but holds a list")
    return values


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or not all(key.split(".")):
            raise ValueError(f"override {override!r} is not of the form section.field=value")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"override is not readable YAML: {error}") from error


def _check_vars(layers: Sequence[tuple[str, DictConfig]]) -> None:
    """ValueError for a `vars` override that no file defines: it would do nothing, silently."""
    *files, (_, overrides) = layers
    known = {name for _, values in files for name in values.get("vars") or {}}
    for name in overrides.get("vars") or {}:
        if name not in known:
            raise ValueError(f"vars.{name}: no file defines it{_nearest(str(name), sorted(known))}")


def _merge(layers: Sequence[tuple[str, DictConfig]]) -> dict[str, Any]:
    """Merge the layers in order, resolve interpolation, and drop `vars`."""
    try:
        merged = OmegaConf.merge(*(values for _, values in layers))
        container = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        at = f" at {error.full_key}" if getattr(error, "full_key", None) else ""
        raise ValueError(f"configuration{at}: {reason}{_where(layers, error.full_key)}") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items() if key != "vars"}


def _explain(stage: str, error: ValidationError, layers: Sequence[tuple[str, DictConfig]]) -> str:
    files = ", ".join(name for name, _ in layers if name != COMMAND_LINE)
    problems = [f"  {_problem(stage, details, layers)}" for details in error.errors()]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{stage} configuration ({files}): {count}", *problems])


def _problem(stage: str, details: ErrorDetails, layers: Sequence[tuple[str, DictConfig]]) -> str:
    key = ".".join(map(str, details["loc"]))
    where = _where(layers, key)
    given = details["input"]
    if reason := schema.NOT_SUPPORTED.get(key.rpartition(".")[2]):
        return f"{key}: not supported: {reason}{where}"
    if details["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest_key(stage, key)}{where}"
    if details["type"] == "missing":
        return f"{key}: required, but not set; add it to the file or pass {key}=VALUE"
    if details["type"] == "value_error":
        return f"{key + ': ' if key else ''}{details['ctx']['error']}{where}"
    wanted = details["msg"].removeprefix("Input should be ")
    return f"{key}: {given!r} given, {wanted} wanted{where}"


def _where(layers: Sequence[tuple[str, DictConfig]], key: str | None) -> str:
    """The layer that set `key` last, as " (in FILE)"; empty if no layer did."""
    for name, values in reversed(layers):
        node: Any = OmegaConf.to_container(values, resolve=False)
        for part in (key or "").split("."):
            node = node.get(part) if isinstance(node, dict) else node
        if node is not None:
            return f" (in {name})"
    return ""


def _nearest_key(stage: str, key: str) -> str:
    """The known key nearest to `key`: one of the same section if it resembles, else any."""
    known = [name for name, _, _ in describe(STAGES[stage])]
    parent, _, misspelt = key.rpartition(".")
    siblings = {
        name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent
    }
    close = difflib.get_close_matches(misspelt, siblings, n=1)
    if close:
        return f", did you mean {siblings[close[0]]}?"
    elsewhere = [name for name in known if name.rpartition(".")[2] == misspelt]
    if elsewhere:
        return f", did you mean {' or '.join(elsewhere)}?"
    return _nearest(key, known)


def unknown(what: str, given: str, known: Sequence[str]) -> str:
    """Message for a name that isn't one of `known`, with the nearest one."""
    return f"unknown {what} {given!r}{_nearest(given, known)}"


def _nearest(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def describe(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, "type = default" or "type, required", meaning) of every key and sub-section."""
    for name, field in section.model_fields.items():
        annotation = field.annotation
        meaning = " ".join((field.description or "").split())
        if _is_section(annotation):
            meaning = meaning or " ".join((annotation.__doc__ or "").split())
            yield f"{prefix}{name}", "section", meaning
            yield from describe(annotation, f"{prefix}{name}.")
            continue
        elements = [part for part in get_args(annotation) if _is_section(part)]
        for element in elements:
            yield f"{prefix}{name}", "section", f"list. {meaning}"
            yield from describe(element, f"{prefix}{name}.")
        if elements:
            continue
        default = "required" if field.is_required() else f"default {_plain(field.default)}"
        yield f"{prefix}{name}", f"{_type_name(annotation)}, {default}", meaning


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, Path) else json.dumps(value)


def _type_name(annotation: Any) -> str:
    """Name of a type as a user would write it: choices for a Literal, elements for a tuple."""
    choices = get_args(annotation)
    if not choices:
        return str(getattr(annotation, "__name__", annotation)).replace("NoneType", "null").lower()
    if getattr(annotation, "__origin__", None) is dict:
        return "mapping to " + _type_name(choices[1])
    if isinstance(annotation, type) or getattr(annotation, "__origin__", None) is tuple:
        return "list of " + _type_name(choices[0])
    if all(isinstance(choice, str) for choice in choices):
        return "|".join(choices)
    return " or ".join(_type_name(choice) for choice in choices)


def check_world(parallel: Parallel, world_size: int, name: str = "parallel") -> None:
    """ValueError if `parallel` does not fit `world_size` ranks; `name` is its configuration key.

    Megatron's rules: tensor x context x pipeline divides the world, and so does expert_tensor x
    expert x pipeline, because the experts have a tensor parallelism of their own.
    """
    for names in (("tensor", "context"), ("expert_tensor", "expert")):
        sizes = {name: getattr(parallel, name) for name in names}
        factors = {n: size for n, size in sizes.items() if size > 1} or {names[0]: 1}
        factors["pipeline"] = parallel.pipeline
        needed = math.prod(factors.values())
        if world_size % needed:
            terms = " x ".join(f"{factor} {size}" for factor, size in factors.items())
            lower = " or ".join(f"{name}.{factor}" for factor, size in factors.items() if size > 1)
            raise ValueError(
                f"{name}: {terms} = {needed} does not divide world size {world_size}; "
                f"start a multiple of {needed} ranks (torchrun --nproc-per-node {needed}) "
                f"or lower {lower}"
            )


def check_layouts(config: Section, world_size: int, prefix: str = "") -> None:
    """`check_world` for every parallel layout in the configuration."""
    for name, value in config:
        if isinstance(value, Parallel):
            check_world(value, world_size, prefix + name)
        elif isinstance(value, Section):
            check_layouts(value, world_size, f"{prefix}{name}.")


def to_yaml(config: Section) -> str:
    """The configuration as YAML with every default filled in; `load` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def save(config: Section, directory: Path) -> None:
    """Write config.yaml (resolved) and run.json (commit, versions, seed, arguments)."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "config.yaml", to_yaml(config))
    write_atomically(directory / "run.json", json.dumps(_record(config), indent=2) + "\n")


def _record(config: Section) -> dict[str, Any]:
    run = getattr(config, "run", None)
    return {
        "seed": run.seed if run is not None else getattr(config, "seed", None),
        "argv": sys.argv,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        **provenance(),
    }


def provenance() -> dict[str, Any]:
    """Which code runs: git_commit, git_dirty (None outside of a checkout), versions."""
    packages = {name: _version(name) for name in RECORDED_PACKAGES}
    return {**git_state(), "versions": {"python": platform.python_version(), **packages}}


def git_state() -> dict[str, str | bool | None]:
    """{"git_commit", "git_dirty"} of the checkout that this code runs from; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {"git_commit": None, "git_dirty": None}
    commit, status = (
        subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True)
        for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
    )
    if commit.returncode or status.returncode:
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": commit.stdout.strip(), "git_dirty": bool(status.stdout.strip())}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
