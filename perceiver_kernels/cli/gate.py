"""Correctness first: a result is compared with the specification in fp64 before anything of it is timed.

A result passes when its error is at most twice that of the textbook in the same dtype, plus the rounding of
the output (testing/accuracy.py). Both the specification and the textbook stream through the inputs and merge
the parts by their log-sum-exp, so that cases of any size fit: the parts are recomputed in the backward, never
stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.cli.measure import release
from perceiver_kernels.cli.stock import Peer, StockCrossAttention
from perceiver_kernels.cli.workload import PASSES, Workload, layer_pass
from perceiver_kernels.testing.accuracy import assert_as_accurate

PART_BYTES = 2**30
"""Bytes that the largest array of one part may take; its softmax and backward hold a few of that size."""
PIECE_ELEMENTS = 2**27
"""Elements that are compared at a time; every piece has to pass."""
ZERO = 1e-9
"""Norms below this are fp64 rounding of a zero."""

Attend = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Verdict:
    """Errors of one result against fp64, the textbook's own beside, and what is wrong, if anything."""

    errors: dict[str, float]
    eager_errors: dict[str, float]
    failure: str | None

    @property
    def is_wrong(self) -> bool:
        """Whether a stock peer's result is useless, not merely less accurate: not finite or far from fp64."""
        pairs = ((error, self.eager_errors[name]) for name, error in self.errors.items())
        return any(not error <= max(0.05, 10 * eager) for error, eager in pairs)


class Gate:
    """Judges results of one workload; specification and textbook are computed once per pass."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def judge(self, which: str, subjects: dict[str, Callable[[], Sequence[Tensor]]]) -> dict[str, Verdict]:
        """Compare what callables give with the specification.

        Args:
            which: name of the pass.
            subjects: name -> callable that is known to run.

        Returns:
            name -> Verdict.
        """
        names = self.workload.names(which)
        try:
            oracle = self._specification(which, torch.float64)
            eager = self._specification(which, self.workload.dtype)
        except torch.OutOfMemoryError:
            release()
            unjudged = Verdict({}, {}, "not judged: the specification ran out of memory")
            return dict.fromkeys(subjects, unjudged)
        verdicts = {name: verdict(call(), eager, oracle, names) for name, call in subjects.items()}
        del oracle, eager
        release()
        return verdicts

    def _specification(self, which: str, dtype: torch.dtype) -> Sequence[Tensor]:
        work = self.workload
        if which == "pack":
            return [reference.pack_inputs(work.inputs.to(dtype))[0]]
        if PASSES[which].level == "kernel":
            return _kernel_specification(work, which, dtype)
        layer = Textbook(work.stock_layer(Peer("eager"), dtype), dtype)
        # Inputs that need a gradient become a leaf of this dtype; others are converted part by part.
        inputs = work.inputs.to(dtype) if which == "backward-inputs" else work.inputs
        return layer_pass(which, layer, work.latents.to(dtype), inputs, work.gradient.to(dtype))()


class Textbook(torch.nn.Module):
    """The textbook layer, LayerNorm -> project -> attend -> project, streamed over parts of the inputs."""

    def __init__(self, layer: StockCrossAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, latents: Tensor, inputs: Tensor | pk.InputArray) -> Tensor:
        layer = self.layer
        q = layer.heads(layer.q_proj(layer.norm_latents(latents)))

        def attend(x: Tensor) -> tuple[Tensor, Tensor]:
            x = layer.norm_inputs(x)
            return _attend(q, layer.heads(layer.k_proj(x)), layer.heads(layer.v_proj(x)), q.shape[-1] ** -0.5)

        width = max(q.shape[1] * q.shape[2], 3 * layer.k_proj.in_features)
        out = _streamed(attend, inputs, self.dtype, width, latents.device)
        return layer.out_proj(out.transpose(1, 2).flatten(2))


def verdict(
    actual: Sequence[Tensor], eager: Sequence[Tensor], oracle: Sequence[Tensor], names: list[str]
) -> Verdict:
    """Judge the tensors of one result."""
    failure = None
    errors: dict[str, float] = {}
    eager_errors: dict[str, float] = {}
    for name, mine, textbook, truth in zip(names, actual, eager, oracle, strict=True):
        if mine.shape != truth.shape:
            return Verdict({}, {}, f"{name} must be {tuple(truth.shape)}, got {tuple(mine.shape)}")
        errors[name], eager_errors[name] = relative_error(mine, truth), relative_error(textbook, truth)
        try:
            for my_part, textbook_part, true_part in _pieces(mine, textbook, truth):
                assert_as_accurate(my_part, textbook_part, true_part, name)
        except (AssertionError, ValueError) as error:
            failure = failure or " ".join(str(error).split())
    return Verdict(errors, eager_errors, failure)


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """Return the relative L2 error; the absolute one where the oracle is zero but for its own rounding.

    That is the gradient of the key projection's bias, which the softmax cancels.
    """
    distance = size = 0.0
    for mine, truth in _pieces(actual, oracle):
        distance += float((mine.to(truth) - truth).square().sum())
        size += float(truth.square().sum())
    distance, size = distance**0.5, size**0.5
    return distance / size if size > ZERO else distance


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors side by side; billions of elements in slices, as comparing takes several fp64 copies."""
    if tensors[0].ndim < 2:
        return iter([tensors])
    rows = tensors[0].shape[-2]
    size = max(1, PIECE_ELEMENTS * rows // max(tensors[0].numel(), 1))
    return zip(*(tensor.split(size, dim=-2) for tensor in tensors), strict=True)


def _kernel_specification(work: Workload, which: str, dtype: torch.dtype) -> Sequence[Tensor]:
    q, x = work.rows.to(dtype), work.packed.data
    if which == "attend":
        with torch.no_grad():
            return [_shared(q, x, dtype)]
    wanted = (q if which == "dq" else x.to(dtype)).detach().requires_grad_()
    z = _shared(wanted, x, dtype) if which == "dq" else _shared(q, wanted, dtype)
    return torch.autograd.grad(z, wanted, work.row_gradient.to(dtype))


def _shared(q: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax(q x^T) x, streamed over x."""

    def attend(part: Tensor) -> tuple[Tensor, Tensor]:
        return _attend(q, part, part, 1.0)

    return _streamed(attend, x, dtype, max(q.shape[1], 3 * q.shape[2]), q.device)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse): the specification in fp64, else softmax(q k^T) v as eager PyTorch has it."""
    if q.dtype == torch.float64:
        out, lse = reference.attention(*(t if t.ndim == 4 else t[:, None] for t in (q, k, v)), scale=scale)
        return (out, lse) if q.ndim == 4 else (out[:, 0], lse[:, 0])
    scores = q @ k.transpose(-1, -2) * scale
    return scores.softmax(-1) @ v, scores.float().logsumexp(-1)


def _streamed(
    attend: Callable[[Tensor], tuple[Tensor, Tensor]], inputs: Any, dtype: torch.dtype, width: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Attend to parts of the inputs, recomputed in the backward: out = sum_c exp(lse_c - lse) out_c."""
    batch, length = (inputs.batch, inputs.length) if isinstance(inputs, pk.InputArray) else inputs.shape[:2]
    size = max(1, PART_BYTES // (batch * width * dtype.itemsize))
    if size >= length:
        return attend(_part(inputs, 0, length, dtype, device))[0]

    def part(start: int) -> tuple[Tensor, Tensor]:
        return attend(_part(inputs, start, min(start + size, length), dtype, device))

    outs, lses = zip(
        *(checkpoint(part, start, use_reentrant=False) for start in range(0, length, size)), strict=True
    )
    weights = torch.stack(lses).softmax(0)[..., None]
    return sum(weight * out for weight, out in zip(weights, outs, strict=True)).to(dtype)


def _part(inputs: Any, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Tokens start..stop as a textbook layer reads them, [B, m, C], positions written out."""
    if not isinstance(inputs, pk.InputArray):
        return inputs[:, start:stop].to(dtype)
    part = inputs.slice(start, stop, device=device, dtype=dtype)
    plain: dict[str, Any] = {"normalize": False, "channels_multiple": 1, "dtype": dtype}
    return reference.pack_inputs(part.content, part.positions, part.fourier, **plain)[0]
