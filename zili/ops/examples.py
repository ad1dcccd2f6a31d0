"""Inputs of every operation. Some have the shapes of a small training step: versions are timed on them. Versions are
compared on others, of all kinds of use and of other scales, where eps, a mask, a limit or a long sum counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zili.ops.reference import Whole

_EXPERTS, _TOP_K = 8, 2


class Example(NamedTuple):
    """Arguments of one call."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class _Table(NamedTuple):
    """fp32 in every precision, and nothing asks for its gradient."""

    values: Tensor


class _Fine(NamedTuple):
    """A parameter that is fp32 in every precision."""

    values: Tensor


class _LaterPart(Whole):
    """Tokens from 600 on of a vocabulary whose others are never likely."""

    first = 600


def example(operation: str, device: str | torch.device, dtype: torch.dtype) -> Example:
    """The same numbers on every device: made on the host, rounded to `dtype`, and sent."""
    return _placed(_MADE[operation], device, dtype)


def examples(operation: str, dtype: torch.dtype, seed: int = 0) -> list[Example]:
    """Everything to compare versions on, on the CPU."""
    return [_placed(make, "cpu", dtype, seed) for make in _COMPARED[operation]]


def _placed(
    make: Callable[[torch.Generator], Example], device: str | torch.device, dtype: torch.dtype, seed: int = 0
) -> Example:
    with torch.device("cpu"):
        arguments, keywords = make(torch.Generator().manual_seed(seed))

    def there(value: Any) -> Any:
        if isinstance(value, _Table):
            return value.values.to(device)
        if isinstance(value, _Fine):
            return value.values.to(device).requires_grad_()
        if not isinstance(value, Tensor):
            return value
        return value.to(dtype).to(device).requires_grad_() if value.is_floating_point() else value.to(device)

    return Example(tuple(map(there, arguments)), {key: there(value) for key, value in keywords.items()})


def run(function: Callable[..., Any], inputs: Example) -> list[Tensor]:
    """Outputs of `function`, and the gradients of its inputs where an output has one."""
    for value in inputs.arguments:
        if isinstance(value, Tensor):
            value.grad = None
    out = function(*inputs.arguments, **inputs.keywords)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    differentiable = [output for output in outputs if output.requires_grad]
    torch.autograd.backward(differentiable, [torch.ones_like(output) for output in differentiable])
    leaves = [value for value in inputs.arguments if isinstance(value, Tensor)]
    return [*outputs, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _linear(generator: torch.Generator, rows: int = 512) -> Example:
    return Example((_normal(generator, rows, 2048), _normal(generator, 512, 2048)), {})


def _many_rows(generator: torch.Generator) -> Example:
    """The gradient of a weight is a sum over them."""
    return Example((_normal(generator, 4096, 32), _normal(generator, 48, 32)), {})


def _rms_norm(generator: torch.Generator, length: int = 512) -> Example:
    return Example((_normal(generator, 2, length, 512), _normal(generator, 512), 1e-6), {})


def _small_rms_norm(generator: torch.Generator) -> Example:
    """Numbers beside whose squares eps is not nothing, and a parameter that is kept in fp32."""
    return Example((1e-3 * _normal(generator, 2, 64, 512), _Fine(_normal(generator, 512)), 1e-6), {})


def _add_rms_norm(generator: torch.Generator, length: int = 512, scale: float = 1.0) -> Example:
    x, branch = scale * _normal(generator, 2, length, 512), scale * _normal(generator, 2, length, 512)
    return Example((x, branch, _normal(generator, 512), 1e-6), {})


def _rotate(generator: torch.Generator, length: int = 512, magnitude: float = 1.0) -> Example:
    angles = torch.outer(torch.arange(float(length)), 10_000.0 ** -(torch.arange(32.0) / 32)).repeat(1, 2)
    tables = (_Table(magnitude * angles.cos()), _Table(magnitude * angles.sin()))
    return Example((_normal(generator, 2, length, 6, 64), *tables), {})


def _swiglu(generator: torch.Generator, length: int = 512, scale: float = 1.0) -> Example:
    return Example(tuple(scale * _normal(generator, 2, length, 1024) for _ in range(2)), {})


def _attention(generator: torch.Generator, length: int = 512) -> Example:
    heads = [_normal(generator, 2, length, count, 64) for count in (6, 2, 2)]
    documents = torch.zeros(2, length, dtype=torch.int32)
    documents[0, 200:], documents[1, 64:], documents[1, 65:] = 1, 1, 2
    return Example(tuple(heads), {"document_ids": documents})


def _peaked_attention(generator: torch.Generator) -> Example:
    """Each query sees few keys, the one it is as far as 12 deviations above the mean."""
    query, key, value = (_normal(generator, 1, 192, count, 64) for count in (4, 4, 4))
    return Example((3.0 * query, key, value), {})


def _latent_attention(generator: torch.Generator) -> Example:
    """Values are narrower than keys."""
    query, key = (_normal(generator, 2, 128, 4, 48) for _ in range(2))
    return Example((query, key, _normal(generator, 2, 128, 4, 32)), {})


def _later_attention(generator: torch.Generator) -> Example:
    """The queries are the last positions alone, as of a process that has a part of each row."""
    query, key, value = (_normal(generator, 2, length, 4, 64) for length in (64, 192, 192))
    documents = torch.zeros(2, 192, dtype=torch.int32)
    documents[0, 100:], documents[1, 150:] = 1, 1
    return Example((query, key, value), {"document_ids": documents})


def _grouped_matmul(generator: torch.Generator) -> Example:
    ends = torch.tensor([64, 64, 192, 256, 320, 384, 500, 512], dtype=torch.int32)
    return Example((_normal(generator, 512, 256), _normal(generator, _EXPERTS, 128, 256), ends), {})


def _routes(generator: torch.Generator) -> Tensor:
    return _normal(generator, 256, _EXPERTS).topk(_TOP_K).indices


def _permute(generator: torch.Generator) -> Example:
    return Example((_normal(generator, 256, 128), _routes(generator)), {})


def _unpermute(generator: torch.Generator) -> Example:
    places = _routes(generator).flatten().argsort(stable=True).argsort()
    weights = _normal(generator, 256, _TOP_K).sigmoid()
    return Example((_normal(generator, 256 * _TOP_K, 128), places, weights), {})


def _linear_cross_entropy(generator: torch.Generator, scale: float = 0.1) -> Example:
    labels = torch.randint(0, 1024, (512,), generator=generator)
    labels[:3] = torch.tensor([0, 1023, -100])
    return Example((_normal(generator, 512, 128), scale * _normal(generator, 1024, 128), labels, 0.3), {})


def _row_losses(generator: torch.Generator) -> Example:
    """What preferences are learned from; of logits as large as a trained model's."""
    return Example(_linear_cross_entropy(generator, scale=2.0).arguments, {"reduction": "none"})


def _losses_of_a_part(generator: torch.Generator) -> Example:
    """All labels are in the part, its first and its last among them."""
    labels = torch.randint(600, 1112, (256,), generator=generator)
    labels[:3] = torch.tensor([600, 1111, -100])
    weight = 0.5 * _normal(generator, 512, 128)
    return Example((_normal(generator, 256, 128), weight, labels, 0.7), {"part": _LaterPart(), "reduction": "none"})


_MADE: dict[str, Callable[[torch.Generator], Example]] = {
    "linear": _linear,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rotate": _rotate,
    "swiglu": _swiglu,
    "attention": _attention,
    "grouped_matmul": _grouped_matmul,
    "permute": _permute,
    "unpermute": _unpermute,
    "linear_cross_entropy": _linear_cross_entropy,
}
_COMPARED: dict[str, tuple[Callable[[torch.Generator], Example], ...]] = {
    "linear": (partial(_linear, rows=128), _many_rows),
    "rms_norm": (partial(_rms_norm, length=64), _small_rms_norm),
    "add_rms_norm": (partial(_add_rms_norm, length=64), partial(_add_rms_norm, length=64, scale=1e-3)),
    "rotate": (partial(_rotate, length=96), partial(_rotate, length=32, magnitude=1.3)),
    "swiglu": (partial(_swiglu, length=64), partial(_swiglu, length=16, scale=8.0)),
    "attention": (partial(_attention, length=288), _peaked_attention, _latent_attention, _later_attention),
    "grouped_matmul": (_grouped_matmul,),
    "permute": (_permute,),
    "unpermute": (_unpermute,),
    "linear_cross_entropy": (_linear_cross_entropy, _row_losses, _losses_of_a_part),
}
