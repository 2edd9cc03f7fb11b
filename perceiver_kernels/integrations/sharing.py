"""What several layers of a model read, packed once for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels import functional
from perceiver_kernels.inputs import PackedInputs
from perceiver_kernels.integrations.filled import blind_entries
from perceiver_kernels.ops.boundary import transforms_active


@dataclass(frozen=True)
class Context:
    """What a layer reads.

    Args:
        packed: the tokens, those that are hidden too where an entry sees none.
        blind: bool [B], entries of the batch that see no token; None without a mask.
    """

    packed: PackedInputs
    blind: Tensor | None


@dataclass
class _Forward:
    """One forward pass of a model, and the context that was read last in it."""

    key: tuple[Any, ...] = ()
    held: tuple[Tensor | None, ...] = ()
    context: Context | None = field(default=None, repr=False)


_forward: ContextVar[_Forward | None] = ContextVar("perceiver_kernels_forward", default=None)


@contextlib.contextmanager
def one_forward() -> Iterator[None]:
    """Inside the block, one forward pass of a model, layers that read the same tensor in the same way share its packed form.

    Nothing is kept after the block. Two kinds of tensors are packed by every layer for itself: those that want a gradient, as
    checkpointing may run one of the layers without recording, whose packed form the others could not use; and those made in
    inference mode, where torch does not count writes, so that nobody could tell whether a hook changed one.
    """
    token = _forward.set(_Forward())
    try:
        yield
    finally:
        _forward.reset(token)


def _can_share(tensor: Tensor) -> bool:
    return not (tensor.requires_grad or tensor.is_inference())


def packed_context(context: Tensor, mask: Tensor | None, *, normalize: bool, eps: float, dtype: torch.dtype) -> Context:
    """Pack what a layer reads, or take what another layer packed in this forward pass.

    Args:
        context: [B, M, C].
        mask: bool [B or 1, ...], True where a token is visible, M of them in any shape; or None.
        normalize, eps, dtype: as ``functional.pack_inputs`` takes them.
    """
    forward = None if torch.compiler.is_compiling() else _forward.get()
    if forward is None or transforms_active() or not _can_share(context) or (mask is not None and not _can_share(mask)):
        return _pack(context, mask, normalize, eps, dtype)
    # The forward pass holds both tensors, so that no other has their identity.
    written = context._version, None if mask is None else mask._version
    key = (id(context), id(mask), written, normalize, eps, dtype, torch.is_inference_mode_enabled())
    if forward.context is None or forward.key != key:
        forward.context = _pack(context, mask, normalize, eps, dtype)
        forward.key, forward.held = key, (context, mask)
    return forward.context


def _pack(context: Tensor, mask: Tensor | None, normalize: bool, eps: float, dtype: torch.dtype) -> Context:
    seen = blind = None
    if mask is not None:
        seen = mask.flatten(1).expand(context.shape[0], -1)
        blind = blind_entries(seen)
        seen = seen | blind[:, None]
    packed = functional.pack_inputs(context, key_mask=seen, normalize=normalize, eps=eps, dtype=dtype)
    return Context(packed, blind)


class SharedContext(nn.Module):
    """What a replacement adds to a model whose layers read one context: they pack it once between them."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the original's."""
        if torch.compiler.is_compiling():
            return super().forward(*args, **options)
        with one_forward():
            return super().forward(*args, **options)
