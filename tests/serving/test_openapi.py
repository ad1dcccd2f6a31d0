"""The OpenAPI document is what the server does: schemathesis makes requests of it, good and bad, and looks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from served import serve_a_tiny_model

from zili.serving.http.keys import Keys


@pytest.mark.slow
def test_the_server_does_as_its_document_says(tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    program = Path(sys.executable).with_name("schemathesis")
    for place in serve_a_tiny_model(Keys(), context=64):
        command = [program, "--config-file", Path(__file__).with_name("schemathesis.toml"), "run"]
        command += [f"{place.url}/openapi.json", "--max-examples", "10", "--seed", "1", "--no-color"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        assert re.search(r"Tested: 8\b", done.stdout) and place.served.engine.load == (0, 0)
