"""Functions derived from the specification, for the backends that compose torch's operations.

Chunked attention drives every backend through pairs of forward and backward; those that torch differentiates take them here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels import reference
from perceiver_kernels.layouts import heads_inside_rows


def pack_inputs_forward(
    content: Tensor, positions: Tensor | None, fourier: Tensor | None, key_mask: Tensor | None, *, normalize: bool,
    eps: float, dtype: torch.dtype, constants: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    packed, rstd = reference.pack_inputs(
        content, positions, fourier, key_mask=key_mask, normalize=normalize, eps=eps, constants=constants, dtype=dtype
    )
    return packed, rstd if normalize else rstd.new_empty(0)


def pack_inputs_backward(
    dpacked: Tensor, packed: Tensor, rstd: Tensor, *, content_channels: int, channels: int, normalize: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """LayerNorm's backward in terms of its output: rstd (dy - mean(dy) - x_hat mean(dy x_hat)), content channels only."""
    dy = dpacked[..., :channels].to(torch.promote_types(dpacked.dtype, torch.float32))
    if normalize:
        x_hat = packed[..., :channels].to(dy.dtype)
        dy = dy - dy.mean(-1, keepdim=True) - x_hat * (dy * x_hat).mean(-1, keepdim=True)
        dy = dy * rstd[..., None]
    return dy[..., :content_channels].to(dtype, copy=True, memory_format=torch.contiguous_format)


def _weights(
    q: Tensor, x: Tensor, lse: Tensor, key_mask: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None,
    key_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention weights p given their lse, and the factors that dropout puts on them: [B, R, M] each."""
    scores = scale * (q @ x.mT)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, :], -torch.inf)
    p = torch.exp(scores - torch.where(lse == -torch.inf, torch.inf, lse)[..., None])
    if dropout_p == 0.0:
        return p, torch.ones((), dtype=p.dtype, device=p.device)
    keep = reference.dropout_keep(seed, *p.shape, dropout_p, key_offset=key_offset, device=p.device)
    return p, keep.to(p.dtype) / (1 - dropout_p)


def shared_kv_attention_forward(
    q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, *, scale: float, dropout_p: float,
    dropout_seed: Tensor | None, key_offset: int, state: tuple[Tensor, Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(z, lse, rho), continued from the ``state`` of earlier keys where one is given."""
    z, lse, rho = reference.shared_kv_attention(
        q, x, key_mask=key_mask, lengths=lengths, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed,
        key_offset=key_offset,
    )  # fmt: skip
    if state is not None:
        z_state, lse_state, rho_state = state
        total = torch.logaddexp(lse, lse_state)
        safe = torch.where(total == -torch.inf, torch.inf, total)
        new, old = torch.exp(lse - safe), torch.exp(lse_state - safe)
        z = new[..., None] * z + old[..., None] * z_state
        lse, rho = total, new * rho + old * rho_state
    return z.to(out_dtype or q.dtype), lse, rho


def shared_kv_attention_delta(
    dz: Tensor, z: Tensor, dlse: Tensor | None, drho: Tensor | None, rho: Tensor
) -> Tensor:
    """delta = dz.z + drho rho - dlse, [B, R] in the dtype of rho."""
    delta = (dz.to(rho.dtype) * z.to(rho.dtype)).sum(-1)
    delta = delta if drho is None else delta + drho * rho
    return delta if dlse is None else delta - dlse


def shared_kv_attention_backward(
    dz: Tensor, delta: Tensor, drho: Tensor | None, q: Tensor, x: Tensor, lse: Tensor, key_mask: Tensor | None,
    lengths: Tensor | None, *, scale: float, dropout_p: float, dropout_seed: Tensor | None, key_offset: int,
    needs_dq: bool, needs_dx: bool, dq_sum: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """ds = p (d (dz x^T + drho) - delta), dq = scale ds x, dx = scale ds^T q + (d p)^T dz.

    dq is added to ``dq_sum`` [B, R, C] in place where one is given, and that tensor is returned for it.
    """
    if lengths is not None:
        key_mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    wide = lse.dtype
    dz_w, q_w, x_w = dz.to(wide), q.to(wide), x.to(wide)
    p, factor = _weights(q_w, x_w, lse, key_mask, scale, dropout_p, dropout_seed, key_offset)
    dp = dz_w @ x_w.mT
    if drho is not None:
        dp = dp + drho[..., None]
    ds = scale * p * (factor * dp - delta[..., None])
    dq = None
    if needs_dq:
        dq = (ds @ x_w).to(q.dtype) if dq_sum is None else dq_sum.add_(ds @ x_w)
    dx = (ds.mT @ q_w + (factor * p).mT @ dz_w).to(x.dtype) if needs_dx else None
    return dq, dx


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, inverse: bool) -> Tensor:
    """The specification on x [B, H, L, d]; the result lies in memory as layouts.empty_heads has it."""
    if heads_inside_rows(x):
        rows = reference.rotary_embedding(
            x.transpose(1, 2), cos.unsqueeze(-2), sin.unsqueeze(-2), interleaved=interleaved, inverse=inverse
        )
        return rows.transpose(1, 2)
    return reference.rotary_embedding(x, cos.unsqueeze(-3), sin.unsqueeze(-3), interleaved=interleaved, inverse=inverse)
