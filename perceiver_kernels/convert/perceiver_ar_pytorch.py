"""Weights of lucidrains/perceiver-ar-pytorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.convert.rules import Rule, affine, under
from perceiver_kernels.models import PerceiverAR


def _feed_forward() -> list[Rule]:
    return [*affine("norm", "0"), *affine("up_proj", "1", bias=False), *affine("down_proj", "4", bias=False)]


def _prefix_attention() -> list[Rule]:
    return [
        *affine("norm", "norm"), *affine("norm_context", "context_norm"), *affine("q_proj", "to_q", bias=False),
        *affine("kv_proj", "to_kv", bias=False), *affine("out_proj", "to_out"),
    ]  # fmt: skip


def _attention() -> list[Rule]:
    return [*affine("norm", "norm"), *affine("qkv_proj", "to_qkv", bias=False), *affine("out_proj", "to_out", bias=False)]


def frequencies(width: int) -> Callable[[], Tensor]:
    """The buffer of rotary frequencies, in fp32 as libraries compute it."""
    return lambda: 1.0 / (10_000 ** (torch.arange(0, width, 2).float() / width))


# What the library's model is, whatever its sizes.
_SWITCHES: dict[str, Any] = {
    "activation": "gelu", "positions": "learned", "grid": None, "rotary_base": 10_000.0, "rotary_interleaved": False,
    "num_rotary_layers": None, "latent_proj": False, "own_keys": True, "final_norm": False, "bias": False,
    "cross_out_bias": True, "logits_bias": False, "tied_logits": False, "eps": 1e-5,
}  # fmt: skip


def perceiver_ar(model: PerceiverAR) -> list[Rule]:
    """PerceiverAR of perceiver_ar_pytorch.

    Raises:
        ValueError: the model is not what the library's computes; all switches that differ are listed.
    """
    config = model.config
    needed = {**_SWITCHES, "rotary_width": max(32, config.head_channels // 2)}
    found = {**{name: getattr(config, name) for name in _SWITCHES}, "rotary_width": config.rotary_channels}
    if found["num_rotary_layers"] is not None and found["num_rotary_layers"] >= config.num_layers:
        found["num_rotary_layers"] = None
    wrong = [f"{name}={value!r} instead of {needed[name]!r}" for name, value in found.items() if value != needed[name]]
    if wrong:
        raise ValueError(f"model must be built as perceiver_ar_pytorch's, got {', '.join(wrong)}")
    rules = [
        Rule("token_embedding.weight", ("token_emb.weight",)),
        Rule("positions.tables.0.weight", ("pos_emb.weight",)),
        Rule("", ("rotary_pos_emb.inv_freq",), value=frequencies(config.rotary_channels)),
        *affine("head", "to_logits", bias=False),
    ]
    for i in range(config.num_perceiver_layers):
        rules += under(f"perceiver_layers.{i}.attention.", f"perceive_layers.{i}.0.", _prefix_attention())
        rules += under(f"perceiver_layers.{i}.feed_forward.", f"perceive_layers.{i}.1.", _feed_forward())
    for i in range(config.num_layers):
        rules += under(f"latent_blocks.{i}.attention.", f"layers.{i}.0.", _attention())
        rules += under(f"latent_blocks.{i}.feed_forward.", f"layers.{i}.1.", _feed_forward())
    return rules


RULES: dict[type, Callable[[Any], list[Rule]]] = {PerceiverAR: perceiver_ar}
