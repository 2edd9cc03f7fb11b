"""The textbook, softmax(q k^T) v written out, streamed so that cases of any size fit.

In fp64 it is the specification, in any other dtype what eager PyTorch gives. A layer and shared keys stream
through the inputs and merge the parts by their log-sum-exp; the parts are recomputed in the backward, never
stored. Attention over given keys and values streams through the rows of its queries, which are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.cli.stock import StockCrossAttention, eager

PART_BYTES = 2**30
"""Bytes that the largest array of one part may take; its softmax and backward hold a few of that size."""


class Textbook(torch.nn.Module):
    """The textbook layer, LayerNorm -> project -> attend -> project, streamed over parts of the inputs."""

    def __init__(self, layer: StockCrossAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, latents: Tensor, inputs: Tensor | pk.InputArray) -> Tensor:
        layer = self.layer
        q = layer.heads(layer.q_proj(layer.norm_latents(latents)))

        def attend(x: Tensor) -> tuple[Tensor, Tensor]:
            x = layer.norm_inputs(x)
            return _attend(q, layer.heads(layer.k_proj(x)), layer.heads(layer.v_proj(x)), q.shape[-1] ** -0.5)

        width = max(q.shape[1] * q.shape[2], 3 * layer.k_proj.in_features)
        out = _streamed(attend, inputs, self.dtype, width, latents.device)
        return layer.out_proj(out.transpose(1, 2).flatten(2))


def shared_kv(which: str, q: Tensor, x: Tensor, dz: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """Return what a pass over shared keys and values gives: z ("attend"), its "dq" or its "dx"."""
    q = q.to(dtype)
    if which == "attend":
        with torch.no_grad():
            return [_shared(q, x, dtype)]
    wanted = (q if which == "dq" else x.to(dtype)).detach().requires_grad_()
    z = _shared(wanted, x, dtype) if which == "dq" else _shared(q, wanted, dtype)
    return torch.autograd.grad(z, wanted, dz.to(dtype))


def attention(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, *, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d_qk)) v, streamed over the rows of q; causal: the last row sees all keys, each before one less."""
    k, v = k.to(dtype), v.to(dtype)
    out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=dtype)
    size = _rows(q, k, v)
    with torch.no_grad():
        for start, rows, filled in zip(range(0, q.shape[-2], size), q.split(size, -2), out.split(size, -2), strict=True):
            filled.copy_(_attend_rows(rows.to(dtype), k, v, start - q.shape[-2] if causal else None))
    return out


def attention_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dtype: torch.dtype, *, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attention`; what the parts add to dk and dv is summed in fp32, as within one product."""
    k, v = (tensor.to(dtype).detach().requires_grad_() for tensor in (k, v))
    dq = torch.empty_like(q, dtype=dtype)
    dk, dv = (torch.zeros_like(t, dtype=torch.promote_types(dtype, torch.float32)) for t in (k, v))
    size = _rows(q, k, v)
    parts_of = (tensor.split(size, -2) for tensor in (q, dq, dout))
    for start, rows, filled, gradient in zip(range(0, q.shape[-2], size), *parts_of, strict=True):
        rows = rows.to(dtype).detach().requires_grad_()
        out = _attend_rows(rows, k, v, start - q.shape[-2] if causal else None)
        parts = torch.autograd.grad(out, (rows, k, v), gradient.to(dtype))
        filled.copy_(parts[0])
        dk += parts[1]
        dv += parts[2]
    return dq, dk.to(dtype), dv.to(dtype)


def _rows(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Rows of a part: its scores, or what it reads and gives, take PART_BYTES."""
    width = max(k.shape[-2], 3 * max(k.shape[-1], v.shape[-1]))
    return max(1, PART_BYTES // (q.shape[0] * q.shape[1] * width * k.dtype.itemsize))


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, behind: int | None) -> Tensor:
    """Rows of an attention; of a causal one, how many places behind the last key the first of them stands, as -1 and less."""
    scale, mask = q.shape[-1] ** -0.5, None
    if behind is not None:
        places = torch.arange(q.shape[-2], device=q.device) + k.shape[-2] + behind
        mask = torch.arange(k.shape[-2], device=q.device) <= places[:, None]
    if q.dtype == torch.float64:
        return reference.attention(q, k, v, scale=scale, attn_mask=mask)[0]
    return eager(q, k, v, scale, mask)


def _shared(q: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax(q x^T) x, streamed over x."""

    def attend(part: Tensor) -> tuple[Tensor, Tensor]:
        return _attend(q, part, part, 1.0)

    return _streamed(attend, x, dtype, max(q.shape[1], 3 * q.shape[2]), q.device)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse): the specification in fp64, else softmax(q k^T) v as eager PyTorch has it."""
    if q.dtype == torch.float64:
        out, lse = reference.attention(*(t if t.ndim == 4 else t[:, None] for t in (q, k, v)), scale=scale)
        return (out, lse) if q.ndim == 4 else (out[:, 0], lse[:, 0])
    scores = q @ k.transpose(-1, -2) * scale
    return scores.softmax(-1) @ v, scores.float().logsumexp(-1)


def _streamed(
    attend: Callable[[Tensor], tuple[Tensor, Tensor]], inputs: Any, dtype: torch.dtype, width: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Attend to parts of the inputs, recomputed in the backward: out = sum_c exp(lse_c - lse) out_c."""
    batch, length = (inputs.batch, inputs.length) if isinstance(inputs, pk.InputArray) else inputs.shape[:2]
    size = max(1, PART_BYTES // (batch * width * dtype.itemsize))
    if size >= length:
        return attend(_part(inputs, 0, length, dtype, device))[0]

    def part(start: int) -> tuple[Tensor, Tensor]:
        return attend(_part(inputs, start, min(start + size, length), dtype, device))

    outs, lses = zip(
        *(checkpoint(part, start, use_reentrant=False) for start in range(0, length, size)), strict=True
    )
    weights = torch.stack(lses).softmax(0)[..., None]
    return sum(weight * out for weight, out in zip(weights, outs, strict=True)).to(dtype)


def _part(inputs: Any, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Tokens start..stop as a textbook layer reads them, [B, m, C], positions written out."""
    if not isinstance(inputs, pk.InputArray):
        return inputs[:, start:stop].to(dtype)
    part = inputs.slice(start, stop, device=device, dtype=dtype)
    plain: dict[str, Any] = {"normalize": False, "channels_multiple": 1, "dtype": dtype}
    return reference.pack_inputs(part.content, part.positions, part.fourier, **plain)[0]
