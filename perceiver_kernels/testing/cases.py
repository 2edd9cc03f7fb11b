"""Shapes: the published model families, the shapes that are timed, and the edges of what is supported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

TILE = 128
"""The largest tile along keys; scaled cases keep their remainder by it: a ragged last tile stays ragged."""


def _shrink(size: int, limit: int, tile: int) -> int:
    """The largest number up to limit that leaves the same remainder as size when divided by tile; limit if none is near."""
    if size <= limit:
        return size
    alike = limit - (limit - size) % tile
    return alike if alike > limit // 2 else limit


@dataclass(frozen=True)
class EncodeCase:
    """A cross-attention of N latents over M inputs.

    Args:
        name: of the model family or the edge.
        B, M, C: batch, input tokens and their channels, content and positions together.
        N, D: latents and their channels.
        H, d_qk, d_v: heads and their widths of queries and keys, and of values.
    """

    name: str
    B: int
    M: int
    C: int
    N: int
    D: int
    H: int
    d_qk: int
    d_v: int

    @property
    def R(self) -> int:
        """Query rows, heads folded in."""
        return self.H * self.N

    @property
    def C_padded(self) -> int:
        """C rounded up to 16."""
        return -(-self.C // 16) * 16

    def scaled(self, max_inputs: int = 2 * TILE, max_latents: int = 24, max_batch: int = 2) -> EncodeCase:
        """The case at a size for a CPU: C, heads, widths and remainders (M by 128, N by 16) stay."""
        return replace(
            self,
            B=min(self.B, max_batch),
            M=_shrink(self.M, max_inputs, TILE),
            N=_shrink(self.N, max_latents, 16),
            D=min(self.D, 64),
        )

    def cut(self, max_inputs: int) -> EncodeCase:
        """The case with at most so many inputs, and nothing else changed."""
        return replace(self, M=min(self.M, max_inputs))


@dataclass(frozen=True)
class AttentionCase:
    """An attention of Lq queries over Lk keys, after the projections.

    Args:
        name: of the model family.
        B, H, Lq, Lk: batch, heads, query and key length.
        d_qk, d_v: widths of a head.
        H_kv: heads of keys and values, each shared by as many of the queries; None is H.
        causal: whether a query sees keys up to its own place, the last query all of them (bottom-right).
    """

    name: str
    B: int
    H: int
    Lq: int
    Lk: int
    d_qk: int
    d_v: int
    H_kv: int | None = None
    causal: bool = False

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.H_kv or self.H

    def scaled(self, max_length: int = 2 * TILE, max_batch: int = 2, max_heads: int = 4) -> AttentionCase:
        """The case at a size for a CPU: widths stay, so do remainders of Lq and Lk by 128, and how many share a key head."""
        heads = min(self.H, max_heads)
        return replace(
            self,
            B=min(self.B, max_batch),
            H=heads,
            H_kv=None if self.H_kv is None else max(1, heads * self.H_kv // self.H),
            Lq=_shrink(self.Lq, max_length, TILE),
            Lk=_shrink(self.Lk, max_length, TILE),
        )

    def cut(self, max_length: int) -> AttentionCase:
        """The case with at most so many queries and so many keys, and nothing else changed."""
        return replace(self, Lq=min(self.Lq, max_length), Lk=min(self.Lk, max_length))


def _encode(*cases: tuple[str, int, int, int, int, int, int, int, int]) -> dict[str, EncodeCase]:
    return {case[0]: EncodeCase(*case) for case in cases}


def _attention(*cases: tuple[Any, ...]) -> dict[str, AttentionCase]:
    return {case[0]: AttentionCase(*case) for case in cases}


# name, B, M, C, N, D, H, d_qk, d_v
ENCODE = _encode(
    ("imagenet", 8, 50_176, 261, 512, 1024, 1, 261, 261),
    ("imagenet-learned", 8, 50_176, 512, 512, 1024, 1, 512, 512),
    ("imagenet-conv", 8, 3_136, 322, 512, 1024, 1, 322, 322),
    ("audioset", 8, 13_024, 487, 512, 1024, 1, 487, 487),
    ("audioset-mel", 8, 17_344, 487, 512, 1024, 1, 487, 487),
    ("modelnet", 512, 2_000, 387, 512, 1024, 1, 387, 387),
    ("language", 32, 2_048, 768, 256, 1280, 8, 32, 160),
    ("flow", 2, 182_528, 322, 2_048, 512, 1, 322, 322),
    ("flow-frames", 1, 365_056, 451, 2_048, 512, 1, 451, 451),
    ("multimodal", 4, 52_097, 704, 784, 512, 1, 704, 704),
    ("longctx", 1, 1_048_576, 256, 256, 1024, 1, 256, 256),
    ("c128", 8, 50_176, 128, 512, 1024, 1, 128, 128),
    ("c64", 8, 50_176, 64, 512, 1024, 1, 64, 64),
    ("perceiver-ar", 1, 65_536, 1024, 1_024, 1024, 16, 64, 64),
    ("flamingo", 8, 1_280, 1024, 64, 1024, 8, 64, 64),
    ("resampler", 32, 2_048, 1024, 64, 1024, 16, 64, 64),
    ("set-transformer", 16, 5_000, 256, 32, 256, 4, 64, 64),
    ("rin", 32, 4_096, 512, 128, 768, 16, 32, 32),
    ("peract", 4, 8_077, 128, 2_048, 512, 1, 64, 64),
    ("aurora", 64_800, 13, 1024, 3, 1024, 16, 64, 64),
    ("poyo", 16, 4_099, 128, 256, 128, 2, 64, 64),
    ("shape2vecset", 16, 2_048, 512, 512, 512, 1, 512, 512),
    ("pointcloud", 4, 81_920, 1024, 3_072, 1024, 16, 64, 64),
    ("triposg", 1, 204_800, 512, 4_096, 512, 8, 64, 64),
    # One image: what sweeps over M are of.
    ("imagenet-b1", 1, 50_176, 261, 512, 1024, 1, 261, 261),
)

# More input channels than absorption takes (1024): projected. IDEFICS2 also shares a key head among four.
ENCODE_WIDE = _encode(
    ("ip-adapter", 8, 257, 1280, 16, 1280, 20, 64, 64),
    ("q-former", 8, 257, 1408, 32, 768, 12, 64, 64),
    ("idefics2", 8, 4_900, 4096, 64, 4096, 16, 96, 96),
)

# name, B, H, Lq, Lk, d_qk, d_v; heads of keys and values and whether causal, where they are not H and no
DECODE = _attention(
    ("decode-h8", 1, 8, 1_048_576, 256, 64, 64),
    ("decode-h1", 1, 1, 1_048_576, 512, 256, 256),
    ("decode-262k", 1, 8, 262_144, 1_024, 64, 64),
    ("flow", 1, 1, 182_528, 2_048, 512, 512),
    ("vecset", 1, 16, 1_048_576, 3_072, 64, 64),
    ("shape2vecset", 1, 1, 2_146_689, 512, 512, 512),
    ("multimodal", 1, 1, 804_737, 784, 512, 512),
    ("imagenet", 8, 1, 1, 512, 1024, 1024),
    ("language", 32, 8, 2_048, 256, 32, 96),
    ("peract", 4, 1, 8_077, 2_048, 64, 64),
    ("rin", 32, 16, 4_096, 128, 32, 32),
    ("aurora", 64_800, 16, 13, 3, 32, 32),
    ("linformer", 8, 8, 4_096, 256, 64, 64),
    ("multimodal-part", 1, 1, 6_288, 784, 512, 512),
    ("set-transformer", 16, 4, 5_000, 32, 64, 64),
    ("poyo", 16, 2, 1_000, 256, 64, 64),
    ("triposg", 1, 8, 16_974_593, 4_096, 64, 64),
)
PROCESS = _attention(
    ("imagenet", 32, 8, 512, 512, 128, 128),
    ("n512-d64", 64, 8, 512, 512, 64, 64),
    ("multimodal", 32, 8, 784, 784, 64, 64),
    ("language", 32, 8, 256, 256, 160, 160),
    ("n2048-d64", 8, 8, 2_048, 2_048, 64, 64),
    ("flow", 2, 16, 2_048, 2_048, 32, 32),
    ("rin", 32, 16, 128, 128, 48, 48),
    ("aurora", 64_800, 16, 3, 3, 64, 64),
    ("language-32-160", 32, 8, 256, 256, 32, 160),
    ("perceiver-ar", 1, 16, 1_024, 1_024, 64, 64, None, True),
    ("q-former", 8, 12, 32, 32, 64, 64),
    ("set-transformer", 16, 4, 32, 32, 64, 64),
    ("peract", 4, 8, 2_048, 2_048, 64, 64),
    ("poyo", 16, 8, 256, 256, 64, 64),
    ("shape2vecset", 16, 8, 512, 512, 64, 64),
    ("triposg", 1, 8, 4_096, 4_096, 64, 64),
)
# Few queries over many keys that are given, not absorbed: what a projected encode comes down to.
ENCODE_KV = _attention(
    ("kv-256x1m-d256", 1, 1, 256, 1_048_576, 256, 256),
    ("kv-64x16k-h16-d64", 8, 16, 64, 16_384, 64, 64),
    ("kv-512x50k-d128", 8, 1, 512, 50_176, 128, 128),
    ("kv-512x50k-h8-d64", 4, 8, 512, 50_176, 64, 64),
    ("kv-perceiver-ar", 1, 16, 1_024, 65_536, 64, 64, None, True),
    ("kv-flamingo", 8, 8, 64, 1_344, 64, 64),
    ("kv-idefics2", 8, 16, 64, 4_964, 96, 96, 4),
    ("kv-ip-adapter", 8, 20, 16, 273, 64, 64),
    ("kv-q-former", 8, 12, 32, 257, 64, 64),
)

_EDGE_BASE = EncodeCase("base", B=2, M=37, C=21, N=5, D=24, H=2, d_qk=12, d_v=20)
_EDGE_SIZES = {
    "B": (0, 1, 3),
    "M": (0, 1, 2, 31, 61, 63, 64, 65, 127, 128, 129, 257),
    "C": (1, 2, 15, 16, 17, 31, 33, 127, 129, 255, 256, 257, 261, 322, 335, 336, 337, 513, 704, 1023, 1024),
    "N": (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65),
    "H": (1, 3, 7),
    "d_qk": (1, 2, 31, 64, 129),
    "d_v": (1, 2, 31, 64, 129),
}


def _with(axis: str, size: int) -> EncodeCase:
    sizes: dict[str, Any] = {axis: size}
    return replace(_EDGE_BASE, name=f"{axis}={size}", **sizes)


EDGE = {case.name: case for case in (_with(axis, size) for axis in _EDGE_SIZES for size in _EDGE_SIZES[axis])}
"""Nothing, one, primes, and each tile size with its neighbours: one axis at a time."""
