"""Inputs of every operation, of the shapes of a small training step: to compare its versions on, and to time them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_EXPERTS, _TOP_K = 8, 2


class Example(NamedTuple):
    """Arguments of one call."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class _Table(NamedTuple):
    """fp32 in every precision, and nothing asks for its gradient."""

    values: Tensor


def example(operation: str, device: str | torch.device, dtype: torch.dtype) -> Example:
    """The same numbers on every device: made on the host, rounded to `dtype`, and sent."""
    return _placed(_MADE[operation], device, dtype)


def examples(operation: str, dtype: torch.dtype) -> list[Example]:
    """Everything to compare versions on, on the CPU: that example, and what is called otherwise by some models."""
    return [_placed(make, "cpu", dtype) for make in (_MADE[operation], *_FURTHER.get(operation, ()))]


def _placed(make: Callable[[torch.Generator], Example], device: str | torch.device, dtype: torch.dtype) -> Example:
    with torch.device("cpu"):
        arguments, keywords = make(torch.Generator().manual_seed(0))

    def there(value: Any) -> Any:
        if isinstance(value, _Table):
            return value.values.to(device)
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


def _linear(generator: torch.Generator) -> Example:
    return Example((_normal(generator, 2048, 512), _normal(generator, 512, 512)), {})


def _rms_norm(generator: torch.Generator) -> Example:
    return Example((_normal(generator, 2, 512, 512), _normal(generator, 512), 1e-6), {})


def _add_rms_norm(generator: torch.Generator) -> Example:
    x, branch = _normal(generator, 2, 512, 512), _normal(generator, 2, 512, 512)
    return Example((x, branch, _normal(generator, 512), 1e-6), {})


def _rotate(generator: torch.Generator) -> Example:
    angles = torch.outer(torch.arange(512.0), 10_000.0 ** -(torch.arange(32.0) / 32)).repeat(1, 2)
    return Example((_normal(generator, 2, 512, 6, 64), _Table(angles.cos()), _Table(angles.sin())), {})


def _swiglu(generator: torch.Generator) -> Example:
    return Example((_normal(generator, 2, 512, 1024), _normal(generator, 2, 512, 1024)), {})


def _attention(generator: torch.Generator) -> Example:
    heads = [_normal(generator, 2, 512, count, 64) for count in (6, 2, 2)]
    documents = torch.zeros(2, 512, dtype=torch.int32)
    documents[0, 200:], documents[1, 64:], documents[1, 65:] = 1, 1, 2
    return Example(tuple(heads), {"document_ids": documents})


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


def _linear_cross_entropy(generator: torch.Generator) -> Example:
    labels = torch.randint(0, 1024, (512,), generator=generator)
    labels[:3] = torch.tensor([0, 1023, -100])
    return Example((_normal(generator, 512, 128), 0.1 * _normal(generator, 1024, 128), labels, 0.3), {})


def _row_losses(generator: torch.Generator) -> Example:
    """What preferences are learned from."""
    return Example(_linear_cross_entropy(generator).arguments, {"reduction": "none"})


_FURTHER: dict[str, tuple[Callable[[torch.Generator], Example], ...]] = {
    "attention": (_latent_attention, _later_attention),
    "linear_cross_entropy": (_row_losses,),
}
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
