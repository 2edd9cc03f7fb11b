"""The cases: the published sizes, what scaling keeps, and which edges there are."""

from __future__ import annotations

import dataclasses

import pytest

from perceiver_kernels.testing import (
    DECODE,
    EDGE,
    ENCODE,
    ENCODE_KV,
    ENCODE_WIDE,
    PROCESS,
    AttentionCase,
    EncodeCase,
)

ALL_ENCODE = {**ENCODE, **ENCODE_WIDE}
ALL_ATTENTION = [*DECODE.values(), *PROCESS.values(), *ENCODE_KV.values()]


def test_names_are_the_keys() -> None:
    for table in (ENCODE, ENCODE_WIDE, DECODE, PROCESS, ENCODE_KV, EDGE):
        assert table and all(case.name == name for name, case in table.items())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("imagenet", (8, 50_176, 261, 512, 1024, 1, 261, 261)),
        ("longctx", (1, 1_048_576, 256, 256, 1024, 1, 256, 256)),
        ("flow", (2, 182_528, 322, 2_048, 512, 1, 322, 322)),
        ("multimodal", (4, 52_097, 704, 784, 512, 1, 704, 704)),
        ("language", (32, 2_048, 768, 256, 1280, 8, 32, 160)),
        ("resampler", (32, 2_048, 1024, 64, 1024, 16, 64, 64)),
        ("pointcloud", (4, 81_920, 1024, 3_072, 1024, 16, 64, 64)),
    ],
)
def test_timed_cases_have_the_sizes_of_the_targets(name: str, sizes: tuple[int, ...]) -> None:
    assert dataclasses.astuple(ENCODE[name])[1:] == sizes


@pytest.mark.parametrize(
    ("table", "name", "sizes"),
    [
        (DECODE, "decode-h8", (1, 8, 1_048_576, 256, 64, 64)),
        (DECODE, "decode-h1", (1, 1, 1_048_576, 512, 256, 256)),
        (DECODE, "decode-262k", (1, 8, 262_144, 1_024, 64, 64)),
        (DECODE, "flow", (1, 1, 182_528, 2_048, 512, 512)),
        (PROCESS, "imagenet", (32, 8, 512, 512, 128, 128)),
        (PROCESS, "n512-d64", (64, 8, 512, 512, 64, 64)),
        (PROCESS, "multimodal", (32, 8, 784, 784, 64, 64)),
        (PROCESS, "language", (32, 8, 256, 256, 160, 160)),
        (PROCESS, "n2048-d64", (8, 8, 2_048, 2_048, 64, 64)),
        (ENCODE_KV, "kv-256x1m-d256", (1, 1, 256, 1_048_576, 256, 256)),
        (ENCODE_KV, "kv-64x16k-h16-d64", (8, 16, 64, 16_384, 64, 64)),
        (ENCODE_KV, "kv-512x50k-d128", (8, 1, 512, 50_176, 128, 128)),
        (ENCODE_KV, "kv-512x50k-h8-d64", (4, 8, 512, 50_176, 64, 64)),
    ],
)
def test_timed_attention_cases_have_the_sizes_of_the_targets(
    table: dict[str, AttentionCase], name: str, sizes: tuple[int, ...]
) -> None:
    assert dataclasses.astuple(table[name])[1:7] == sizes


def test_sizes_follow_from_the_configurations() -> None:
    """Pixels and Fourier features; 64 + 258 channels of flow; audio, video and label tokens."""
    assert (ENCODE["imagenet"].M, ENCODE["imagenet"].C) == (224 * 224, 3 + 2 * (2 * 64 + 1))
    assert (ENCODE["flow"].M, ENCODE["flow"].C) == (368 * 496, 64 + 258)
    assert ENCODE["multimodal"].M == 1_920 + 16 * 56 * 56 + 1
    assert ENCODE["modelnet"].C == 3 + 3 * 2 * 64
    assert DECODE["multimodal"].Lq == 16 * 224 * 224 + 1_920 + 1
    assert DECODE["shape2vecset"].Lq == 129**3


def test_every_family_has_its_attention() -> None:
    """Latents of every encoder read each other, or are read, at their own number and width."""
    assert {"imagenet", "language-32-160", "flow", "multimodal", "perceiver-ar", "q-former", "rin", "peract"} <= set(PROCESS)
    assert {"set-transformer", "aurora", "poyo", "shape2vecset", "triposg"} <= set(PROCESS)
    assert {"kv-perceiver-ar", "kv-flamingo", "kv-idefics2", "kv-ip-adapter", "kv-q-former"} <= set(ENCODE_KV)
    assert {"set-transformer", "poyo", "triposg", "multimodal-part", "linformer", "aurora"} <= set(DECODE)
    assert DECODE["triposg"].Lq == 257**3
    assert DECODE["multimodal-part"].Lq == (16 * 224 * 224 + 1_920) // 128 + 1
    # Their keys are the inputs and the latents.
    assert ENCODE_KV["kv-flamingo"].Lk == ENCODE["flamingo"].M + ENCODE["flamingo"].N
    assert ENCODE_KV["kv-idefics2"].Lk == ENCODE_WIDE["idefics2"].M + ENCODE_WIDE["idefics2"].N
    assert ENCODE_KV["kv-ip-adapter"].Lk == ENCODE_WIDE["ip-adapter"].M + ENCODE_WIDE["ip-adapter"].N
    assert [case.name for case in ALL_ATTENTION if case.causal] == ["perceiver-ar", "kv-perceiver-ar"]


def test_shared_key_heads_stay_shared() -> None:
    case = ENCODE_KV["kv-idefics2"]
    assert (case.H, case.key_heads) == (16, 4)
    assert (case.scaled().H, case.scaled().key_heads) == (4, 1)
    assert (case.scaled(max_heads=8).key_heads, DECODE["flow"].key_heads) == (2, 1)


def test_absorbable_cases_are_apart_from_wide_ones() -> None:
    assert all(case.C <= 1024 for case in [*ENCODE.values(), *EDGE.values()])
    assert all(case.C > 1024 for case in ENCODE_WIDE.values())


def test_rows_and_padding() -> None:
    assert (ENCODE["language"].R, ENCODE["imagenet"].C_padded, ENCODE["c64"].C_padded) == (2_048, 272, 64)


@pytest.mark.parametrize("case", ALL_ENCODE.values(), ids=lambda case: case.name)
def test_scaled_encode_cases_are_small_and_alike(case: EncodeCase) -> None:
    small = case.scaled()
    expected = min(case.B, 2), min(case.D, 64)
    assert expected == (small.B, small.D)
    assert 0 < small.M <= 256 and 0 < small.N <= 24
    assert (small.M - case.M) % 128 == 0 and (small.N - case.N) % 16 == 0
    for axis in ("name", "C", "H", "d_qk", "d_v"):
        assert getattr(small, axis) == getattr(case, axis)
    assert small.scaled() == small


@pytest.mark.parametrize("case", ALL_ATTENTION, ids=lambda case: case.name)
def test_scaled_attention_cases_are_small_and_alike(case: AttentionCase) -> None:
    small = case.scaled()
    assert small.B <= 2 and small.H <= 4 and 0 < small.Lq <= 256 and 0 < small.Lk <= 256
    assert (small.Lq - case.Lq) % 128 == 0 and (small.Lk - case.Lk) % 128 == 0
    assert (small.d_qk, small.d_v) == (case.d_qk, case.d_v)


def test_cutting_changes_lengths_alone() -> None:
    encode, decode = ENCODE["imagenet"], DECODE["flow"]
    assert encode.cut(1_000) == dataclasses.replace(encode, M=1_000) and encode.cut(10**9) == encode
    assert decode.cut(10_000) == dataclasses.replace(decode, Lq=10_000)
    assert decode.cut(100) == dataclasses.replace(decode, Lq=100, Lk=100)


def test_scaling_keeps_the_ragged_tile() -> None:
    assert [ENCODE[name].scaled(300).M for name in ("imagenet", "multimodal", "peract")] == [256, 257, 269]


@pytest.mark.parametrize("limit", [1, 10, 127])
def test_a_limit_below_the_remainder_is_the_size(limit: int) -> None:
    """No number up to 10 leaves the remainder 77 when divided by 128; the size was negative then. Nor is one of a few."""
    for case in ENCODE.values():
        M = case.scaled(limit).M
        assert 1 <= M <= limit
        assert M in (limit, case.M) or (M - case.M) % 128 == 0
    assert (ENCODE["modelnet"].scaled(10).M, ENCODE["multimodal"].scaled(10).M) == (10, 10)
    assert (ENCODE["multimodal"].scaled(128).M, ENCODE_KV["kv-q-former"].scaled(128).Lk) == (128, 128)


def test_edges_surround_nothing_one_and_every_tile_size() -> None:
    for axis, tiles in (("M", (64, 128)), ("N", (8, 16, 32, 64)), ("C", (16, 256, 336))):
        sizes = {getattr(case, axis) for name, case in EDGE.items() if name.startswith(f"{axis}=")}
        assert {tile + step for tile in tiles for step in (-1, 0, 1)} <= sizes and 1 in sizes
    assert EDGE["M=0"].M == EDGE["N=0"].N == EDGE["B=0"].B == 0
    assert EDGE["C=1024"].C == 1024


def test_an_edge_changes_one_axis() -> None:
    base = EncodeCase("base", B=2, M=37, C=21, N=5, D=24, H=2, d_qk=12, d_v=20)
    for name, case in EDGE.items():
        axis, size = name.split("=")
        assert dataclasses.replace(case, **{"name": "base", axis: getattr(base, axis)}) == base
        assert getattr(case, axis) == int(size)
