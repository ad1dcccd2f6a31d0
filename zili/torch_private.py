"""Every private name of torch that Zili uses, in one list: a new torch may change any of them without a word.

`from zili.torch_private import tree_leaves` gives what the list says, and loads it only then. Some names have to be
used in their place: a method that is overridden or replaced, an attribute of an object. They stand in `IN_PLACE`.
tests/test_torch_private.py tries each name alone and says which torch broke it; tests/test_house.py keeps private names
out of all other files.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any, NamedTuple

CHECKED_WITH = ("2.13.0",)
"""Versions of torch with which all names passed tests/test_torch_private.py."""


class PrivateName(NamedTuple):
    """A name that torch does not promise to keep."""

    path: str
    """Module, a colon, and the name in it."""
    use: str
    """What Zili does with it."""
    instead: str
    """What public name would replace it, and what that one lacks today."""


_PYTREE = "a public torch.utils.pytree, which torch 2.13 does not have"
_NO_OPERATION = "nothing public: torch.nn.functional.linear lets torch choose the library"
_LIST = "a loop over the tensors, a kernel each"
_MODE = "torch.overrides.TorchFunctionMode, which sees no operation below autograd"
_CACHED = "nothing public: each process that compiles finds it out anew, in seconds"
_PLACES = "DTensor.to_local, which gives the part and not where it lies"

NAMES = {
    # ---- trees of tensors
    "tree_flatten": PrivateName("torch.utils._pytree:tree_flatten", "takes arguments of operations apart", _PYTREE),
    "tree_unflatten": PrivateName("torch.utils._pytree:tree_unflatten", "puts them together again", _PYTREE),
    "tree_map": PrivateName("torch.utils._pytree:tree_map", "copies arguments of operations to the CPU", _PYTREE),
    "tree_leaves": PrivateName("torch.utils._pytree:tree_leaves", "finds the tensors of an operation", _PYTREE),
    # ---- operations
    "onednn_product": PrivateName(
        "torch:ops.mkldnn._linear_pointwise", "matrix products on the CPU by oneDNN", _NO_OPERATION
    ),
    "onednn_layout": PrivateName(
        "torch:ops.mkldnn._reorder_linear_weight", "lays a weight out in oneDNN's blocks, for serving", _NO_OPERATION
    ),
    "onednn_has_bf16": PrivateName(
        "torch:ops.mkldnn._is_mkldnn_bf16_supported", "asks whether oneDNN takes bfloat16 on this CPU", _NO_OPERATION
    ),
    "softmax_backward": PrivateName(
        "torch:_softmax_backward_data", "gradient of blocked attention's softmax", "the same in four operations"
    ),
    "foreach_multiply": PrivateName("torch:_foreach_mul_", "scales all gradients at once", _LIST),
    "foreach_copy": PrivateName("torch:_foreach_copy_", "puts summed gradients back", _LIST),
    "fused_devices": PrivateName(
        "torch.utils._foreach_utils:_get_fused_kernels_supported_devices",
        "asks which devices have a fused AdamW",
        "AdamW(fused=True) in a try: it refuses where there is none",
    ),
    "OpOverload": PrivateName(
        "torch._ops:OpOverload", "tells torch's operations from others when blocks are recomputed", "torch.library"
    ),
    "profiler_enter": PrivateName(
        "torch:ops.profiler._record_function_enter_new.default", "is not counted when a block is recomputed", "none"
    ),
    "profiler_exit": PrivateName(
        "torch:ops.profiler._record_function_exit._RecordFunction", "is not counted when a block is recomputed", "none"
    ),
    # ---- processes
    "functional_collectives": PrivateName(
        "torch.distributed._functional_collectives",
        "collectives that compile and that a rehearsal sees",
        "torch.distributed's own, which change a tensor in place",
    ),
    "wait_tensor": PrivateName(
        "torch:ops._c10d_functional.wait_tensor.default", "the end of a collective, to a rehearsal", "none"
    ),
    "exchange_of_cuts": PrivateName(
        "torch:ops._dtensor.shard_dim_alltoall", "DTensor's exchange as chips have it, in a rehearsal", "none"
    ),
    "resolve_process_group": PrivateName(
        "torch.distributed.distributed_c10d:_resolve_process_group", "the group that an operation names", "none"
    ),
    "StridedShard": PrivateName(
        "torch.distributed.tensor.placement_types:_StridedShard",
        "matrices that FSDP2 cuts after tensor parallel",
        "none",
    ),
    "compute_local_shape_and_global_offset": PrivateName(
        "torch.distributed.tensor._utils:compute_local_shape_and_global_offset",
        "which part of a tensor a process has, of a checkpoint or a published folder",
        _PLACES,
    ),
    "WorkerServer": PrivateName(
        "torch._C._distributed_c10d:_WorkerServer",
        "tells an agent what its process asked of collectives when the run hangs",
        "torch.distributed.debug.start_debug_server, which listens at all addresses to anybody",
    ),
    "compiler_version": PrivateName(
        "torch._inductor.codecache:torch_key", "reads torch's source once a nursery", _CACHED
    ),
    "triton_version": PrivateName("torch._inductor.codecache:triton_key", "reads Triton's the same way", _CACHED),
    "vector_instructions": PrivateName(
        "torch._inductor.cpu_vec_isa:pick_vec_isa", "tries once a nursery what this CPU's programs may use", _CACHED
    ),
    "stage_backward": PrivateName(
        "torch.distributed.pipelining._backward:stage_backward", "a backward pass that sums its gradients", "none"
    ),
    # ---- watching a step
    "TorchDispatchMode": PrivateName(
        "torch.utils._python_dispatch:TorchDispatchMode", "rehearsal and `zili align` see every operation", _MODE
    ),
    "disable_current_modes": PrivateName(
        "torch.utils._python_dispatch:_disable_current_modes", "`zili align` computes unseen by itself", "none"
    ),
    "current_autograd_node": PrivateName(
        "torch._C:_current_autograd_node", "tells backward passes from forward passes", "hooks on every node"
    ),
    "get_sequence_nr": PrivateName(
        "torch.autograd:_get_sequence_nr", "tells which module a backward operation belongs to", "hooks on every node"
    ),
    "ExcludeDispatchKeys": PrivateName(
        "torch._C:_SetExcludeDispatchKeyGuard", "`zili align` differentiates below autograd", "none"
    ),
    "DispatchKey": PrivateName("torch._C:DispatchKey", "names autograd, for the name before", "none"),
    "FakeTensorMode": PrivateName(
        "torch._subclasses.fake_tensor:FakeTensorMode", "tensors without memory in a rehearsal", "the meta device"
    ),
    "FakeStore": PrivateName(
        "torch.testing._internal.distributed.fake_pg:FakeStore", "a rehearsal's world of one process", "none"
    ),
    "ShardingPropagator": PrivateName(
        "torch.distributed.tensor._sharding_prop:ShardingPropagator", "a rehearsal leaves DTensor's trials out", "none"
    ),
    # ---- devices
    "privateuse1_name": PrivateName(
        "torch._C:_get_privateuse1_backend_name", "finds another vendor's plugin before it is too late", "none"
    ),
    "dispatch_key_for_device": PrivateName(
        "torch._C:_dispatch_key_for_device", "for the name after", "torch.library.get_kernel, from 2.10 on"
    ),
    "has_kernel": PrivateName(
        "torch._C:_dispatch_has_kernel_for_dispatch_key",
        "`zili doctor` tells a chip's grouped product from torch's stand-in",
        "torch.library.get_kernel, which has stand-ins too",
    ),
}
"""What stands for a private name, by the name under which this module gives it."""

_STAGE = "torch.distributed.pipelining:PipelineStage."
_SCHEDULES = "torch.distributed.pipelining.schedules:"
_RECEIVED = "memory of a pipeline's messages is given back as soon as it was used"
IN_PLACE = (
    *(
        PrivateName(_STAGE + method, _RECEIVED, "none")
        for method in (
            *("_setup_forward_recv_info", "_setup_backward_recv_info", "_get_recv_ops"),
            *("_retrieve_recv_activations", "_retrieve_recv_grads"),
        )
    ),
    PrivateName(_SCHEDULES + "_batch_p2p", "a pipeline's messages, sent at once and held in a rehearsal", "none"),
    PrivateName(_SCHEDULES + "_wait_batch_p2p", "waits for them", "none"),
    PrivateName(_SCHEDULES + "_PipelineSchedule._warmup_p2p", "a vote that a rehearsal has nobody for", "none"),
    PrivateName(
        _SCHEDULES + "_PipelineScheduleRuntime._comp_type_to_function_map",
        "sends of our own in a schedule",
        "register_custom_function of the same class, which takes no sends",
    ),
    PrivateName("torch.distributed.pipelining.stage:_PipelineStageBase._inference_mode", "that vote's result", "none"),
    PrivateName(
        "torch.distributed.tensor._sharding_prop:ShardingPropagator._propagate_tensor_meta_non_cached",
        "what DTensor tries out is not counted",
        "none",
    ),
    PrivateName("torch:UntypedStorage._cdata", "tells memory apart in a rehearsal", "data_ptr, which fakes lack"),
    PrivateName("torch._ops:OpOverload._schema", "names of an operation's arguments", "str(operation)"),
    PrivateName("torch._ops:OpOverload._overloadpacket", "finds an operation's formula of FLOPs", "none"),
    PrivateName("torch.autograd.graph:Node._sequence_nr", "tells which module a node belongs to", "none"),
    PrivateName("torch:ops.aten._grouped_mm", "FLOPs of a mixture's products in a rehearsal", "none"),
    PrivateName("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu", "FLOPs of attention on the CPU", "none"),
    PrivateName(
        "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", "the same of its backward pass", "none"
    ),
)
"""Names that cannot be handed out, because they are overridden, replaced, or belong to an object or a formula."""


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    private = NAMES[name]
    try:
        found = resolve_name(private.path)
    except (ImportError, AttributeError) as error:
        from torch import __version__

        raise ImportError(
            f"torch {__version__} has no {private.path} ({error}); Zili needs it: {private.use}. "
            f"Checked with torch {', '.join(CHECKED_WITH)}"
        ) from error
    globals()[name] = found  # asked for once: some are used in every step
    return found


def arguments_by_name(function: Any, arguments: Any, keywords: Any) -> dict[str, Any]:
    """What an operation (`torch._ops.OpOverload`) is called with, by the names in its schema; defaults are left out."""
    return dict(zip((given.name for given in function._schema.arguments), arguments, strict=False)) | keywords
