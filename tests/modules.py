"""What tests do to layers and models, ours and other libraries'."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def randomised(module: Module, seed: int = 0) -> Module:
    """The module itself, its parameters drawn anew and as large as at a start; norms' weights lie about one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5
        parameter.data = noise * scale + (1.0 if parameter.data.eq(1).all() else 0.0)
    return module


def perturbed(module: Module, seed: int = 0, scale: float = 0.3) -> Module:
    """The module itself with noise on every parameter: no bias is zero and no norm's weight is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return module


def result_and_gradients(run: Any, module: nn.Module, *leaves: Tensor) -> dict[str, Tensor]:
    """The output of ``run(*leaves)`` and its gradients, by name, for one fixed upstream gradient."""
    named = dict(module.named_parameters()) | {f"leaf {i}": leaf for i, leaf in enumerate(leaves)}
    out = run(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    gradients = torch.autograd.grad(out, list(named.values()), upstream)
    return {"out": out.detach(), **dict(zip(named, gradients, strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], roundings: int = 256) -> None:
    """Equal up to ``roundings`` of the dtype, relative to the largest element of each tensor."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        # A key bias shifts all scores of a row alike: its gradient is rounding of what the weight's gradient sums.
        scale = expected[name.replace("k_proj.bias", "k_proj.weight")].abs().max().item()
        atol = roundings * torch.finfo(tensor.dtype).eps * scale
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
