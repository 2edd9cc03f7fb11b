"""Points of space: their embedding, and samples of a cloud that lie far from each other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.checks import check_tensor
from perceiver_kernels.nn.aligned import zero_padded
from perceiver_kernels.nn.called import is_plain, parameter_of
from perceiver_kernels.nn.checks import check_count
from perceiver_kernels.positions import constant


class PointEmbedding(nn.Module):
    """Points as channels, by sines of doubling frequencies.

        e(x) = [sin(2^k pi x_a) | cos(2^k pi x_a) | x_a | features],   a = 1..3 outer, k = 0..num_bands - 1 inner
        out = W e(x) + b

    Args:
        dim: D, channels of the result.
        num_bands: frequencies of each axis.
        feature_dim: further channels of every point (normals, for example).

    Source: 3DShape2VecSet, arXiv 2301.11445, section 5.1, and its authors' code, whose 8 bands make 48 + 3 channels.
    """

    def __init__(
        self,
        dim: int,
        num_bands: int = 8,
        feature_dim: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("num_bands", num_bands)
        check_count("feature_dim", feature_dim, 0)
        self.num_bands, self.feature_dim = num_bands, feature_dim
        self.proj = nn.Linear(6 * num_bands + 3 + feature_dim, dim, device=device, dtype=dtype)

    def forward(self, points: Tensor, features: Tensor | None = None) -> Tensor:
        """Embed points.

        Args:
            points: float [B, M, 3], best within [-1, 1], of any float dtype: half precision has no bits left for the sines.
            features: [B, M, feature_dim], where the layer has any; zeros when None.

        Returns:
            [B, M, D].

        Raises:
            TypeError, ValueError: a wrong type, shape or dtype, named.
        """
        check_tensor("points", points, "[B, M, 3]", (None, None, 3))
        weight = parameter_of(self.proj)
        # An embedding is differentiated by its points, twice where surfaces are trained by their gradients.
        wide = points.to(torch.promote_types(weight.dtype, torch.float32))
        frequencies = constant(
            ("octaves", self.num_bands, wide.dtype), points.device,
            lambda: [math.pi * 2.0**k for k in range(self.num_bands)], wide.dtype,
        )  # fmt: skip
        angles = (wide[..., None] * frequencies).flatten(2)  # [B, M, 3 bands]
        # Rounded one by one, so that nothing wide is laid side by side.
        parts = [part.to(weight.dtype) for part in (angles.sin(), angles.cos(), wide)]
        if self.feature_dim:
            shape = (*points.shape[:2], self.feature_dim)
            if features is None:
                parts.append(parts[0].new_zeros(shape))
            else:
                check_tensor("features", features, "[B, M, F]", shape)
                parts.append(features.to(weight.dtype))
        elif features is not None:
            raise ValueError(f"features must be None where feature_dim is 0, got {tuple(features.shape)}")
        missing = self._missing(points)
        if not missing:
            return self.proj(torch.cat(parts, -1))
        channels = torch.cat([*parts, parts[0].new_zeros(*points.shape[:2], missing)], -1)
        (padded,) = zero_padded((weight, (weight.shape[0], channels.shape[-1])))
        assert padded is not None
        return F.linear(channels, padded, self.proj.bias)

    def _missing(self, points: Tensor) -> int:
        """Channels of zeros that make rows of whole 16 bytes: without, an H200 takes 0.30 ms for 262,144 x 51 by 512."""
        return -self.proj.in_features % 8 if points.is_cuda and is_plain(self.proj) else 0


@torch.library.custom_op("perceiver_models::farthest_points", mutates_args=())
def _farthest_points(points: Tensor, first: Tensor, count: int) -> Tensor:
    """An operator, so that a compiled model holds one step instead of a loop of ``count``."""
    chosen = torch.empty(points.shape[0], count, dtype=torch.int64, device=points.device)
    distance = torch.full(points.shape[:2], torch.inf, dtype=points.dtype, device=points.device)
    latest = first[:, None]
    for i in range(count):
        chosen[:, i : i + 1] = latest
        place = points.gather(1, latest[..., None].expand(-1, -1, 3))  # [B, 1, 3]
        distance = torch.minimum(distance, (points - place).square().sum(-1))
        latest = distance.argmax(1, keepdim=True)
    return chosen


@_farthest_points.register_fake
def _(points: Tensor, first: Tensor, count: int) -> Tensor:
    return points.new_empty((points.shape[0], count), dtype=torch.int64)


def farthest_points(points: Tensor, count: int, first: Tensor | None = None) -> Tensor:
    """Which points of a cloud are a sample of it whose points lie far apart.

        i_0 = first,   i_n = argmax_m min_{l < n} |x_m - x_{i_l}|

    Args:
        points: float [B, M, 3].
        count: N, at most M.
        first: int64 [B], where each sample starts; the first point when None.

    Returns:
        int64 [B, N], places in the cloud; no gradient passes through them.

    Raises:
        TypeError, ValueError: a wrong type, shape or dtype, named.

    Source: Eldar et al. 1997, the farthest point strategy; PointNet++, arXiv 1706.02413, section 3.2. N passes over the cloud.
    """
    check_tensor("points", points, "[B, M, 3]", (None, None, 3))
    check_count("count", count)
    B, M = points.shape[:2]
    if count > M:
        raise ValueError(f"count must be at most the cloud's M={M} points, got {count}")
    if first is None:
        first = torch.zeros(B, dtype=torch.int64, device=points.device)
    check_tensor("first", first, "[B]", (B,), dtypes=(torch.int64,))
    wide = torch.promote_types(points.dtype, torch.float32)
    return _farthest_points(points.detach().to(wide), first, count)
