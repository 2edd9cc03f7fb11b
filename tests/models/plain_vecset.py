"""The shape autoencoder written out from its description, on the parameters of our modules: an oracle."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def affine(x: Tensor, layer: Any) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def norm(x: Tensor, layer: Any) -> Tensor:
    if layer is None:
        return x
    if not hasattr(layer, "bias"):
        return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def embed(points: Tensor, layer: Any, features: Tensor | None = None) -> Tensor:
    axes, bands = range(3), range(layer.num_bands)
    waves = [math.pi * 2**k * points[..., a] for a in axes for k in bands]
    channels = [*(w.sin() for w in waves), *(w.cos() for w in waves), *points.unbind(-1)]
    if layer.feature_dim:
        zeros = [torch.zeros_like(points[..., 0])] * layer.feature_dim
        channels += zeros if features is None else list(features.unbind(-1))
    return affine(torch.stack(channels, -1), layer.proj)


def mlp(x: Tensor, layer: Any) -> Tensor:
    hidden, gate = affine(norm(x, layer.norm), layer.up_proj), None
    if layer.activation == "geglu":
        hidden, gate = hidden.chunk(2, -1)
    weighed = hidden if gate is None else gate
    active = weighed * 0.5 * (1 + torch.erf(weighed / 2**0.5))
    return x + affine(active if gate is None else hidden * active, layer.down_proj)


def heads(q: Tensor, k: Tensor, v: Tensor, layer: Any) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, one head after the other, and the output projection."""
    outs = []
    for q_h, k_h, v_h in zip(*(t.chunk(layer.num_heads, -1) for t in (q, k, v)), strict=True):
        scores = norm(q_h, layer.norm_query) @ norm(k_h, layer.norm_key).mT / q_h.shape[-1] ** 0.5
        outs.append(scores.softmax(-1) @ v_h)
    return affine(torch.cat(outs, -1), layer.out_proj)


def cross(x: Tensor, read: Tensor, layer: Any) -> Tensor:
    return heads(affine(x, layer.q_proj), affine(read, layer.k_proj), affine(read, layer.v_proj), layer)


def transform(z: Tensor, layers: Any) -> Tensor:
    for attention, feed_forward in layers:
        q, k, v = affine(norm(z, attention.norm), attention.qkv_proj).chunk(3, -1)
        z = mlp(z + heads(q, k, v, attention), feed_forward)
    return z


def sampled(points: Tensor, count: int, first: list[int]) -> Tensor:
    """Farthest points by their definition."""
    chosen = []
    for cloud, start in zip(points.detach(), first, strict=True):
        places = [start]
        while len(places) < count:
            distances = torch.cdist(cloud.double(), cloud[places].double()).amin(1)
            places.append(int(distances.argmax()))
        chosen.append(places)
    return torch.tensor(chosen)


def plain_encode(model: Any, points: Tensor, features: Tensor | None = None) -> Any:
    """Latents, or mean and log variance."""
    e = model.point_embedding
    if model.queries is not None:
        z = model.queries.expand(points.shape[0], -1, -1)
    else:
        sample = sampled(points, model.config.num_latents, [0] * points.shape[0])
        rows = torch.arange(points.shape[0])[:, None]
        z = embed(points[rows, sample], e, None if features is None else features[rows, sample])
    cloud, layer = embed(points, e, features), model.read
    z = z + cross(norm(z, layer.norm_latents), norm(cloud, layer.norm_inputs), layer)
    z = transform(mlp(z, model.read_feed_forward), model.encoder)
    return z if model.mean is None else (affine(z, model.mean), affine(z, model.log_variance).clamp(-30, 20))


def plain_decode(model: Any, z: Tensor, queries: Tensor) -> Tensor:
    z = transform(z if model.expand is None else affine(z, model.expand), model.decoder)
    y, layer = embed(queries, model.point_embedding).expand(z.shape[0], -1, -1), model.answer
    read = cross(norm(y, layer.norm_queries), norm(z, layer.norm_latents), layer)
    return affine(norm(read, model.head_norm), model.head)
