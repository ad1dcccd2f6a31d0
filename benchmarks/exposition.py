"""What the agents' endpoint for Prometheus costs, with the files of a long run behind it.

    python benchmarks/exposition.py [--processes 8] [--steps 200000] [--days 30]

The run is made up: a record of so many steps, and the events of a life of so many days, two progresses a minute. Told
are wall and CPU seconds of the first answer, which reads the files, and of later ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from zili.exposition import Endpoint
from zili.parallel.control.crumbs import Crumbs
from zili.supervision.figures import MachineFigures
from zili.supervision.pace import Pace
from zili.supervision.state import State

LATER = 50


def main() -> None:
    """Make up a run, ask the endpoint, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, usual in (("processes", 8), ("steps", 200_000), ("days", 30)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "made-up"
        _make_up(run, asked.steps, asked.days)
        crumbs = {rank: Crumbs() for rank in range(asked.processes)}
        pace = Pace("a")
        pace.look(crumbs)
        endpoint = Endpoint(MachineFigures(run, "cpu", pace, lambda: State(machines=["a"])), port=0)
        first, later = _ask(endpoint.url), [_ask(endpoint.url) for _ in range(LATER)]
        endpoint.close()
    print(f"first answer: {first[0]:.2f} s, {first[1]:.2f} s of a core")
    mean = [1000 * sum(one[kind] for one in later) / LATER for kind in (0, 1)]
    print(f"later ones: {mean[0]:.1f} ms, {mean[1]:.1f} ms of a core")


def _ask(url: str) -> tuple[float, float]:
    """Wall and CPU seconds of an answer; who asks is in this process too."""
    wall, own = time.perf_counter(), time.process_time()
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert b"zili_goodput_ratio" in answer.read()
    return time.perf_counter() - wall, time.process_time() - own


def _make_up(run: Path, steps: int, days: int) -> None:
    (run / "supervision").mkdir(parents=True)
    figures = {"loss": 2.0, "learning_rate": 1e-4, "gradient_norm": 0.3, "step_seconds": 10.0, "data_seconds": 0.01}
    more = {"tokens_per_second": 1e5, "matmul_share": 0.4, "memory_bytes": 10**10}
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            line = {"kind": "train", "time": 1e9 + step, "step": step, "tokens": 1000 * step, **figures, **more}
            file.write(json.dumps(line) + "\n")
    with (run / "supervision" / "events.jsonl").open("w", encoding="utf-8") as file:
        for number, event in enumerate(_events(days * 2880)):
            timed = {"term": 1, "time": 30.0 * number, "monotonic": 30.0 * number, "clock": "made up"}
            file.write(json.dumps({**timed, **event}) + "\n")


def _events(progresses: int) -> list[dict[str, Any]]:
    begun = {"life": 1, "generation": 1, "machines": ["a"], "processes": 8}
    at = {"phase": "step", "begun_after": 0, "saves": 1, "stood": 0.1, "went_on": 0.0}
    told = [{**at, "seconds": {"step": 29.0 * n, "data": 1.0}, "step": 3 * n} for n in range(1, progresses)]
    return [
        *({"event": "preparing", **begun}, {"event": "started", "life": 1}),
        *({"event": "progress", "life": 1, "at": one} for one in told),
    ]


if __name__ == "__main__":
    main()
