"""Autoencoder of shapes: a point cloud as a set of latents, and a field that can be asked anywhere in space.

Source: 3DShape2VecSet, arXiv 2301.11445.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perceiver_kernels.checks import check_indices, check_tensor, is_integer
from perceiver_kernels.functional.common import autocast_dtype
from perceiver_kernels.models.model import Model, changed
from perceiver_kernels.models.progress import Progress, reporting
from perceiver_kernels.nn import CrossAttention, FeedForward, OutputCrossAttention, SelfAttention
from perceiver_kernels.nn.called import parameter_of
from perceiver_kernels.nn.checkpointing import run_block
from perceiver_kernels.nn.checks import check_choice, check_count, check_flag, check_input_dim, check_sequence, check_widths
from perceiver_kernels.nn.feed_forward import Activation, check_activation
from perceiver_kernels.nn.norms import NormKind
from perceiver_kernels.nn.output_attention import PreparedLatents
from perceiver_kernels.nn.points import PointEmbedding, farthest_points
from perceiver_kernels.positions import grid_coordinates
from perceiver_kernels.problem import check_eps, check_probability


@dataclass(frozen=True, kw_only=True)
class VecSetConfig:
    """Sizes of a shape autoencoder; the defaults are those of 3DShape2VecSet.

    Args:
        num_latents: N.
        dim: D, width of the latents and of all embeddings, at most 1024.
        queries: "sampled", N points of the cloud that lie far apart; "learned", the same N vectors for every cloud.
        encoder_layers: self-attention layers between reading the cloud and the bottleneck.
        decoder_layers: self-attention layers after the bottleneck.
        cross_heads: heads of reading the cloud and of answering queries.
        latent_heads: heads of the self-attention layers.
        bottleneck_dim: channels that each latent is left with, as a normal distribution; None for no bottleneck.
        output_dim: channels of the field; 1 for occupancy or distance.
        num_bands: frequencies of the point embedding, on each axis.
        feature_dim: channels that points of the cloud have besides their places.
        widening_factor: of the feed-forward layers.
        activation: of the feed-forward layers.
        qk_norm: norm of queries and keys in every attention.
        head_norm: LayerNorm before the linear layer of the head.
        drop_path: probability of dropping a whole branch of a self-attention layer, in training.
        eps: of all norms.
        activation_checkpointing: in training, keep only the input of every layer and compute it again for its gradient.

    Source: arXiv 2301.11445, section 5 and its authors' code.
    """

    num_latents: int = 512
    dim: int = 512
    queries: Literal["sampled", "learned"] = "sampled"
    encoder_layers: int = 0
    decoder_layers: int = 24
    cross_heads: int = 1
    latent_heads: int = 8
    bottleneck_dim: int | None = None
    output_dim: int = 1
    num_bands: int = 8
    feature_dim: int = 0
    widening_factor: int = 4
    activation: Activation = "geglu"
    qk_norm: NormKind | None = None
    head_norm: bool = False
    drop_path: float = 0.1
    eps: float = 1e-5
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("num_latents", "output_dim", "num_bands", "widening_factor"):
            check_count(name, getattr(self, name))
        for name in ("encoder_layers", "decoder_layers", "feature_dim"):
            check_count(name, getattr(self, name), 0)
        check_input_dim(self.dim)
        check_choice("queries", self.queries, ("sampled", "learned"))
        check_widths(self.cross_heads, dim=self.dim)
        check_widths(self.latent_heads, dim=self.dim)
        if self.bottleneck_dim is not None:
            check_count("bottleneck_dim", self.bottleneck_dim)
        check_activation(self.activation)
        if self.qk_norm is not None:
            check_choice("qk_norm", self.qk_norm, ("layer", "rms"))
        check_flag("head_norm", self.head_norm)
        check_flag("activation_checkpointing", self.activation_checkpointing)
        check_probability("drop_path", self.drop_path)
        check_eps(self.eps)


@dataclass(frozen=True, eq=False)
class LatentDistribution:
    """Independent normal distributions of latents' channels.

    Args:
        mean: [B, N, C].
        log_variance: [B, N, C], within [-30, 20].
    """

    mean: Tensor
    log_variance: Tensor

    def sample(self) -> Tensor:
        """Latents [B, N, C], mean + exp(log_variance / 2) noise."""
        return self.mean + (0.5 * self.log_variance).exp() * torch.randn_like(self.mean)

    def kl(self) -> Tensor:
        """[B], the mean over latents and channels of (mean^2 + variance - 1 - log_variance) / 2, nats from a unit normal."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).mean((1, 2))


class VecSetAutoencoder(Model):
    """A cloud of points in, N latents between, and the value of a field at any point out.

        z = q + CrossAttention(LN(q), LN(e(cloud))),   z <- z + FeedForward(LN(z))        q sampled or learned, [B, N, D]
        z <- layers,   z ~ N(W_m z + b_m, exp(W_s z + b_s)),   z <- W z + b              where there is a bottleneck
        z <- z + SelfAttention(LN(z)),   z <- z + FeedForward(LN(z))                      every layer
        f(y) = W CrossAttention(LN(e(y)), LN(z)) + b

    e is the point embedding, of the cloud, of its sample and of the queries alike.

    Args:
        config: the sizes, see ``VecSetConfig``.
        device: of the parameters.
        dtype: of the parameters.

    Source: arXiv 2301.11445, section 5, wired as its authors' code: no biases of queries, keys and values, no residual and no
    feed-forward behind the queries, linear layers that start as torch's do. Learned queries start standard normal.
    """

    def __init__(
        self,
        config: VecSetConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = VecSetConfig() if config is None else config
        self.config = config
        D = config.dim
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        normed: dict[str, Any] = {"eps": config.eps, **where}
        cross: dict[str, Any] = {"num_heads": config.cross_heads, "bias": False, "qk_norm": config.qk_norm, **normed}
        forward: dict[str, Any] = {"activation": config.activation, **normed}
        self.point_embedding = PointEmbedding(D, config.num_bands, config.feature_dim, **where)
        self.queries = nn.Parameter(torch.empty(1, config.num_latents, D, **where)) if config.queries == "learned" else None
        self._reset_queries()
        self.read = CrossAttention(D, D, **cross)
        self.read_feed_forward = FeedForward(D, config.widening_factor, **forward)
        self.encoder, self.decoder = (
            nn.ModuleList(
                nn.Sequential(
                    SelfAttention(
                        D, config.latent_heads, bias=False, qk_norm=config.qk_norm, drop_path=config.drop_path, **normed
                    ),
                    FeedForward(D, config.widening_factor, drop_path=config.drop_path, **forward),
                )
                for _ in range(count)
            )
            for count in (config.encoder_layers, config.decoder_layers)
        )
        self.mean = self.log_variance = self.expand = None
        if config.bottleneck_dim is not None:
            self.mean = nn.Linear(D, config.bottleneck_dim, **where)
            self.log_variance = nn.Linear(D, config.bottleneck_dim, **where)
            self.expand = nn.Linear(config.bottleneck_dim, D, **where)
        self.answer = OutputCrossAttention(D, D, **cross)
        self.head_norm = nn.LayerNorm(D, **normed) if config.head_norm else None
        self.head = nn.Linear(D, config.output_dim, **where)
        self._reset_linears()

    def reset_parameters(self) -> None:
        """Start learned queries, and linear layers as torch does, after the layers' own methods."""
        self._reset_queries()
        self._reset_linears()

    def _reset_queries(self) -> None:
        if self.queries is not None:
            nn.init.normal_(self.queries)

    def _reset_linears(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.Linear.reset_parameters(module)

    @classmethod
    def shapenet(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> VecSetAutoencoder:  # fmt: skip
        """The paper's model: 2,048 points, 512 latents x 512, one head of 512 in and out, 24 layers with 8 heads of 64.

        Args:
            changes: other values for fields of ``VecSetConfig``: ``bottleneck_dim=8`` for the paper's second stage,
                ``queries="learned"`` for its other way to ask the cloud.

        Source: arXiv 2301.11445, section 5; sizes as in the authors' code.
        """
        return cls(changed(VecSetConfig, {}, changes), device=device, dtype=dtype)

    @classmethod
    def large(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> VecSetAutoencoder:  # fmt: skip
        """The size of today's shape generators: 81,920 points with 4 features, 4,096 latents x 1,024, 16 heads of 64.

        8 layers before the bottleneck and 16 after it, GELU, norms of queries and keys and before the head, eps 1e-6. These
        are sizes: how the parts are wired is 3DShape2VecSet's.

        Args:
            changes: other values for fields of ``VecSetConfig``, for example ``num_latents=2048``.
        """
        sizes: dict[str, Any] = {
            "num_latents": 4096, "dim": 1024, "encoder_layers": 8, "decoder_layers": 16, "cross_heads": 16, "latent_heads": 16,
            "feature_dim": 4, "activation": "gelu", "qk_norm": "layer", "head_norm": True, "drop_path": 0.0, "eps": 1e-6,
        }  # fmt: skip
        return cls(changed(VecSetConfig, sizes, changes), device=device, dtype=dtype)

    def forward(
        self, points: Tensor, queries: Tensor, features: Tensor | None = None, sample: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encode clouds and ask the fields of their latents.

        Args:
            points: float [B, M, 3], the clouds.
            queries: float [B, O, 3], or batch 1 to share them over the batch.
            features: see ``encode``.
            sample: see ``encode``.

        Returns:
            the field [B, O, output_dim], and the bottleneck's divergence [B], None without one. Latents are drawn from the
            bottleneck in training, and are its mean else (the authors' code draws them always).

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named.
        """
        encoded = self.encode(points, features, sample)
        if isinstance(encoded, LatentDistribution):
            latents = encoded.sample() if self.training else encoded.mean
            return self.decode(latents, queries), encoded.kl()
        return self.decode(encoded, queries), None

    def encode(
        self, points: Tensor, features: Tensor | None = None, sample: Tensor | None = None
    ) -> Tensor | LatentDistribution:
        """Latents of clouds.

        Args:
            points: float [B, M, 3], M at least N where queries are sampled.
            features: [B, M, feature_dim], zeros when None.
            sample: int64 [B, N], which points the latents start from; ``nn.points.farthest_points`` of a random first point
                in training, of the cloud's first point else, when None. For sampled queries only.

        Returns:
            [B, N, D], or their distribution where there is a bottleneck.
        """
        check_tensor("points", points, "[B, M, 3]", (None, None, 3))
        latents = self._initial_latents(points, features, sample)
        checkpointing = self.config.activation_checkpointing
        read = run_block(self.read, latents, self.point_embedding(points, features), checkpointing=checkpointing)
        latents = run_block(self.read_feed_forward, read, checkpointing=checkpointing)
        latents = self._layers(self.encoder, latents)
        if self.mean is None or self.log_variance is None:
            return latents
        return LatentDistribution(self.mean(latents), self.log_variance(latents).clamp(-30.0, 20.0))

    def _initial_latents(self, points: Tensor, features: Tensor | None, sample: Tensor | None) -> Tensor:
        N, (B, M, _) = self.config.num_latents, points.shape
        if self.queries is not None:
            if sample is not None:
                raise ValueError(f"sample must be None with queries='learned', got {tuple(sample.shape)}")
            return self.queries
        if sample is None:
            if M < N:
                raise ValueError(f"points must have at least num_latents={N} points in a cloud, got {M}")
            first = torch.randint(M, (B,), device=points.device) if self.training else None
            sample = farthest_points(points, N, first)
        check_tensor("sample", sample, "[B, N]", (B, N), dtypes=(torch.int64,))
        check_indices("sample", sample, "M-1", M)
        places = points.gather(1, sample[..., None].expand(-1, -1, 3))
        if features is not None:
            features = features.gather(1, sample[..., None].expand(-1, -1, features.shape[-1]))
        return self.point_embedding(places, features)

    def _layers(self, layers: nn.ModuleList, latents: Tensor) -> Tensor:
        for layer in layers:
            latents = run_block(layer, latents, checkpointing=self.config.activation_checkpointing)
        return latents

    def transform(self, latents: Tensor) -> Tensor:
        """Latents as ``encode`` gives or draws them, [B, N, D or bottleneck_dim], as those that queries read, [B, N, D]."""
        config = self.config
        channels = config.dim if config.bottleneck_dim is None else config.bottleneck_dim
        check_sequence("latents", latents, "B, N, C", channels, parameter_of(self.head))
        return self._layers(self.decoder, latents if self.expand is None else self.expand(latents))

    def query(self, transformed: Tensor | PreparedLatents, queries: Tensor) -> Tensor:
        """The field of transformed latents [B, N, D] at queries [B or 1, O, 3]: [B, O, output_dim].

        Latents that ``answer.prepare`` made ready serve queries that come in many calls. The field is differentiable by the
        queries, and twice where the attention that runs is: the reference is.
        """
        check_tensor("queries", queries, "[B, O, 3]", (None, None, 3))
        checkpointing = self.config.activation_checkpointing
        read = run_block(self.answer, self.point_embedding(queries), transformed, checkpointing=checkpointing)
        return self.head(read if self.head_norm is None else self.head_norm(read))

    def decode(self, latents: Tensor, queries: Tensor) -> Tensor:
        """The field of latents [B, N, D or bottleneck_dim] at queries [B or 1, O, 3]: [B, O, output_dim]."""
        return self.query(self.transform(latents), queries)

    @torch.no_grad()
    def decode_grid(
        self,
        latents: Tensor,
        resolution: int | tuple[int, int, int],
        chunk_size: int = 262_144,
        progress: Progress = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """The field on a dense grid of [-1, 1]^3, ends included, a chunk of its points at a time.

        Places are made chunk by chunk and values go straight into the result: memory is the result's, and one chunk's. They
        are those of ``decode`` to rounding, since products of other sizes may add in another order. No gradient.

        Args:
            latents: [B, N, D or bottleneck_dim].
            resolution: points along every axis, or along x, y and z.
            chunk_size: points that are asked at a time.
            progress: called as ``progress(done, total)`` in points, after every chunk; True shows a bar (needs rich).
            out: [B, x, y, z, output_dim], contiguous, to write into, of any float dtype and on any device.

        Returns:
            [B, x, y, z, output_dim], ``out`` where it is given.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, named. ImportError: no rich.
        """
        shape = _grid_shape(resolution)
        check_count("chunk_size", chunk_size)
        transformed = self.answer.prepare(self.transform(latents))
        whole = (latents.shape[0], *shape, self.config.output_dim)
        if out is None:
            like = parameter_of(self.head)
            dtype = autocast_dtype(like) or like.dtype
            out = torch.empty(whole, dtype=dtype, device=latents.device)
        check_tensor("out", out, "[B, x, y, z, output_dim]", whole)
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous, got strides {out.stride()}")
        flat, total = out.view(whole[0], -1, whole[-1]), math.prod(shape)
        with reporting(progress, "decoding", total) as report:
            for start in range(0, total, chunk_size):
                stop = min(start + chunk_size, total)
                places = grid_coordinates(shape, start, stop, device=latents.device)
                flat[:, start:stop] = self.query(transformed, places[None])
                report(stop)
        return out


def _grid_shape(resolution: int | tuple[int, int, int]) -> tuple[int, int, int]:
    sizes = resolution if isinstance(resolution, (tuple, list)) else (resolution,) * 3
    if len(sizes) != 3 or not all(is_integer(size) and size >= 1 for size in sizes):
        raise ValueError(f"resolution must be a positive integer, or three of them, got {resolution!r}")
    return (sizes[0], sizes[1], sizes[2])
