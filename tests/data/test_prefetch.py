import threading
import time

import pytest
import torch
from waiting import until

from zili.data import TokenStore
from zili.data.loader import Batch, Loader
from zili.data.prefetch import Prefetcher


class Source:
    """Batches that say their step and rows, slowly, and fail at one step."""

    def __init__(self, seconds: float = 0.0, fail_at: int | None = None) -> None:
        self.seconds, self.fail_at = seconds, fail_at
        self.made: list[int] = []

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        time.sleep(self.seconds)
        if step == self.fail_at:
            raise OSError("the disk went away")
        self.made.append(step)
        tensor = torch.arange(step, step + 4)[rows]
        return Batch(tensor, tensor, tensor)


def test_yields_the_loaders_batches_in_order(stores: list[TokenStore]) -> None:
    loader = Loader([(stores[0], 1.0)], sequence_length=16, global_batch=4, seed=0)
    with Prefetcher(loader, start=7, rows=slice(1, 3)) as batches:
        for expected in range(7, 40):
            step, batch = next(batches)
            assert step == expected
            assert torch.equal(batch.input_ids, loader.batch(step, slice(1, 3)).input_ids)


def test_is_bounded() -> None:
    source = Source()
    with Prefetcher(source, depth=3) as batches:
        next(batches)
        time.sleep(0.3)
        assert len(source.made) <= 1 + 3 + 1  # taken, waiting, in hand


def test_an_error_reaches_the_consumer_at_its_step() -> None:
    batches = Prefetcher(Source(fail_at=2))
    assert [next(batches)[0], next(batches)[0]] == [0, 1]
    with pytest.raises(OSError, match="the disk went away"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    assert not any(thread.name == "zili-prefetch" for thread in threading.enumerate())


def test_closes_with_a_full_queue_and_twice() -> None:
    batches = Prefetcher(Source(), depth=1)
    time.sleep(0.05)
    batches.close()
    batches.close()
    assert list(batches) == []
    assert not any(thread.name == "zili-prefetch" for thread in threading.enumerate())


def test_waiting_is_measured() -> None:
    class Held(Source):
        let_go = threading.Event()

        def batch(self, step: int, rows: slice = slice(None)) -> Batch:
            if step == 1:
                self.let_go.wait()
            return super().batch(step, rows)

    with Prefetcher(Held()) as slow:
        next(slow)
        threading.Timer(0.5, Held.let_go.set).start()
        next(slow)
        assert slow.waited > 0.25
    source = Source()
    with Prefetcher(source, depth=6) as fast:
        until(lambda: len(source.made) > 5)
        for _ in range(5):
            time.sleep(0.1)  # the step
            next(fast)
        assert fast.waited < 0.25, "what was there already is not waited for, and a step is no waiting"
