"""Layers: cross-attention that reads long inputs, cross-attention of output queries, latent self-attention, attention over a
context and the sequence itself, attention to mixtures of tokens, feed-forward, blocks of them, blocks of sets and of
interface networks, points, and torch's multi-head attention."""

from perceiver_kernels.nn.attention import CrossAttention, Linear, SelfAttention
from perceiver_kernels.nn.blocks import CrossBlock, LatentBlock, OutputBlock
from perceiver_kernels.nn.cache import KeyValueCache
from perceiver_kernels.nn.feed_forward import FeedForward
from perceiver_kernels.nn.joint_attention import JointAttention
from perceiver_kernels.nn.linformer import LinformerAttention
from perceiver_kernels.nn.multihead import MultiheadAttention
from perceiver_kernels.nn.output_attention import OutputCrossAttention, PreparedLatents
from perceiver_kernels.nn.points import PointEmbedding, farthest_points
from perceiver_kernels.nn.positions import LearnedPositions
from perceiver_kernels.nn.rin import RINBlock
from perceiver_kernels.nn.rotary import Rotary
from perceiver_kernels.nn.set_blocks import ISAB, MAB, PMA, SAB

__all__ = [
    "ISAB",
    "MAB",
    "PMA",
    "SAB",
    "CrossAttention",
    "CrossBlock",
    "FeedForward",
    "JointAttention",
    "KeyValueCache",
    "LatentBlock",
    "LearnedPositions",
    "Linear",
    "LinformerAttention",
    "MultiheadAttention",
    "OutputBlock",
    "OutputCrossAttention",
    "PointEmbedding",
    "PreparedLatents",
    "RINBlock",
    "Rotary",
    "SelfAttention",
    "farthest_points",
]
