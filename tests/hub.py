"""A hub on this machine: what huggingface_hub and `llama-cli -hf` ask huggingface.co for, answered from a folder.

FOLDER/ORG/NAME/... are the files of ORG/NAME. What is served is counted.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)(/(?P<what>revision|tree|refs|paths-info)(/(?P<rest>.*))?)?")
FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class Hub:
    """served: file -> bytes of it that were sent, ORG/NAME/FILE. gated: names whose files are refused without a token;
    cut: answers with fewer bytes than there are."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.served: Counter[str] = Counter()
        self.gated: dict[str, int] = {}  # name -> 401 or 403
        self.revisions = {"main", COMMIT}
        self.url = ""

    def files(self, name: str) -> dict[str, Path]:
        folder = self.folder / name
        return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}

    def env(self, cache: Path) -> dict[str, str]:
        """Of a process that asks this hub and no other, and keeps what it gets in a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "LLAMA_CACHE": str(cache / "hub"), "NO_PROXY": "*"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, found: object) -> None:
        self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: int, error: str, message: str) -> None:
        self.answer(code, b"", {"X-Error-Code": error, "X-Error-Message": message})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        asked = FILE.fullmatch(path) or API.fullmatch(path)
        if asked is None or not (self.hub.folder / unquote(asked["name"])).is_dir():
            return self.refuse(401, "RepoNotFound", "Repository not found")
        name = unquote(asked["name"])
        files = self.hub.files(name)
        if "file" in asked.groupdict():
            return self.file(name, unquote(asked["revision"]), unquote(asked["file"]), files)
        what, (revision, _, inside) = asked["what"], (asked["rest"] or "main").partition("/")
        if what in ("revision", "tree") and unquote(revision) not in self.hub.revisions:
            return self.refuse(404, "RevisionNotFound", "Revision not found")
        if what == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}
            return self.json({"branches": [branch], "tags": [], "converts": []})
        if what == "tree":
            start = f"{unquote(inside)}/" if inside else ""
            return self.json(self.tree(files, start, "recursive=true" in self.path.lower()))
        siblings = [{"rfilename": n, "size": p.stat().st_size} for n, p in files.items()]
        return self.json({"id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": siblings})

    @staticmethod
    def tree(files: dict[str, Path], start: str, recursive: bool) -> list[dict]:
        found: dict[str, dict] = {}
        for name, path in files.items():
            first, slash, _ = name.removeprefix(start).partition("/")
            if name.startswith(start) and slash and not recursive:
                folder = start + first
                found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
            elif name.startswith(start):
                oid = hashlib.sha1(path.read_bytes()).hexdigest()
                found[name] = {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}
        return list(found.values())

    def file(self, name: str, revision: str, file: str, files: dict[str, Path]) -> None:
        if name in self.hub.gated:
            return self.refuse(self.hub.gated[name], "GatedRepo", "Access to the model is restricted")
        if revision not in self.hub.revisions:
            return self.refuse(404, "RevisionNotFound", "Revision not found")
        if file not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data = files[file].read_bytes()
        etag = hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked, code = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")), 200
        if asked:
            start, end, total = int(asked[1]), int(asked[2] or len(data) - 1), len(data)
            data, code = data[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{min(end, total - 1)}/{total}"
        headers["Content-Length"] = str(len(data))
        if self.command == "GET":
            self.hub.served[f"{name}/{file}"] += len(data)
        return self.answer(code, data, headers)


@contextmanager
def running(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def asked(folder: Path, cache: Path) -> Iterator[Hub]:
    """The hub of this process for the time of the block."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import HfFileSystem, constants

    with running(folder) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            patch.setattr(constants, name, str(cache))
        HfFileSystem.clear_instance_cache()
        yield hub
        HfFileSystem.clear_instance_cache()
