"""Loading from the hub: the real client and `datasets`, against a small hub on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from verl_trb.data_files import read_rows

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
README = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: train.jsonl
- config_name: other
  data_files:
  - split: train
    path: other.jsonl
---
"""


def lines(count: int) -> str:
    return "".join(json.dumps({"question": f"{n}+{n}?", "answer": f"#### {2 * n}"}) + "\n" for n in range(count))


FILES = {"README.md": README.encode(), "train.jsonl": lines(50).encode(), "other.jsonl": lines(3).encode()}


class Hub(http.server.BaseHTTPRequestHandler):
    """What the client asks a hub for: the commit of a revision, the list of files, and files in ranges."""

    protocol_version = "HTTP/1.1"
    gated = False

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if path.startswith("/api/datasets/openai/gsm8k"):
            if self.gated:
                self.reply(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
            elif "/tree/" in path:
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in FILES.items()
                ]
                self.reply(200, json.dumps(entries).encode())
            elif path.endswith(("/revision/main", f"/revision/{COMMIT}")):
                siblings = [{"rfilename": name} for name in FILES]
                self.reply(200, json.dumps({"id": "openai/gsm8k", "sha": COMMIT, "siblings": siblings}).encode())
            else:
                self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        elif (name := path.removeprefix(f"/datasets/openai/gsm8k/resolve/{COMMIT}/")) in FILES:
            self.send_part(FILES[name])
        else:
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def send_part(self, content: bytes) -> None:
        facts = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            start, end = asked.removeprefix("bytes=").split("-")
            part = content[int(start) : int(end) + 1 if end else None]
            facts["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
            self.reply(206, part, facts)
        else:
            self.reply(200, content, facts)

    def reply(self, code: int, body: bytes, facts: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(facts or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("ThisHub", (Hub,), {}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def prepare(address: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command in its own process: the client reads its address when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", "verl_trb.prepare_data", "gsm8k", "--out", str(folder), *options],
        env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def address_of(hub: http.server.ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{hub.server_port}"


def refused(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 2 and run.stdout == "", run
    said = run.stderr.splitlines()
    assert len(said) == 1 and said[0].startswith("error: The data set openai/gsm8k at revision "), said
    assert said[0].endswith("or give a downloaded copy: prepare_data gsm8k --from FILE_OR_FOLDER.")
    return said[0]


def test_a_set_of_the_hub(hub: http.server.ThreadingHTTPServer, tmp_path: Path):
    run = prepare(address_of(hub), tmp_path)
    assert run.returncode == 0, run.stderr
    rows = read_rows(tmp_path / "gsm8k.parquet")
    assert [row["reward_model"]["ground_truth"] for row in rows] == [str(2 * n) for n in range(50)]
    manifest = json.loads((tmp_path / "gsm8k.manifest.json").read_text())
    assert (manifest["source"], manifest["config"], manifest["split"]) == ("hub: openai/gsm8k", "main", "train")
    assert manifest["revision"] == COMMIT
    assert manifest["notes"] == ["50 rows were read, and openai/gsm8k is known to have 7473"]


def test_a_commit_is_pinned_and_a_limit_stops_the_reading(hub: http.server.ThreadingHTTPServer, tmp_path: Path):
    run = prepare(address_of(hub), tmp_path, "--revision", COMMIT, "--limit", "5")
    assert run.returncode == 0, run.stderr
    assert "gsm8k: 5 of 5 rows read" in run.stdout
    manifest = json.loads((tmp_path / "gsm8k.manifest.json").read_text())
    assert manifest["revision"] == COMMIT and manifest["whole_source_read"] is False


def test_an_unknown_revision(hub: http.server.ThreadingHTTPServer, tmp_path: Path):
    said = refused(prepare(address_of(hub), tmp_path, "--revision", "v9"))
    assert "at revision v9 could not be read" in said and "404" in said


def test_a_set_that_needs_a_login(hub: http.server.ThreadingHTTPServer, tmp_path: Path):
    hub.RequestHandlerClass.gated = True  # type: ignore[attr-defined]
    assert "403" in refused(prepare(address_of(hub), tmp_path))


def test_no_connection(tmp_path: Path):
    refused(prepare("http://127.0.0.1:9", tmp_path))
    assert not list(tmp_path.glob("gsm8k*"))
