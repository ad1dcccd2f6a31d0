"""A run under `zili launch` as a real Prometheus sees it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from deployed import BOARD, RULES, alerts, queries
from launching import Launched

from zili.config import RunConfig
from zili.exposition import METRICS
from zili.supervision.account import account_of

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs Prometheus: Debian's package prometheus",
)
_CONFIG = """
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [RULES]
scrape_configs:
  - job_name: zili
    static_configs: [{targets: TARGETS}]
"""


class Prometheus:
    """A server that scrapes some endpoints once a second."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        config = _CONFIG.replace("RULES", str(RULES)).replace("TARGETS", json.dumps(targets))
        (folder / "prometheus.yml").write_text(config, encoding="utf-8")
        self._log = folder / "prometheus.log"
        words = [
            *("prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"),
            *("--web.listen-address=127.0.0.1:0", "--log.level=info"),
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._at = self._address()

    def _address(self) -> str:
        """Where it listens: port 0 is any, which Prometheus does not say."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self._process.poll() is None, self._log.read_text()
            for port in listened(self._process.pid):
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5).close()
                    return f"http://127.0.0.1:{port}"
            time.sleep(0.1)
        raise AssertionError(self._log.read_text())

    def get(self, path: str, **words: str) -> Any:
        with urllib.request.urlopen(f"{self._at}/api/v1/{path}?{urllib.parse.urlencode(words)}", timeout=20) as answer:
            return json.load(answer)["data"]

    def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values, now."""
        return [(one["metric"], float(one["value"][1])) for one in self.get("query", query=query)["result"]]

    def until(self, query: str, seconds: float = 60) -> list[tuple[dict[str, str], float]]:
        """What `query` gives once it gives something."""
        end = time.monotonic() + seconds
        while not (found := self.ask(query)):
            assert time.monotonic() < end, query
            time.sleep(0.2)
        return found

    def end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def listened(pid: int) -> list[int]:
    """TCP ports at which a process listens."""
    with suppress(OSError):
        own = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
        return [int(one[1].partition(":")[2], 16) for one in lines if one[3] == "0A" and f"socket:[{one[9]}]" in own]
    return []


@pytest.fixture
def launched(recipe: Callable[..., RunConfig], tmp_path: Path) -> Iterator[Launched]:
    """A run on two machines of two processes each, which serve figures at free ports."""
    config = recipe(
        "training.steps=100000", "training.micro_batch=1", "checkpoint.every=10", f"folder={tmp_path / 'mine'}"
    )
    (tmp_path / "launched").mkdir()
    run = Launched(tmp_path / "launched", config, "--processes", "2", "--machines", "2", "--metrics", "0")
    yield run
    run.end()
    assert not run.left()


@needs_prometheus
@pytest.mark.slow
def test_prometheus_sees_a_run_and_its_restart(launched: Launched, tmp_path: Path) -> None:
    launched.begin("a", "b")
    launched.await_life(1, 20)
    targets = {name: re.findall(r"at http://(127\S+)/metrics", launched.log(name).read_text())[0] for name in "ab"}
    for target in targets.values():
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=20) as answer:
            checked = subprocess.run(
                ["promtool", "check", "metrics"], check=False, input=answer.read(), capture_output=True
            )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
    watching = Prometheus(tmp_path, list(targets.values()))
    try:
        _see_the_run(watching, launched)
        _see_a_restart(watching, launched)
        _ask_all_that_is_shown(watching)
    finally:
        watching.end()
    launched.agents["a"].send_signal(signal.SIGINT)
    assert launched.codes() == {130}, launched.everything()


def _see_the_run(watching: Prometheus, launched: Launched) -> None:
    ((_, first),) = watching.until("max by (run) (zili_step) > 0")
    ((labels, later),) = watching.until(f"max by (run) (zili_step) > {first + 5}")
    assert labels == {"run": "mine"}
    said = launched.steps()
    assert first < later <= said
    lines = map(json.loads, (launched.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    ((_, step), (_, loss)) = (watching.ask(f"zili_{name}")[0] for name in ("step", "loss"))
    assert loss in losses.values() and step in losses
    assert {(one["node"], one["rank"]) for one, _ in watching.until("zili_process_step_seconds > 0")} <= {
        *(("a", "0"), ("a", "1"), ("b", "2"), ("b", "3"), ("b", "0"), ("b", "1"), ("a", "2"), ("a", "3")),
    }
    assert watching.ask("sum(zili_node_processes)") == [({}, 4.0)]
    assert watching.ask("count(zili_loss)") == [({}, 1.0)], "one machine tells of the run"
    assert watching.ask("zili_data_position_samples / zili_step")[0][1] == launched.config.training.global_batch
    ((_, goodput),) = watching.until("zili_goodput_ratio > 0")
    assert goodput < 1
    ((_, phases),) = watching.ask("sum by (run) (zili_phase_seconds)")
    ((_, steps),) = watching.ask('zili_phase_seconds{phase="step"}')
    assert 0 < steps < phases
    ((_, age),) = watching.until("zili_checkpoint_age_seconds >= 0")
    assert age < 120
    assert _counts(watching) == _counted(launched)


def _see_a_restart(watching: Prometheus, launched: Launched) -> None:
    os.kill(launched.workers("b")[0], signal.SIGKILL)
    launched.await_life(2, launched.steps() + 3)
    watching.until("max by (run) (zili_restarts_total) >= 1")
    # Beside other work a machine may be lost for a moment too: as many as the run's own account has.
    end = time.monotonic() + 60
    while (seen := _counts(watching)) != (told := _counted(launched)):
        assert time.monotonic() < end, (seen, told, launched.said())
        time.sleep(0.2)
    watching.until('max by (run) (zili_phase_seconds{phase="reload"}) > 0')
    watching.until("count(zili_process_step_seconds) == 4")
    assert watching.ask("sum(zili_node_processes)") == [({}, 4.0)]


def _counts(watching: Prometheus) -> tuple[float, ...]:
    return tuple(watching.ask(f"max(zili_{name})")[0][1] for name in ("lives", "restarts_total", "machines"))


def _counted(launched: Launched) -> tuple[float, ...]:
    told = account_of(launched.run)
    return len(told.lives), sum(life.failed for life in told.lives), told.lives[-1].machines


def _ask_all_that_is_shown(watching: Prometheus) -> None:
    """Every alert rule is evaluated without an error, and every query of the dashboard answered; names have values."""
    groups = watching.get("rules")["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert rules.keys() == alerts().keys()
    end = time.monotonic() + 60
    while any(rule["health"] == "unknown" for rule in rules.values()) and time.monotonic() < end:
        time.sleep(0.5)
        groups = watching.get("rules")["groups"]
        rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert {name: rule["health"] for name, rule in rules.items()} == dict.fromkeys(rules, "ok")
    assert rules["ZiliNoStep"]["state"] == rules["ZiliLossNotFinite"]["state"] == "inactive"
    empty = set()
    for query in queries(json.loads(BOARD.read_text(encoding="utf-8"))):
        if not query.startswith("label_values"):
            asked = query.replace("$run", ".*").replace("$__rate_interval", "1m")
            if not watching.ask(asked):
                empty.add(query)
    assert all(re.search("zili_machine_left_out|zili_straggler|zili_eval|changes", query) for query in empty), empty
    seen = {name for name in watching.get("label/__name__/values") if name.startswith("zili_")}
    assert METRICS.keys() - seen == {
        "zili_machine_left_out",
        "zili_straggler",
        "zili_eval_loss",
        "zili_eval_bits_per_byte",
    }


@needs_prometheus
@pytest.mark.slow
def test_promtool_takes_the_alert_rules() -> None:
    for what, file in {"rules": RULES, "config": RULES.with_name("prometheus.yml")}.items():
        words = ["promtool", "check", what, str(file)]
        checked = subprocess.run(words, check=False, capture_output=True, text=True)
        assert checked.returncode == 0 and f"{len(alerts())} rules found" in checked.stdout, checked
