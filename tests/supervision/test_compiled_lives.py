"""Compiled workers: what one life has compiled the next one finds."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from launching import Launch, Launched


@pytest.mark.slow
def test_what_is_compiled_is_kept_for_the_next_life(launch: Launch) -> None:
    """In this user's cache, not in torch's place below /tmp; and the nursery stays one that can fork."""
    run: Launched = launch("training.steps=100000", "chip.compile=true")
    run.environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch has set it in the process of the tests
    run.begin("a")
    run.until(lambda: run.steps() > 3, 400)
    kept = Path(run.environment["ZILI_CACHE"], "compiled")
    kernels = sorted(kept.rglob("*.so"))
    assert kernels
    assert len(list(Path(f"/proc/{run.nursery('a')}/task").iterdir())) == 1, "a thread would not be in a fork"
    os.kill(run.workers("a")[1], signal.SIGKILL)
    run.await_life(2, run.steps() + 3)
    assert sorted(kept.rglob("*.so")) == kernels
    run.agents["a"].send_signal(signal.SIGINT)
    assert run.codes() == {130}, run.everything()
    log = (run.run / "logs/life-0002/rank-00001.log").read_text()
    assert not re.search("Error|Warning", log), log
