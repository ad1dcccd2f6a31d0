"""llama.cpp itself, through node-llama-cpp, runs the GGUF files that `zili export` writes, and splits text alike."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from small_models import MODELS, STEPS, TEXT, answers, made, prompts, tokenizer

from zili.data.tokenizer import Tokenizer
from zili.errors import CheckpointError
from zili.release import export_model, import_model
from zili.serving.model_folder import demo_file

MODULES = Path(os.environ.get("ZILI_NODE_MODULES", "no-such-folder"))
pytestmark = pytest.mark.skipif(
    not (MODULES / "node-llama-cpp").is_dir(), reason="node-llama-cpp is not here: `make test-interop` installs it"
)
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tokenizers"


def ask(file: Path, texts: list[str], ids: list[list[int]]) -> dict[str, Any]:
    script = Path(__file__).with_name("ask_llama_cpp.mjs")
    asked = json.dumps({"prompts": ids, "steps": STEPS if ids else 0, "texts": texts})
    found = subprocess.run(
        ["node", script, MODULES.parent, file], input=asked, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr
    answer: dict[str, Any] = json.loads(found.stdout)
    print("llama.cpp", answer["version"])
    return answer


def varied(count: int) -> list[str]:
    draw = random.Random(0)
    letters = [*"abcdefghij  \n\t0123456789你好的是中国<>/=-#.,'", "don't", "  ", "\n\n", "😀", "é", "한", "_"]
    return [TEXT, *("".join(draw.choices(letters, k=draw.randint(1, 50))) for _ in range(count))]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids_and_log_probabilities(tmp_path: Path, name: str) -> None:
    decoder = made(tmp_path / "zili", name)
    export_model(tmp_path / "zili", tmp_path / "out", layout="gguf")
    texts = varied(200)
    found = ask(tmp_path / "out" / "model.gguf", texts, prompts())
    for prompt, said in zip(prompts(), found["answers"], strict=True):
        ids, log_probs = answers(decoder, prompt)
        assert said["ids"] == ids
        assert said["logProbs"] == pytest.approx(log_probs, abs=1e-4)
    assert found["tokens"] == [tokenizer().encode(text).tolist() for text in texts]


@pytest.mark.parametrize("name", ["telechat2", "telechat3"])
def test_telechat_s_own_tokenizers(tmp_path: Path, name: str) -> None:
    if not (SHARED / f"{name}.model").is_file():
        pytest.skip("TeleChat's tokenizers are not here: they are not ours to ship")
    made(tmp_path / "zili", "tied")
    for file in (tmp_path / "zili").glob("tokenizer*"):
        file.unlink()
    (tmp_path / "zili" / "tokenizer.model").write_bytes((SHARED / f"{name}.model").read_bytes())
    theirs = Tokenizer.from_folder(tmp_path / "zili")
    grown = _with_vocabulary(tmp_path / "zili", theirs.vocab_size)
    export_model(grown, tmp_path / "out", layout="gguf")
    texts = varied(300)
    found = ask(tmp_path / "out" / "model.gguf", texts, [])
    wrong = [text for text, ids in zip(texts, found["tokens"], strict=True) if ids != theirs.encode(text).tolist()]
    assert not wrong, (len(wrong), wrong[:3])


def _with_vocabulary(folder: Path, size: int) -> Path:
    import torch

    from zili.models.decoder import Decoder
    from zili.release.native import write_native
    from zili.release.tensors import HeldTensors

    config = MODELS["tied"].model_copy(update={"vocab_size": size, "hidden_size": 32, "head_dim": 8, "layers": 1})
    for name in ("model.json", "model.safetensors"):
        (folder / name).unlink()
    torch.manual_seed(0)
    write_native(folder, config, None, HeldTensors(Decoder(config).state_dict()), 10**9)
    return folder


def test_smollm2_splits_text_as_llama_cpp_does(tmp_path: Path) -> None:
    try:
        file = demo_file()
    except CheckpointError as error:
        pytest.skip(str(error))
    texts = varied(300)
    import_model(file, tmp_path / "zili")
    ours = Tokenizer.from_folder(tmp_path / "zili")
    assert ask(file, texts, [])["tokens"] == [ours.encode(text).tolist() for text in texts]
