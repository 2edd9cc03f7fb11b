"""What PyTorch offers on the same shapes: the textbook layer over named attention implementations.

A peer's name is `[compiled-]<attention>[-pad8]`: `eager` writes softmax(q k^T) v out; `math`, `flash`,
`cudnn` and `efficient` are scaled_dot_product_attention with that one backend allowed; `compiled-` puts the
layer through torch.compile; `-pad8` zero-pads head dims to a multiple of 8, which the fused backends demand.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from perceiver_kernels.cli.report import CommandError, unknown_name

SDPA = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ATTENTIONS = ("eager", *SDPA)
COMPILED = ("compiled-eager", "compiled-efficient", "compiled-cudnn")
# compiled-eager keeps the scores in memory as eager does; the other two are what torch.compile makes of a
# fused kernel.
PEERS = (*ATTENTIONS, *COMPILED)
CPU_PEERS = ("eager", "math", "flash")


@dataclass(frozen=True)
class Peer:
    """One stock implementation of attention."""

    attention: str
    compiled: bool = False
    padded: bool = False

    @property
    def name(self) -> str:
        return f"{'compiled-' if self.compiled else ''}{self.attention}{'-pad8' if self.padded else ''}"

    @classmethod
    def parse(cls, name: str) -> Peer:
        """Read a peer's name; CommandError with the nearest names for an unknown one."""
        core = name.removeprefix("compiled-").removesuffix("-pad8")
        if core not in ATTENTIONS:
            raise unknown_name("peer", name, [*PEERS, *(f"{peer}-pad8" for peer in PEERS)])
        return cls(core, name.startswith("compiled-"), name.endswith("-pad8"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention in layout [B, H, L, d], by this peer's method."""
        if not self.padded:
            return self._attend(q, k, v, scale)
        q, k, padded_v = (F.pad(tensor, (0, -tensor.shape[-1] % 8)) for tensor in (q, k, v))
        return self._attend(q, k, padded_v, scale)[..., : v.shape[-1]]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.attention == "eager":
            return torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1) @ v
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    def only(self) -> contextlib.AbstractContextManager[Any]:
        """Allow no other SDPA backend in the body."""
        return sdpa_kernel(SDPA[self.attention]) if self.attention in SDPA else contextlib.nullcontext()


def peers_for(
    names: Iterable[str] | None, head_dims: Iterable[int], device: torch.device, *, compiled: bool
) -> list[Peer]:
    """Return the peers asked for, or all that the device has.

    Args:
        names: names of peers; None for all.
        head_dims: where one is no multiple of 8, the padded variants come too.
        device: a CPU has neither cuDNN nor the memory-efficient kernel, and needs no padding.
        compiled: whether all includes torch.compile of the layer.
    """
    if names is not None:
        return [Peer.parse(name) for name in names]
    if device.type == "cpu":
        return [Peer.parse(name) for name in CPU_PEERS]
    peers = [Peer.parse(name) for name in PEERS if compiled or name not in COMPILED]
    odd = any(dim % 8 for dim in head_dims)
    return peers + [
        dataclasses.replace(peer, padded=True) for peer in peers if odd and peer.attention != "eager"
    ]


class StockCrossAttention(nn.Module):
    """LayerNorm -> q, k, v projections -> attention -> output projection, as a PyTorch user writes it.

    Parameter names are those of `perceiver_kernels.nn.CrossAttention`, so weights are shared by
    load_state_dict.
    """

    def __init__(self, case: Any, peer: Peer, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attend, self.num_heads = peer.attend, case.H
        self.norm_latents = nn.LayerNorm(case.D, **made)
        self.norm_inputs = nn.LayerNorm(case.C, **made)
        self.q_proj = nn.Linear(case.D, case.H * case.d_qk, **made)
        self.k_proj = nn.Linear(case.C, case.H * case.d_qk, **made)
        self.v_proj = nn.Linear(case.C, case.H * case.d_v, **made)
        self.out_proj = nn.Linear(case.H * case.d_v, case.D, **made)

    def forward(self, latents: Tensor, inputs: Tensor) -> Tensor:
        latents, inputs = self.norm_latents(latents), self.norm_inputs(inputs)
        q, k, v = (self.heads(t) for t in (self.q_proj(latents), self.k_proj(inputs), self.v_proj(inputs)))
        out = self.attend(q, k, v, q.shape[-1] ** -0.5)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def heads(self, tensor: Tensor) -> Tensor:
        """[B, L, H*d] -> [B, H, L, d]."""
        return tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def compiled(function: Callable[..., Any]) -> Any:
    """torch.compile a module or function: static shapes, as many variants as there are peers and passes."""
    try:
        import torch._dynamo as dynamo

        # Each is a variant of one forward; the default limit of 8 would send the ninth to eager.
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 64)
        return torch.compile(function, dynamic=False)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise CommandError(f"torch.compile is not available here: {error}") from error
