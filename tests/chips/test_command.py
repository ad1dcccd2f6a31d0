"""`zili chips`, as a user sees it on a terminal of 100 columns."""

import json
import re

import pytest
import typer
from typer.testing import CliRunner

from zili.chips import catalog
from zili.cli.chips import chips
from zili.errors import ChipError

APP = typer.Typer()
APP.command()(chips)


def run(*arguments: str, terminal: bool = True) -> str:
    environment = {"COLUMNS": "100", **({"FORCE_COLOR": "1"} if terminal else {})}
    result = CliRunner().invoke(APP, list(arguments), env=environment, catch_exceptions=False)
    assert result.exit_code == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def test_in_a_pipe_a_row_is_a_line_and_whole():
    lines = run(terminal=False).splitlines()
    assert not set("│┃━─…") & set("".join(lines))
    fields = {line.split()[0]: line for line in lines if line.split()}
    assert "353.9 H" in fields["ascend-910b2"]
    assert "torch_npu is not installed; pip install" in fields["ascend"], "what must be copied stands in one line"


def test_the_list_shows_what_is_here_and_what_is_known():
    output = run()
    assert max(map(len, output.splitlines())) <= 100
    assert "bf16" in output
    for chip in catalog():
        assert chip in output
    assert "not published" in output
    assert "353.9 H" in output
    assert "…" not in output, "nothing is cut off"


def test_a_backend_in_detail():
    output = run("ascend")
    assert max(map(len, output.splitlines())) <= 100
    for text in ("torch_npu", "HCCL_CONNECT_TIMEOUT", "1800", "fsdp2", "evidence", "ascend-910b2", "left alone"):
        assert text in output
    assert "refuses aten::scaled_dot_product_attention enable_gqa" in run("cambricon")


def test_a_chip_in_detail():
    output = run("MLU590")
    assert "not published" in output
    assert "80" in output
    assert "source: " in output


def test_an_unknown_name():
    with pytest.raises(ChipError, match="no backend or chip is named '910b9'; did you mean"):
        run("910b9")


def test_json_leaves_unpublished_figures_out():
    everything = json.loads(run("--json"))
    assert {backend["name"] for backend in everything["backends"]} >= {"cpu", "ascend"}
    known = {chip["name"]: chip["figures"] for chip in everything["chips"]}
    assert known["ascend-910b2"]["bf16_tflops"] == {"value": 353.9, "confidence": "H"}
    assert set(known["mlu590"]) == {"memory_gb", "chips_per_node"}
    one = json.loads(run("cpu", "--json"))
    assert one["here"] is True
    assert one["capabilities"]["fsdp2"]["value"] is True
