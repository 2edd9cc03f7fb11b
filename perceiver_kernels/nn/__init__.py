"""Layers: cross-attention that reads long inputs, cross-attention of output queries, latent self-attention, attention over a
context and the sequence itself, feed-forward, blocks of them, and torch's multi-head attention."""

from perceiver_kernels.nn.attention import CrossAttention, Linear, SelfAttention
from perceiver_kernels.nn.blocks import CrossBlock, LatentBlock, OutputBlock
from perceiver_kernels.nn.cache import KeyValueCache
from perceiver_kernels.nn.feed_forward import FeedForward
from perceiver_kernels.nn.joint_attention import JointAttention
from perceiver_kernels.nn.multihead import MultiheadAttention
from perceiver_kernels.nn.output_attention import OutputCrossAttention
from perceiver_kernels.nn.positions import LearnedPositions
from perceiver_kernels.nn.rotary import Rotary

__all__ = [
    "CrossAttention",
    "CrossBlock",
    "FeedForward",
    "JointAttention",
    "KeyValueCache",
    "LatentBlock",
    "LearnedPositions",
    "Linear",
    "MultiheadAttention",
    "OutputBlock",
    "OutputCrossAttention",
    "Rotary",
    "SelfAttention",
]
