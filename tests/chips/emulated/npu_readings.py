"""What Zili's use of each of Huawei's operations relies on, in short and with its source; and the readings where they
differ.

Read in November 2026, none of it tried on a chip. Sources: "page" is Ascend/op-plugin docs/zh/custom_APIs/torch_npu,
"binding" its op_plugin/ops/opapi and op_plugin/config; "nn" is cann ops-nn, "transformer" cann ops-transformer: each
operation's docs/aclnn*.md, op_host, op_kernel, tests.
"""

from __future__ import annotations

LAST_INDEX = "EMULATED_NPU_LAST_INDEX"
"""Of npu_fused_linear_online_max_sum: by the "page" a label is outside if it is larger than the last index, by the
"kernel" and the golden specification if it is not smaller."""
SERIES = "EMULATED_NPU_SERIES"
"""Of npu_add_rms_norm: "A2" and A3 round the sum and the normed value, the "950" only the result."""
READINGS = ({LAST_INDEX: "kernel", SERIES: "A2"}, {LAST_INDEX: "page", SERIES: "950"})
"""Variables of processes; the two have no operation in common."""

RELIED_ON: dict[str, tuple[tuple[str, str], ...]] = {
    "npu_rms_norm": (
        ("x / sqrt(mean(x^2) + eps) * gamma in fp32, rounded once", "nn norm/rms_norm: golden and kernel"),
        ("x of 16 bits takes gamma of its dtype or fp32", "nn norm/rms_norm docs"),
    ),
    "npu_rms_norm_backward": (
        (
            "arguments dy, x, gamma, rstd; dgamma is fp32",
            "binding; nn norm/rms_norm_grad docs",
        ),
        ("without rows dgamma is nan", "nn norm/rms_norm_grad golden"),
    ),
    "npu_add_rms_norm": (
        ("x1, x2 and gamma have one dtype; results y, 1/rms in fp32, sum", "page"),
        ("A2, A3: sum and normed value are rounded to the dtype first", "nn norm/add_rms_norm golden, version 1"),
        ("950: the sum stays fp32 for the norm, rounded once", "nn norm/add_rms_norm golden, version 2"),
    ),
    "npu_rotary_mul": (
        ("x [B, S, N, D] with tables [1, S, 1, D]; B, N < 1000; D < 896 and even; tables within [-1, 1]", "page"),
        ("950 and A3 beside A2", "page of 2026; transformer posembedding/rotary_position_embedding"),
    ),
    "npu_swiglu": (
        ("silu of the first half times the second, in fp32, rounded once", "nn activation/swi_glu golden"),
        ("gradient: no empty input, rows of whole 64 bytes, dy contiguous", "nn activation/swi_glu_grad docs"),
    ),
    "npu_fusion_attention": (
        ("TND: lists of cumulative ends without a leading 0, on the host, of equal length", "page; binding"),
        ("lists of up to 1 K entries (page) or 2 K (transformer)", "page; transformer attention/flash_attention_score"),
        ("sparse_mode 3: lower right triangle of each document, mask 2048 x 2048, True is hidden", "page"),
        ("T to 1 M, N to 256, D to 768; in the gradient of November 2025 to 512", "transformer docs"),
    ),
    "npu_grouped_matmul": (
        (
            "group_type 0: ends in an int64 list on the chip, at most 1024, the last is M",
            "page; transformer gmm docs V5",
        ),
        ("group_type 2: the left matrix is a transposed view, an empty group gives 0", "transformer CheckCaseSplitK"),
        ("the last dimension of either, as stored, is below 65,536", "page"),
        ("a list of length 1 is refused for lists of ints and for type 1", "page"),
    ),
    "npu_moe_token_permute": (
        ("stable by expert; places int32: argsort of the argsort", "transformer moe/moe_token_permute docs"),
        ("bf16 (page); N k < 16,777,215 and k <= 512", "_op_plugin_docs.py; transformer docs"),
    ),
    "npu_moe_token_unpermute": (
        ("places are int32", "transformer moe_token_unpermute_def.cpp and docs; _op_plugin_docs.py alone says int64"),
        ("multiplied and summed in fp32, rounded once; k <= 512", "transformer docs, kernel"),
    ),
    "npu_fused_linear_online_max_sum": (
        (
            "the picked logit is less the row maximum of this part; 0 where the label is outside",
            "nn docs steps 3 and 7",
        ),
        ("outside: target < start or target > end", "nn matmul/fused_linear_online_max_sum/docs step 5"),
        ("outside: target < start or target >= end", "nn kernel TargetInnerProcess and executor_aclnn...py"),
        ("one bit a row, lowest first", "nn golden; gradient's kernel"),
        ("16-bit inputs, K <= 65,534; A2 and A3", "nn CheckShapeValid, docs"),
    ),
    "npu_fused_linear_cross_entropy_loss_with_max_sum_backward": (
        (
            "exp(logit - max) / sum, less 1 at the label whose bit is 0, times grad, rounded, then both products",
            "nn golden",
        ),
        ("V >= 128, H <= 65,535; A2 and A3 by a test of the chip", "nn docs, tiling, CheckShapeValid"),
    ),
}
