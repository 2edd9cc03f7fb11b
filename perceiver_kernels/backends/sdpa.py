"""Compositions over torch.nn.functional.scaled_dot_product_attention: linear memory where torch has a fused kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from perceiver_kernels.backends import torch_attention
from perceiver_kernels.backends.composite import pack_inputs_backward, pack_inputs_forward, rotary_embedding
from perceiver_kernels.masks import NO_MASKS, Masks
from perceiver_kernels.problem import AttentionProblem, Problem, SharedKVProblem, needs_gradient
from perceiver_kernels.reference import pack_inputs, visible_pairs

__all__ = [
    "attention", "pack_inputs", "pack_inputs_backward", "pack_inputs_forward", "rotary_embedding", "shared_kv_attention",
]  # fmt: skip

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


# cuDNN is not among them: with masks, d_qk unlike d_v or short sides it gave NaN and wrong gradients, refused at its
# execution, and read addresses that are not its own, after which the process has no GPU (torch 2.11, H100, bf16).
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _kernels(query: Tensor, mask: Tensor | None, *others: Tensor) -> AbstractContextManager[None]:
    """torch's implementations that are right for a call; torch takes the first that serves it."""
    if not query.is_cuda:
        return nullcontext()
    # The memory-efficient kernel keeps what its backward reads only if another tensor than the mask needs a gradient
    # (pytorch#148476), and takes no mask of another dtype: torch's definition serves there.
    for_mask_alone = needs_gradient(mask) and not needs_gradient(query, *others)
    other_dtype = mask is not None and mask.dtype not in (torch.bool, query.dtype)
    return sdpa_kernel(SDPBackend.MATH if for_mask_alone or other_dtype else _KERNELS)


def _positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """torch's flash kernel gives NaN for other scales (torch 2.11): the sign, or the zero, moves into the queries."""
    return (query, scale) if scale > 0.0 else (-query, -scale) if scale < 0.0 else (query * 0.0, 1.0)


def attention(
    query: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    *,
    masks: Masks = NO_MASKS,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, None]:
    """torch's attention; dropout draws from torch's generator, so ``dropout_seed`` is not read.

    Whatever torch has no argument for becomes one mask of at most [B, 1, Lq, Lk]; two segments are concatenated.
    """
    key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in (keys, values))
    if key.shape[0] == 0:
        # Of one query's entry beside an empty batch of keys torch's attention makes one entry (torch 2.13).
        query = query.expand(0, -1, -1, -1)
    if query.is_cuda:
        query, key, value = (_aligned(tensor) for tensor in (query, key, value))
    # What hidden tokens hold must not matter, and torch's kernels multiply it by 0, NaN included.
    seen = visible_pairs(1, key.shape[2], key_mask=masks.key_mask, lengths=masks.lengths, device=key.device)
    if seen is not None:
        key, value = (torch.where(seen.mT, tensor, 0.0) for tensor in (key, value))
    if masks.query_mask is not None:
        query = torch.where(masks.query_mask[:, None, :, None], query, 0.0)
    mask, is_causal = _torch_mask(masks, query.shape[2], key.shape[2], query)
    if query.is_cuda:
        query, scale = _positive_scale(query, query.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None and mask.shape[-1] != key.shape[2]:
            # The memory-efficient kernel wants the keys of a mask side by side.
            mask = mask.expand(*mask.shape[:-1], key.shape[2]).contiguous()
    grouped = key.shape[1] not in (1, query.shape[1])
    with _kernels(query, mask, key, value):
        out = torch_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped
        )
    return out, None


def _torch_mask(masks: Masks, Lq: int, Lk: int, query: Tensor) -> tuple[Tensor | None, bool]:
    """(attn_mask, is_causal) as torch's attention takes them: never both."""
    if masks.causal == "upper_left" and masks == Masks(causal="upper_left"):
        return None, True
    visible = visible_pairs(
        Lq, Lk, key_mask=masks.key_mask, lengths=masks.lengths, query_mask=masks.query_mask, cu_seqlens_q=masks.cu_seqlens_q,
        cu_seqlens_k=masks.cu_seqlens_k, causal=masks.causal, device=query.device,
    )  # fmt: skip
    # torch's attention reads two axes of a mask.
    added = None if masks.attn_mask is None else torch.atleast_2d(masks.attn_mask)
    if visible is None or added is None:
        return (visible if added is None else added), False
    if added.dtype == torch.bool:
        return visible & added, False
    return torch.where(visible, added, -torch.inf), False


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
        q, scale = _positive_scale(_aligned(q), scale)
        x = _aligned(x)
    with _kernels(q, mask, x):
        z = torch_attention(q[:, None], x[:, None], x[:, None], mask, scale=scale)[:, 0]
    rho = torch.ones(q.shape[:2], device=q.device, dtype=torch.float32)
    if key_mask is not None:
        rho = rho * key_mask.any(-1, keepdim=True)
    elif x.shape[1] == 0:
        rho = torch.zeros_like(rho)
    return z, None, rho
