"""Huawei Ascend: torch's CPU build, the torch_npu plugin of the same minor version, and CANN."""

from __future__ import annotations

from zili.chips.backend import Backend, Capability, RefusedCall, Variable, VersionFile

ASCEND = Backend(
    name="ascend",
    device_type="npu",
    collectives="hccl",
    vendor="Huawei",
    plugin="torch_npu",
    vllm_plugin="vllm-ascend",
    plugin_pairs=True,
    install="pip install torch==2.13.0 torch_npu==2.13.* (torch's CPU build), beside CANN and its driver",
    device_nodes="/dev/davinci[0-9]*",
    runtime_library="libascendcl.so",
    runtime_fix="source CANN's set_env.sh in this shell (usually under /usr/local/Ascend)",
    version_files=(
        # The files torch_npu's get_cann_version names for the driver, and CANN's installation guide for the toolkit.
        VersionFile("driver", ("/usr/local/Ascend/driver/version.info",)),
        VersionFile(
            "CANN",
            (
                "$ASCEND_TOOLKIT_HOME/*-linux/ascend_toolkit_install.info",
                "/usr/local/Ascend/cann/*-linux/ascend_toolkit_install.info",
                "/usr/local/Ascend/ascend-toolkit/latest/*-linux/ascend_toolkit_install.info",
            ),
        ),
    ),
    visible_devices="ASCEND_RT_VISIBLE_DEVICES",
    environment=(
        Variable("TASK_QUEUE_ENABLE", "1", "torch_npu's default; 2 is faster and takes more memory"),
        Variable(
            "PYTORCH_NPU_ALLOC_CONF",
            "expandable_segments:True",
            "less fragmentation (MindSpeed-LLM, AReaL); needs HDK 23.0 or newer",
        ),
        Variable("CPU_AFFINITY_CONF", "1", "coarse pinning of host threads (torch_npu; MindSpeed-LLM)"),
        Variable("HCCL_CONNECT_TIMEOUT", "1800", "seconds; at the default 120 slow starts miss the rendezvous"),
        Variable("HCCL_EXEC_TIMEOUT", "3600", "seconds; above the longest pause for checkpoint or evaluation"),
        Variable("HCCL_DETERMINISTIC", "true", "reductions repeat, slower (CANN)", only_deterministic=True),
        # 1 is the default on A2 and A3; what setting it does on the 910A, which only saturates, is unknown.
        Variable("INF_NAN_MODE_ENABLE", None, "0 saturates: inf becomes max, nan becomes 0, overflow is hidden"),
        Variable("MULTI_STREAM_MEMORY_REUSE", None, "default 1; 2 is 'not recommended' by torch_npu's documents"),
        Variable("HCCL_BUFFSIZE", None, "MB a process group reserves, default 200; lower it for many groups"),
        Variable("HCCL_IF_BASE_PORT", None, "first of 16 host ports that HCCL uses, default 60000"),
        Variable("ASCEND_LAUNCH_BLOCKING", None, "debugging: every kernel waits; turns the task queue off"),
        Variable("TORCH_HCCL_ASYNC_ERROR_HANDLING", None, "whether a hung collective ends the process"),
        Variable("HCCL_EVENT_TIMEOUT", None, "seconds a collective's event is waited for"),
        Variable("ACL_DEVICE_SYNC_TIMEOUT", None, "seconds a device synchronisation may take"),
    ),
    operations="zili.ops.ascend",
    capabilities={
        "bf16": Capability(True, "A2 (910B) and newer", "documented"),
        "bf16_reduce": Capability(True, "listed for A2 in CANN 7.0's HCCL documents", "documented"),
        "fsdp2": Capability(True, "torch_npu's table of native interfaces: A2 and A3", "documented"),
        "fused_adamw": Capability(True, "torch's own, listed for plugin devices; shapes checked with the real wheel"),
        "compile": Capability(False, "torch_npu has compilers of its own; none tried here"),
        "deterministic": Capability(True, "only the first setting in a thread counts (torch_npu)", "documented"),
        "grouped_matmul": Capability(False, "only its shape function was seen to run; torch_npu has its own op"),
        "grouped_heads_attention": Capability(
            True, "users ran it: transformers#41601 (torch_npu 2.5.1), vllm-omni#6788 (2.10)", "documented"
        ),
        "inf_nan": Capability(True, "A2 and newer, unless INF_NAN_MODE_ENABLE=0", "documented"),
    },
    refusals=(
        # Divided by hand instead, on every chip (zili/parallel/data.py).
        RefusedCall("c10d::PREMUL_SUM", "ByteDance-Seed/VeOmni#241, December 2025"),
        RefusedCall("aten::logsumexp", "verl's pull request 198, early 2025", dtype="bfloat16"),
    ),
    notes=(
        "Not run on hardware by us: written from the sources named and torch_npu 2.13's wheel.",
        "torch_npu without CANN makes `import torch` itself fail, unless TORCH_DEVICE_BACKEND_AUTOLOAD=0.",
        "Cannot share a process with CUDA: use the CPU build of torch.",
    ),
)
