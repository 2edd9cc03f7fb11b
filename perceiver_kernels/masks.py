"""What hides keys from queries in one attention call, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.weak import WeakIdKeyDictionary

Causal = Literal["none", "upper_left", "bottom_right"]
ALIGNMENTS: tuple[Causal, ...] = ("upper_left", "bottom_right")


@dataclass(frozen=True)
class Masks:
    """Everything that decides which keys a query sees; a key is visible where all that are given agree.

    Args:
        key_mask: bool [B, Lk], True where a key is visible.
        lengths: int32 [B], keys visible from the front.
        query_mask: bool [B, Lq], False for queries that see nothing.
        attn_mask: bool (True = visible) or floating (added to the scores), broadcastable to [B, H, Lq, Lk].
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], where each packed sequence starts, and the token count.
        causal: query i sees keys up to i (upper_left), or up to i + Lk - Lq (bottom_right); within its sequence when packed.
    """

    key_mask: Tensor | None = None
    lengths: Tensor | None = None
    query_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    causal: Causal = "none"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but ``causal``, in the order of the fields."""
        return (
            self.key_mask, self.lengths, self.query_mask, self.attn_mask, self.cu_seqlens_q, self.cu_seqlens_k
        )  # fmt: skip

    @property
    def packed(self) -> bool:
        """Whether batch axis 1 holds sequences of different lengths, one after the other."""
        return self.cu_seqlens_q is not None


# Starts whose values were seen, at which version and for which token count: a model's layers share them, and looking waits
# for the GPU.
_seen = WeakIdKeyDictionary()


def check_starts(masks: Masks, Lq: int, Lk: int) -> None:
    """Starts of packed sequences begin at 0, never decrease and end at the token count; what cannot be read now passes."""
    for name, starts, total in (("cu_seqlens_q", masks.cu_seqlens_q, Lq), ("cu_seqlens_k", masks.cu_seqlens_k, Lk)):
        if starts is None or torch.compiler.is_compiling() or is_fake(starts):
            continue
        if starts.is_cuda and torch.cuda.is_current_stream_capturing():
            continue
        seen = (starts._version, total)
        if _seen.get(starts) == seen:
            continue
        values = starts.tolist()
        if values[0] != 0 or values[-1] != total:
            raise ValueError(f"{name} must begin at 0 and end at the token count {total}, got {values[0]} and {values[-1]}")
        falls = [i for i in range(1, len(values)) if values[i] < values[i - 1]]
        if falls:
            i = falls[0]
            raise ValueError(f"{name} must not decrease, got {values[i - 1]} and then {values[i]} at {i}")
        _seen[starts] = seen


NO_MASKS = Masks()
CAUSAL_MASKS = {alignment: Masks(causal=alignment) for alignment in ALIGNMENTS}
