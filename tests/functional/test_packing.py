"""pack_inputs as users call it: what is a view, what is cast, where positions and masks come from, which gradients flow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.testing import column_major, same_bits

B, M, C = 2, 12, 5


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def test_nothing_to_do_is_a_view() -> None:
    """Aligned rows without LayerNorm, positions or mask are packed inputs already; gradients flow through them."""
    x = randn(B, M, 32).requires_grad_()
    packed = pk.pack_inputs(x, normalize=False)
    assert packed.data is x or packed.data.data_ptr() == x.data_ptr()
    assert (packed.channels, packed.normalized) == (32, False)
    (gradient,) = torch.autograd.grad(packed.data.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ("normalize", {"normalize": True}),
        ("dtype", {"dtype": torch.float16}),
        ("mask", {"key_mask": torch.zeros(B, M, dtype=torch.bool)}),
        ("positions", {"positions": torch.ones(M, 16)}),
        ("strides", {}),
        ("padding", {}),
    ],
)
def test_anything_to_do_is_a_copy(change: str, options: dict[str, Any]) -> None:
    x = {"strides": column_major(randn(B, M, 32)), "padding": randn(B, M, 30)}.get(change, randn(B, M, 32))
    packed = pk.pack_inputs(x, **({"normalize": False} | options))
    assert packed.data.data_ptr() != x.data_ptr()
    assert packed.data.stride(-1) == 1 and packed.data.shape[-1] % 16 == 0
    if change == "mask":
        assert not packed.data.any() and packed.key_mask is options["key_mask"]


def test_input_arrays_bring_their_own() -> None:
    content, coordinates = randn(B, M, C), randn(B, M, 2).tanh()
    lengths = torch.tensor([M, 4], dtype=torch.int32)
    fourier = pk.FourierPositions(3, (9.0, 9.0))
    array = pk.InputArray(content, fourier, coordinates, lengths=lengths)
    separate = pk.pack_inputs(content, fourier, coordinates=coordinates, lengths=lengths)
    joined = pk.pack_inputs(array)
    assert same_bits(joined.data, separate.data) and joined.lengths is lengths and separate.lengths is lengths
    for name, value in {
        "positions": fourier,
        "coordinates": coordinates,
        "key_mask": content[..., 0] > 0,
        "lengths": lengths,
    }.items():
        with pytest.raises(ValueError, match="an InputArray brings its own"):
            pk.pack_inputs(array, **{name: value})


def test_lengths_hide_what_a_mask_hides() -> None:
    x, lengths = randn(B, M, C), torch.tensor([7, 0], dtype=torch.int32)
    by_mask = pk.pack_inputs(x, key_mask=torch.arange(M) < lengths[:, None])
    assert same_bits(pk.pack_inputs(x, lengths=lengths).data, by_mask.data)
    assert not by_mask.data[1].any() and by_mask.data[0, :7].any()


@pytest.mark.parametrize("shape", [(M, 3), (B, M, 3)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_learned_positions_get_their_gradient(shape: tuple[int, ...], normalize: bool) -> None:
    content, positions = randn(B, M, C).requires_grad_(), randn(*shape).requires_grad_()
    packed = pk.pack_inputs(content, positions, normalize=normalize)
    weights = randn(B, M, 16)
    found = torch.autograd.grad((packed.data * weights).sum(), (content, positions))
    expected, _ = reference.pack_inputs(content, positions, normalize=normalize)
    truth = torch.autograd.grad((expected * weights).sum(), (content, positions))
    torch.testing.assert_close(packed.data, expected)
    torch.testing.assert_close(found, truth)


def test_dtype_is_asked_for_or_autocasts_or_the_contents() -> None:
    x = randn(B, M, C)
    assert pk.pack_inputs(x).data.dtype == torch.float32
    assert pk.pack_inputs(x.double()).data.dtype == torch.float64
    assert pk.pack_inputs(x, dtype=torch.bfloat16).data.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert pk.pack_inputs(x).data.dtype == torch.bfloat16
        assert pk.pack_inputs(x, dtype=torch.float16).data.dtype == torch.float16


def test_autocast_leaves_fp64_alone() -> None:
    """As torch's own attention does, in every function; F.linear of the layers too."""
    q, x, w = randn(B, 1, 3, 4).double(), randn(B, M, 16).double(), randn(4, 16).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.scaled_dot_product_attention(q, q, q).dtype == torch.float64
        assert pk.pack_inputs(x).data.dtype == torch.float64
        assert pk.attention(q, q, q).dtype == torch.float64
        assert pk.shared_kv_attention(x[:, :3], x).dtype == torch.float64
        for options in ({"method": "absorbed"}, {"method": "projected"}, {"chunk_size": 5}):
            out = pk.input_cross_attention(q, x, w, w, **options)
            torch.testing.assert_close(out, reference.input_cross_attention(q, x, w, w))


@pytest.mark.parametrize("shape", [(M, 1), (M, 3), (B, M, 3), (M,), (B, M + 1, 2)], ids=str)
def test_coordinates_have_the_axes_of_their_features(shape: tuple[int, ...]) -> None:
    rule = r"coordinates must be \[M, axes\] or \[B, M, axes\] with B=2, M=12, axes=2, got"
    with pytest.raises(ValueError, match=rule):
        pk.pack_inputs(randn(B, M, C), pk.FourierPositions(3, (9.0, 9.0)), coordinates=randn(*shape))


def test_frames_of_a_video_lie_on_a_grid_of_three_axes() -> None:
    content = randn(B, 2, 3, 4, C)
    packed = pk.pack_inputs(content, pk.FourierPositions(2, (2.0, 3.0, 4.0)))
    assert packed.data.shape == (B, 24, 32) and packed.channels == C + 15
    positions = pk.FourierPositions(2, (2.0, 3.0, 4.0))
    array = pk.InputArray(content.flatten(1, 3), positions, grid=(2, 3, 4))
    assert same_bits(pk.pack_inputs(array).data, packed.data)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_lengths_past_the_ends_are_the_ends(chunk_size: int | None) -> None:
    """Above M all tokens are visible, below 0 none; lengths are not looked at, so that nothing waits for the device."""
    q, x, w = randn(B, 2, 3, 4), randn(B, M, C), randn(8, C)
    past, ends = (torch.tensor(lengths, dtype=torch.int32) for lengths in ((M + 50, -3), (M, 0)))
    assert same_bits(pk.pack_inputs(x, lengths=past).data, pk.pack_inputs(x, lengths=ends).data)
    options = {"chunk_size": chunk_size, "method": "absorbed"}
    found, expected = (pk.input_cross_attention(q, x, w, w, lengths=lengths, **options) for lengths in (past, ends))
    assert same_bits(found, expected) and found[0].any() and not found[1].any()
