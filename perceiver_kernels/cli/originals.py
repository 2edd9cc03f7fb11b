"""Cross-attention layers of other libraries, with the weights of ours, where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.nn import CrossAttention

PACKAGES = {"transformers": "transformers", "perceiver-pytorch": "perceiver_pytorch"}
"""Name of an original -> the module it comes in."""


def installed() -> list[str]:
    """Return the names of the originals that are installed here."""
    return [name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is not None]


def original_layer(name: str, layer: CrossAttention) -> nn.Module:
    """Return a library's own layer of the same sizes, called as ours: (latents [B, N, D], inputs [B, M, C]) -> [B, N, D].

    Args:
        name: one of PACKAGES.
        layer: ours, without residual, of one width of latents and results; its weights are copied. perceiver-pytorch has no
            biases of q, k and v.

    Raises:
        RuntimeError: the library is not installed, or has no layer of these sizes.
    """
    if importlib.util.find_spec(PACKAGES[name]) is None:
        raise RuntimeError(f"{name} is not installed")
    weight, usual = layer.q_proj.weight, torch.get_default_dtype()
    # Built where and as it shall be: parameters of fake tensors cannot be moved.
    torch.set_default_dtype(weight.dtype)
    try:
        with weight.device:
            return _BUILDERS[name](layer)
    finally:
        torch.set_default_dtype(usual)


class _Transformers(nn.Module):
    """transformers' PerceiverAttention: LayerNorms, projections, scores written out, output projection."""

    def __init__(self, layer: CrossAttention) -> None:
        super().__init__()
        from transformers import PerceiverConfig
        from transformers.models.perceiver.modeling_perceiver import PerceiverAttention

        self.attention = PerceiverAttention(
            PerceiverConfig(attention_probs_dropout_prob=0.0), is_cross_attention=True, qk_channels=layer.qk_channels,
            v_channels=layer.v_channels, num_heads=layer.num_heads, q_dim=layer.latent_dim, kv_dim=layer.input_dim,
            use_query_residual=False,
        )  # fmt: skip
        inner = self.attention.self
        pairs = (
            (inner.layernorm1, layer.norm_latents), (inner.layernorm2, layer.norm_inputs), (inner.query, layer.q_proj),
            (inner.key, layer.k_proj), (inner.value, layer.v_proj), (self.attention.output.dense, layer.out_proj),
        )  # fmt: skip
        for theirs, ours in pairs:
            _copy(theirs.weight, ours.weight)
            _copy(theirs.bias, ours.bias)

    def forward(self, latents: Tensor, inputs: Tensor) -> Tensor:
        return self.attention(latents, inputs=inputs)[0]


class _PerceiverPytorch(nn.Module):
    """perceiver-pytorch's PreNorm of Attention: scores written out by einsum, one projection for keys and values."""

    def __init__(self, layer: CrossAttention) -> None:
        super().__init__()
        from perceiver_pytorch.perceiver_pytorch import Attention, PreNorm

        if layer.qk_channels != layer.v_channels:
            raise RuntimeError(
                f"perceiver-pytorch has one width of keys and values, got {layer.qk_channels} and {layer.v_channels} channels"
            )
        attention = Attention(
            layer.latent_dim, layer.input_dim, heads=layer.num_heads, dim_head=layer.qk_channels // layer.num_heads
        )
        self.attention = PreNorm(layer.latent_dim, attention, context_dim=layer.input_dim)
        for theirs, ours in ((self.attention.norm, layer.norm_latents), (self.attention.norm_context, layer.norm_inputs)):
            _copy(theirs.weight, ours.weight)
            _copy(theirs.bias, ours.bias)
        _copy(attention.to_q.weight, layer.q_proj.weight)
        _copy(attention.to_kv.weight, torch.cat([layer.k_proj.weight, layer.v_proj.weight]))
        _copy(attention.to_out.weight, layer.out_proj.weight)
        _copy(attention.to_out.bias, layer.out_proj.bias)

    def forward(self, latents: Tensor, inputs: Tensor) -> Tensor:
        return self.attention(latents, context=inputs)


def _copy(theirs: Any, ours: Any) -> None:
    with torch.no_grad():
        theirs.copy_(ours)


_BUILDERS: dict[str, Callable[[CrossAttention], nn.Module]] = {
    "transformers": _Transformers,
    "perceiver-pytorch": _PerceiverPytorch,
}
