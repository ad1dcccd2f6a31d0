"""OpenAI's client for Node against the server. `make test-interop` installs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import KEY, KEYS, Place, serve_a_tiny_model

MODULES = Path(os.environ.get("ZILI_NODE_MODULES", "nowhere"))
pytestmark = pytest.mark.skipif(
    not (MODULES / "openai").is_dir() or shutil.which("node") is None,
    reason="no openai in ZILI_NODE_MODULES: `make test-interop` installs it",
)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    yield from serve_a_tiny_model(KEYS)


def test_it_talks_as_python_s_does(place: Place, tmp_path: Path) -> None:
    script = tmp_path / "ask.mjs"
    script.write_text(Path(__file__).with_name("ask_openai.mjs").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "node_modules").symlink_to(MODULES)
    done = subprocess.run(["node", script, place.url, KEY], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    messages = [{"role": "user", "content": "snow?"}]
    answer = place.client().chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=9)
    assert told["models"] == ["tiny"]
    assert told["whole"] == told["streamed"] == answer.choices[0].message.content
    assert told["usage"]["completion_tokens"] == answer.usage.completion_tokens
    assert told["refused"] == {"status": 401, "code": "invalid_api_key"}
    assert told["form"] in ("white", "blue")
