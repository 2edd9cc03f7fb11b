"""Compositions over torch.nn.functional.scaled_dot_product_attention: linear memory where torch has a fused kernel."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from perceiver_kernels.backends.composite import pack_inputs_backward, pack_inputs_forward
from perceiver_kernels.problem import AttentionProblem, Problem, SharedKVProblem, needs_gradient
from perceiver_kernels.reference import pack_inputs

__all__ = ["attention", "pack_inputs", "pack_inputs_backward", "pack_inputs_forward", "shared_kv_attention"]

COMPOSITE = True


def reasons_against(problem: Problem) -> list[str]:
    """Sentences that say why torch's attention cannot serve ``problem``."""
    reasons = []
    if isinstance(problem, (SharedKVProblem, AttentionProblem)) and problem.needs_lse:
        reasons.append("sdpa does not return lse")
    if isinstance(problem, SharedKVProblem) and problem.dropout:
        reasons.append("sdpa does not return the row sums of dropped-out weights, which absorbed values need")
    return reasons


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor on 16 bytes: torch's memory-efficient kernel faults on others (torch 2.11, fp32).

    A graph cannot ask for an offset; what it allocates is aligned, and inductor aligns its inputs.
    """
    if torch.compiler.is_compiling() or tensor.storage_offset() * tensor.element_size() % 16 == 0:
        return tensor
    return tensor.clone()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, None]:
    """torch's attention; dropout draws from torch's generator, so ``dropout_seed`` is not read."""
    if query.is_cuda:
        query, key, value = (_aligned(tensor) for tensor in (query, key, value))
    if key_mask is not None:
        attn_mask = key_mask[:, None, None, :]
        # What hidden tokens hold must not matter, and torch's kernels multiply it by 0, NaN included.
        key, value = (torch.where(attn_mask.mT, tensor, 0.0) for tensor in (key, value))
    # The memory-efficient kernel keeps what its backward reads only if another tensor than the mask needs a gradient
    # (pytorch#148476): torch's definition serves where none does.
    for_mask_alone = query.is_cuda and needs_gradient(attn_mask) and not needs_gradient(query, key, value)
    with sdpa_kernel(SDPBackend.MATH) if for_mask_alone else nullcontext():
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return out, None


def shared_kv_attention(
    q: Tensor,
    x: Tensor,
    *,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    key_offset: int = 0,
) -> tuple[Tensor, None, Tensor]:
    """One query head over x as both keys and values; a row sees nothing only if its whole batch entry is masked."""
    if lengths is not None:
        key_mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if q.is_cuda:
        q, x = _aligned(q), _aligned(x)
    z = F.scaled_dot_product_attention(q[:, None], x[:, None], x[:, None], mask, scale=scale)[:, 0]
    rho = torch.ones(q.shape[:2], device=q.device, dtype=torch.float32)
    if key_mask is not None:
        rho = rho * key_mask.any(-1, keepdim=True)
    elif x.shape[1] == 0:
        rho = torch.zeros_like(rho)
    return z, None, rho
