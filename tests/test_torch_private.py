"""Each private name of torch that Zili uses, alone: a failure says which torch broke which, and what for."""

from __future__ import annotations

import asyncio
import inspect
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.pipelining.stage import InferenceMode

from zili import torch_private
from zili.models import recomputation
from zili.supervision.reports import _answer, groups_in
from zili.torch_private import CHECKED_WITH, IN_PLACE, NAMES, PrivateName, arguments_by_name

TREE = {"a": [torch.ones(1), 2], "b": (torch.zeros(2),)}
KEYS = {private.path: name for name, private in NAMES.items()} | {
    private.path: private.path.rpartition(".")[2].rpartition(":")[2] for private in IN_PLACE
}
"""What a name's check is found by."""
PATHS = {key: path for path, key in KEYS.items()}


def parameters_of(key: str, *names: str) -> Callable[[], None]:
    """Whether a function takes these first, and needs no more."""

    def check() -> None:
        found = inspect.signature(resolve_name(PATHS[key])).parameters.values()
        first, rest = [one.name for one in found][: len(names)], list(found)[len(names) :]
        assert tuple(first) == names and all(one.default is not one.empty for one in rest), found

    return check


def arguments_of(key: str, *names: str) -> Callable[[], None]:
    """Whether an operation takes these first."""

    def check() -> None:
        operation = resolve_name(PATHS[key])
        schema = getattr(operation, "default", operation)._schema
        assert tuple(one.name for one in schema.arguments[: len(names)]) == names, schema

    return check


def trees() -> None:
    leaves, layout = torch_private.tree_flatten(TREE)
    assert len(leaves) == len(torch_private.tree_leaves(TREE)) == 3
    assert torch_private.tree_unflatten(leaves, layout) == TREE
    assert torch_private.tree_map(type, TREE) == {"a": [Tensor, int], "b": (Tensor,)}


def onednn() -> None:
    a, b, other = torch.randn(3, 5), torch.randn(4, 5), torch.randn(3, 4)
    torch.testing.assert_close(torch_private.onednn_product(a, b, None, "none", [], ""), a @ b.t())
    laid_out = torch_private.onednn_layout(b, 512)
    added = torch_private.onednn_product.binary(a, other, laid_out, None, "add")
    torch.testing.assert_close(added, a @ b.t() + other)


def softmax_backward() -> None:
    x, grad = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    x.softmax(-1).backward(grad)
    found = torch_private.softmax_backward(grad, x.softmax(-1).detach(), -1, torch.float32)
    torch.testing.assert_close(found, x.grad)


def foreach() -> None:
    tensors = [torch.ones(2), torch.ones(3)]
    torch_private.foreach_multiply(tensors, torch.tensor(2.0))
    assert [float(one.sum()) for one in tensors] == [4.0, 6.0]
    torch_private.foreach_copy(tensors, [torch.zeros(2), torch.zeros(3)])
    assert not any(one.any() for one in tensors)


def recorder() -> None:
    """It answers what `zili.supervision.reports` reads."""
    with tempfile.TemporaryDirectory() as short:
        path = f"{short}/recorder"
        server = torch_private.WorkerServer(path)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            dist.all_reduce(torch.ones(3))
            raw = asyncio.run(_answer(Path(path)))
        finally:
            dist.destroy_process_group()
            server.shutdown()
    (group,) = groups_in(json.loads(raw.partition(b"\r\n\r\n")[2])).values()
    assert (group.description, group.asked) == ("default_pg", 1)
    assert group.last == [(1, "gloo:all_reduce", "[[3]]")]


def found_once() -> None:
    """What a fork does not find out again."""
    from torch._inductor import cpu_vec_isa

    for version in (torch_private.compiler_version, torch_private.triton_version):
        assert version() is version()
    assert not inspect.signature(torch_private.vector_instructions).parameters
    assert cpu_vec_isa.valid_vec_isa_list.cache_info()


def recomputing() -> None:
    assert isinstance(torch_private.profiler_enter, torch_private.OpOverload)
    assert torch_private.profiler_exit.name() == "profiler::_record_function_exit._RecordFunction"
    for name in recomputation._KEPT - {"zili::linear"}:
        assert resolve_name(f"torch:ops.{name.replace('::', '.')}"), name


def collectives() -> None:
    module = torch_private.functional_collectives
    known = {
        "all_gather_single": "self gather_dim group",
        "reduce_scatter_single": "self reduceOp scatter_dim group",
        "all_reduce": "self reduceOp group",
        "all_to_all_single": "self output_split_sizes input_split_sizes group",
        "wait_tensor": "tensor",
    }
    found = {name: " ".join(inspect.signature(getattr(module, name)).parameters) for name in known}
    assert {name: given.removesuffix(" tag") for name, given in found.items()} == known


def dispatch_mode() -> None:
    seen: list[Any] = []

    class Mode(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            seen.append((function, arguments_by_name(function, arguments, keywords or {})))
            with torch_private.disable_current_modes():
                torch.ones(1).neg()  # unseen
            # As `zili align` differentiates what it checks.
            again = torch_private.ExcludeDispatchKeys(torch_private.DispatchKey.AutogradFunctionality, False)
            with torch_private.disable_current_modes(), again, torch.enable_grad():
                assert torch.ones(1, requires_grad=True).neg().requires_grad
            return function(*arguments, **(keywords or {}))

    x = torch.ones(2)
    with Mode():
        torch.add(x, x, alpha=2)
    ((function, given),) = seen
    assert isinstance(function, torch_private.OpOverload) and function._overloadpacket is torch.ops.aten.add
    assert set(given) == {"self", "other", "alpha"}


def autograd_nodes() -> None:
    seen = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(torch_private.current_autograd_node()._sequence_nr())
            return 2 * grad

    x = torch.ones(1, requires_grad=True)
    before = torch_private.get_sequence_nr()
    y = Twice.apply(x)
    after = torch_private.get_sequence_nr()
    assert torch_private.current_autograd_node() is None
    y.backward()
    assert before <= seen[0] < after


def fake_tensors() -> None:
    with torch_private.FakeTensorMode(allow_non_fake_inputs=True):
        storage = torch.empty(1 << 40).untyped_storage()
    assert storage._cdata and storage.nbytes() == 4 << 40


def fake_world() -> None:
    parts = inspect.signature(dist.init_process_group).parameters
    assert isinstance(torch_private.FakeStore(), dist.Store) and {"store", "rank", "world_size"} <= set(parts)
    from torch.distributed.pipelining import schedules
    from torch.distributed.tensor import placement_types

    assert callable(placement_types.shard_dim_alltoall) and schedules.Schedule1F1B is Schedule1F1B


def pipeline() -> None:
    """What an object has of its own is looked for where it is set."""
    assert "self._inference_mode =" in source_of(PipelineStage) and InferenceMode.STATIC
    assert "self._comp_type_to_function_map:" in source_of(ScheduleInterleaved1F1B)


def source_of(kind: type) -> str:
    return "".join(inspect.getsource(one) for one in kind.__mro__ if one.__module__.startswith("torch.distributed"))


def fused_devices() -> None:
    assert "cpu" in torch_private.fused_devices()


def privateuse1_name() -> None:
    assert isinstance(torch_private.privateuse1_name(), str)


def kernels() -> None:
    key = torch_private.dispatch_key_for_device("cpu")
    assert torch_private.has_kernel("aten::mm", key) and not torch_private.has_kernel("aten::_cudnn_rnn", key)


def strided_shard() -> None:
    placement = torch_private.StridedShard(1, split_factor=2)
    assert (placement.dim, placement.split_factor) == (1, 2)


CHECKS: dict[str, Callable[[], None]] = {
    **dict.fromkeys(("tree_flatten", "tree_unflatten", "tree_map", "tree_leaves"), trees),
    **dict.fromkeys(("onednn_product", "onednn_layout"), onednn),
    "onednn_has_bf16": arguments_of("onednn_has_bf16"),
    "softmax_backward": softmax_backward,
    **dict.fromkeys(("foreach_multiply", "foreach_copy"), foreach),
    "fused_devices": fused_devices,
    **dict.fromkeys(("OpOverload", "_schema", "_overloadpacket"), dispatch_mode),
    **dict.fromkeys(("profiler_enter", "profiler_exit"), recomputing),
    "functional_collectives": collectives,
    "wait_tensor": arguments_of("wait_tensor", "tensor"),
    "exchange_of_cuts": arguments_of("exchange_of_cuts", "input", "gather_dim", "shard_dim", "group_name"),
    "resolve_process_group": lambda: resolve_name(PATHS["resolve_process_group"]),
    "StridedShard": strided_shard,
    "compute_local_shape_and_global_offset": parameters_of(
        "compute_local_shape_and_global_offset", "global_shape", "mesh", "placements"
    ),
    "WorkerServer": recorder,
    **dict.fromkeys(("compiler_version", "triton_version", "vector_instructions"), found_once),
    "stage_backward": parameters_of("stage_backward", "stage_output", "output_grads", "input_values"),
    **dict.fromkeys(
        ("TorchDispatchMode", "disable_current_modes", "ExcludeDispatchKeys", "DispatchKey"), dispatch_mode
    ),
    **dict.fromkeys(("current_autograd_node", "get_sequence_nr", "_sequence_nr"), autograd_nodes),
    **dict.fromkeys(("FakeTensorMode", "_cdata"), fake_tensors),
    "FakeStore": fake_world,
    "ShardingPropagator": parameters_of("ShardingPropagator"),
    "privateuse1_name": privateuse1_name,
    **dict.fromkeys(("dispatch_key_for_device", "has_kernel"), kernels),
    "_setup_forward_recv_info": parameters_of("_setup_forward_recv_info", "self", "num_microbatches", "has_backward"),
    "_setup_backward_recv_info": parameters_of("_setup_backward_recv_info", "self", "num_microbatches"),
    "_get_recv_ops": parameters_of("_get_recv_ops", "self", "recv_infos"),
    "_retrieve_recv_activations": parameters_of("_retrieve_recv_activations", "self", "fwd_chunk_id"),
    "_retrieve_recv_grads": parameters_of("_retrieve_recv_grads", "self", "bwd_chunk_id"),
    "_batch_p2p": parameters_of("_batch_p2p", "p2p_ops", "desc"),
    "_wait_batch_p2p": parameters_of("_wait_batch_p2p", "work"),
    "_warmup_p2p": parameters_of("_warmup_p2p", "self", "stages", "has_backward", "p2p_done"),
    **dict.fromkeys(("_comp_type_to_function_map", "_inference_mode"), pipeline),
    "_propagate_tensor_meta_non_cached": parameters_of("_propagate_tensor_meta_non_cached", "self", "op_schema"),
    "_grouped_mm": arguments_of("_grouped_mm", "self", "mat2"),
    "_scaled_dot_product_flash_attention_for_cpu": arguments_of(
        "_scaled_dot_product_flash_attention_for_cpu", "query", "key", "value"
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": arguments_of(
        "_scaled_dot_product_flash_attention_for_cpu_backward", "grad_out", "query", "key", "value"
    ),
}


def told(private: PrivateName, error: BaseException) -> str:
    return (
        f"torch {torch.__version__} broke {private.path}: {type(error).__name__}: {error}. "
        f"Zili uses it: {private.use}. In its place: {private.instead}. It held with torch {', '.join(CHECKED_WITH)}."
    )


@pytest.mark.parametrize("private", [*NAMES.values(), *IN_PLACE], ids=lambda private: private.path)
def test_torch_keeps_what_zili_uses_of_it(private: PrivateName) -> None:
    try:
        CHECKS[KEYS[private.path]]()
    except Exception as error:
        pytest.fail(told(private, error), pytrace=False)


def test_every_check_is_of_a_name() -> None:
    assert set(CHECKS) == set(KEYS.values())


def test_a_name_that_torch_lost_is_told_with_its_use() -> None:
    gone = PrivateName("torch:_no_such_name", "nothing at all", "none")
    with mock.patch.dict(NAMES, gone=gone), pytest.raises(ImportError, match=r"torch \d.*_no_such_name.*nothing at"):
        torch_private.gone  # noqa: B018
    assert "broke torch:_no_such_name" in told(gone, AttributeError())
