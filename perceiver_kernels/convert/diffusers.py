"""diffusers: ``IPAdapterPlusImageProjection``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perceiver_kernels.convert.ip_adapter import projections, require_ip_adapter
from perceiver_kernels.convert.rules import Rule, affine, stacked, under
from perceiver_kernels.models import PerceiverResampler


def resampler(model: PerceiverResampler) -> list[Rule]:
    config = require_ip_adapter(model, "diffusers' IPAdapterPlusImageProjection")
    width = config.num_heads * config.head_dim
    layer = [
        *affine("attention.norm_context", "ln0"),
        *affine("attention.norm", "ln1"),
        *affine("attention.q_proj", "attn.to_q", bias=False),
        *stacked("attention.kv_proj", ("attn.to_k", "attn.to_v"), (width, width), bias=False),
        *affine("attention.out_proj", "attn.to_out.0", bias=False),
        *affine("feed_forward.norm", "ff.0"),
        *affine("feed_forward.up_proj", "ff.1.net.0.proj", bias=False),
        *affine("feed_forward.down_proj", "ff.1.net.2", bias=False),
    ]
    layers = (under(f"layers.{i}.", f"layers.{i}.", layer) for i in range(config.depth))
    return [*projections(), *(rule for rules in layers for rule in rules)]


RULES: dict[type, Callable[[Any], list[Rule]]] = {PerceiverResampler: resampler}
