"""Chunked cross-attention: pack a chunk, attend, merge the softmax state, next chunk.

Nothing proportional to M is stored but the raw inputs, which may lie in host memory. The backward packs every chunk again and
adds its part of the query gradient; with the merged (z, lse) of the forward each chunk's gradient is exact on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from perceiver_kernels.dispatch import select_passes
from perceiver_kernels.functional.common import dropout_seed, float_dtype
from perceiver_kernels.inputs import InputArray, TokenSlice
from perceiver_kernels.ops import pack as pack_op
from perceiver_kernels.ops import shared_kv as shared_kv_op
from perceiver_kernels.ops.boundary import refuse_double_backward, transforms_active
from perceiver_kernels.problem import PackProblem, SharedKVProblem, needs_gradient, pad_channels


@dataclass(frozen=True)
class ChunkSettings:
    """What stays the same over the chunks of one call."""

    chunk_size: int
    dtype: torch.dtype
    normalize: bool
    eps: float
    scale: float
    dropout_p: float
    channels: int

    @property
    def channels_padded(self) -> int:
        return pad_channels(self.channels)


@dataclass(eq=False)
class _Run:
    """One call: its inputs, settings and the backends that pack and attend, each forward and backward.

    Not frozen: torch 2.10 would compile a frozen argument of a Function by building it anew, of what stands for its tensors.
    """

    source: InputArray
    settings: ChunkSettings
    pack_backends: tuple[str, str]
    attention_backends: tuple[str, str]

    def versions(self) -> list[int]:
        """How often each raw tensor has been changed in place; graphs and inference tensors do not count."""
        if torch.compiler.is_compiling():
            return []
        fields = (getattr(self.source, name) for name in ("content", "positions", "coordinates", "key_mask", "lengths"))
        return [field._version for field in fields if isinstance(field, Tensor) and not field.is_inference()]

    def chunks(self, device: torch.device) -> Iterator[tuple[int, int, TokenSlice, Tensor, Tensor]]:
        """(start, stop, raw tokens, packed tokens, rstd) of every chunk, on ``device``.

        None of them is kept here: whoever drops them before the next chunk holds one chunk at a time.
        """
        M = self.source.length
        for start in range(0, M, self.settings.chunk_size):
            yield self._chunk(start, min(start + self.settings.chunk_size, M), device)

    def _chunk(self, start: int, stop: int, device: torch.device) -> tuple[int, int, TokenSlice, Tensor, Tensor]:
        settings = self.settings
        part = self.source.slice(start, stop, device=device, dtype=float_dtype(self.source, settings.dtype))
        packed, rstd = pack_op.PACK_FORWARD(
            part.content, part.positions, part.fourier, part.key_mask, settings.normalize, settings.eps, settings.dtype,
            self.pack_backends[0],
        )  # fmt: skip
        return start, stop, part, packed, rstd


class _Chunked(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, content: Tensor, seed: Tensor | None, run: _Run) -> tuple[Tensor, Tensor, Tensor]:
        settings = run.settings
        state: tuple[Any, Any, Any] = (None, None, None)
        wide = torch.promote_types(q.dtype, torch.float32)
        for start, _, part, packed, rstd in run.chunks(q.device):
            state = shared_kv_op.FORWARD(
                q, packed, part.key_mask, None, seed, settings.scale, settings.dropout_p, start, *state, wide,
                run.attention_backends[0],
            )  # fmt: skip
            del part, packed, rstd
        if state[0] is None:
            rows = q.shape[:2]
            state = (q.new_zeros(q.shape), q.new_full(rows, -torch.inf, dtype=wide), q.new_zeros(rows, dtype=wide))
        z, lse, rho = state
        ctx.save_for_backward(q, z, lse, rho, seed)
        # Not saved: the raw inputs are the caller's, and the backward reads them again.
        ctx.content, ctx.run, ctx.versions = content, run, run.versions()
        ctx.set_materialize_grads(False)
        return z, lse, rho

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        # Read once: checkpointing computes them again, for one reader.
        saved = ctx.saved_tensors
        with torch.no_grad():
            dq, dcontent = _chunk_gradients(ctx, saved, *gradients)
        sources = *gradients, saved[0], ctx.content
        return refuse_double_backward(dq, *sources), refuse_double_backward(dcontent, *sources), None, None


def _chunk_gradients(
    ctx: Any, saved: tuple[Any, ...], dz: Tensor | None, dlse: Tensor | None, drho: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of q and content, each where it is needed."""
    q, z, lse, rho, seed = saved
    content, run, settings = ctx.content, ctx.run, ctx.run.settings
    if run.versions() != ctx.versions:
        raise RuntimeError(
            "the inputs of a chunked cross-attention were modified by an inplace operation before its backward"
        )
    needs_dq, needs_dx = ctx.needs_input_grad[:2]
    backend = run.attention_backends[1]
    dz, delta, drho = shared_kv_op.row_gradients(dz, dlse, drho, q, z, rho, settings.dropout_p, backend)
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device) if needs_dq else None
    dcontent = torch.empty_like(content) if needs_dx else None
    for start, stop, part, packed, rstd in run.chunks(q.device):
        dx = shared_kv_op.BACKWARD_ADD(
            dq, dz, delta, drho, q, packed, lse, part.key_mask, seed, settings.scale, settings.dropout_p, start,
            needs_dx, backend,
        )  # fmt: skip
        if dcontent is not None:
            dcontent[:, start:stop] = pack_op.PACK_BACKWARD(
                dx, packed, rstd, part.content.shape[2], settings.channels, settings.normalize, part.content.dtype,
                run.pack_backends[1],
            )  # fmt: skip
        del part, packed, rstd, dx
    return None if dq is None else dq.to(q.dtype), dcontent


def check_source(source: InputArray) -> None:
    """What the gradients of chunks cannot reach is refused, rather than left without one."""
    if transforms_active():
        raise ValueError("chunk_size must be None under torch.func's transforms (grad, vmap), which need whole inputs")
    for name, what in (("positions", "learned positions"), ("coordinates", "coordinates")):
        if isinstance(field := getattr(source, name), Tensor) and needs_gradient(field):
            raise ValueError(f"chunk_size needs {name} without gradient: {what} are trained on whole inputs")


def pack_problem(
    source: InputArray, settings: ChunkSettings, device: torch.device, tokens: int = 0
) -> tuple[PackProblem, TokenSlice]:
    """What packing a chunk on ``device`` asks of a backend, and the first ``tokens`` of it."""
    part = source.slice(0, tokens, device=device, dtype=float_dtype(source, settings.dtype))
    problem = PackProblem.of(
        part.content, part.positions, part.fourier, part.key_mask, None, settings.normalize, settings.dtype
    )
    return problem, part


def chunked_attention(
    q: Tensor, source: InputArray, settings: ChunkSettings, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(z, lse, rho) of absorbed queries q [B, R, C_padded] over inputs that are packed ``chunk_size`` tokens at a time.

    Gradients reach q and, where it requires one, ``source.content``.
    """
    packing, _ = pack_problem(source, settings, q.device)
    attending = SharedKVProblem.of(q, q[:, :0], None, None, settings.scale, settings.dropout_p, needs_lse=True)
    run = _Run(source, settings, select_passes(packing, backend), select_passes(attending, backend))
    return _Chunked.apply(q, source.content, dropout_seed(settings.dropout_p, q.device), run)
