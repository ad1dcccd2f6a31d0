"""The store as a tier, against moto's S3 on loopback: there and back, and what goes wrong in between."""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
from tiny_run import Recipe, Recorder, Saves, assert_same_bits, final_tensors, open_trainer, train

from zili.errors import CheckpointError, ConfigError
from zili.training.checkpoints import list_checkpoints, verify
from zili.training.tiers import store as store_module
from zili.training.tiers.store import Store

pytest.importorskip("s3fs")
pytest.importorskip("moto")
serving_module = pytest.importorskip("werkzeug.serving")

URL = "s3://bucket/runs/mine"
Fault = Callable[[dict[str, Any]], "tuple[str, bytes] | None"]
"""What is answered to a request in place of the store; None: the store answers."""


class FaultyStore:
    """moto's S3 behind what may go wrong on the way."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._store = DomainDispatcherApplication(create_backend_app)
        self.fault: Fault = lambda request: None
        self.cut: Callable[[dict[str, Any]], bool] = lambda request: False
        """Whether half of an answer is sent."""

    def __call__(self, request: dict[str, Any], start: Any) -> Iterable[bytes]:
        answer = self.fault(request)
        if answer is not None:
            status, body = answer
            start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        body = b"".join(self._store(request, start))
        return [body[: len(body) // 2]] if self.cut(request) else [body]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FaultyStore, int]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    faulty = FaultyStore()
    serving = serving_module.make_server("127.0.0.1", 0, faulty, threaded=True)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield faulty, serving.server_port
    serving.shutdown()
    thread.join(10)


@pytest.fixture
def s3(server: tuple[FaultyStore, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultyStore]:
    """An empty bucket, and the environment that leads there."""
    faulty, port = server
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "hidden",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.mkdir("bucket")
    yield faulty
    faulty.fault, faulty.cut = lambda request: None, lambda request: False
    system.invalidate_cache()
    system.rm("bucket", recursive=True)


TIER = f'checkpoint.tiers=[{{place = "{URL}", every = 3}}]'


def test_a_run_goes_on_from_s3_where_its_folder_is_gone(recipe: Recipe, s3: FaultyStore, tmp_path: Path) -> None:
    config = recipe(TIER, "model.hidden_dropout=0.1")
    train(config)
    whole = final_tensors(config)
    shutil.rmtree(config.folder)
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.get(f"{URL[5:]}/step-00000003", str(tmp_path / "got"), recursive=True)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "got", check=True)
    Store(URL).remove("step-00000006/SHA256SUMS")
    heard = Recorder()
    trainer = open_trainer(config, [heard])
    assert trainer.resume() and trainer.step == 3, heard.notes
    trainer.fit()
    assert_same_bits(final_tensors(config), whole)
    assert sorted(Store(URL).sizes()) == ["step-00000003", "step-00000006"]


def refusal(s3: FaultyStore, recipe: Recipe, kind: type[Exception] = CheckpointError) -> str:
    """What a new run says that cannot write there."""
    with pytest.raises(kind) as caught:
        open_trainer(recipe(TIER)).resume()
    text = str(caught.value)
    assert "\n" not in text and "hidden" not in text and URL in text, text
    return text


def error(code: str, text: str, **further: str) -> bytes:
    parts = "".join(f"<{name}>{value}</{name}>" for name, value in further.items())
    return f"<Error><Code>{code}</Code><Message>{text}</Message>{parts}</Error>".encode()


def test_without_credentials(s3: FaultyStore, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "Unable to locate credentials; give credentials in the environment" in refusal(s3, recipe)


def test_a_wrong_region(s3: FaultyStore, recipe: Recipe) -> None:
    wrong = error(
        "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'cn-north-1'", Region="cn-north-1"
    )
    s3.fault = lambda request: ("400 Bad Request", wrong)
    text = refusal(s3, recipe)
    assert "expecting 'cn-north-1'" in text and "for S3 by AWS_DEFAULT_REGION" in text


def test_credentials_that_may_not(s3: FaultyStore, recipe: Recipe) -> None:
    s3.fault = lambda request: ("403 Forbidden", error("AccessDenied", "Access Denied"))
    assert "these credentials may not do that" in refusal(s3, recipe)


def test_no_such_bucket(s3: FaultyStore, recipe: Recipe) -> None:
    elsewhere = TIER.replace("s3://bucket", "s3://another")
    with pytest.raises(CheckpointError, match="bucket does not exist; make the bucket, or mend the URL"):
        open_trainer(recipe(elsewhere)).resume()


def test_no_answer(s3: FaultyStore, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    quick = {"config_kwargs": {"connect_timeout": 20, "read_timeout": 0.2, "retries": {"max_attempts": 0}}}
    monkeypatch.setitem(store_module._OPTIONS, "s3", quick)

    def wait(request: dict[str, Any]) -> None:
        time.sleep(1)

    s3.fault = wait
    assert "it answers too slowly or not at all" in refusal(s3, recipe)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "see whether it can be reached from here" in refusal(s3, recipe)


def test_a_package_that_is_missing(s3: FaultyStore, recipe: Recipe) -> None:
    with mock.patch.object(fsspec, "get_filesystem_class", side_effect=ImportError("Install s3fs to access S3")):
        assert "needs a package that is not here (Install s3fs to access S3)" in refusal(s3, recipe, ConfigError)


def asks(request: dict[str, Any], method: str, name: str) -> bool:
    return request["REQUEST_METHOD"] == method and request["PATH_INFO"].endswith(name)


def test_half_a_file_is_no_checkpoint_whether_it_is_said_or_not(s3: FaultyStore, recipe: Recipe) -> None:
    def shorten(request: dict[str, Any]) -> None:
        """Keep the first half of what is sent, and say that all is well."""
        if asks(request, "PUT", "step-00000003/shard-00001.safetensors"):
            body = request["wsgi.input"].read(int(request["CONTENT_LENGTH"]))
            request["CONTENT_LENGTH"] = str(len(body) // 2)
            request["wsgi.input"] = io.BytesIO(body[: len(body) // 2])

    s3.fault = shorten
    saves = Saves()
    train(recipe(TIER), saves)
    ((_, note),) = saves.notes
    assert "has not taken step 3" in note and "bytes that were written: the store keeps less than it says" in note
    assert "SHA256SUMS" not in Store(URL).sizes("step-00000003")
    assert "SHA256SUMS" in Store(URL).sizes("step-00000006")


def test_half_an_answer_is_passed_over_and_nothing_is_lost(s3: FaultyStore, recipe: Recipe) -> None:
    config = recipe(TIER)
    train(config)
    shutil.rmtree(config.folder)
    raw = Store(URL).part("step-00000006/shard-00001.safetensors", 0, 1 << 20)

    def half(request: dict[str, Any]) -> tuple[str, bytes] | None:
        if asks(request, "GET", "step-00000006/shard-00001.safetensors"):
            return "200 OK", raw[: len(raw) // 2]
        return None

    s3.fault = half
    heard = Recorder()
    trainer = open_trainer(config, [heard])
    assert trainer.resume() and trainer.step == 3
    assert "passing over step 6 in the store" in heard.notes[0] and "damaged" in heard.notes[0]
    (path,) = list_checkpoints(config.folder / "checkpoints")
    verify(path)


def test_an_answer_that_breaks_off_is_asked_for_again(s3: FaultyStore, recipe: Recipe) -> None:
    config = recipe(TIER)
    train(config)
    shutil.rmtree(config.folder)
    broken: list[str] = []

    def once(request: dict[str, Any]) -> bool:
        if asks(request, "GET", "shard-00001.safetensors") and not broken:
            broken.append(request["PATH_INFO"])
            return True
        return False

    s3.cut = once
    trainer = open_trainer(config)
    assert trainer.resume() and trainer.step == 6 and broken


def test_a_store_that_fails_in_the_middle_of_a_run_costs_no_step(s3: FaultyStore, recipe: Recipe) -> None:
    def down(request: dict[str, Any]) -> tuple[str, bytes] | None:
        if "step-00000003" in request["PATH_INFO"] and request["REQUEST_METHOD"] == "PUT":
            return "403 Forbidden", error("AccessDenied", "Access Denied")
        return None

    s3.fault = down
    saves = Saves()
    assert train(recipe(TIER), saves).done
    ((step, note),) = saves.notes
    assert step in (3, 4) and f"the store {URL} has not taken step 3: " in note and "may not do that" in note
    assert sorted(name for name in Store(URL).sizes()) == ["step-00000006"], "what was not completed is cleared away"
