"""sdpa_override: which calls come here, which stay torch's, and that torch's function comes back."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels import sdpa_override
from perceiver_kernels.functional import sdpa as ours
from perceiver_kernels.integrations import sdpa as overriding

TORCHS = F.scaled_dot_product_attention


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, 8, generator=generator, dtype=dtype).requires_grad_() for n in (5, 7, 7)]


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.arange(35).view(5, 7) % 3 > 0}], ids=str
)
def test_results_and_gradients(options: dict) -> None:
    q, k, v = tensors()
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    with sdpa_override() as calls:
        found = F.scaled_dot_product_attention(q, k, v, **options)
        assert (calls.ours, calls.torchs) == (1, 0)
        for a, e in zip(torch.autograd.grad(found.square().sum(), (q, k, v)), gradients, strict=True):
            torch.testing.assert_close(a, e)
    torch.testing.assert_close(found, expected)
    assert F.scaled_dot_product_attention is TORCHS


def test_torchs_modules_come_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    called, function = [], ours.scaled_dot_product_attention
    monkeypatch.setattr(
        overriding, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or function(*a, **k)
    )
    layer, x = nn.TransformerEncoderLayer(16, 4, dropout=0.0, batch_first=True), torch.randn(2, 5, 16)
    expected = layer(x)
    with sdpa_override() as calls:
        found = layer(x)
    torch.testing.assert_close(found, expected)
    assert called == [1] and calls.ours == 1


def test_what_ours_refuses_is_torchs() -> None:
    with sdpa_override() as calls:
        assert not F.scaled_dot_product_attention(*tensors(), dropout_p=1.0).any()
    assert calls.torchs == 1 and any("dropout_p" in reason for reason in calls.reasons)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_torchs(layout: torch.layout) -> None:
    shapes = [(n, 2, 8) for n in (3, 5)] if layout == torch.jagged else [(2, n, 8) for n in (3, 5)]
    nested = torch.nested.nested_tensor([torch.randn(*shape) for shape in shapes], layout=layout)
    if layout == torch.jagged:  # whose first axis is the ragged one
        nested = nested.transpose(1, 2)
    expected = F.scaled_dot_product_attention(nested, nested, nested)
    with sdpa_override() as calls:
        found = F.scaled_dot_product_attention(nested, nested, nested)
    for a, e in zip(found.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, e)
    assert calls.torchs == 1 and "nested" in str(calls.reasons).lower()


def test_wrong_arguments_fail_as_torchs_do() -> None:
    q, k, v = tensors()
    with sdpa_override(), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, k[..., :5], v)


def test_blocks_nest_and_end_with_an_error() -> None:
    q, k, v = tensors()
    with sdpa_override() as outer:
        with pytest.raises(KeyError), sdpa_override() as inner:
            F.scaled_dot_product_attention(q, k, v)
            raise KeyError
        assert F.scaled_dot_product_attention is not TORCHS
        F.scaled_dot_product_attention(q, k, v)
    assert (outer.ours, inner.ours) == (2, 1)
    assert F.scaled_dot_product_attention is TORCHS


def test_other_threads_blocks_end_by_themselves() -> None:
    q, k, v = tensors()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with sdpa_override():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    with sdpa_override() as calls:
        F.scaled_dot_product_attention(q, k, v)
    assert calls.ours == 1 and F.scaled_dot_product_attention is not TORCHS
    leave.set()
    thread.join()
    assert F.scaled_dot_product_attention is TORCHS


def test_compiled_code() -> None:
    q, k, v = tensors()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: F.scaled_dot_product_attention(*t).sin(), backend="aot_eager")
    expected = TORCHS(q, k, v).sin()
    with sdpa_override():
        torch.testing.assert_close(compiled(q, k, v), expected)
    torch._dynamo.reset()
