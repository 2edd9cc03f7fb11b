"""Calls of whole layers, ours beside the specification's: tensors as leaves, options, and dropout whose seed is known."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from perceiver_kernels.testing.targets import Target

SEED = torch.tensor([-77])


def know_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout of ours is drawn with SEED from here on."""
    for name in ("attention", "chunked"):
        module = sys.modules[f"perceiver_kernels.functional.{name}"]
        monkeypatch.setattr(module, "dropout_seed", lambda p, device: SEED.to(device) if p else None)


@dataclass
class Layer:
    """Every tensor of one call, as leaves; ``upstream`` gives what an output is differentiated with."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    upstream: Callable[[Tensor], Tensor]

    @classmethod
    def on(
        cls, target: Target, drawn: dict[str, Tensor], options: dict[str, Any], upstream: Callable[[Tensor], Tensor]
    ) -> Layer:
        """Drawn tensors in the dtype and on the device of ``target``, where options lie too."""
        tensors = {name: value.to(target.device, target.dtype) for name, value in drawn.items()}
        moved = {name: v.to(target.device) if isinstance(v, Tensor) else v for name, v in options.items()}
        return cls(tensors, moved, upstream)

    def without(self, *names: str) -> Layer:
        return replace(self, tensors={name: value for name, value in self.tensors.items() if name not in names})

    def specified(self) -> Layer:
        """The same for the specification, which is given the seed of dropout."""
        if not self.options.get("dropout_p"):
            return self
        seed = SEED.to(next(iter(self.tensors.values())).device)
        return replace(self, options={**self.options, "dropout_seed": seed})

    def run(self, function: Any, dtype: torch.dtype | None = None, **more: Any) -> dict[str, Tensor]:
        """The output and the gradient of every tensor that it depends on."""
        leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in self.tensors.items()}
        out = function(**leaves, **self.options, **more)
        gradients = torch.autograd.grad(out, list(leaves.values()), self.upstream(out), allow_unused=True)
        found = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {"out": out.detach(), **{name: g for name, g in found.items() if g is not None}}
