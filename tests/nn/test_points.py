"""Point embeddings and farthest points against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perceiver_kernels.nn import PointEmbedding, farthest_points
from tests.models.plain_vecset import embed, sampled
from tests.modules import assert_same, randomised, result_and_gradients

B, M = 2, 33


def cloud(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.rand(B, M, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(dtype)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("feature_dim", [0, 4])
def test_embedding_as_written(feature_dim: int, given: bool) -> None:
    layer = randomised(PointEmbedding(16, 5, feature_dim, dtype=torch.float64))
    leaves = [cloud().requires_grad_()]
    if given and feature_dim:
        leaves.append(torch.randn(B, M, feature_dim, dtype=torch.float64).requires_grad_())
    actual = result_and_gradients(layer, layer, *leaves)
    assert_same(actual, result_and_gradients(lambda x, f=None: embed(x, layer, f), layer, *leaves))


def test_rows_of_whole_16_bytes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, leaf = randomised(PointEmbedding(16, 5, dtype=torch.float64)), cloud().requires_grad_()
    expected = result_and_gradients(layer, layer, leaf)
    monkeypatch.setattr(PointEmbedding, "_missing", lambda self, points: -self.proj.in_features % 8)
    assert_same(result_and_gradients(layer, layer, leaf), expected)
    torch.autograd.gradgradcheck(layer, cloud()[:, :2].requires_grad_())


@pytest.mark.gpu
def test_embedding_on_a_gpu_has_rows_of_whole_16_bytes() -> None:
    layer, points = randomised(PointEmbedding(64)).cuda(), cloud(torch.float32).cuda()
    assert layer._missing(points) == 5 and layer._missing(points.cpu()) == 0
    expected = layer.double()(points.double())
    torch.testing.assert_close(layer.float()(points).double(), expected, rtol=1e-4, atol=1e-4)
    assert (layer.bfloat16()(points).double() - expected).norm() < 0.01 * expected.norm()


def test_embedding_has_the_published_channels() -> None:
    assert PointEmbedding(512).proj.in_features == 48 + 3 and PointEmbedding(1024, feature_dim=4).proj.in_features == 51 + 4


def test_half_precision_keeps_the_phases() -> None:
    """In a bf16 layer the sines are taken of fp32 places: the result is what rounding its channels once gives."""
    layer, points = PointEmbedding(16, 8), cloud(torch.float32)
    half = PointEmbedding(16, 8, dtype=torch.bfloat16)
    half.load_state_dict(layer.state_dict())
    layer.load_state_dict(half.state_dict())
    assert (half(points).float() - layer(points)).abs().max() < 0.02
    assert (half(points.bfloat16()).float() - layer(points)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_farthest_points_by_definition(dtype: torch.dtype) -> None:
    points = cloud(dtype)
    assert torch.equal(farthest_points(points, 12), sampled(points, 12, [0, 0]))
    first = torch.tensor([3, 30])
    assert torch.equal(farthest_points(points, 12, first), sampled(points, 12, [3, 30]))
    everything = farthest_points(points, M)
    assert torch.equal(everything.sort(1).values, torch.arange(M).expand(B, -1))


def test_farthest_points_of_equal_points() -> None:
    """More points than places: nothing breaks, and every place is taken before one comes twice."""
    points = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5])[None, :, None].expand(1, 5, 3)
    assert farthest_points(points, 4)[0, :3].tolist() == [0, 1, 4]


def test_farthest_points_is_one_operator_when_compiled() -> None:
    points = cloud(torch.float32)
    compiled = torch.compile(lambda x: farthest_points(x, 9), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(points), farthest_points(points, 9))
    torch.library.opcheck(torch.ops.perceiver_models.farthest_points.default, (points, torch.zeros(B, dtype=torch.int64), 9))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: PointEmbedding(0), ValueError, "dim must be at least 1, got 0"),
        (lambda: PointEmbedding(8, 0), ValueError, "num_bands must be at least 1, got 0"),
        (lambda: PointEmbedding(8)(cloud()[..., :2]), ValueError, r"points must be \[B, M, 3\], got \(2, 33, 2\)"),
        (lambda: PointEmbedding(8)(cloud(), cloud()), ValueError, r"features must be None where feature_dim is 0, got \(2, 33"),
        (
            lambda: PointEmbedding(8, feature_dim=4)(cloud(), cloud()),
            ValueError,
            r"features must be \[B, M, F\] with B=2, M=33, F=4, got \(2, 33, 3\)",
        ),
        (lambda: farthest_points(cloud(), M + 1), ValueError, "count must be at most the cloud's M=33 points, got 34"),
        (lambda: farthest_points(cloud().long(), 3), TypeError, "points must be .* got int64"),
        (lambda: farthest_points(cloud(), 3, torch.zeros(3)), TypeError, "first must be int64, got float32"),
    ],
)
def test_wrong_use_is_named(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
