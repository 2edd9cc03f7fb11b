"""Rotary embedding of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perceiver_kernels.dispatch import load, select
from perceiver_kernels.ops import rotary as rotary_op
from perceiver_kernels.problem import RotaryProblem


@dataclass(frozen=True)
class RotaryCall:
    """One call of rotary_embedding, checked; tables that the batch shares are [L, r/2]."""

    problem: RotaryProblem
    x: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool
    inverse: bool


def resolve(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False) -> RotaryCall:
    """Check every argument of rotary_embedding."""
    for name, flag in (("interleaved", interleaved), ("inverse", inverse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {flag!r}")
    problem = RotaryProblem.of(x, cos, sin)
    if cos.ndim == 3 and not problem.batched:
        cos, sin = cos[0], sin[0]
    return RotaryCall(problem, x, cos, sin, interleaved, inverse)


def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False, backend: str | None = None
) -> Tensor:
    """Queries or keys turned by their positions, so that scores depend on distances: pair by pair of the first r channels

        y1 = x1 cos - x2 sin,   y2 = x1 sin + x2 cos

    The channels from r on pass as they are. ``rotary_tables`` makes the tables. Products are in fp32 (fp64 for fp64) and
    rounded once to x's dtype, which autocast leaves alone.

    Args:
        x: ``[B, H, L, d]``, float16, bfloat16, float32 (float64 on reference and sdpa), d up to 1024; any strides. Nothing is
            copied whose last stride is 1, heads inside rows of ``[B, L, H*d]`` included.
        cos: ``[L, r/2]`` or ``[1, L, r/2]``, shared by the batch, or ``[B, L, r/2]``; any float dtype.
            r, at most d, is the rotary width.
        sin: likewise, of the same dtype. Kernels give the tables no gradient; where one requires it, sdpa and reference serve.
        interleaved: pair i is the channels (2i, 2i + 1), as in RoFormer and GPT-J; False: (i, i + r/2), as in GPT-NeoX and
            Llama.
        inverse: turn back, as POYO does with the outputs of attention over turned values.
        backend: a backend's name; it never falls back.

    Returns:
        ``[B, H, L, d]`` in x's dtype; its heads lie inside rows where those of x do. Differentiable any number of times.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names it.

    Source: Su et al., RoFormer, arXiv 2104.09864, section 3.4.2. Partial width: Perceiver AR, arXiv 2202.07765, appendix.
    Values and outputs: POYO, arXiv 2310.16046.
    """
    call = resolve(x, cos, sin, interleaved=interleaved, inverse=inverse)
    name = select(call.problem, backend)
    module = load(call.problem.OP, name)
    if module.COMPOSITE:
        return module.rotary_embedding(call.x, call.cos, call.sin, interleaved=call.interleaved, inverse=call.inverse)
    return rotary_op.rotary_embedding(call.x, call.cos, call.sin, call.interleaved, call.inverse, name)
