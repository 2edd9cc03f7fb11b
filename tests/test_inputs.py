"""Input arrays: their constructors, slices on any device and in any dtype; packed inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from perceiver_kernels import reference
from perceiver_kernels.inputs import FourierPositions, InputArray, PackedInputs, grid_coordinates

close = torch.testing.assert_close
EPS = torch.finfo(torch.float32).eps


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.uint8)


class TestPackedInputs:
    def test_holds_what_it_is_given(self) -> None:
        lengths = torch.tensor([1, 2], dtype=torch.int32)
        packed = PackedInputs(randn(2, 3, 16), 13, True, lengths=lengths)
        assert (packed.channels, packed.normalized, packed.key_mask) == (13, True, None)
        assert packed.lengths is lengths

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"data": [1.0]}, TypeError, r"data must be a tensor \[B, M, C_padded\], got list"),
            (
                {"data": torch.zeros(2, 3, 16, dtype=torch.int32)},
                TypeError,
                "data must be float32 or .*, got int32",
            ),
            ({"data": torch.zeros(3, 16)}, ValueError, r"data must be \[B, M, C_padded\], got \(3, 16\)"),
            ({"channels": 13.0}, TypeError, "channels must be an integer, got 13.0"),
            ({"channels": 0}, ValueError, "channels must be in 1..C_padded=16, got 0"),
            ({"channels": 17}, ValueError, "channels must be in 1..C_padded=16, got 17"),
            ({"constants": 4}, ValueError, "constants must be in 0..C_padded-channels=3, got 4"),
            ({"constants": 2.0}, ValueError, "constants must be in 0..C_padded-channels=3, got 2.0"),
            ({"normalized": 1}, TypeError, "normalized must be a bool, got 1"),
            ({"key_mask": torch.ones(2, 3)}, TypeError, "key_mask must be bool, True = visible, got float32"),
            (
                {"key_mask": torch.ones(3, 2, dtype=torch.bool)},
                ValueError,
                r"key_mask must be \[B, M\] with B=2, M=3, got \(3, 2\)",
            ),
            ({"lengths": torch.ones(2).long()}, TypeError, "lengths must be int32, got int64"),
            ({"lengths": torch.ones(3).int()}, ValueError, r"lengths must be \[B\] with B=2, got \(3,\)"),
            (
                {"lengths": torch.ones(2).int(), "key_mask": torch.ones(2, 3, dtype=torch.bool)},
                ValueError,
                "key_mask and lengths exclude each other: give one of them",
            ),
        ],
    )
    def test_refusals(self, changes: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            PackedInputs(**{"data": torch.zeros(2, 3, 16), "channels": 13, "normalized": False} | changes)


class TestRepr:
    """Printing one of these printed every number in it."""

    def test_packed_inputs(self) -> None:
        packed = PackedInputs(torch.zeros(2, 7, 16), 5, True, lengths=torch.tensor([1, 7], dtype=torch.int32))
        told = "data=float32[2, 7, 16] on cpu, channels=5, normalized=True, lengths=int32[2] on cpu, constants=0"
        assert repr(packed) == f"PackedInputs({told})"

    def test_input_array(self) -> None:
        learned = InputArray.tokens(torch.zeros(2, 7, 3).bfloat16(), torch.zeros(7, 4))
        told = "content=bfloat16[2, 7, 3] on cpu, positions=float32[7, 4] on cpu"
        assert repr(learned) == f"InputArray({told})"
        fourier = FourierPositions(2, (4.0,))
        image = InputArray(random_bytes(1, 4, 3), fourier, grid=(4,), mean=(0.5, 0.5, 0.5))
        told = f"content=uint8[1, 4, 3] on cpu, positions={fourier}, grid=(4,), mean=(0.5, 0.5, 0.5)"
        assert repr(image) == f"InputArray({told})"


class TestSlice:
    def test_everything_by_default_without_a_copy(self) -> None:
        content, positions, mask = randn(2, 6, 3), randn(6, 4), torch.ones(2, 6, dtype=torch.bool)
        part = InputArray(content, positions, key_mask=mask).slice()
        assert part.content.data_ptr() == content.data_ptr() and part.content.shape == content.shape
        assert part.positions is not None and part.positions.data_ptr() == positions.data_ptr()
        assert part.key_mask is not None and torch.equal(part.key_mask, mask)
        assert part.fourier is None

    @pytest.mark.parametrize("batched", [False, True])
    def test_a_range(self, batched: bool) -> None:
        content, positions = randn(2, 6, 3), randn(2, 6, 4) if batched else randn(6, 4)
        mask = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
        part = InputArray(content, positions, key_mask=mask).slice(2, 5)
        assert torch.equal(part.content, content[:, 2:5])
        assert torch.equal(part.positions, positions[..., 2:5, :])
        assert torch.equal(part.key_mask, mask[:, 2:5])

    def test_slices_join_to_the_whole(self) -> None:
        inputs = InputArray.image(random_bytes(2, 3, 5, 7), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        whole, parts = inputs.slice(), [inputs.slice(a, b) for a, b in ((0, 9), (9, 9), (9, 30), (30, 35))]
        assert torch.equal(torch.cat([part.content for part in parts], 1), whole.content)
        assert torch.equal(torch.cat([part.positions for part in parts]), whole.positions)

    def test_bytes_become_normalised_floats(self) -> None:
        u = random_bytes(2, 3, 4, 4)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        plain = InputArray.image(u).slice().content
        assert plain.dtype == torch.float32
        exact = u.flatten(2).mT.double() / 255
        close(plain.double(), exact, rtol=EPS, atol=0)
        exact = (exact - exact.new_tensor(mean)) / exact.new_tensor(std)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            content = InputArray.image(u, mean=mean, std=std).slice(dtype=dtype).content
            assert content.dtype == dtype
            close(content.double(), exact, rtol=torch.finfo(dtype).eps, atol=8 * EPS)
        close(InputArray.image(u, mean=mean).slice().content, plain - plain.new_tensor(mean))
        close(InputArray.image(u, std=std).slice().content, plain / plain.new_tensor(std))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_coordinates_are_never_half_precision(self, dtype: torch.dtype) -> None:
        """bf16 coordinates would leave no bit of sin(pi * 112 * x)."""
        wide = torch.promote_types(dtype, torch.float32)
        given = InputArray.points(randn(2, 5, 3).to(dtype)).slice(dtype=dtype)
        dense = InputArray.image(randn(2, 3, 2, 2)).slice(dtype=dtype)
        assert given.content.dtype == dense.content.dtype == dtype
        assert given.positions.dtype == dense.positions.dtype == wide
        learned = InputArray(randn(2, 5, 3), randn(5, 4)).slice(dtype=dtype)
        assert learned.positions.dtype == dtype

    def test_lengths_become_a_mask(self) -> None:
        lengths = torch.tensor([0, 3, 6], dtype=torch.int32)
        inputs = InputArray.tokens(randn(3, 6, 2), lengths=lengths)
        expected = torch.arange(6) < lengths[:, None]
        assert torch.equal(inputs.slice().key_mask, expected)
        assert torch.equal(inputs.slice(2, 5).key_mask, expected[:, 2:5])

    def test_gradients_reach_content_and_learned_positions(self) -> None:
        content, positions = randn(2, 6, 3).requires_grad_(), randn(6, 4).requires_grad_()
        part = InputArray(content, positions).slice(1, 4, dtype=torch.float64)
        (part.content.sum() + part.positions.sum()).backward()
        inside = torch.tensor([0.0, 1, 1, 1, 0, 0])
        assert torch.equal(content.grad, inside[None, :, None].expand(2, 6, 3))
        assert torch.equal(positions.grad, inside[:, None].expand(6, 4))

    def test_goes_to_another_device_and_the_rest_stays(self) -> None:
        """The meta device stands for an accelerator here; the slice alone is moved."""
        mask = torch.ones(2, 20, dtype=torch.bool)
        inputs = InputArray(random_bytes(2, 20, 3), FourierPositions(2, (4, 5)), grid=(4, 5), key_mask=mask)
        part = inputs.slice(3, 11, device="meta", dtype=torch.bfloat16)
        tensors = (part.content, part.positions, part.fourier, part.key_mask)
        assert all(tensor.device.type == "meta" for tensor in tensors)
        assert part.content.shape == (2, 8, 3) and part.positions.shape == (8, 2)
        assert inputs.device == inputs.content.device == torch.device("cpu")

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to copy to")
    @pytest.mark.parametrize("pinned", [False, True])
    def test_host_slices_on_a_gpu(self, pinned: bool) -> None:
        u = random_bytes(2, 3, 50, 70)
        inputs = InputArray.image(u.pin_memory() if pinned else u, mean=(0.5,) * 3, std=(0.2,) * 3)
        expected = InputArray.image(u, mean=(0.5,) * 3, std=(0.2,) * 3).slice(100, 2000)
        part = inputs.slice(100, 2000, device="cuda")
        close(part.content.cpu(), expected.content)
        close(part.positions.cpu(), expected.positions, rtol=0, atol=0)
        close(part.fourier.cpu(), expected.fourier, rtol=0, atol=0)

    def test_compiles_without_a_break(self) -> None:
        def sliced(images: Tensor, stop: int) -> Tensor:
            part = InputArray.image(images, mean=(0.5,) * 3, std=(0.2,) * 3).slice(2, stop)
            return reference.pack_inputs(part.content, part.positions, part.fourier)[0]

        compiled = torch.compile(sliced, backend="eager", fullgraph=True)
        for stop in (20, 35):
            u = random_bytes(2, 3, 5, 7)
            close(compiled(u, stop), sliced(u, stop))

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            ({"start": -1}, ValueError, "start, stop must satisfy 0 <= start <= stop <= M=6, got -1, 6"),
            ({"start": 4, "stop": 3}, ValueError, "0 <= start <= stop <= M=6, got 4, 3"),
            ({"stop": 7}, ValueError, "0 <= start <= stop <= M=6, got 0, 7"),
            ({"dtype": torch.int32}, TypeError, "dtype must be a floating-point type, got torch.int32"),
        ],
    )
    def test_refusals(self, call: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            InputArray.tokens(randn(2, 6, 3)).slice(**call)


class TestConstructors:
    def test_image(self) -> None:
        images = randn(2, 3, 5, 7)
        inputs = InputArray.image(images)
        assert (inputs.batch, inputs.length, inputs.channels, inputs.grid) == (2, 35, 3 + 258, (5, 7))
        assert inputs.positions == FourierPositions(64, (5, 7))
        assert inputs.content.data_ptr() == images.data_ptr()
        assert torch.equal(inputs.content[:, 2 * 7 + 3], images[:, :, 2, 3])
        assert torch.equal(inputs.slice(17, 18).positions, grid_coordinates((5, 7))[17:18])
        assert InputArray.image(randn(1, 3, 224, 224)).channels == 261

    def test_channels_last_image_is_a_view_too(self) -> None:
        images = randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
        inputs = InputArray.image(images)
        assert inputs.content.data_ptr() == images.data_ptr() and inputs.content.stride(-1) == 1

    @pytest.mark.parametrize("positions", [randn(35, 9), randn(2, 35, 9)], ids=["shared", "batched"])
    def test_learned_positions(self, positions: Tensor) -> None:
        inputs = InputArray.image(randn(2, 3, 5, 7), positions)
        assert (inputs.channels, inputs.grid) == (12, None)
        assert torch.equal(inputs.slice().positions, positions)

    @pytest.mark.parametrize("patch", [(1, 1, 1), (2, 4, 3)])
    def test_video(self, patch: tuple[int, int, int]) -> None:
        video = random_bytes(2, 4, 3, 8, 6)
        inputs = InputArray.video(video, patch)
        grid = tuple(size // part for size, part in zip((4, 8, 6), patch, strict=True))
        assert (inputs.length, inputs.grid) == (math.prod(grid), grid)
        assert inputs.positions == FourierPositions(32, (4, 8, 6))
        assert inputs.content.dtype == torch.uint8 and inputs.content.shape[2] == 3 * math.prod(patch)
        t, h, w = patch
        token = video[:, t : 2 * t, :, h : 2 * h, 2 * w - w : 2 * w].permute(0, 1, 3, 4, 2).flatten(1)
        index = (1 * grid[1] + 1) * grid[2] + 1
        assert torch.equal(inputs.content[:, index], token)

    def test_video_patches_equal_transformers(self) -> None:
        video = randn(2, 4, 3, 8, 8)
        perceiver = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")
        theirs = perceiver.space_to_depth(video, temporal_block_size=2, spatial_block_size=4).flatten(1, 3)
        assert torch.equal(InputArray.video(video, (2, 4, 4)).content, theirs)

    def test_video_statistics_repeat_over_the_patch(self) -> None:
        video = random_bytes(1, 2, 3, 4, 4)
        whole = InputArray.video(video, (2, 2, 2), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0)).slice().content
        value = video.float().div(255)
        scaled = (value - value.new_tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / value.new_tensor(
            [1.0, 2, 4]
        ).view(3, 1, 1)
        close(whole, InputArray.video(scaled, (2, 2, 2)).content)

    @pytest.mark.parametrize("shape", [(2, 96), (2, 96, 2)])
    def test_audio(self, shape: tuple[int, ...]) -> None:
        samples = randn(*shape)
        inputs = InputArray.audio(samples)
        assert inputs.content.shape == (2, 6, 16 * math.prod(shape[2:]))
        assert torch.equal(inputs.content[:, 1], samples[:, 16:32].flatten(1))
        assert inputs.content.data_ptr() == samples.data_ptr()
        assert inputs.positions == FourierPositions(192, (96,)) and inputs.grid == (6,)

    def test_points(self) -> None:
        coordinates, colours = randn(2, 9, 3), randn(2, 9, 4)
        bare = InputArray.points(coordinates)
        assert (bare.content.shape, bare.channels) == ((2, 9, 0), 387)
        table = bare.slice().fourier
        assert table is not None and table[1].max() == 1120  # ten times that of 224 x 224 images
        assert torch.equal(bare.slice(3, 7).positions, coordinates[:, 3:7])
        assert bare.slice(3, 7).content.shape == (2, 4, 0)
        lengths = torch.tensor([9, 2], dtype=torch.int32)
        own = InputArray.points(coordinates, colours, FourierPositions(8, (64.0,) * 3), lengths=lengths)
        assert (own.channels, own.content) == (4 + 51, colours)
        assert own.lengths is lengths

    def test_tokens(self) -> None:
        content, mask = randn(2, 6, 3), torch.ones(2, 6, dtype=torch.bool)
        inputs = InputArray.tokens(content, key_mask=mask)
        assert inputs.content is content and inputs.key_mask is mask and inputs.channels == 3
        series = InputArray.tokens(content, FourierPositions(4, (6,)))
        assert (series.channels, series.grid) == (12, (6,))
        close(series.slice(2).positions, torch.linspace(-1, 1, 6)[2:, None], rtol=0, atol=EPS)
        assert InputArray.tokens(random_bytes(2, 6, 3)).slice().content.dtype == torch.float32

    @pytest.mark.parametrize(
        "make",
        [
            lambda: InputArray.image(randn(0, 3, 4, 4)),
            lambda: InputArray.image(randn(2, 3, 0, 4)),
            lambda: InputArray.video(randn(2, 0, 3, 4, 4)),
            lambda: InputArray.audio(randn(2, 0)),
            lambda: InputArray.points(randn(2, 0, 3)),
            lambda: InputArray.tokens(randn(2, 0, 3)),
        ],
    )
    def test_nothing_is_an_input_too(self, make: Callable[[], InputArray]) -> None:
        part = make().slice()
        assert part.content.shape[0] * part.content.shape[1] == 0
