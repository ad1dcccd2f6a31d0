"""Every faster version of an operation against its plain PyTorch form, values and gradients."""

import inspect

import pytest
import torch
from torch import Tensor

from zili import ops
from zili.errors import ChipError, ConfigError
from zili.ops import product, reference, registry
from zili.ops.blocked_attention import BLOCK, blocked_attention
from zili.ops.chunked_cross_entropy import chunked_linear_cross_entropy
from zili.ops.versions import Version


@pytest.fixture(autouse=True, params=["plain", "onednn"])
def library(request):
    before = product.library()
    product.use_library(request.param)
    yield
    product.use_library(before)


def values_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    weights = torch.linspace(0.5, 1.5, out.numel()).view(out.shape)
    (out * weights).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(first: list[Tensor], second: list[Tensor], tolerance: float = 2e-5) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("shape", [(7, 24, 40), (2, 5, 40, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(shape, bias):
    *rows, inputs, outputs = shape
    tensors = [torch.randn(*rows, inputs), torch.randn(outputs, inputs)]
    tensors += [torch.randn(outputs)] if bias else []
    assert_same(values_and_gradients(product.linear, *tensors), values_and_gradients(reference.linear, *tensors))


def document_ids(kind: str, batch: int, length: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "one":
        return torch.zeros(batch, length, dtype=torch.int32)
    boundaries = torch.rand(batch, length) < {"few": 0.008, "many": 0.2}[kind]
    return boundaries.cumsum(1).to(torch.int32)


@pytest.mark.parametrize("kind", ["none", "one", "few", "many"])
@pytest.mark.parametrize("length", [1, 5, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_blocked_attention(kind, length, heads):
    torch.manual_seed(length)
    batch, size = 2, 16
    documents = document_ids(kind, batch, length)
    query = torch.randn(batch, length, heads[0], size)
    key, value = torch.randn(2, batch, length, heads[1], size)

    def run(function):
        return values_and_gradients(lambda q, k, v: function(q, k, v, document_ids=documents), query, key, value)

    assert_same(run(blocked_attention), run(reference.attention))


def test_blocked_attention_leaves_a_cache_to_the_reference():
    query, key, value = torch.randn(1, 2, 4, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    assert torch.equal(blocked_attention(query, key, value), reference.attention(query, key, value))


@pytest.mark.parametrize("multiplier", [1.0, 0.25])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_chunked_linear_cross_entropy(multiplier, ignored, reduction, monkeypatch):
    monkeypatch.setattr("zili.ops.chunked_cross_entropy._CHUNK", 1)  # chunks of 64 rows
    torch.manual_seed(0)
    hidden, weight = torch.randn(150, 16), torch.randn(97, 16)
    labels = torch.randint(97, (150,))
    labels[torch.rand(150) < ignored] = ops.IGNORE_INDEX

    def run(function):
        return values_and_gradients(lambda h, w: function(h, w, labels, multiplier, None, reduction), hidden, weight)

    assert_same(run(chunked_linear_cross_entropy), run(reference.linear_cross_entropy))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_target_whose_probability_underflows_still_has_a_finite_loss(reduction):
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]])
    loss = chunked_linear_cross_entropy(hidden, weight, torch.tensor([1]), reduction=reduction)
    assert loss.item() == pytest.approx(600.0)


def test_linear_cross_entropy_in_bf16_close_to_fp32():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(80, 32), torch.randn(64, 32), torch.randint(64, (80,))
    exact = reference.linear_cross_entropy(hidden, weight, labels)
    assert chunked_linear_cross_entropy(hidden.bfloat16(), weight, labels) == pytest.approx(exact.item(), rel=2e-2)


def test_compiled_block_shape_works_with_custom_operations():
    def block(x, weight):
        return ops.swiglu(product.linear(x, weight), product.linear(x, weight)).sum()

    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.zili.linear, (x, weight))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    compiled(x, weight).backward()
    grads = (x.grad.clone(), weight.grad.clone())
    x.grad = weight.grad = None
    block(x, weight).backward()
    assert_same(list(grads), [x.grad, weight.grad])


@pytest.fixture
def restored():
    before = ops.chosen()
    yield
    ops.choose("cpu", "fp32", before)


def test_choices_are_named_with_reasons_and_can_be_overruled(restored):
    chosen = ops.choose("cpu", "fp32", {"linear": "reference", "attention": "blocked"})
    by_name = {operation: (version, reason) for operation, version, reason in chosen}
    assert by_name["linear"] == ("reference", "asked for")
    assert by_name["attention"] == ("blocked", "asked for")
    assert by_name["linear_cross_entropy"][0] == "chunked"
    assert ops.chosen()["linear"] == "reference"


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="no operation 'linaer'"):
        ops.choose("cpu", "fp32", {"linaer": "reference"})
    with pytest.raises(ConfigError, match=r"no version 'fast'.*reference, onednn"):
        ops.choose("cpu", "fp32", {"linear": "fast"})
    with pytest.raises(ConfigError, match="does not run on cpu in bf16"):
        ops.choose("cpu", "bf16", {"linear": "onednn"})


def test_no_rows_and_no_gradients(library):
    empty, weight = torch.empty(0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    assert product.linear(empty, weight).shape == (0, 5)
    chunked_linear_cross_entropy(empty, weight, torch.empty(0, dtype=torch.int64)).backward()
    assert weight.grad is not None and not weight.grad.any()


def test_an_evaluation_makes_no_weight_gradient(monkeypatch):
    def refuse(*_):
        raise AssertionError("a gradient nobody asked for")

    monkeypatch.setattr("zili.ops.chunked_cross_entropy.weight_gradient", refuse)
    weight = torch.randn(5, 8, requires_grad=True)
    with torch.no_grad():
        chunked_linear_cross_entropy(torch.randn(3, 8), weight, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_frozen_output_matrix_gets_no_gradient(reduction, monkeypatch):
    """Beside adapters: of preferences the loss of each row is asked for."""
    made = []
    monkeypatch.setattr("zili.ops.chunked_cross_entropy.weight_gradient", lambda *_: made.append(1))
    hidden = torch.randn(3, 8, requires_grad=True)
    chunked_linear_cross_entropy(
        hidden, torch.randn(5, 8), torch.tensor([0, 1, 2]), reduction=reduction
    ).sum().backward()
    assert hidden.grad is not None and not made


def test_without_liger_the_references_run_and_the_reason_is_given():
    assert ops.versions("zili.ops.nvidia")[0].lacks("cuda", "bf16") == "liger-kernel is not installed"


def test_a_vendors_module_that_cannot_be_imported_is_named():
    with pytest.raises(ChipError, match=r"no_such_operations, cannot be imported.*repair its package"):
        ops.choose("cpu", "fp32", {}, vendor="no_such_operations")


def off_by_one(x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    rows, places = reference.permute(x, experts)
    return rows, (places + 1) % len(places)


def test_a_version_is_compared_with_the_reference_before_it_is_taken(monkeypatch, restored):
    wrong = Version("swiglu", "wrong", lambda gate, up: reference.swiglu(gate, up) * 1.01, lambda *_: None)
    fails = Version("rms_norm", "fails", lambda *_: torch.ones(1, 2) @ torch.ones(3, 1), lambda *_: None)
    ungraded = Version("add_rms_norm", "ungraded", torch.no_grad()(reference.add_rms_norm), lambda *_: None)
    shifted = Version("permute", "shifted", off_by_one, lambda *_: None)
    monkeypatch.setattr("zili.ops.registry.VERSIONS", (wrong, fails, ungraded, shifted))
    found = {operation: (name, reason) for operation, name, reason in ops.choose("cpu", "fp32", {})}
    assert {name for name, _ in found.values()} == {"reference"}
    assert "wrong: differs from the reference: forward is" in found["swiglu"][1]
    assert "ungraded: failed (0 gradients where the reference has 3)" in found["add_rms_norm"][1]
    assert "shifted: differs from the reference: forward 2 is inf" in found["permute"][1]
    assert found["rms_norm"][1].startswith("fails: failed (mat1 and mat2")


@pytest.mark.parametrize("reason", ["", "logits are never whole in memory"])
def test_a_wrong_version_is_neither_taken_for_its_reason_nor_at_its_name(reason, monkeypatch, restored):
    wrong = Version(
        "swiglu", "wrong", lambda gate, up: reference.swiglu(gate, up) * 1.01, lambda *_: None, reason=reason
    )
    monkeypatch.setattr("zili.ops.registry.VERSIONS", (wrong,))
    ((_, taken, why),) = ops.choose("cpu", "fp32", {})
    assert taken == "reference" and "wrong: differs from the reference" in why
    with pytest.raises(ChipError, match=r"chip\.operations\.swiglu: 'wrong' differs.*set it to \"reference\""):
        ops.choose("cpu", "fp32", {"swiglu": "wrong"})


def test_places_of_another_version_may_be_of_32_bits():
    rows, places, weights = torch.randn(6, 4), torch.randperm(6), torch.rand(3, 2)
    assert torch.equal(reference.unpermute(rows, places, weights), reference.unpermute(rows, places.int(), weights))


@pytest.mark.parametrize("name", registry.OPERATIONS)
def test_an_operation_has_the_signature_and_the_words_of_its_reference(name):
    public, declared = getattr(ops, name), getattr(reference, name)
    assert inspect.signature(public) == inspect.signature(declared) and public.__doc__ == declared.__doc__


@pytest.mark.parametrize("vendor", [None, "zili.ops.ascend", "zili.ops.nvidia"])
def test_a_version_takes_what_its_operation_declares(vendor):
    for version in ops.versions(vendor):
        declared = inspect.signature(registry.OPERATIONS[version.operation]).parameters.values()
        own = inspect.signature(version.function).parameters.values()
        first = [(one.name, one.kind, one.default) for one in own][: len(declared)]
        assert first == [(one.name, one.kind, one.default) for one in declared], version
        assert all(one.default is not one.empty for one in list(own)[len(declared) :]), version
