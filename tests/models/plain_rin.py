"""The Recurrent Interface Network written out from its description, on the parameters of our modules: an oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def affine(x: Tensor, layer: Any) -> Tensor:
    return x @ layer.weight.T + layer.bias


def norm(x: Tensor, layer: Any) -> Tensor:
    """LayerNorm with the published 1e-6; without a layer, x."""
    if layer is None:
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def mlp(x: Tensor, layer: Any) -> Tensor:
    hidden = affine(norm(x, layer.norm), layer.up_proj)
    return x + affine(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), layer.down_proj)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, visible: Tensor | None = None) -> Tensor:
    outs = []
    for q_h, k_h, v_h in zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True):
        scores = torch.einsum("bnd,bmd->bnm", q_h, k_h) / q_h.shape[-1] ** 0.5
        scores = scores if visible is None else scores.masked_fill(~visible[:, None], -torch.inf)
        outs.append(torch.einsum("bnm,bmd->bnd", scores.softmax(-1), v_h))
    return torch.cat(outs, -1)


def cross(x: Tensor, read: Tensor, layer: Any, norm_x: Any, norm_read: Any, visible: Tensor | None = None) -> Tensor:
    """x + attention of LN(x) to what is read."""
    read = norm(read, norm_read)
    q, k, v = affine(norm(x, norm_x), layer.q_proj), affine(read, layer.k_proj), affine(read, layer.v_proj)
    return x + affine(attend(q, k, v, layer.num_heads, visible), layer.out_proj)


def transform(z: Tensor, block: Any) -> Tensor:
    q, k, v = affine(norm(z, block.attention.norm), block.attention.qkv_proj).chunk(3, -1)
    z = z + affine(attend(q, k, v, block.attention.num_heads), block.attention.out_proj)
    return mlp(z, block.feed_forward)


def plain_round(block: Any, tape: Tensor, z: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
    read, write = block.read.attention, block.write
    z = mlp(cross(z, tape, read, read.norm_latents, read.norm_inputs, visible), block.read.feed_forward)
    for layer in block.process:
        z = transform(z, layer)
    tape = cross(tape, z, write, write.norm_queries, write.norm_latents)
    return (tape if block.feed_forward is None else mlp(tape, block.feed_forward)), z


def time_vector(time: Tensor, layer: Any, scale: float) -> Tensor:
    width = layer.up_proj.in_features
    angles = torch.stack([time * scale / 10_000 ** (2 * j / width) for j in range(width // 2)], -1)
    waves = torch.cat((angles.sin(), angles.cos()), -1)
    waves = (waves - waves.mean(-1, keepdim=True)) / waves.std(-1, correction=0, keepdim=True)
    hidden = affine(waves, layer.up_proj)
    return affine(hidden * torch.sigmoid(hidden), layer.down_proj)


def plain_rin(
    model: Any, images: Tensor, time: Tensor, labels: Tensor | None = None, previous: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Patch by patch in, patch by patch out."""
    c, B = model.config, images.shape[0]
    p, side = c.patch_size, c.image_size // c.patch_size
    corners = [(p * i, p * j) for i in range(side) for j in range(side)]
    patches = [images[:, :, y : y + p, x : x + p].permute(0, 2, 3, 1).reshape(B, -1) for y, x in corners]
    tape = norm(affine(torch.stack(patches, 1), model.stem), model.stem_norm) + model.positions
    told = [time_vector(time, model.time_embedding, c.time_scale)]
    if labels is not None:
        one_hot = torch.eye(c.num_classes, dtype=images.dtype)[labels]
        told.append(affine(one_hot, model.class_embedding))
    z = torch.cat((model.latents.expand(B, -1, -1), torch.stack(told, 1)), 1)
    y = torch.zeros_like(z) if previous is None else previous
    z = z + norm(mlp(y, model.previous), model.previous_norm)
    for block in model.blocks:
        tape, z = plain_round(block, tape, z)
    out, result = affine(norm(tape, model.head_norm), model.head), torch.zeros_like(images)
    for index, (y0, x0) in enumerate(corners):
        patch = out[:, index].reshape(B, p, p, c.channels).permute(0, 3, 1, 2)
        result = result.index_put(
            (
                torch.arange(B)[:, None, None, None], torch.arange(c.channels)[:, None, None],
                torch.arange(y0, y0 + p)[:, None], torch.arange(x0, x0 + p),
            ),
            patch,
        )  # fmt: skip
    return result, z
