"""Memory of a cross-attention layer in closed form: what it takes beside inputs, latents and parameters, and what it keeps.

T = B M tokens, e bytes an element, w bytes of a sum (4; 8 in fp64), P = C rounded up to 16, K = H d_qk, V = H d_v, R = H N
rows, S = B R M scores. What grows with M, forward and then what autograd keeps for a backward:

    packed whole, kernels         T (P e + w)                                                    T P e
    chunked, kernels              the same of the c tokens of one chunk                          0
    packed whole, composed        T max(2 or 3 C w, (C + P) w [+ P e]), backward 3 T P e         T P e
    chunked, composed             c P e + 4 B R c w, backward 5 B R c w                          0
    eager                         T e (C + K + V) + 2 S e, backward 3 S e (4 on a GPU)           T e (C + K + V) + S e

"Composed" is PyTorch's own attention under the same algebra, as it runs on a CPU; a packed bf16 or fp16 array is then a copy
of an fp32 one. Everything else is of the latents' size or the weights', or a partial result of the kernels' splits, which the
planner knows. tests/test_footprint.py holds all of this against measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from perceiver_kernels.device import DeviceFacts
from perceiver_kernels.plan.shared_kv import plan_shared_kv
from perceiver_kernels.problem import CrossAttentionProblem, SharedKVProblem, pad_channels


@dataclass(frozen=True)
class Footprint:
    """Bytes beside inputs, latents and parameters: the most at once, and those kept between forward and backward."""

    peak: int
    saved: int


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the arrays of one layer; one name is one array."""

    problem: CrossAttentionProblem
    D: int

    def __post_init__(self) -> None:
        if self.problem.packed or self.problem.inputs_need_grad:
            raise ValueError(
                "problem must have raw inputs without gradient, got "
                f"packed={self.problem.packed}, inputs_need_grad={self.problem.inputs_need_grad}"
            )
        if self.D < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.D}")

    @property
    def e(self) -> int:
        return self.problem.dtype.itemsize

    @property
    def w(self) -> int:
        return torch.promote_types(self.problem.dtype, torch.float32).itemsize

    @property
    def on_gpu(self) -> bool:
        return self.problem.device_type == "cuda"

    @property
    def P(self) -> int:
        return pad_channels(self.problem.C)

    @property
    def tokens(self) -> int:
        return self.problem.B * self.problem.M

    @property
    def statistic(self) -> int:
        """Bytes of a mean that PyTorch's LayerNorm keeps: of a sum on a GPU, of an element on a CPU."""
        return self.w if self.on_gpu else self.e

    def width(self, channels: int) -> int:
        """Channels of all heads; on a GPU one head is padded to 16 bytes (nn.aligned)."""
        H = self.problem.H
        return H * channels + (-channels % 8 if self.on_gpu and H == 1 else 0)

    @property
    def latents(self) -> int:
        return self.problem.B * self.problem.N * self.D * self.e

    def heads(self, channels: int, itemsize: int) -> int:
        """[B, H, N, d]."""
        return self.problem.B * self.problem.N * self.width(channels) * itemsize

    def rows(self, itemsize: int, columns: int | None = None) -> int:
        """[B, H N, P], or that many columns."""
        return self.problem.B * self.problem.H * self.problem.N * (self.P if columns is None else columns) * itemsize

    @property
    def scores(self) -> int:
        """[B, H, N, M]."""
        return self.rows(self.e, self.problem.M)

    @property
    def padded_weights(self) -> int:
        """Copies of weights whose widths are none of a GPU's."""
        p, K, V = self.problem, self.width(self.problem.d_qk), self.width(self.problem.d_v)
        if not self.on_gpu or p.H > 1:
            return 0
        columns = self.P != p.C
        queries, values = p.d_qk != K, p.d_v != V
        count = (self.D * K + 2 * K) * queries + K * self.P * (queries or columns)
        count += (self.D * V + V) * values + V * self.P * (values or columns) + 2 * self.P * columns
        return count * self.e

    def absorption(self, kept: bool) -> int:
        """q' = g (W_k^T q), and what its gradient reads."""
        p, fused = self.problem, self.on_gpu and self.problem.H == 1 and self.e == 2
        q = self.heads(p.d_qk, self.e)
        if not kept:
            return q + self.rows(self.e)
        if fused:
            return q + self.rows(self.e)
        q_wide = self.heads(p.d_qk, self.w)
        # The weight is widened and padded; of several heads it is written out for every element of the batch.
        copies = p.B if p.H > 1 else 1
        weight = copies * p.H * p.d_qk * self.P * self.w if copies > 1 or self.e < self.w or self.P != p.C else 0
        return q_wide + weight + self.rows(self.w) + self.rows(self.e)

    @property
    def state(self) -> int:
        """z, lse and rho of shared-KV attention."""
        return self.rows(self.w) + 2 * self.rows(self.w, 1)

    @property
    def projection(self) -> int:
        """g z + b, its product with W_v, and W_v in the width of the packed inputs."""
        p = self.problem
        weight = p.H * p.d_v * self.P * self.e if self.P != p.C and not self.padded_weights else 0
        return self.rows(self.e) + self.heads(p.d_v, self.e) + weight

    @property
    def kept(self) -> int:
        """What a backward of the latents' side reads: norm, absorption, attention, both projections after it."""
        p = self.problem
        norm = self.latents + 2 * p.B * p.N * self.statistic
        return norm + self.padded_weights + self.absorption(True) + self.state + self.projection

    @property
    def turned(self) -> int:
        """What the backward of shared-KV attention finds beside `kept`: out, dW_o, dW_v, dz and its products with z."""
        p = self.problem
        weights = (self.D + self.P) * self.width(p.d_v) * self.e
        return self.latents + weights + self.rows(self.e) + self.rows(self.w, 1)


def layer_footprint(
    problem: CrossAttentionProblem, latent_dim: int, *, chunk_size: int | None = None, device: DeviceFacts | None = None,
    composed: bool = False,
) -> Footprint:  # fmt: skip
    """Footprint of `nn.CrossAttention` without residual, absorbed.

    Args:
        problem: sizes and dtype; inputs raw and without gradient. ``needs_grad`` says forward alone, or forward and backward.
        latent_dim: D, channels of the latents and of the result.
        chunk_size: tokens of one chunk; None packs all of them.
        device: whose splits write partial results; None counts none, as fake tensors have it.
        composed: PyTorch's own attention on a CPU instead of kernels.

    Returns:
        Bytes beside inputs, latents and parameters; the result and the gradients that are there at the peak count.

    Raises:
        ValueError: packed inputs, inputs that need a gradient, or a latent_dim or chunk_size below 1.

    Source: docs/encode.md; the module's table has what grows with M.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be None or at least 1, got {chunk_size}")
    chunked = chunk_size is not None
    part = replace(problem, M=min(problem.M, chunk_size)) if chunk_size is not None else problem
    sizes, grad = _Sizes(part, latent_dim), problem.needs_grad
    before = sizes.latents + sizes.padded_weights + sizes.heads(problem.d_qk, sizes.e)
    # From the second chunk on there is a state while the next is packed and read.
    state = sizes.state if chunked and part.M < problem.M else 0
    absorbed = sizes.absorption(grad) - sizes.heads(problem.d_qk, sizes.e) if chunked or not grad else 0
    forward, backward = _workspaces(part, device)
    packed = sizes.tokens * sizes.P * sizes.e
    rstd = sizes.tokens * sizes.w
    pack = _composed_pack(sizes) if composed else packed + rstd
    attend = packed + (rstd if chunked else 0)
    attend += _composed_scores(sizes, 4, chunked) if composed else forward
    peaks = [before + state + (absorbed if chunked else 0) + pack]
    peaks.append(before + state + sizes.absorption(grad) + sizes.state + attend)
    peaks.append(before + sizes.absorption(grad) + sizes.state + sizes.projection + (0 if chunked else packed))
    if grad:
        turn = _composed_turn(sizes, chunked) if composed else packed + (rstd if chunked else 0) + backward
        dq = sizes.rows(sizes.w if chunked else sizes.e)
        peaks.append(sizes.kept + sizes.turned + dq + turn)
        peaks.append(sizes.kept + sizes.turned + dq + pack if chunked else 0)
    # Composed, z is kept as it was computed too, and rho is all ones.
    narrow = sizes.rows(sizes.e) if sizes.e < sizes.w else 0
    results = narrow - sizes.rows(sizes.w, 1) if composed and not chunked else 0
    return Footprint(max(peaks), sizes.kept + results + (0 if chunked else packed) if grad else 0)


def _workspaces(problem: CrossAttentionProblem, device: DeviceFacts | None) -> tuple[int, int]:
    """Bytes of the partial results that the splits of the forward and of dq write; on CUDA C++ they are about as many."""
    if device is None or problem.M == 0:
        return 0, 0
    B, R, C, e = problem.B, problem.H * problem.N, pad_channels(problem.C), problem.dtype.itemsize
    plan = plan_shared_kv(
        SharedKVProblem(
            B=B, R=R, M=problem.M, C=C, dtype=problem.dtype, device_type=problem.device_type, masked=False, dropout=False,
            needs_lse=True, needs_grad=problem.needs_grad,
        ),
        device,
    )  # fmt: skip
    if plan.dq is None:
        rows = math.ceil(R / plan.wide.weights_backward.rows) * plan.wide.weights_backward.rows
        return plan.workspace_bytes(B, R, C, e), B * rows * plan.wide.chunk_dq * e
    return plan.workspace_bytes(B, R, C, e), 4 * B * plan.dq_splits * R * C if plan.dq_splits > 1 else 0


def _composed_pack(sizes: _Sizes) -> int:
    """Copies of the inputs while they are packed: wide, centred, squared; or centred, padded, cast."""
    C, P, e, w = sizes.problem.C, sizes.P, sizes.e, sizes.w
    narrow = e < w
    return sizes.tokens * (w + max((3 if narrow else 2) * C * w, (C + P) * w + P * e * narrow))


def _composed_scores(sizes: _Sizes, arrays: int, chunked: bool) -> int:
    """Scores are written out where their log-sum-exp is wanted, as chunks do; PyTorch's own kernel keeps none."""
    return arrays * sizes.rows(sizes.w, sizes.problem.M) if chunked else 0


def _composed_turn(sizes: _Sizes, chunked: bool) -> int:
    """Gradients of keys and values come with that of the queries; chunks make do without them."""
    packed = sizes.tokens * sizes.P * sizes.e
    if not chunked:
        return 3 * packed
    wide = sizes.tokens * sizes.P * sizes.w if sizes.e < sizes.w else 0
    return packed + sizes.tokens * sizes.w + wide + _composed_scores(sizes, 5, True)


def eager_footprint(problem: CrossAttentionProblem, latent_dim: int) -> Footprint:
    """Footprint of the textbook layer, softmax(q k^T) v written out in PyTorch: LayerNorms, projections, scores.

    Args:
        problem: sizes and dtype; inputs raw and without gradient. ``needs_grad`` says forward alone, or forward and backward.
        latent_dim: D, channels of the latents and of the result.

    Returns:
        Bytes beside inputs, latents and parameters; the result and the gradients that are there at the peak count.

    Raises:
        ValueError: packed inputs, inputs that need a gradient, or a latent_dim below 1.

    Source: the autograd formulas of torch.softmax and torch.matmul; the module's table has what grows with M.
    """
    sizes = _Sizes(problem, latent_dim)
    p, e, T = problem, sizes.e, sizes.tokens
    C, K, V = T * p.C * e, T * p.H * p.d_qk * e, T * p.H * p.d_v * e
    # Heads of a batch do not lie as a batched product wants them: keys and values are copied, and a backward keeps the copy.
    copied = p.B > 1 and p.H > 1
    q = p.B * p.N * p.H * p.d_qk * e
    before = sizes.latents + q * (2 if copied else 1)
    if not p.needs_grad:
        peaks = [before + C + K + V + 2 * sizes.scores, before + C + K + V + (K if copied else 0) + sizes.scores]
        return Footprint(max([*peaks, before + C + K + V + (V if copied else 0) + sizes.scores]), 0)
    statistics = 2 * (T + p.B * p.N) * sizes.statistic
    attended = p.B * p.N * p.H * p.d_v * e
    kept = sizes.latents + q + attended + C + K + V + statistics
    out = sizes.latents + sizes.D * p.H * p.d_v * e
    softmax = 4 if sizes.on_gpu else 3
    peaks = [
        kept + 2 * sizes.scores + (K if copied else 0),
        kept + sizes.scores + (K + V if copied else 0),
        kept + out + softmax * sizes.scores,
        # dk beside dv, then the gradients of the normalised inputs through either.
        kept + out + K + 2 * sizes.scores,
        kept + out + 2 * C - (0 if copied else min(K, V)),
    ]
    return Footprint(max(peaks), kept + sizes.scores)
