"""scaled_dot_product_attention on the samples with which torch tests its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels import scaled_dot_product_attention, use_backend
from perceiver_kernels.testing import assert_as_accurate
from perceiver_kernels.testing.targets import Target, only
from tests.functional.test_sdpa import eager, torchs

OP = "attention"
NAME = "nn.functional.scaled_dot_product_attention"


@dataclass
class Sample:
    """One call: query, key, value, and what else it is given."""

    tensors: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dropped(self) -> bool:
        return self.options.get("dropout_p", 0.0) > 0

    def signature(self) -> str:
        options = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return f"{[tuple(tensor.shape) for tensor in self.tensors]} {sorted(options.items())}"


def generated(device: str, dtype: torch.dtype) -> list[Sample]:
    """torch's samples, written out: three and four axes, a query without batch, causal or not, dropped out or not, a mask."""

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).uniform_(-9, 9).requires_grad_()

    four, keys = (4, 4, 3, 8), (4, 4, 6, 8)
    shapes = [((4, 3, 8), (4, 6, 8)), (four, keys), ((4, 3, 8), keys)]
    samples = [
        Sample([make(*q), make(*kv), make(*kv)], {"is_causal": is_causal, "dropout_p": dropout_p})
        for (q, kv), is_causal, dropout_p, _ in product(shapes, (True, False), (0.0, 0.5), range(2))
    ]
    masked = {"attn_mask": make(3, 6), "is_causal": False, "dropout_p": 0.0}
    return [*samples, Sample([make(*four), make(*keys), make(*keys)], masked)]


def torchs_own(device: str, dtype: torch.dtype) -> list[Sample] | None:
    """The samples of torch's OpInfo; None where torch's test modules, or what they import, are not installed."""
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ImportError:
        return None
    (entry,) = (entry for entry in op_db if entry.name == NAME)
    found = entry.sample_inputs(device, dtype, requires_grad=True)
    return [Sample([sample.input, *sample.args], dict(sample.kwargs)) for sample in found]


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    return torchs_own(device, dtype) or generated(device, dtype)


def results(function: Any, sample: Sample, dtype: torch.dtype, learned_mask: bool) -> list[Tensor]:
    """The output and the gradient of everything that requires one; of a mask only where it is learned."""
    cast = {
        k: v.detach().to(dtype).requires_grad_(learned_mask) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in sample.options.items()
    }
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in sample.tensors]
    out = function(*tensors, **cast)
    leaves = tensors + [value for value in cast.values() if isinstance(value, Tensor) and value.requires_grad]
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(out.shape, generator=generator).to(sample.tensors[0].detach()).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def fused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """torch's function on four axes, for which it has fused kernels: where one key takes all, less accurate than eager."""
    leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    tensors = [tensor.expand(*leading, *tensor.shape[-2:]) for tensor in (query, key, value)]
    if len(leading) == 2:
        return F.scaled_dot_product_attention(*tensors, **options)
    return F.scaled_dot_product_attention(*(tensor[:, None] for tensor in tensors), **options)[:, 0]


def test_agrees_with_torch(target: Target) -> None:
    """Value and gradients against torch in fp64; twelve samples draw random numbers, whose shape alone is compared.

    As accurate as eager PyTorch, or, where torch's fused kernels serve, as they are.
    """
    found, learned = samples(target.device, target.dtype), not target.is_kernel
    assert len(found) >= 25 and sum(sample.dropped for sample in found) == 12
    for sample in found:
        with use_backend(target.backend):
            if sample.dropped:
                out = scaled_dot_product_attention(*sample.tensors, **sample.options)
                assert out.shape == torchs(*sample.tensors, **sample.options).shape and out.isfinite().all()
                continue
            actual = results(scaled_dot_product_attention, sample, target.dtype, learned)
        oracle = results(torchs, sample, torch.float64, learned)
        near = results(fused if target.backend == "sdpa" else eager, sample, target.dtype, learned)
        for each, other, truth in zip(actual, near, oracle, strict=True):
            assert_as_accurate(each, other, truth, f"{target} {sample.signature()}")


@only(torch.float32)
def test_agrees_with_torch_in_float64(target: Target) -> None:
    if target.is_kernel:
        pytest.skip("kernels do not take float64")
    for sample in samples(target.device, torch.float64):
        if not sample.dropped:
            with use_backend(target.backend):
                actual = results(scaled_dot_product_attention, sample, torch.float64, True)
            torch.testing.assert_close(actual, results(torchs, sample, torch.float64, True), rtol=1e-12, atol=1e-12)


def test_written_out_samples_are_torchs() -> None:
    theirs = torchs_own("cpu", torch.float32)
    if theirs is None:
        pytest.skip("torch's test modules, or what they import, are not installed")
    for sample in theirs:
        # What torch 2.13 makes twice has enable_gqa once in torch 2.14, for as many heads of keys as of queries.
        sample.options.pop("enable_gqa", None)
    written = [sample.signature() for sample in generated("cpu", torch.float32)]
    assert sorted(written) == sorted(sample.signature() for sample in theirs)
