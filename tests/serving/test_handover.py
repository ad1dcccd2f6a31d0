"""What is handed to vLLM, by a program of its name that says what it got."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from forks import zili

from zili.data.chat import ChatTemplate
from zili.errors import CheckpointError, ConfigError
from zili.release.trust import REMOTE_CODE
from zili.serving.handover import Offer, to_vllm


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "tele"
    folder.mkdir()
    ours = {"AutoConfig": "configuration_telechat2.TeleChat2Config"}
    config = {"architectures": ["TeleChat2ForCausalLM"], "auto_map": ours, "torch_dtype": "float32"}
    shutil.copy(REMOTE_CODE / "configuration_telechat2.py", folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "chat_template.jinja").write_text(ChatTemplate.named("telechat2").source, encoding="utf-8")
    return folder


def serve(release: Path, *words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    return zili("serve", release, "--engine", "vllm", *words, environment=environment)


def test_the_command(release: Path, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\necho "$VLLM_API_KEY|$VLLM_NO_USAGE_STATS"; for word in "$@"; do echo "$word"; done\n'
    )
    program.chmod(0o755)
    keys = tmp_path / "keys.toml"
    keys.write_text("[me]\nkey = 'sk-12345678'\n", encoding="utf-8")
    keys.chmod(0o600)
    found = serve(release, "--keys", str(keys), "--context", "512", "--chip", "cpu", path=str(program.parent))
    assert found.returncode == 0, found.stderr
    shown, environment, *words = found.stdout.splitlines()
    assert environment == "sk-12345678|1" and shown == " ".join(("vllm", *words)) and "sk-12345678" not in shown
    assert words[:2] == ["serve", str(release)]
    for pair in (
        ("--served-model-name", "tele"),
        ("--max-model-len", "512"),
        ("--max-num-seqs", "16"),
        ("--tool-call-parser", "hermes"),
        ("--dtype", "float32"),
    ):
        assert pair in pairwise(words)
    assert "--trust-remote-code" in words and "--reasoning-parser" not in words
    keys.write_text("[me]\nkey = 'sk-12345678'\nrequests_per_minute = 5\n", encoding="utf-8")
    limited = serve(release, "--keys", str(keys), path=str(program.parent))
    assert limited.returncode == 3 and "one key and no limits" in limited.stderr


def write(file: Path, content: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


EVIL = {"AutoTokenizer": ["somebody/else--tokenization.Tokens", None]}
FOREIGN: list[tuple[str, object, str]] = [
    ("modeling_telechat2.py", "import os", "modeling_telechat2.py"),
    ("evil.py", "import os", "evil.py"),
    ("custom_generate/generate.py", "import os", "custom_generate/generate.py"),
    ("config.json", {"auto_map": {"AutoConfig": "somebody/else--configuration_telechat2.A"}}, "somebody/else--"),
    ("config.json", {"auto_map": {"AutoConfig": "sub/evil.A"}}, "sub/evil.A"),
    ("config.json", {"auto_map": {"AutoConfig": "x"}}, "x"),
    ("config.json", {"text_config": {"auto_map": {"AutoModel": "evil.A"}}}, "evil.A"),
    ("tokenizer_config.json", {"auto_map": EVIL}, "somebody/else--tokenization.Tokens"),
]


@pytest.mark.parametrize(("name", "content", "said"), FOREIGN)
def test_code_that_is_not_ours_is_run_only_where_that_is_asked_for(
    release: Path, name: str, content: object, said: str
) -> None:
    offer = Offer("127.0.0.1", 8000, "x", slots=1, context=None, dtype=None)
    assert "--trust-remote-code" in to_vllm(release, offer, chip="cpu", key=None).arguments
    write(release / name, content)
    found = to_vllm(release, offer, chip="cpu", key=None)
    assert "--trust-remote-code" not in found.arguments and any(said in one for one in found.untrusted)
    trusted = to_vllm(release, offer, chip="cpu", key=None, trust=True)
    assert "--trust-remote-code" in trusted.arguments and not trusted.untrusted


def test_code_that_is_not_ours_is_named(release: Path, tmp_path: Path) -> None:
    write(release / "evil.py", "import os")
    program = tmp_path / "bin" / "vllm"
    write(program, "#!/bin/sh\n")
    program.chmod(0o755)
    found = serve(release, "--chip", "cpu", path=str(program.parent))
    assert found.returncode == 0 and "is not told to run evil.py" in found.stderr
    assert "--trust-remote-code" not in found.stdout
    found = serve(release, "--chip", "cpu", "--trust-remote-code", path=str(program.parent))
    assert "--trust-remote-code" in found.stdout and "evil.py" not in found.stderr


def test_what_it_computes_in(release: Path) -> None:
    offer = Offer("127.0.0.1", 8000, "x", slots=1, context=None, dtype=None)
    assert ("--dtype", "bfloat16") in pairwise(
        to_vllm(release, replace(offer, dtype="bfloat16"), chip="cpu", key=None).arguments
    )
    assert "--dtype" not in to_vllm(release, offer, chip="cuda", key=None).arguments


def test_what_cannot_be_handed_over(release: Path, tmp_path: Path) -> None:
    offer = Offer("127.0.0.1", 8000, "x", slots=1, context=None, dtype=None)
    with pytest.raises(ConfigError, match="give --port"):
        to_vllm(release, replace(offer, port=0), chip="cpu", key=None)
    (release / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"zili export .*--as telechat2"):
        to_vllm(release, offer, chip="cpu", key=None)
    missing = to_vllm_without_vllm(tmp_path)
    assert missing.returncode == 3 and "pip install vllm" in missing.stderr


def to_vllm_without_vllm(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"")
    return zili("serve", folder, "--engine", "vllm", "--chip", "cpu", environment={"PATH": str(tmp_path)})
