"""krasserm's perceiver-io, loaded without what its packages import, and how its models are compared with ours."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import convert

BACKENDS = {
    "core": "core.modules", "image": "vision.image_classifier", "flow": "vision.optical_flow", "language": "text.mlm",
    "classifier": "text.classifier",
}  # fmt: skip


def load() -> types.SimpleNamespace | None:
    """Its modules of torch alone: their packages import Lightning and a transformers of years ago, and stay unread."""
    spec = importlib.util.find_spec("perceiver")
    if spec is None or not (Path(spec.submodule_search_locations[0]) / "model" / "core" / "adapter.py").exists():
        return None
    root = Path(spec.submodule_search_locations[0])
    with pytest.MonkeyPatch.context() as patch:
        fairscale: Any = types.ModuleType("fairscale.nn")
        fairscale.checkpoint_wrapper = None
        patch.setitem(sys.modules, "fairscale", types.ModuleType("fairscale"))
        patch.setitem(sys.modules, "fairscale.nn", fairscale)
        for name in ("model.vision", "model.text", "model.text.common", *(f"model.{n}" for n in BACKENDS.values())):
            if not name.endswith("core.modules"):
                package = types.ModuleType(f"perceiver.{name}")
                package.__path__ = [str(root.joinpath(*name.split(".")))]
                patch.setitem(sys.modules, package.__name__, package)
        # What text.mlm and text.classifier read from the package of what they share.
        common = importlib.import_module("perceiver.model.text.common.backend")
        shared: Any = sys.modules["perceiver.model.text.common"]
        shared.TextEncoder, shared.TextEncoderConfig = common.TextEncoder, common.TextEncoderConfig
        found = {
            name: importlib.import_module(f"perceiver.model.{path}" + ("" if name == "core" else ".backend"))
            for name, path in BACKENDS.items()
        }
        found |= {part: importlib.import_module(f"perceiver.model.core.{part}") for part in ("position", "config", "adapter")}
    return types.SimpleNamespace(**found)


theirs = load()
needs_perceiver_io = pytest.mark.skipif(
    theirs is None, reason="perceiver-io 0.11 is not installed (pip install --no-deps --ignore-requires-python perceiver-io)"
)


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, data: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    leaf = data.clone().requires_grad_(data.is_floating_point())
    out = run(leaf)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(out)
    named = dict(model.named_parameters()) | ({"data": leaf} if leaf.requires_grad else {})
    found = torch.autograd.grad(out, list(named.values()), upstream)
    return {"out": out.detach(), **dict(zip(named, found, strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module) -> None:
    """Relative to the largest element of each; a key bias' gradient is rounding of what its weight's gradient sums."""
    given = {name: expected.pop(name) for name in ("out", "data") if name in expected}
    expected = given | convert.to_ours(convert.rules_of(model, "perceiver_io"), expected, model.state_dict())
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert wanted.any(), name
        scale = expected[name.replace("k_proj.bias", "k_proj.weight")].abs().max().item()
        atol = 4096 * torch.finfo(torch.float64).eps * scale
        torch.testing.assert_close(actual[name], wanted, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
