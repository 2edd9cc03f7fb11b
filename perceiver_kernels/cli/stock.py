"""What is offered on the same shapes: the textbook layer over named attention implementations.

A peer's name is `[compiled-]<attention>[-pad8]`: `eager` writes softmax(q k^T) v out; `math`, `flash`,
`cudnn` and `efficient` are scaled_dot_product_attention with that one backend allowed; `flex` is flex_attention
put through torch.compile; `ffpa`, `xformers` and `flash-attn` are the packages ffpa-attn, xformers and flash-attn;
`transformers` and `perceiver-pytorch` are the layers of those packages; `compiled-` puts the layer through
torch.compile; `-pad8` zero-pads head dims to a multiple of 8, which the fused backends demand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from perceiver_kernels.cli.report import CommandError, unknown_name

SDPA = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LIBRARIES = {"ffpa": "ffpa_attn", "xformers": "xformers", "flash-attn": "flash_attn"}
"""Peers of packages of their own, and what they are imported as."""
ORIGINALS = ("transformers", "perceiver-pytorch")
"""Of layers and whole models: what has no attention over given queries, keys and values."""
WHOLE = (*ORIGINALS, "sdpa", "original")
"""Those of whole models: `sdpa` is our model over PyTorch's own attention, `original` another library's as it was."""
ATTENTIONS = ("eager", *SDPA, "flex", *LIBRARIES, *WHOLE)
COMPILED = ("compiled-eager", "compiled-efficient", "compiled-cudnn")
# compiled-eager keeps the scores in memory as eager does; the other two are what torch.compile makes of a
# fused kernel.
PEERS = ("eager", *SDPA, *COMPILED, *LIBRARIES)
"""Of a layer, and of attention over one tensor that serves as keys and values."""
LAYER_PEERS = (*PEERS, *ORIGINALS)
"""Of whole layers."""
ATTENTION_PEERS = ("flash", "cudnn", "efficient", "math", "flex", *LIBRARIES, "compiled-eager")
"""Of attention over given keys and values."""
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
        if core not in ATTENTIONS or (core in WHOLE and name.endswith("-pad8")):
            known = dict.fromkeys((*PEERS, *ATTENTION_PEERS))
            raise unknown_name("peer", name, [*known, *(f"{peer}-pad8" for peer in known), *WHOLE])
        return cls(core, name.startswith("compiled-"), name.endswith("-pad8"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> Tensor:
        """Attention in layout [B, H, L, d], by this peer's method; causal: the last query sees all keys."""
        if not self.padded:
            return self._attend(q, k, v, scale, causal)
        q, k, padded_v = (F.pad(tensor, (0, -tensor.shape[-1] % 8)) for tensor in (q, k, v))
        return self._attend(q, k, padded_v, scale, causal)[..., : v.shape[-1]]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        Lq, Lk, shared = q.shape[-2], k.shape[-2], k.shape[1] != q.shape[1]
        if self.attention == "eager":
            mask = torch.ones(Lq, Lk, dtype=torch.bool, device=q.device).tril(Lk - Lq) if causal else None
            return eager(q, k, v, scale, mask)
        if self.attention == "flex":
            mask = _block_mask(Lq, Lk, q.device) if causal else None
            return _flex_attention()(q, k, v, scale=scale, block_mask=mask, enable_gqa=shared)
        if self.attention in LIBRARIES:
            return _LIBRARY_CALLS[self.attention](q, k, v, scale, causal)
        if self.attention in WHOLE:
            raise ValueError(f"{self.attention} has no attention over given queries, keys and values")
        if causal and Lq != Lk:
            # Its own flag counts from the first key.
            return F.scaled_dot_product_attention(q, k, v, causal_lower_right(Lq, Lk), scale=scale, enable_gqa=shared)
        return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal, enable_gqa=shared)

    def only(self) -> contextlib.AbstractContextManager[Any]:
        """Allow no other SDPA backend in the body."""
        return sdpa_kernel(SDPA[self.attention]) if self.attention in SDPA else contextlib.nullcontext()


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T) v written out; keys and values are repeated for the heads that share them."""
    if shared := q.shape[1] // k.shape[1] - 1:
        k, v = (tensor.repeat_interleave(shared + 1, 1) for tensor in (k, v))
    # No name for the scores: they would be held beside the weights.
    return torch.softmax(_scores(q, k, scale, mask), dim=-1) @ v


def _scores(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


@functools.cache
def _block_mask(Lq: int, Lk: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: j <= i + (Lk - Lq), None, None, Lq, Lk, device=str(device))


@functools.cache
def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention)


def _ffpa_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """ffpa-attn's own kernels; which head dims it hands on is what its version 0.2.4 does."""
    attend = _imported("ffpa-attn", "ffpa_attn", "ffpa_attn_func")
    if not 256 < q.shape[-1] <= 1024:
        raise ValueError(
            f"ffpa-attn has kernels for head dims 257 to 1024 and hands others to SDPA, got {q.shape[-1]}"
        )
    if causal or k.shape[1] != q.shape[1]:
        raise ValueError("ffpa-attn is measured without a causal mask and without shared key heads")
    return attend(q, k, v, scale=scale)


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """The kernel that xformers picks, in its layout [B, L, H, d]."""
    attend = _imported("xformers", "xformers.ops", "memory_efficient_attention")
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"xformers wants a key head for each of {q.shape[1]} heads, got {k.shape[1]}")
    mask = {"attn_bias": _imported("xformers", "xformers.ops", "LowerTriangularFromBottomRightMask")()} if causal else {}
    return attend(*(tensor.transpose(1, 2) for tensor in (q, k, v)), scale=scale, **mask).transpose(1, 2)


def _flash_attn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """The package flash-attn, in its layout [B, L, H, d]."""
    attend = _imported("flash-attn", "flash_attn", "flash_attn_func")
    return attend(*(tensor.transpose(1, 2) for tensor in (q, k, v)), softmax_scale=scale, causal=causal).transpose(1, 2)


_LIBRARY_CALLS: dict[str, Callable[..., Tensor]] = {
    "ffpa": _ffpa_attention, "xformers": _xformers_attention, "flash-attn": _flash_attn_attention,
}  # fmt: skip


def _imported(package: str, module: str, name: str) -> Any:
    """A function of a package that may not be there, or not for this PyTorch."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, OSError, AttributeError) as error:
        raise RuntimeError(f"{package} cannot be imported: {error}") from error


def _is_installed(peer: Peer) -> bool:
    module = LIBRARIES.get(peer.attention)
    return module is None or importlib.util.find_spec(module) is not None


def peers_for(
    names: Iterable[str] | None, head_dims: Iterable[int], device: torch.device, *, compiled: bool,
    offered: Iterable[str] = PEERS,
) -> list[Peer]:  # fmt: skip
    """Return the peers asked for, or all that the device has.

    Args:
        names: names of peers; None for all.
        head_dims: where one is no multiple of 8, the padded variants come too, but of what is not installed.
        device: a CPU has neither cuDNN nor the memory-efficient kernel, and needs no padding.
        compiled: whether all includes what torch.compile makes.
        offered: all that a GPU has.
    """
    if names is not None:
        return [Peer.parse(name) for name in names]
    if device.type == "cpu":
        return [Peer.parse(name) for name in CPU_PEERS]
    peers = [Peer.parse(name) for name in offered if compiled or name not in (*COMPILED, "flex")]
    odd = any(dim % 8 for dim in head_dims)
    paddable = [peer for peer in peers if peer.attention not in ("eager", *WHOLE) and _is_installed(peer)]
    return peers + [dataclasses.replace(peer, padded=True) for peer in paddable if odd]


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


def compiled(function: Callable[..., Any], mode: str | None = None) -> Any:
    """torch.compile a module or function: static shapes, as many variants as there are peers and passes."""
    try:
        import torch._dynamo as dynamo

        # Each is a variant of one forward; the default limit of 8 would send the ninth to eager.
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 64)
        return torch.compile(function, dynamic=False, mode=mode)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise CommandError(f"torch.compile is not available here: {error}") from error
