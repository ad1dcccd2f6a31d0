"""Memory for keys and values: as many answers as fit, and pages only where something was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from served import tiny_shape

from zili.errors import ConfigError
from zili.models.cache import KeyValueCache, bytes_a_token
from zili.serving.generate import room
from zili.serving.generate.room import room_for

CPU = torch.device("cpu")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_room_is_taken_as_it_is_used(dtype: torch.dtype) -> None:
    shape = tiny_shape(4096)
    before = resident()
    cache = KeyValueCache(shape, 256, 4096, dtype=dtype, device=CPU)
    whole = cache.keys.nbytes + cache.values.nbytes
    assert whole == bytes_a_token(shape, dtype) * 256 * 4096 > 60e6
    assert cache.keys.dtype == dtype and not cache.keys[0, 0, 0, 0].any()
    # Short answers take pages of their own, and no huge ones.
    cache.keys[:, ::8, :, :4] = 1
    cache.values[:, ::8, :, :4] = 1
    assert resident() - before < whole / 8


def test_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = tiny_shape(1000)
    each = bytes_a_token(shape, torch.float32) * 1000
    for free, slots in ((each * 100, 16), (each * 10, 8), (each * 1.3, 1), (None, 16)):
        monkeypatch.setattr(room, "available_bytes", lambda free=free: free)
        found = room_for(shape, 16, None, torch.float32, CPU)
        assert (found.slots, found.context, found.all_bytes) == (slots, 1000, slots * each)
        assert ("of 16: more have no room" in found.said(16)) == (slots < 16)
    monkeypatch.setattr(room, "available_bytes", lambda: each)
    with pytest.raises(ConfigError, match="--context 800 or less"):
        room_for(shape, 16, None, torch.float32, CPU)
    assert room_for(shape, 16, 800, torch.float32, CPU).slots == 1
