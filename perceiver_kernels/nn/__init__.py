"""Layers: cross-attention that reads long inputs, cross-attention of output queries, latent self-attention, feed-forward,
blocks of them, and torch's multi-head attention."""

from perceiver_kernels.nn.attention import CrossAttention, Linear, SelfAttention
from perceiver_kernels.nn.blocks import CrossBlock, FeedForward, LatentBlock
from perceiver_kernels.nn.multihead import MultiheadAttention
from perceiver_kernels.nn.output_attention import OutputCrossAttention
from perceiver_kernels.nn.positions import LearnedPositions

__all__ = [
    "CrossAttention",
    "CrossBlock",
    "FeedForward",
    "LatentBlock",
    "LearnedPositions",
    "Linear",
    "MultiheadAttention",
    "OutputCrossAttention",
    "SelfAttention",
]
