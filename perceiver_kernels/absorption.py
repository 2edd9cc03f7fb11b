"""The algebra that moves the projections of long arrays, inputs or output queries, to the latents, where they are small.

Per head, with x_hat the input normalised without LayerNorm's affine part (weight g, bias b):

    k_j = W_k (g x_hat_j + b) + b_k,    scale q_i . k_j = q'_i . x_hat_j + const_i,    q'_i = scale g (W_k^T q_i)
    z_i = sum_j p_ij x_hat_j,    rho_i = sum_j p_ij,    out_i = W_v (g z_i + b rho_i) + b_v rho_i

softmax over j drops const_i, so the key bias and b (through W_k) vanish from the scores. docs/encode.md derives it.

The dual, with y_hat the normalised output queries of one head, which read keys k_j and values v_j:

    scale q_i . k_j = scale (y_hat_i . key'_j + beta_j),    key'_j = g (W_q^T k_j),    beta_j = (W_q b + b_q) . k_j

beta_j differs from key to key and stays: two channels of key' hold it, where y_hat has ones. docs/decode.md derives it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from perceiver_kernels.checks import autocasts
from perceiver_kernels.ops.boundary import transforms_active

T = TypeVar("T", Tensor, "Tensor | None")


class _ZeroGradient(Function):
    """Identity in ``value``; ``parameter`` takes part with a gradient that is exactly zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros_like(ctx.saved_tensors[0])


class _ZeroGradientFunctorch(Function):
    """The same under functorch's transforms, which a ``forward`` with a context does not know."""

    @staticmethod
    def forward(value: Tensor, parameter: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    backward = staticmethod(_ZeroGradient.backward)

    @staticmethod
    def jvp(ctx: Any, value: Tensor, parameter: Tensor | None) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], value: Tensor, parameter: Tensor) -> tuple[Tensor, Any]:
        return value.view_as(value), in_dims[0]


def with_zero_gradient(value: Tensor, parameter: Tensor | None) -> Tensor:
    """``value``, with an exactly zero gradient to ``parameter`` where it wants one."""
    if parameter is None or not (torch.is_grad_enabled() and parameter.requires_grad):
        return value
    return (_ZeroGradientFunctorch if transforms_active() else _ZeroGradient).apply(value, parameter)


def _unfused() -> bool:
    """Whether results are left to the compiler to fuse; torch 2.11 loses the gradients of functions that write to ``out``."""
    return transforms_active() or torch.compiler.is_compiling()


class _ScaledProduct(Function):
    """(a b) g for 16-bit matrices a [R, K], b [K, C] on a GPU and g [C] or None: fp32 until one rounding at the end.

    The unscaled product is computed again in the backward, where g needs it, rather than kept in fp32.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, g: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b, g)
        product = torch.mm(a, b, out_dtype=torch.float32)
        if g is None or _unfused():
            return (product if g is None else product * g).to(a.dtype)
        return torch.mul(product, g, out=torch.empty_like(product, dtype=a.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        a, b, g = ctx.saved_tensors
        needs_a, needs_b, needs_g = ctx.needs_input_grad
        scaled = gradient if g is None else (gradient * g).to(a.dtype)
        dg = None
        if needs_g:
            if torch.is_grad_enabled():
                # torch has no derivative of a product with an out_dtype.
                with _without_autocast(a.device):
                    product = torch.mm(a.float(), b.float())
            else:
                product = torch.mm(a, b, out_dtype=torch.float32)
            dg = product.mul_(gradient).sum(0).to(g.dtype)
        return scaled @ b.mT if needs_a else None, a.mT @ scaled if needs_b else None, dg


class _NormedProduct(Function):
    """(z g + b) w^T + c per head: z [B, H*N, C] in fp32 or wider, g, b [C], w [H*d_v, C], c [H*d_v] or None to [B, H, N, d_v].

    z g + b is rounded once, by the kernel that computes it. The gradients of g and b add up, over all rows, products of z with
    a gradient that no store has rounded: where attention is nearly uniform the rows of z are nearly equal, and so is what
    rounding adds to the sum.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, g: Tensor, b: Tensor, w: Tensor, c: Tensor | None, H: int) -> Tensor:
        rows = _by_head(torch.addcmul(b, z, g, out=torch.empty_like(z, dtype=w.dtype)), H)
        if H == 1:
            out = F.linear(rows, w, c)
        else:
            out = torch.bmm(rows, w.view(H, -1, w.shape[-1]).mT)
            out = out if c is None else out.add_(c.view(H, 1, -1))
        ctx.save_for_backward(z, g, b, w, rows)
        return _by_batch(out, z.shape[0], z.shape[1] // H)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, g, b, w, rows = ctx.saved_tensors
        H, differentiable = rows.shape[0], torch.is_grad_enabled()
        if differentiable:
            rows = _by_head(torch.addcmul(b, z, g).to(w.dtype), H)
        weight = w.view(H, -1, w.shape[-1])
        needs_z, needs_g, needs_b, needs_w, needs_c, _ = ctx.needs_input_grad
        gradient = gradient.transpose(0, 1).flatten(1, 2)  # [H, B*N, d_v]
        dw = torch.bmm(gradient.mT, rows).view_as(w) if needs_w else None
        dc = gradient.sum(1).flatten() if needs_c else None
        if w.is_cuda and w.dtype.itemsize == 2 and not differentiable:
            drows = torch.bmm(gradient, weight, out_dtype=torch.float32)
        else:
            with _without_autocast(w.device):
                drows = torch.bmm(gradient.to(z.dtype), weight.to(z.dtype))
        drows = _by_batch(drows, z.shape[0], z.shape[1] // H).flatten(1, 2)
        dg = (drows * z).sum((0, 1)).to(g.dtype) if needs_g else None
        db = drows.sum((0, 1)).to(b.dtype) if needs_b else None
        return drows * g if needs_z else None, dg, db, dw, dc, None


def _by_head(rows: Tensor, H: int) -> Tensor:
    """[B, H*N, C] to [H, B*N, C]: one product per head over the rows of the whole batch sums a weight's gradient in fp32."""
    return rows.unflatten(1, (H, -1)).transpose(0, 1).flatten(1, 2)


def _by_batch(rows: Tensor, B: int, N: int) -> Tensor:
    """[H, B*N, C] to [B, H, N, C]; N cannot be told from a batch of none."""
    return rows.unflatten(1, (B, N)).transpose(0, 1)


def pad_to(tensor: T, channels: int) -> T:
    """``tensor`` (None stays None) with zeros after its last axis up to ``channels``."""
    if tensor is None or tensor.shape[-1] == channels:
        return tensor
    return F.pad(tensor, (0, channels - tensor.shape[-1]))


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products inside keep the dtype of their operands; entering torch.autocast costs 2 us, so only where it is on."""
    on = autocasts(device)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def absorb_queries(q: Tensor, w_k: Tensor, norm_weight: Tensor | None, channels: int, dtype: torch.dtype) -> Tensor:
    """q' = g (W_k^T q) per head, heads folded into rows: [B, H, N, d_qk] to [B, H*N, channels].

    The product is accumulated and scaled in fp32 (fp64 for fp64) and rounded to ``dtype`` once; columns past C are zero.
    """
    B, H, N, d_qk = q.shape
    weight, scale = pad_to(w_k, channels), pad_to(norm_weight, channels)
    half = q.dtype in (torch.bfloat16, torch.float16)
    if H == 1 and half and q.is_cuda and q.dtype == weight.dtype == dtype and not transforms_active():
        return _ScaledProduct.apply(q[:, 0].flatten(0, 1), weight, scale).unflatten(0, (B, N))
    wide = torch.promote_types(q.dtype, torch.float32)
    with _without_autocast(q.device):
        absorbed = torch.matmul(q.to(wide), weight.to(wide).view(H, d_qk, channels)).view(B, H * N, channels)
    if scale is not None:
        absorbed = absorbed * scale
    return absorbed.to(dtype)


def fold_norm(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, channels: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(W g, W b + bias) so that W (g x_hat + b) + bias is one product of the packed inputs: [rows, channels] and [rows].

    Folded in fp32 and rounded once: no normalised copy of the inputs is made.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    full = pad_to(weight, channels).to(wide)
    shift = _shift(full, bias, norm_bias)
    if norm_weight is not None:
        full = full * pad_to(norm_weight, channels).to(wide)
    return full.to(dtype), shift.to(dtype)


def _shift(weight: Tensor, bias: Tensor | None, norm_bias: Tensor | None) -> Tensor:
    """W b + bias of a weight [rows, channels] in fp32 or wider, in its dtype."""
    shift = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(weight.dtype)
    if norm_bias is None:
        return shift
    with _without_autocast(weight.device):
        return shift + weight @ pad_to(norm_bias, weight.shape[1]).to(weight.dtype)


def bias_channels(bias: Tensor | None, norm_bias: Tensor | None, dtype: torch.dtype) -> int:
    """Channels that ``absorb_keys`` needs for the biases of queries: 16-bit keys hold them in two parts."""
    return 0 if bias is None and norm_bias is None else 2 if dtype.itemsize == 2 else 1


def absorb_keys(
    key: Tensor, w_q: Tensor, b_q: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, C: int, channels: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """key' = g (W_q^T k) of one head, then (W_q b + b_q) . k in the channels from C on: [B, 1, N, d_qk] to the same, channels.

    Accumulated in fp32 (fp64 for fp64). What is rounded to ``dtype`` is rounded once; the bias is kept as a rounded part and
    what that leaves, so that it is as exact as its sum: it adds to every score.
    """
    absorbed = absorb_queries(key, w_q, norm_weight, channels, dtype)[:, None]  # [B, 1, N, channels]
    count = bias_channels(b_q, norm_bias, dtype)
    if not count:
        return absorbed
    wide = torch.promote_types(key.dtype, torch.float32)
    with _without_autocast(key.device):
        bias = key.to(wide) @ _shift(w_q.to(wide), b_q, norm_bias)[:, None]  # [B, 1, N, 1]
    parts = [bias.to(dtype)]
    if count == 2:
        # The gradient flows through the first part alone: together the two are one number.
        parts.append((bias - parts[0]).detach().to(dtype))
    return torch.cat([absorbed[..., :C], *parts, absorbed[..., C + count :]], -1)


def project_values(
    z: Tensor, rho: Tensor | None, H: int, w_v: Tensor, b_v: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """out = W_v (g z + b rho) + b_v rho per head: z [B, H*N, C_padded], rho [B, H*N] or None for 1, to [B, H, N, d_v].

    Columns of z past C are zero and meet zero columns of W_v: nothing is sliced.
    """
    B, N, channels = z.shape[0], z.shape[1] // H, z.shape[2]
    weight, scale, shift = (pad_to(t, channels) for t in (w_v, norm_weight, norm_bias))
    b_v = None if b_v is None else b_v.to(w_v.dtype)
    if scale is not None and shift is not None and rho is None and not _unfused():
        return _NormedProduct.apply(z, scale, shift, weight, b_v, H)
    z = z if scale is None else z * scale
    if shift is not None:
        z = z + (shift if rho is None else shift * rho[..., None])
    z = z.to(w_v.dtype)
    if H == 1:
        out = F.linear(z, weight, b_v if rho is None else None)[:, None]  # [B, 1, N, d_v]
    else:
        out = _by_batch(torch.bmm(_by_head(z, H), weight.view(H, -1, channels).mT), B, N)
        if b_v is not None and rho is None:
            out = out + b_v.view(H, 1, -1)
    if b_v is not None and rho is not None:
        out = out + (b_v.view(H, 1, -1) * rho.view(B, H, N, 1)).to(out.dtype)
    return out
