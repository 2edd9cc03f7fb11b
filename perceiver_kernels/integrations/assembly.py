"""Layers of ours made of another module's own submodules."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.checks import autocasts
from perceiver_kernels.functional.heads import split_projection
from perceiver_kernels.integrations.adapter import are_plain
from perceiver_kernels.nn import CrossAttention, OutputCrossAttention
from perceiver_kernels.nn.called import is_plain
from perceiver_kernels.problem import MAX_CHANNELS


class LinearRows(nn.Module):
    """Some outputs of another linear layer as a layer of their own; its weight and bias are views of the other's.

    Args:
        whole: the other layer.
        start, stop: which of its outputs.
    """

    is_product = True
    """For ``nn.called.is_plain``: a replacement asks that of the other layer before it runs this one."""

    def __init__(self, whole: nn.Linear, start: int, stop: int) -> None:
        super().__init__()
        self.whole, self.start, self.stop = whole, start, stop
        self.in_features, self.out_features = whole.in_features, stop - start

    @property
    def weight(self) -> Tensor:
        """[stop - start, in_features]."""
        return self.whole.weight[self.start : self.stop]

    @property
    def bias(self) -> Tensor | None:
        """[stop - start], or None."""
        bias: Tensor | None = self.whole.bias
        return None if bias is None else bias[self.start : self.stop]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., stop - start]."""
        return F.linear(x, self.weight, self.bias)


def heads_of(x: Tensor, num_heads: int, *projections: tuple[nn.Module, int]) -> tuple[Tensor, ...]:
    """What several projections make of one sequence, as heads: of one product, where they are plain linear layers.

    Their weights are copied side by side for it. Each by itself would take a training step two products, a sum over the bias's
    rows and one of the sequence's gradients more for every projection after the first.

    Args:
        x: [B, L, C].
        num_heads: of each part.
        projections: modules, and of how many parts side by side the result of each is.

    Returns:
        [B, num_heads, L, d] for every part.
    """
    plain = [module for module, _ in projections if _is_product(module)]
    together = len(projections) == len(plain) > 1 and len({linear.bias is None for linear in plain}) == 1
    if together and not autocasts(x.device):
        bias = None if plain[0].bias is None else torch.cat([linear.bias for linear in plain])
        rows = F.linear(x, torch.cat([linear.weight for linear in plain]), bias)
        widths = [width for linear, (_, parts) in zip(plain, projections, strict=True) for width in _even(linear, parts)]
        return split_projection(rows, widths, num_heads)
    results = [(module(x), parts) for module, parts in projections]
    return tuple(
        head for rows, parts in results for head in split_projection(rows, parts * [rows.shape[-1] // parts], num_heads)
    )


def _even(linear: nn.Linear, parts: int) -> list[int]:
    return parts * [linear.out_features // parts]


def _is_product(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling a module is no more than its product, of a weight that may be joined with others."""
    return isinstance(module, nn.Linear) and is_plain(module)


Projection = nn.Linear | LinearRows


def _norm(module: nn.Module | None) -> nn.LayerNorm | None:
    return module if isinstance(module, nn.LayerNorm) else None


def cross_attention_of(*, norm_latents: nn.Module | None, norm_inputs: nn.Module | None, **parts: Any) -> CrossAttention:
    """Few latents that read many inputs, of q_proj, k_proj, v_proj, out_proj, num_heads and residual.

    See ``nn.CrossAttention`` for the parts. What is no LayerNorm is no norm.
    """
    norms: dict[str, Any] = {"norm_latents": _norm(norm_latents), "norm_inputs": _norm(norm_inputs)}
    return _assembled(CrossAttention, norms["norm_inputs"], **norms, **parts)


def output_attention_of(
    *, norm_queries: nn.Module | None, norm_latents: nn.Module | None, **parts: Any
) -> OutputCrossAttention:
    """Many queries that read few latents, of the same parts; see ``nn.OutputCrossAttention``."""
    norms: dict[str, Any] = {"norm_queries": _norm(norm_queries), "norm_latents": _norm(norm_latents)}
    return _assembled(OutputCrossAttention, norms["norm_queries"], **norms, **parts)


def _assembled(
    kind: Any, many: nn.LayerNorm | None, *, q_proj: nn.Linear, k_proj: Projection, v_proj: Projection, out_proj: nn.Linear,
    num_heads: int, residual: bool, **norms: nn.LayerNorm | None,
) -> Any:  # fmt: skip
    """A layer of a class of ours; ``many`` is the norm on the longer side, which its kernels apply themselves."""
    layer = kind(
        q_proj.in_features, k_proj.in_features, num_heads=num_heads, qk_channels=q_proj.out_features,
        v_channels=v_proj.out_features, out_channels=out_proj.out_features, residual=residual,
        eps=1e-5 if many is None else many.eps, device="meta",
    )  # fmt: skip
    layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj = q_proj, k_proj, v_proj, out_proj
    for name, norm in norms.items():
        setattr(layer, name, norm)
    return layer


class Readers:
    """A layer for few queries of many inputs, and one for many queries of few; both of the same parts.

    Inputs of more channels than the first reads are read by the second, which computes keys and values.

    Args:
        norm_queries, norm_inputs: the norms on what asks and on what is read.
        parts: what else ``cross_attention_of`` takes.
    """

    def __init__(self, *, norm_queries: nn.Module | None, norm_inputs: nn.Module | None, **parts: Any) -> None:
        self.parts = (norm_queries, norm_inputs, *(parts[f"{name}_proj"] for name in ("q", "k", "v", "out")))
        self.output = output_attention_of(norm_queries=norm_queries, norm_latents=norm_inputs, **parts)
        self.input: CrossAttention | OutputCrossAttention = self.output
        if parts["k_proj"].in_features <= MAX_CHANNELS:
            self.input = cross_attention_of(norm_latents=norm_queries, norm_inputs=norm_inputs, **parts)

    def are_of(self, *parts: nn.Module | None) -> bool:
        """Whether both norms and q, k, v and out are still these and plain: adapters and hooks may have come since."""
        return all(mine is theirs for mine, theirs in zip(self.parts, parts, strict=True)) and are_plain(*parts)

    def of(self, queries: int, inputs: int) -> CrossAttention | OutputCrossAttention:
        """The layer for so many queries and inputs."""
        return self.output if inputs < queries else self.input
