"""The calls of `zili.ops.ascend` against the committed schemas of the wheel, without the wheel."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import npu_readings
import pytest
import schemas
import torch

import zili.ops.ascend

TABLE = json.loads(schemas.TABLE.read_text(encoding="utf-8"))["schemas"]
TREE = ast.parse(Path(zili.ops.ascend.__file__).read_text(encoding="utf-8"))
CALLS = [
    node
    for node in ast.walk(TREE)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Call) and ast.unparse(node.func.func) == "_operation"
]


def test_every_operation_called_is_in_the_table() -> None:
    assert sorted(TABLE) == schemas.called() and len(TABLE) == 11


def test_every_operation_called_has_what_its_use_relies_on_with_a_source() -> None:
    assert sorted(npu_readings.RELIED_ON) == sorted(TABLE)
    assert all(sentence and source for said in npu_readings.RELIED_ON.values() for sentence, source in said)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: ast.unparse(call.func))
def test_a_call_fits_its_schema(call: ast.Call) -> None:
    schema = torch._C.parse_schema(TABLE[ast.literal_eval(call.func.args[0])])
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    assert len(call.args) <= len(positional)
    given = {argument.name for argument in positional[: len(call.args)]} | {keyword.arg for keyword in call.keywords}
    assert given <= {argument.name for argument in schema.arguments}
    assert len(given) == len(call.args) + len(call.keywords), "no argument twice"
    assert {argument.name for argument in schema.arguments if not argument.has_default_value()} <= given
