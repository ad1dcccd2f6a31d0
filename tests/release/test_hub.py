"""Repositories of a hub, by its own client, from a server on this machine that speaks as much of the hub as it asks."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zili.errors import CheckpointError, ConfigError
from zili.release import import_model
from zili.release.hub import fetch, is_hub_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories, by Hugging Face's routes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repositories: dict[str, Path] = {}
        self.served: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(/tree/.*)?(\?.*)?", self.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)(\?.*)?", self.path)
        folder = self.server.repositories.get((about or file)[1]) if about or file else None  # type: ignore[index]
        if folder is None or (about and about[2] not in (None, "main", COMMIT)):
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, body)
        elif about and about[3]:
            entries = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": COMMIT}
                for path in sorted(folder.iterdir())
            ]
            self._send(200, json.dumps(entries).encode(), {}, body)
        elif about:
            names = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
            self._send(200, json.dumps({"id": about[1], "sha": COMMIT, "siblings": names}).encode(), {}, body)
        else:
            assert file is not None
            content = (folder / file[3]).read_bytes()
            self.server.served.append(file[3]) if body else None
            etag = hashlib.sha256(content).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_a_repository_is_fetched_and_imported(hub: Hub, tmp_path: Path, publish: Callable[..., Path]) -> None:
    folder = publish("llama")
    for name in ("pytorch_model.bin", "training_args.bin", "picture.png"):
        (folder / name).write_bytes(b"not wanted")
    hub.repositories["team/model"] = folder
    found = fetch("hf:team/model", endpoint=hub.address, cache=tmp_path / "cache")
    assert {path.name for path in found.iterdir()} == {"config.json", "model.safetensors"}
    import_model(found, tmp_path / "zili")
    published, imported = load_file(folder / "model.safetensors"), load_file(tmp_path / "zili" / "model.safetensors")
    assert torch.equal(published["model.norm.weight"], imported["norm.weight"])
    served = len(hub.served)
    assert fetch("hf:team/model@main", endpoint=hub.address, cache=tmp_path / "cache") == found
    assert len(hub.served) == served  # it was there


def test_pickles_are_fetched_only_where_there_is_nothing_else(
    hub: Hub, tmp_path: Path, publish: Callable[..., Path]
) -> None:
    folder = publish("llama", torch.float32)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.repositories["team/old"] = folder
    found = fetch("hf:team/old", endpoint=hub.address, cache=tmp_path / "cache")
    assert (found / "pytorch_model.bin").is_file()
    import_model(found, tmp_path / "zili")


def test_what_cannot_be_fetched_is_said(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="hf:team/none cannot be fetched"):
        fetch("hf:team/none", endpoint=hub.address, cache=tmp_path)
    for name in ("hf:model", "hf:../../etc/x", "modelscope:a/b/c", "hf:a/b@"):
        with pytest.raises(ConfigError, match="names no repository"):
            fetch(name)
    monkeypatch.setitem(__import__("sys").modules, "modelscope_hub", None)
    with pytest.raises(ConfigError, match="pip install modelscope-hub"):
        fetch("modelscope:team/model")
    assert is_hub_name("hf:a/b") and not is_hub_name("runs/hf")


def test_modelscope_s_client_is_asked_for_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own protocol is not imitated: what is passed to it is looked at, against its signature where installed."""
    import inspect
    import sys
    import types

    asked: list[dict[str, object]] = []

    def snapshot_download(model_id: str, **options: object) -> str:
        asked.append({"model_id": model_id, **options})
        return str(tmp_path)

    try:
        from modelscope_hub.compat import snapshot_download as real
    except ImportError:
        real = None
    compat = types.ModuleType("modelscope_hub.compat")
    compat.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope_hub", types.ModuleType("modelscope_hub"))
    monkeypatch.setitem(sys.modules, "modelscope_hub.compat", compat)
    assert fetch("modelscope:TeleAI/TeleChat2-3B@v1.0") == tmp_path
    assert asked[0]["model_id"] == "TeleAI/TeleChat2-3B" and asked[0]["revision"] == "v1.0"
    assert "*.safetensors" in str(asked[0]["allow_patterns"]) and "*.bin" in str(asked[1]["allow_patterns"])
    if real is not None:
        assert set(asked[0]) <= set(inspect.signature(real).parameters)
