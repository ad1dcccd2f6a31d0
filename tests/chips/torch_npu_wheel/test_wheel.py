"""Huawei's real wheel, on stand-ins for CANN and under FakeTensorMode: `make test-ascend`.

Every Ascend operation of ours, whole models, an optimizer's step and FSDP2 go through the wheel's own schemas, shape
functions and autograd formulas. Nothing is computed: a wrong name, argument, dtype or shape is found, a wrong number is
not. tests/chips/emulated has the numbers.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemas
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from zili.config.model import LatentConfig, MixtureConfig, ModelConfig
from zili.models.decoder import Decoder
from zili.ops import ascend, registry
from zili.ops.chunked_cross_entropy import chunked_linear_cross_entropy
from zili.ops.examples import example, run
from zili.ops.registry import OPERATIONS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is None or "ZILI_STUB_CANN" not in os.environ,
    reason="torch_npu on stand-ins for CANN: run `make test-ascend`",
)
SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "ffn_hidden_size": 256,
    "max_length": 128,
}
DENSE = ModelConfig(**SIZES)
MIXTURE = ModelConfig(
    **{**SIZES, "kv_heads": 4, "head_dim": 48},
    mixture=MixtureConfig(experts=8, top_k=2, ffn_hidden_size=64, shared_experts=1, scoring="sigmoid", bias=True),
    latent=LatentConfig(query_rank=64, key_value_rank=32, rope_head_dim=16, value_head_dim=32),
)


@pytest.fixture(autouse=True)
def fake_npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything inside is fake and on npu:0: the stand-ins must never compute."""
    import torch_npu  # noqa: F401 - registers the device

    # Where documents end is asked of values, which fake tensors have not.
    monkeypatch.setattr(ascend, "_ends", lambda ids: [[ids.shape[1] // 2, ids.shape[1]] for _ in range(len(ids))])
    with FakeTensorMode(), torch.device("npu:0"):
        yield


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations by name, and where their results are."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.devices: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        out = function(*arguments, **(keywords or {}))
        self.operations[str(function).rpartition(".")[0]] += 1
        leaves = torch.utils._pytree.tree_leaves(out)
        self.devices.update(leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim())
        return out


WITH_SHAPES = [version for version in ascend.VERSIONS if version.operation != "linear_cross_entropy"]
"""torch_npu 2.13 has no shape function for npu_fused_linear_online_max_sum: only its schema can be checked."""


@pytest.fixture
def all_of_them() -> Iterator[None]:
    """Every version of ours that can run on fake tensors; nothing compares them, which have no values."""
    functions = {version.operation: version.function for version in WITH_SHAPES}
    functions["linear_cross_entropy"] = chunked_linear_cross_entropy
    with registry.replaced(functions.get):
        yield


def test_the_schemas_are_those_of_the_table() -> None:
    import json

    table = json.loads(schemas.TABLE.read_text(encoding="utf-8"))
    assert schemas.in_the_wheel() == table["schemas"]


@pytest.mark.parametrize("version", WITH_SHAPES, ids=lambda version: version.operation)
def test_an_operation_has_the_references_shapes(version: Any) -> None:
    assert version.lacks("npu", "bf16") is None
    found = run(version.function, example(version.operation, "npu:0", torch.bfloat16))
    with unset_fake_temporarily(), torch.device("cpu"):
        wanted = run(OPERATIONS[version.operation], example(version.operation, "cpu", torch.bfloat16))
    assert {x.device.type for x in found} == {"npu"}
    assert [x.shape for x in found] == [x.shape for x in wanted]
    floating = [(x.dtype, y.dtype) for x, y in zip(found, wanted, strict=True) if y.is_floating_point()]
    assert all(one == other for one, other in floating), floating


@pytest.mark.parametrize("optimizer", ["foreach", "fused"])
@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.usefixtures("all_of_them")
def test_a_training_step(config: ModelConfig, optimizer: str) -> None:
    model = Decoder(config)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, **{optimizer: True})
    ids = torch.zeros(2, 64, dtype=torch.int64)
    for _ in range(2):  # the first step sends what a model keeps on its device
        with Recorded() as recorded:
            with torch.autocast("npu", dtype=torch.bfloat16):
                loss = model.loss_sum(ids, ids, document_ids=torch.zeros(2, 64, dtype=torch.int32))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
    assert set(recorded.devices) == {"npu"}
    wanted = {"npu_rms_norm", "npu_add_rms_norm", "npu_rotary_mul", "npu_swiglu", "npu_fusion_attention"}
    wanted |= {"npu_fusion_attention_grad", "npu_rms_norm_backward"}
    if config.mixture:
        wanted |= {"npu_grouped_matmul", "npu_moe_token_permute", "_npu_moe_token_unpermute"}
    assert {f"npu.{name}" for name in wanted} <= set(recorded.operations), sorted(recorded.operations)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("all_of_them")
def test_fsdp2_on_eight_devices() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert dist.get_default_backend_for_device("npu") == "hccl"
    with unset_fake_temporarily():
        dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
        mesh = init_device_mesh("npu", (8,))
    try:
        with torch.device("meta"):
            model = Decoder(DENSE)
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)
        model.to_empty(device="npu:0")
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids = torch.zeros(2, 64, dtype=torch.int64)
        with Recorded() as recorded:
            with torch.autocast("npu", dtype=torch.bfloat16):
                loss = model.loss_sum(ids, ids)
            loss.backward()
            adam.step()
        assert recorded.operations["c10d._allgather_base_"] >= 3, recorded.operations
        assert recorded.operations["c10d._reduce_scatter_base_"] >= 3
        assert model.layers[0].attention.query.weight.to_local().shape == (16, 128)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda npu, x: npu.npu_rms_norm(x),
        lambda npu, x: npu.npu_swiglu(x, dimension=1),
        lambda npu, x: npu.npu_fusion_attention(1, 2),
        lambda npu, x: npu.npu_none_such(x),
    ],
    ids=["missing argument", "unknown keyword", "wrong type", "unknown operation"],
)
def test_the_wheel_refuses_what_is_wrong(wrong: Any) -> None:
    with pytest.raises((RuntimeError, TypeError, AttributeError)):
        wrong(torch.ops.npu, torch.empty(2, 64))
