"""The command line: one stage, its configuration files, and overrides.

    prism-megatron STAGE --config FILE [--config OVERLAY ...] [section.field=value ...]
                         [--dry-run [--gpus N]]
    prism-megatron checkpoint NAME ...
    prism-megatron plan --model NAME --gpus N --gpu-memory GB --seq TOKENS
    prism-megatron bench {train,rollout,sync,step,show} ...
    prism-megatron score --input FILE [--output FILE] [--rules reference]
    prism-megatron doctor [--json] [STAGE --config FILE [section.field=value ...]]

The configuration is checked before anything imports torch. A mistake of the user ends with one
message and exit status 2; a defect of ours keeps its traceback.
"""

from __future__ import annotations

import argparse
import atexit
import faulthandler
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from checkpoint_tools.command import exit_status, rank, requeued_when_asked
from prism_megatron.config import load as configuration
from prism_megatron.config.schema import Evaluate, Optimizer, Section

ENTRY_POINTS = {
    "digit-sums": "prism_megatron.data.digit_sums:build",
    "tiny-model": "prism_megatron.pipelines.tiny_model:run",
    "convert": "prism_megatron.pipelines.convert:run",
    "sft": "prism_megatron.pipelines.sft:run",
    "upcycle": "prism_megatron.pipelines.upcycle:run",
    "data-stats": "prism_megatron.data_stats:run",
    "make-warmup-pairs": "prism_megatron.pipelines.make_warmup_pairs:run",
    "make-alignment-set": "prism_megatron.pipelines.make_alignment_set:run",
    "warmup": "prism_megatron.pipelines.warmup:run",
    "align": "prism_megatron.pipelines.alignment:run",
    "filter-difficulty": "prism_megatron.pipelines.filter_difficulty:run",
    "rlvr": "prism_megatron.pipelines.rlvr:run",
    "sync-check": "prism_megatron.pipelines.sync_check:run",
    "evaluate": "prism_megatron.pipelines.evaluate:run",
    "report": "prism_megatron.report:run",
}
"""Stage to the function that takes its configuration."""

CHECKPOINT_TOOLS = (
    "hf-to-megatron",
    "megatron-to-hf",
    "verify",
    "inspect",
    "reshard",
    "merge",
    "upcycle",
    "quantize",
    "hub",
)


TOOLS = {
    "plan": (
        "prism_megatron.planner.command:main",
        "Layouts for a model and GPUs, by memory and estimated time.",
    ),
    "bench": (
        "prism_megatron.bench.command:main",
        "What training, sampling, syncs and whole steps reach.",
    ),
    "score": ("prism_megatron.score:main", "What responses in a file earn, by the rules of RLVR."),
    "doctor": (
        "prism_megatron.doctor:main",
        "Versions, acceleration, settings and room of one or all hosts.",
    ),
}
"""Commands with arguments of their own: the function that takes them, and what it does."""


def run() -> NoReturn:
    """Be the process of a command.

    It ends as the interpreter ends it, but for taking the interpreter down, in which one rank in 40
    runs over gloo was aborted that had done all it had to; which thread did it is not known.
    """
    status = main()
    # what Python does first; there is no public name, and none in typeshed
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    # `| head` has read enough
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `argv` (default: sys.argv) and return its exit status."""
    _quieten()
    # where every thread was, if something beneath Python ends this process
    if sys.__stderr__ and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name in TOOLS:
        return exit_status(_function(TOOLS[name][0]), rest)
    if name == "checkpoint":
        return exit_status(_checkpoint, rest)
    return exit_status(_stage, name, rest)


def _quieten() -> None:
    """Leave out what megatron.core and torch tell of themselves in every process as they are
    imported: that there is no GPU, or no Transformer Engine. `doctor` tells that once, and training
    on GPUs is refused without them. With -W or PYTHONWARNINGS all is as asked there."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"megatron\.|.*/megatron/")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def parse(name: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, Section]:
    """Options of a stage's command line, and the checked configuration that it asks for."""
    if name not in ENTRY_POINTS:
        commands = [*ENTRY_POINTS, "checkpoint", *TOOLS]
        raise ValueError(configuration.unknown("command", name, commands))
    options = _stage_parser(name).parse_intermixed_args(arguments)
    return options, configuration.load(name, options.config, options.overrides)


def _stage(name: str, arguments: Sequence[str]) -> int:
    options, config = parse(name, arguments)
    if options.gpus is not None and not (options.dry_run and options.gpus > 0):
        raise ValueError(
            f"--gpus {options.gpus} plans a run for so many GPUs, one or more, with --dry-run; a "
            "run takes the ranks that the launcher starts"
        )
    world = options.gpus or int(os.environ.get("WORLD_SIZE", "0"))
    if world or not options.dry_run:
        configuration.check_layouts(config, world or 1)
    if options.dry_run:
        if rank() == 0:
            for line in _function("prism_megatron.plan:lines")(config, world) if world else ():
                print(f"# {line}")
            print(configuration.to_yaml(config), end="")
        return 0
    with requeued_when_asked():
        if any(isinstance(section, Optimizer) and section.offload for _, section in config):
            _function("prism_megatron.plan:check_host")(config, world or 1)
        _save(config)
        _function(ENTRY_POINTS[name])(config)
    return 0


def _save(config: Section) -> None:
    """Record the configuration of a stage that owns its run folder, once for all ranks; `evaluate`
    writes into that of the stage that it looks at."""
    run = getattr(config, "run", None)
    if run is not None and not isinstance(config, Evaluate) and rank() == 0:
        configuration.save(config, run.dir)


def _checkpoint(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: prism-megatron checkpoint {{{','.join(CHECKPOINT_TOOLS)}}} ...")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in CHECKPOINT_TOOLS:
        raise ValueError(configuration.unknown("checkpoint tool", name, CHECKPOINT_TOOLS))
    module = name.replace("-", "_")
    return int(_function(f"checkpoint_tools.{module}:main")(rest) or 0)


def _function(entry_point: str) -> Callable[..., Any]:
    module, _, function = entry_point.partition(":")
    resolved: Callable[..., Any] = getattr(import_module(module), function)
    return resolved


def _stage_parser(name: str) -> argparse.ArgumentParser:
    section = configuration.STAGES[name]
    parser = argparse.ArgumentParser(
        prog=f"prism-megatron {name}",
        description=section.__doc__,
        epilog=_keys(section),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        type=Path,
        metavar="FILE",
        help="YAML file of this stage; given again, an overlay whose keys win",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check and print the resolved configuration, and end"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="with --dry-run: check models and layouts for N GPUs, print batches and memory",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="win over the files"
    )
    return parser


def _keys(section: type[Section]) -> str:
    """Every configuration key, indented by section: type, default, meaning."""
    lines = ["configuration keys:"]
    for key, type_and_default, meaning in configuration.describe(section):
        depth = key.count(".")
        indent, name = "  " * (depth + 1), key.rpartition(".")[2]
        if type_and_default == "section":
            lines += ["", f"{indent}{name}:  {meaning}"]
        else:
            lines += [f"{indent}{name}  ({type_and_default})", f"{indent}    {meaning}"]
    return "\n".join(lines)


def _overview() -> str:
    """The help without a stage: every command with the first sentence of its meaning."""
    stages = [
        f"  {name:<20}{(configuration.STAGES[name].__doc__ or '').splitlines()[0]}"
        for name in ENTRY_POINTS
    ]
    usage = (__doc__ or "").split("\n\n")[1]
    return "\n".join(
        [
            "usage:",
            usage,
            "",
            "stages, in the order of a whole run (STAGE --help lists its configuration keys):",
            *stages,
            "",
            "tools:",
            f"  {'checkpoint':<20}{', '.join(CHECKPOINT_TOOLS)}",
            *(f"  {name:<20}{meaning}" for name, (_, meaning) in TOOLS.items()),
        ]
    )
