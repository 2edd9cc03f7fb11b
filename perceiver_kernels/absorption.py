"""The algebra that moves key and value projections from the inputs to the latents, where they are small.

Per head, with x_hat the input normalised without LayerNorm's affine part (weight g, bias b):

    k_j = W_k (g x_hat_j + b) + b_k,    scale q_i . k_j = q'_i . x_hat_j + const_i,    q'_i = scale g (W_k^T q_i)
    z_i = sum_j p_ij x_hat_j,    rho_i = sum_j p_ij,    out_i = W_v (g z_i + b rho_i) + b_v rho_i

softmax over j drops const_i, so the key bias and b (through W_k) vanish from the scores. docs/encode.md derives it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


class _ZeroGradient(Function):
    """Identity in ``value``; ``parameter`` takes part with a gradient that is exactly zero."""

    @staticmethod
    def forward(value: Tensor, parameter: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros_like(ctx.saved_tensors[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], value: Tensor, parameter: Tensor) -> tuple[Tensor, Any]:
        return value.view_as(value), in_dims[0]


def with_zero_gradient(value: Tensor, parameter: Tensor | None) -> Tensor:
    """``value``, with an exactly zero gradient to ``parameter`` where it wants one."""
    if parameter is None or not (torch.is_grad_enabled() and parameter.requires_grad):
        return value
    return _ZeroGradient.apply(value, parameter)


def absorb_queries(q: Tensor, w_k: Tensor, norm_weight: Tensor | None, channels: int, dtype: torch.dtype) -> Tensor:
    """q' = g (W_k^T q) per head, heads folded into rows: [B, H, N, d_qk] to [B, H*N, channels].

    The product is accumulated and scaled in fp32 (fp64 for fp64) and rounded to ``dtype`` once; columns past C are zero.
    """
    B, H, N, d_qk = q.shape
    C = w_k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    weight = w_k.to(wide).view(H, d_qk, C)
    if norm_weight is not None:
        weight = weight * norm_weight.to(wide)
    absorbed = torch.matmul(q.to(wide), weight).reshape(B, H * N, C)
    return F.pad(absorbed, (0, channels - C)).to(dtype) if channels != C else absorbed.to(dtype)


def project_values(
    z: Tensor, rho: Tensor | None, H: int, w_v: Tensor, b_v: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """out = W_v (g z + b rho) + b_v rho per head: z [B, H*N, >= C], rho [B, H*N] or None for 1, to [B, H, N, d_v]."""
    B, rows, _ = z.shape
    C = w_v.shape[1]
    z = z[..., :C]
    mean_input = z
    if norm_weight is not None:
        mean_input = z * norm_weight
    if norm_bias is not None:
        shift = norm_bias if rho is None else norm_bias * rho[..., None]
        mean_input = mean_input + shift
    mean_input = mean_input.to(w_v.dtype)
    if H == 1:
        bias = b_v if rho is None else None
        out = F.linear(mean_input, w_v, bias)[:, None]  # [B, 1, N, d_v]
    else:
        heads = mean_input.view(B, H, rows // H, C)
        out = torch.matmul(heads, w_v.view(H, -1, C).transpose(1, 2))
        if b_v is not None and rho is None:
            out = out + b_v.view(H, 1, -1)
    if b_v is not None and rho is not None:
        out = out + (b_v.view(H, 1, -1) * rho.view(B, H, rows // H, 1)).to(out.dtype)
    return out
