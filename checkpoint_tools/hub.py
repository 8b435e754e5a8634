"""The Hugging Face hub: a model by its id becomes a local directory, a directory becomes a model.

    prism-megatron checkpoint hub --download Qwen/Qwen3-VL-8B-Instruct --out models/8b
    prism-megatron checkpoint hub --upload runs/rlvr/hf --to my-team/qwen3-vl-8b-prism

The token is that of `hf auth login`. Both go on where they were interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from checkpoint_tools.command import exit_status

FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "value_head.pt"]
"""What a model's directory is made of; pickled weights are left on the hub."""


def local(source: str | Path, revision: str | None = None, out: Path | None = None) -> Path:
    """The directory itself, or that of a hub id, downloaded unless it was before.

    Raises ValueError if it is neither.
    """
    if Path(source).exists():
        return Path(source)
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{source} does not exist; give a directory or a hub id (owner/name)")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES, local_dir=out))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"{source} is no directory here and could not be downloaded: {error}"
        ) from error


def upload(directory: Path, name: str, private: bool = True) -> str:
    """Make hub model `name` of the directory; the address of what was uploaded.

    Raises ValueError if the hub refuses or can't be reached.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_large_folder(
            repo_id=name, folder_path=directory, repo_type="model", allow_patterns=FILES
        )
    except (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        OSError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{directory} could not be uploaded to {name}: {error}") from error
    return f"{api.endpoint}/{name}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--download", metavar="ID", help="hub id to fetch")
    action.add_argument("--upload", type=Path, metavar="DIR", help="directory to send")
    parser.add_argument("--out", type=Path, help="where a download goes (default: hub's cache)")
    parser.add_argument("--revision", help="branch, tag or commit of a download")
    parser.add_argument("--to", metavar="ID", help="hub id of an upload")
    parser.add_argument("--public", action="store_true", help="make a new upload visible to all")
    options = parser.parse_args(argv)
    if options.download:
        print(local(options.download, options.revision, options.out))
        return 0
    if not options.to:
        raise ValueError("--upload needs --to owner/name")
    if not (options.upload / "config.json").exists():
        raise ValueError(f"{options.upload} has no config.json, so it is no model; nothing is sent")
    print(upload(options.upload, options.to, private=not options.public))
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
