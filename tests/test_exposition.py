"""The endpoint for Prometheus: what it serves, and that nothing a client does troubles the run."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import closing

import pytest
from prometheus_client.parser import text_string_to_metric_families

from zili import exposition
from zili.errors import ConfigError
from zili.exposition import METRICS, Endpoint, ServedFigure, place_of_endpoint, serving


def scraped(url: str) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Values by name and labels, as Prometheus' own client reads them."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        text = answer.read().decode()
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def figures() -> Iterator[ServedFigure]:
    yield ServedFigure("zili_loss", 2.5, {"run": 'a "strange" \\name\n'})
    yield ServedFigure("zili_tokens_total", 1e12 + 1, {"run": "a"})
    yield ServedFigure("zili_process_in_phase", 1, {"run": "a", "phase": "step"})


def test_what_is_served_is_what_was_given() -> None:
    with closing(Endpoint(figures, port=0)) as endpoint:
        assert endpoint.url.startswith("http://127.0.0.1:")
        found = scraped(endpoint.url)
    assert found["zili_loss"] == {frozenset({("run", 'a "strange" \\name\n')}): 2.5}
    assert found["zili_tokens_total"] == {frozenset({("run", "a")}): 1e12 + 1}
    with pytest.raises(OSError):
        scraped(endpoint.url)


def test_figures_that_fail_are_an_answer_of_their_own(capfd: pytest.CaptureFixture[str]) -> None:
    answers: list[Iterable[ServedFigure]] = [figures()]

    def fails() -> Iterable[ServedFigure]:
        return answers.pop()  # the second time there is none

    with closing(Endpoint(fails, port=0)) as endpoint:
        assert scraped(endpoint.url)
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError, match="500"):
                scraped(endpoint.url)
    assert capfd.readouterr() == ("", ""), "the terminal is the run's"


def test_silent_and_broken_clients_are_left(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(exposition._Handler, "timeout", 0.2)
    with closing(Endpoint(figures, port=0)) as endpoint:
        port = int(endpoint.url.rpartition(":")[2].partition("/")[0])
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        garbage = socket.create_connection(("127.0.0.1", port))
        garbage.sendall(b"\xff\x00" * 40_000)
        garbage.close()
        assert "zili_loss" in scraped(endpoint.url)
        begun = time.monotonic()
    assert time.monotonic() - begun < 10, "who says nothing does not hold up the end"
    for one in silent:
        one.close()
    assert capfd.readouterr() == ("", "")


def test_figures_that_hang_hold_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the run may lie on a dead file server."""
    monkeypatch.setattr(exposition, "_PATIENCE", 0.2)
    answers, asked = threading.Event(), threading.Event()

    def hang() -> Iterator[ServedFigure]:
        asked.set()
        answers.wait(30)
        yield from figures()

    endpoint = Endpoint(hang, port=0)
    client = threading.Thread(target=lambda: scraped(endpoint.url), daemon=True)
    client.start()
    assert asked.wait(20)
    begun = time.monotonic()
    endpoint.close()
    assert time.monotonic() - begun < 10
    answers.set()
    client.join(20)


def test_a_port_that_is_taken_is_told_and_ends_nothing() -> None:
    said: list[str] = []
    with closing(Endpoint(figures, port=0)) as endpoint:
        port = int(endpoint.url.rpartition(":")[2].partition("/")[0])
        with serving(figures, ("127.0.0.1", port), said.append):
            pass
    assert said == [f"no figures for Prometheus at 127.0.0.1:{port}: Address already in use; the run goes on without"]
    for host in ("no.such.host.invalid", "a..b", "1.2.3.4"):
        with serving(figures, (host, 9464), said.append):
            assert f"no figures for Prometheus at {host}:9464" in said[-1]


def test_a_process_without_room_for_a_thread_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def full(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    with serving(figures, ("127.0.0.1", 0), said.append):
        assert "can't start new thread; the run goes on without" in said[0]


@pytest.mark.parametrize(
    ("text", "place"),
    [("9464", ("127.0.0.1", 9464)), ("0", ("127.0.0.1", 0)), ("0.0.0.0:1", ("0.0.0.0", 1)), ("[::]:80", ("::", 80))],
)
def test_where_is_loopback_unless_told_otherwise(text: str, place: tuple[str, int]) -> None:
    assert place_of_endpoint(text) == place


@pytest.mark.parametrize("text", ["", "x", "host:", "65536", "-1", "1:2:x", "٣"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="give PORT or HOST:PORT"):
        place_of_endpoint(text)


def test_without_the_client_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'zili\[metrics\]'"):
        Endpoint(figures, port=0)


def test_names_are_of_prometheus_kind() -> None:
    for name, metric in METRICS.items():
        assert name.startswith("zili_") and (metric.kind == "counter") == name.endswith("_total"), name
