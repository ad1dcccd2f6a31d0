"""Cambricon MLU: torch with the torch_mlu plugin and the Neuware stack, both from the vendor."""

from __future__ import annotations

from zili.chips.backend import Backend, Capability, RefusedCall, Variable, VersionFile

CAMBRICON = Backend(
    name="cambricon",
    device_type="mlu",
    collectives="cncl",
    vendor="Cambricon",
    plugin="torch_mlu",
    vllm_plugin="vllm-mlu, of Cambricon's own SDK",
    install=(
        "use Cambricon's container, or its torch_mlu wheel for your torch, from developer.cambricon.com "
        "(it is not on PyPI)"
    ),
    device_nodes="/dev/cambricon_dev[0-9]*",
    runtime_library="libcnrt.so",
    runtime_fix="add $NEUWARE_HOME/lib64 to LD_LIBRARY_PATH (Neuware is usually under /usr/local/neuware)",
    version_files=(
        VersionFile("Neuware", ("$NEUWARE_HOME/version.txt", "/usr/local/neuware/version.txt"), r"(\d+\.\d+\.\d+)"),
    ),
    visible_devices="MLU_VISIBLE_DEVICES",
    environment=(
        Variable("ENABLE_FALLBACK_TO_CPU", "0", "an operation the device lacks fails instead of running slowly"),
        Variable("ENABLE_MLU_FAIL_FALLBACK", "0", "the same, for operations that fail on the device"),
        Variable("PYTORCH_MLU_ALLOC_CONF", None, "allocator settings; no recommended value is published"),
        Variable("PYTORCH_NO_MLU_MEMORY_CACHING", None, "debugging: turns the caching allocator off"),
        Variable("NEUWARE_HOME", None, "where Neuware is installed"),
        Variable("TORCH_MIN_CNLOG_LEVEL", None, "log level of torch_mlu"),
    ),
    capabilities={
        "bf16": Capability(True, "listed for MLU370", "documented"),
        "bf16_reduce": Capability(True, "no public statement"),
        "fsdp2": Capability(True, "stock PyTorch, ran on an emulated device; no public report on hardware"),
        "fused_adamw": Capability(True, "torch's own is listed for plugin devices; torch_mlu has kernels for it"),
        "compile": Capability(False, "no public statement for this torch"),
        "deterministic": Capability(False, "no public statement"),
        "grouped_matmul": Capability(False, "no public statement"),
        "grouped_heads_attention": Capability(
            False, "a user's report: torch_mlu's SDPA raises TypeError at enable_gqa (Neuware 4.7.2)", "documented"
        ),
        "inf_nan": Capability(True, "no public statement"),
    },
    refusals=(
        RefusedCall(
            "aten::scaled_dot_product_attention",
            "flagos-ai/sglang-plugin-FL#90, September 2026: Neuware 4.7.2, which has torch_mlu 1.33.1 for torch 2.11",
            argument="enable_gqa",
            capability="grouped_heads_attention",
        ),
    ),
    notes=(
        "Not run on hardware by us: written to torch_mlu's public source, which ends in 2024 (torch 2.4).",
        "Seen by users since: torch_mlu 1.29.2 for torch 2.7.1 (Neuware 4.4.3), 1.30.2 for 2.9.1, 1.33.1 for 2.11 "
        "(Neuware 4.7.2). 1.34.1 for torch 2.13 stands in SGLang's scripts/ci/mlu/component_versions.properties, which "
        "says that it is not published yet.",
        "Users report that torch_mlu gives 5.0 as a device's compute capability whatever the chip: software that asks "
        "for it turns bf16 off. Zili does not ask.",
        "An 'assumed' answer is a conclusion of ours: check it on the device before a long run.",
    ),
)
