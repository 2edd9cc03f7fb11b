"""One case of more input channels than absorption takes: a whole layer that computes keys and values of every input."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

import perceiver_kernels as pk
from perceiver_kernels.cli.measure import Call
from perceiver_kernels.cli.stock import Peer, StockCrossAttention
from perceiver_kernels.cli.subject import OURS
from perceiver_kernels.cli.workload import Workload
from perceiver_kernels.integrations.assembly import output_attention_of
from perceiver_kernels.nn import OutputCrossAttention
from perceiver_kernels.testing.cases import EncodeCase


@dataclass(frozen=True)
class WideCase(EncodeCase):
    """An encode case that is projected: its layer has neither packed inputs nor a chunked form."""

    passes: ClassVar[tuple[str, ...]] = ("forward", "backward", "backward-inputs")
    chunks: ClassVar[bool] = False


class WideWorkload(Workload):
    """Tensors and layers of a `WideCase`; arguments as `Workload` has them.

    Our layer is the one that `replace_attention` puts where inputs are too wide for `nn.CrossAttention`, over the modules of
    the textbook layer, whose names stand for its weights.
    """

    def _our_layer(self, **changes: Any) -> Any:
        return StockCrossAttention(self.case, Peer("eager"), device=self.device, dtype=self.dtype)

    @functools.cached_property
    def projected_layer(self) -> OutputCrossAttention:
        """Our layer, of the same parameters in the same order."""
        layer = self.layer
        return output_attention_of(
            norm_queries=layer.norm_latents, norm_latents=layer.norm_inputs, q_proj=layer.q_proj, k_proj=layer.k_proj,
            v_proj=layer.v_proj, out_proj=layer.out_proj, num_heads=self.case.H, residual=False,
        )  # fmt: skip

    def ours(self, which: str) -> Call:
        """Return our callable for a pass of the whole layer."""
        return self.layer_call(which, self.projected_layer, self.inputs)

    def calls(self, which: str, peers: Sequence[Peer]) -> dict[str, Call]:
        """Return ours and the peers' callables for a pass."""
        return {OURS: self.ours(which)} | {peer.name: self.stock(which, peer) for peer in peers}

    def choice(self, which: str) -> tuple[Literal["absorbed", "projected"], str]:
        """Return the method and the backend of our callable."""
        case, layer = self.case, self.layer
        differentiable = which.startswith("backward")
        key, value = (
            self.inputs.new_empty(case.B, case.H, case.M, width, requires_grad=differentiable)
            for width in (case.d_qk, case.d_v)
        )
        with torch.set_grad_enabled(differentiable):
            explained = pk.explain(
                "output_cross_attention", self.latents, key, value, layer.q_proj.weight, layer.out_proj.weight
            )
        return explained.plan.method, str(explained.backend)
