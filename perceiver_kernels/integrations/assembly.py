"""Layers of ours made of another module's own submodules."""

from __future__ import annotations

from typing import Any

from torch import nn

from perceiver_kernels.nn import CrossAttention, OutputCrossAttention


def _norm(module: nn.Module | None) -> nn.LayerNorm | None:
    return module if isinstance(module, nn.LayerNorm) else None


def cross_attention_of(
    *, norm_latents: nn.Module | None, norm_inputs: nn.Module | None, q_proj: nn.Linear, k_proj: nn.Linear, v_proj: nn.Linear,
    out_proj: nn.Linear, num_heads: int, residual: bool, dropout: float = 0.0,
) -> CrossAttention:  # fmt: skip
    """Few latents that read many inputs; see ``nn.CrossAttention`` for the parts. What is no LayerNorm is no norm."""
    norm = _norm(norm_inputs)
    layer = CrossAttention(
        q_proj.in_features, k_proj.in_features, num_heads=num_heads, qk_channels=q_proj.out_features,
        v_channels=v_proj.out_features, out_channels=out_proj.out_features, residual=residual, dropout=dropout,
        eps=1e-5 if norm is None else norm.eps, device="meta",
    )  # fmt: skip
    layer.norm_latents, layer.norm_inputs = _norm(norm_latents), norm
    return _with_projections(layer, q_proj, k_proj, v_proj, out_proj)


def output_attention_of(
    *, norm_queries: nn.Module | None, norm_latents: nn.Module | None, q_proj: nn.Linear, k_proj: nn.Linear, v_proj: nn.Linear,
    out_proj: nn.Linear, num_heads: int, residual: bool, dropout: float = 0.0,
) -> OutputCrossAttention:  # fmt: skip
    """Many queries that read few latents; see ``nn.OutputCrossAttention`` for the parts. What is no LayerNorm is no norm."""
    norm = _norm(norm_queries)
    layer = OutputCrossAttention(
        q_proj.in_features, k_proj.in_features, num_heads=num_heads, qk_channels=q_proj.out_features,
        v_channels=v_proj.out_features, out_channels=out_proj.out_features, residual=residual, dropout=dropout,
        eps=1e-5 if norm is None else norm.eps, device="meta",
    )  # fmt: skip
    layer.norm_queries, layer.norm_latents = norm, _norm(norm_latents)
    return _with_projections(layer, q_proj, k_proj, v_proj, out_proj)


def _with_projections(layer: Any, q_proj: nn.Linear, k_proj: nn.Linear, v_proj: nn.Linear, out_proj: nn.Linear) -> Any:
    layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj = q_proj, k_proj, v_proj, out_proj
    return layer
