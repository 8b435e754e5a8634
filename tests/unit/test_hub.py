"""Download and upload with a hub that runs here: the real client over HTTP, cut off in between."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "qwen3_vl"}',
    "model.safetensors": bytes(range(256)) * 120_000,
    "pytorch_model.bin": b"a pickle",
}
ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
DATA = {
    "README.md": b"about",
    "data/train-0.jsonl": json.dumps(ROW).encode(),
    "data/train-1.jsonl": json.dumps(ROW | {"id": 1}).encode(),
    "pairs.jsonl": b"{}",
}
"""The data set team/set; team/one has the first two files."""


class Hub(ThreadingHTTPServer):
    """One repository to download, one that uploads make."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.log: list[tuple[str, str, str]] = []
        self.cuts = 0
        """How many of the next transfers break off half-way."""
        self.stored: dict[str, bytes] = {}
        self.committed: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """What of the hub's protocol the client uses for these."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._file(self._asked(), is_head=True)

    def do_GET(self) -> None:
        self._note()
        if self.path.startswith("/api/models/team/tiny/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            self._json({"id": "team/tiny", "sha": COMMIT, "siblings": siblings})
        elif self.path.startswith("/api/models/team/tiny/tree/"):
            entries = [{"type": "file", "path": n, "size": len(c)} for n, c in FILES.items()]
            self._json([entry | {"oid": "0" * 40} for entry in entries])
        elif self.path.startswith(("/api/datasets/team/set/", "/api/datasets/team/one/")):
            names = list(DATA)[: 2 if "/one/" in self.path else None]
            siblings = [{"rfilename": name} for name in names]
            files = [{"type": "file", "path": n, "size": len(DATA[n]), "oid": "0"} for n in names]
            is_tree = "/tree/" in self.path
            self._json(files if is_tree else {"id": "x", "sha": COMMIT, "siblings": siblings})
        elif "/resolve/" in self.path:
            self._file(self._asked(), is_head=False)
        else:
            self._json({"error": "not found"}, 404)

    def _asked(self) -> bytes:
        name = self.path.partition(f"/resolve/{COMMIT}/")[2]
        return (DATA if self.path.startswith("/datasets/") else FILES)[name]

    def do_POST(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self._json({"url": f"{self.server.url}/team/new", "name": "team/new"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            kinds = [("lfs" if f["path"].endswith(".safetensors") else "regular") for f in files]
            pairs = zip(files, kinds, strict=True)
            self._json({"files": [{"path": f["path"], "uploadMode": kind, "shouldIgnore": False}
                                  for f, kind in pairs]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            self._json({"transfer": "basic", "objects": [self._lfs(o) for o in asked]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                self._commit(json.loads(line))
            self._json(
                {"commitUrl": f"{self.server.url}/team/new/commit/{COMMIT}", "commitOid": COMMIT}
            )
        else:
            self._json({"error": "not found"}, 404)

    def do_PUT(self) -> None:
        self._note()
        length = int(self.headers["Content-Length"])
        if self.server.cuts:
            self.server.cuts -= 1
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        content = self.rfile.read(length)
        self.server.stored[self.path.rpartition("/")[2]] = content
        self._json({})

    def _lfs(self, asked: dict[str, Any]) -> dict[str, Any]:
        known = asked["oid"] in self.server.stored
        action = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}
        return asked | ({} if known else {"actions": action})

    def _commit(self, entry: dict[str, Any]) -> None:
        value = entry["value"]
        if entry["key"] == "file":
            self.server.committed[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            self.server.committed[value["path"]] = self.server.stored[value["oid"]]

    def _file(self, content: bytes, is_head: bool) -> None:
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if is_head:
            return
        if self.server.cuts and len(content) > 1000:
            self.server.cuts -= 1
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def _json(self, answer: Any, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _note(self) -> None:
        line = (self.command, self.path, self.headers.get("Range") or "")
        self.server.log.append(line)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def _tool(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return _python(hub, home, "-m", "checkpoint_tools.hub", *arguments)


def _python(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_secret",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_download_that_broke_off_goes_on_and_leaves_pickles_behind(
    hub: Hub, tmp_path: Path
) -> None:
    hub.cuts = 1
    out = tmp_path / "model"
    done = _tool(hub, tmp_path / "home", "--download", "team/tiny", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    found = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    assert found == {name: FILES[name] for name in ("config.json", "model.safetensors")}
    ranges = [asked for _, path, asked in hub.log if path.endswith("model.safetensors")]
    assert [bool(asked) for asked in ranges] == [False, True]


def test_a_name_that_is_nowhere_is_one_clear_error(hub: Hub, tmp_path: Path) -> None:
    done = _tool(hub, tmp_path / "home", "--download", "team/none")
    assert done.returncode == 2
    assert "team/none is no directory here and could not be downloaded" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_upload_that_broke_off_goes_on(hub: Hub, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, content in FILES.items():
        (source / name).write_bytes(content)
    hub.cuts = 1
    arguments = ("--upload", str(source), "--to", "team/new")
    done = _tool(hub, tmp_path / "home", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"{hub.url}/team/new")
    assert hub.committed == {name: FILES[name] for name in ("config.json", "model.safetensors")}
    assert "hf_secret" not in done.stdout + done.stderr
    puts = len([1 for method, _, _ in hub.log if method == "PUT"])
    assert puts == 2
    again = _tool(hub, tmp_path / "home", *arguments)
    assert again.returncode == 0, again.stderr
    assert len([1 for method, _, _ in hub.log if method == "PUT"]) == puts


def test_what_is_no_model_is_not_sent(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("private")
    done = _tool(hub, tmp_path / "home", "--upload", str(tmp_path), "--to", "team/new")
    assert done.returncode == 2 and "has no config.json" in done.stderr
    assert not hub.log


def _data(hub: Hub, home: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Prints the number of rows of the data set, and the files that hold them."""
    code = (
        "import sys; from pathlib import Path; from prism_megatron.config import schema;"
        "from prism_megatron.data.rows import read_sft;"
        "from prism_megatron.data.sources import open_sources;"
        "from checkpoint_tools.command import exit_status\n"
        "def main():\n"
        "    [source] = open_sources(schema.Data(path=Path(sys.argv[1])), read_sft)\n"
        "    print(len(source), source[len(source) - 1].response, source.name)\n"
        "sys.exit(exit_status(main))"
    )
    return _python(hub, home, "-c", code, name)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("team/one", 1), ("team/set:data/train-1.jsonl", 1), ("team/set:data/*.jsonl", 2)],
)
def test_rows_of_a_data_set_by_its_id(hub: Hub, tmp_path: Path, name: str, rows: int) -> None:
    done = _data(hub, tmp_path, name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(rows), "a", name]
    loaded = {path.rpartition("/")[2] for _, path, _ in hub.log if "/resolve/" in path}
    assert "pairs.jsonl" not in loaded and len(loaded) == (2 if name == "team/one" else rows)


def test_which_files_of_a_data_set_are_meant_has_to_be_said(hub: Hub, tmp_path: Path) -> None:
    done = _data(hub, tmp_path, "team/set")
    assert done.returncode == 2
    assert "has 3 files: data/train-0.jsonl, data/train-1.jsonl, pairs.jsonl" in done.stderr
    done = _data(hub, tmp_path, "team/set:other.json")
    assert done.returncode == 2 and "data set team/set has no file other.json" in done.stderr
    done = _data(hub, tmp_path, "team/none")
    assert done.returncode == 2 and "team/none is neither a file here nor a data" in done.stderr
