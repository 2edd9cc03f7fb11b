"""Fourier positions and grids against other implementations, hand-worked tables, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from perceiver_kernels import positions, reference
from perceiver_kernels.inputs import FourierPositions, InputArray, TokenSlice, grid_coordinates

close = torch.testing.assert_close
EPS = torch.finfo(torch.float32).eps


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def features(part: TokenSlice) -> Tensor:
    """The position channels of a slice, as the reference packs them."""
    content = part.content[..., :0].double()
    return reference.pack_inputs(content, part.positions, part.fourier, normalize=False, channels_multiple=1)[
        0
    ]


class TestFourierPositions:
    def test_hand_worked_table(self) -> None:
        positions = FourierPositions(2, (4, 6))
        table = torch.tensor([
            [0, 1, 0, 0, 1, 1, 0, 0, 1, 1],
            [0, 0, 1, 2, 1, 3, 1, 2, 1, 3],
            [0, 0, 1, 1, 1, 1, 2, 2, 2, 2],
        ]).float()  # fmt: skip
        assert torch.equal(positions.table(), table)
        by_axis = FourierPositions(2, (4, 6), order="perceiver-pytorch").table()
        assert torch.equal(by_axis, table[:, [2, 3, 6, 7, 0, 4, 5, 8, 9, 1]])
        assert torch.equal(FourierPositions(2, (4, 6), False).table(), table[:, 2:])

    @pytest.mark.parametrize(
        ("positions", "axes", "channels"),
        [
            (FourierPositions(64, (224, 224)), 2, 258),
            (FourierPositions(64, (224, 224), include_raw=False), 2, 256),
            (FourierPositions(64, (2240,) * 3), 3, 387),
            (FourierPositions(32, (16, 224, 224)), 3, 195),
            (FourierPositions(1, (1,)), 1, 3),
        ],
    )
    def test_sizes(self, positions: FourierPositions, axes: int, channels: int) -> None:
        assert (positions.num_axes, positions.channels) == (axes, channels)
        assert positions.table().shape == (3, channels)
        assert positions.table().dtype == torch.float32

    @pytest.mark.parametrize("sizes", [(24,), (9, 14), (3, 8, 5), (1, 6)])
    def test_equals_transformers(self, sizes: tuple[int, ...]) -> None:
        """A whole grid of theirs, up to fp32 phases: coordinate, frequency and product are rounded."""
        perceiver = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")
        encoding = perceiver.PerceiverFourierPositionEncoding(num_bands=6, max_resolution=sizes)
        theirs = encoding(list(sizes), 1, torch.device("cpu"), torch.float32)
        positions = FourierPositions(6, sizes)
        assert positions.channels == encoding.output_size()
        inputs = InputArray(torch.zeros(1, math.prod(sizes), 0), positions, grid=sizes)
        atol = 4 * EPS * math.pi * max(1, max(sizes) / 2)
        close(features(inputs.slice()).float(), theirs, rtol=0, atol=atol)

    def test_equals_perceiver_pytorch(self) -> None:
        axes = [torch.linspace(-1, 1, size, dtype=torch.float64) for size in (5, 8)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        perceiver = pytest.importorskip("perceiver_pytorch.perceiver_pytorch")
        theirs = perceiver.fourier_encode(grid, 10.0, 6).flatten(-2)
        positions = FourierPositions(6, (10.0, 10.0), order="perceiver-pytorch")
        ours = features(InputArray(torch.zeros(1, 40, 0), positions, grid=(5, 8)).slice())[0]
        close(ours, theirs, rtol=0, atol=4 * EPS * math.pi * 5)

    def test_table_is_made_once(self) -> None:
        assert FourierPositions(3, (5,)).table() is FourierPositions(3, [5.0]).table("cpu")

    def test_tables_of_shapes_long_past_are_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A data set of endless lengths fills no memory; what is in use, or was captured in a CUDA graph, stays."""
        captured, place = FourierPositions(1, (3.125,)).table(), (FourierPositions(1, (3.125,)), torch.device("cpu"))
        monkeypatch.setitem(positions._captured, place, captured)
        used, dropped = FourierPositions(1, (3.25,)).table(), FourierPositions(1, (3.375,)).table()
        for size in range(2 * positions.MAX_CONSTANTS):
            FourierPositions(1, (1000.0 + size,)).table()
            assert FourierPositions(1, (3.25,)).table() is used
        assert len(positions._constants) == positions.MAX_CONSTANTS
        assert FourierPositions(1, (3.125,)).table() is captured
        again = FourierPositions(1, (3.375,)).table()
        assert again is not dropped and torch.equal(again, dropped)

    @pytest.mark.gpu
    def test_tables_in_a_cuda_graph_stay(self) -> None:
        fourier = FourierPositions(1, (3.0625,))
        table, graph = fourier.table("cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            doubled = 2 * fourier.table("cuda")
        graph.replay()
        assert torch.equal(doubled, 2 * table) and any(kept is table for kept in positions._captured.values())

    def test_table_made_in_inference_mode_serves_autograd(self) -> None:
        positions = FourierPositions(3, (5.25,))
        with torch.inference_mode():
            positions.table()
        x = randn(4, 1).requires_grad_()
        packed, _ = reference.pack_inputs(torch.zeros(1, 4, 0), x, positions.table(), normalize=False)
        packed.sum().backward()
        assert x.grad is not None and x.grad.any()

    def test_table_made_under_a_transform_outlives_it(self) -> None:
        positions = FourierPositions(3, (5.5,))
        torch.func.grad(lambda x: (positions.table() * x).sum())(torch.tensor(1.0))
        close(positions.table()[1], torch.tensor([0, 1, 1.875, 2.75, 1, 1.875, 2.75]))

    def test_follows_the_default_device(self) -> None:
        with torch.device("meta"):
            assert FourierPositions(3, (7.0,)).table().device.type == "meta"
        assert FourierPositions(3, (7.0,)).table().device.type == "cpu"

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((2.0, (4,)), TypeError, "num_bands must be an integer, got 2.0"),
            ((True, (4,)), TypeError, "num_bands must be an integer, got True"),
            ((0, (4,)), ValueError, "num_bands must be at least 1, got 0"),
            ((2, 4), TypeError, "max_resolution must be a tuple of finite positive numbers, got 4"),
            (
                (2, ("4",)),
                TypeError,
                r"max_resolution must be a tuple of finite positive numbers, got \('4',\)",
            ),
            ((2, ()), ValueError, r"max_resolution must hold one number for each axis, got \(\)"),
            (
                (2, (4, 0)),
                ValueError,
                r"max_resolution must be a tuple of finite positive numbers, got \(4, 0\)",
            ),
            (
                (2, (math.inf,)),
                ValueError,
                r"max_resolution must be .* finite positive numbers, got \(inf,\)",
            ),
            ((2, (4,), 1), TypeError, "include_raw must be a bool, got 1"),
            ((2, (4,), True, "hf"), ValueError, "order must be 'deepmind' or 'perceiver-pytorch', got 'hf'"),
        ],
    )
    def test_refusals(self, arguments: tuple, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            FourierPositions(*arguments)


class TestGridCoordinates:
    def test_hand_worked(self) -> None:
        expected = [[-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]
        assert torch.equal(grid_coordinates((2, 3)), torch.tensor(expected).float())

    @pytest.mark.parametrize("shape", [(7,), (1,), (5, 1, 3), (1, 1), (2, 3, 4, 5)])
    def test_equals_numpy_and_transformers(self, shape: tuple[int, ...]) -> None:
        numpy = pytest.importorskip("numpy")
        ours = grid_coordinates(shape)
        axes = numpy.meshgrid(*(numpy.linspace(-1, 1, size) for size in shape), indexing="ij")
        exact = torch.from_numpy(numpy.stack(axes, -1)).flatten(0, -2)
        close(ours.double(), exact, rtol=0, atol=EPS / 2)
        perceiver = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")
        close(ours, perceiver.build_linear_positions(shape).flatten(0, -2), rtol=0, atol=EPS)

    def test_ranges_are_parts_of_the_whole(self) -> None:
        shape = (5, 7, 3)
        whole = grid_coordinates(shape)
        for start, stop in ((0, 0), (0, 105), (13, 14), (20, 91), (105, 105)):
            assert torch.equal(grid_coordinates(shape, start, stop), whole[start:stop])
        assert torch.equal(grid_coordinates(shape, 50), whole[50:])

    def test_empty_grid(self) -> None:
        assert grid_coordinates((3, 0, 2)).shape == (0, 3)

    @pytest.mark.parametrize("bounds", [(-1, 3), (4, 3), (0, 7)])
    def test_refusals(self, bounds: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="start, stop must satisfy 0 <= start <= stop <= M=6, got"):
            grid_coordinates((2, 3), *bounds)
