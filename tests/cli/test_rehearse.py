"""`zili rehearse` as a user runs it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import forks
import pytest
from forks import zili
from tiny_models import tiny_recipe

from zili.chips import find_backend
from zili.config import RunConfig, dump_recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def rehearse(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return zili("rehearse", *words, environment=variables)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(dump_recipe(tiny_recipe("dense", tmp_path, tmp_path / "run")), encoding="utf-8")
    return file


def test_all_stages_with_json_and_page(file: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ["--chips", "8", "--all-stages", "--chip", "ascend-910b2", "--page", str(page)]
    words += ["--set", "parallel.pipeline=2", "--set", "parallel.tensor=2"]
    finished = rehearse(str(file), *words, "--json")
    assert finished.returncode == 0, finished.stderr
    first, last = json.loads(finished.stdout)
    assert "rehearsing process 0, 4\n" in finished.stderr
    assert (first["rank"], first["layers"], last["rank"], last["layers"]) == (0, [0, 1], 4, [2, 3])
    for one in (first, last):
        assert sum(one["peak"]["parts"].values()) == one["peak"]["bytes"] > 0
        assert max(sum(parts.values()) for _, parts in one["timeline"]) == one["peak"]["bytes"]
    sent = [message for message in first["messages"] if message["kind"] == "send"]
    # To the next stage, a micro-batch's hidden states in fp32: two rows of 64 tokens, half of them here, 64 wide.
    assert [(m["mesh"], m["bytes"], m["count"]) for m in sent] == [("pipeline", 2 * 32 * 64 * 4, 4)]
    text = page.read_text(encoding="utf-8")
    assert "Process 4: layers 2-3" in text and "<svg" in text and "ascend-910b2" in text
    assert not (tmp_path / "run").exists()


def test_one_process_is_told_as_text_and_what_it_is_at(file: Path) -> None:
    words = ["--chips", "8", "--chip", "ascend-910b2", "--set", "parallel.pipeline=2", "--set", "parallel.tensor=2"]
    finished = rehearse(str(file), *words)
    assert finished.returncode == 0, finished.stderr
    assert "pipeline 2 x shards 2 x tensor 2" in finished.stdout and "fits ascend-910b2" in finished.stdout
    assert finished.stderr == "rehearsing process 0\n", "more only where it takes long"


def tell(config: RunConfig, out: Path) -> None:
    from zili.rehearsal import rehearse as run

    told: list[str] = []
    run(config, 8, backend=find_backend("ascend"), progress=told.append)
    out.write_text("\n".join(told))


def test_what_a_rehearsal_is_at_is_told(file: Path, tmp_path: Path) -> None:
    config = load_recipe(file, ["parallel.pipeline=2", "training.micro_batch=1"])
    process = forks.context().Process(target=tell, args=(config, tmp_path / "told"))
    process.start()
    process.join(300)
    begun, *told = (tmp_path / "told").read_text().splitlines()
    assert begun == "process 0: building its part of the model"
    assert told == [f"process 0: micro-batch {number} of {len(told)}" for number in range(1, len(told) + 1)] != []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--chips", "8", "--set", "parallel.tensor=3"], 7, "8 processes cannot be divided by"),
        (["--chips", "4", "--rank", "4"], 7, "process 4 of 4: give 0 to 3"),
        (["--chips", "4", "--chip", "no-such"], 6, "no chip is named 'no-such'"),
        (["--chips", "4", "--all-stages", "--rank", "1"], 2, "leave out --rank"),
        (["--chips", "4", "--page", "/no/such/page.html"], 3, "there is no folder /no/such"),
        (["--chips", "0"], 2, "greater than or equal to 1"),
        (["--chips", "2", "--set", 'training.micro_batch="auto"'], 3, "name it (--chip)"),
        (
            ["--chips", "4", "--set", "parallel.pipeline=4", "--set", "training.micro_batch=8"],
            7,
            "as many micro-batches",
        ),
    ],
)
def test_what_cannot_be_is_said(words: list[str], code: int, said: str, file: Path) -> None:
    finished = rehearse(str(file), *words)
    assert finished.returncode == code and said in finished.stderr, (finished.returncode, finished.stderr)
    assert "Traceback" not in finished.stderr


def test_what_does_not_fit_is_said_with_the_process() -> None:
    few_and_wide = [f"--set=model.{size}" for size in ("layers=2", "ffn_hidden_size=131072")]
    words = ["--chips", "1", "--chip", "ascend-910b4", "--set=training.micro_batch=1", *few_and_wide]
    finished = rehearse(str(RECIPES / "telechat2-3b.toml"), *words)
    assert finished.returncode == 7, finished.stderr
    assert "process 0 does not fit" in finished.stderr and "ascend-910b4 has 28.01 GiB" in finished.stderr
