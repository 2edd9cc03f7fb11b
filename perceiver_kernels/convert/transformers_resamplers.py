"""The resamplers of transformers: ``IdeficsPerceiverResampler``, ``Idefics2PerceiverResampler`` and ``Idefics2Connector``."""

from __future__ import annotations

from perceiver_kernels.convert.resampler_layouts import WITHOUT_EMBEDDINGS, WITHOUT_PROJECTIONS, require
from perceiver_kernels.convert.rules import Rule, affine, renamed, stacked, under
from perceiver_kernels.models import PerceiverResampler


def resampler(model: PerceiverResampler) -> list[Rule]:
    """IDEFICS's has LayerNorms, IDEFICS2's RMSNorms; with a modality projection it is a connector."""
    if model.config.norm == "layer":
        return _idefics(model)
    if model.config.input_dim is None:
        return _idefics2(model)
    hidden = require(model, "transformers' Idefics2Connector", given=("input_hidden_dim",)).input_hidden_dim
    assert hidden is not None
    return [
        *stacked("input_proj.up_proj", _prefixed("modality_projection", "up_proj", "gate_proj"), (hidden, hidden), bias=False),
        *affine("input_proj.down_proj", "modality_projection.down_proj", bias=False),
        *under("", "perceiver_resampler.", _idefics2(model)),
    ]


def _idefics(model: PerceiverResampler) -> list[Rule]:
    heads, dim = model.config.num_heads, model.config.dim
    config = require(
        model, "transformers' IdeficsPerceiverResampler", num_kv_heads=(None, heads), hidden_dim=(None, 4 * dim),
        activation="relu", qk_norm=(None, "layer"), eps=1e-5, **WITHOUT_EMBEDDINGS, **WITHOUT_PROJECTIONS,
    )  # fmt: skip
    width = heads * config.head_dim
    rules = [*renamed("latents", "latents"), *affine("norm", "layer_norm")]
    for i in range(config.depth):
        attention = [
            *affine("norm_context", "context_layer_norm"),
            *affine("norm", "latents_layer_norm"),
            *affine("q_proj", "q_proj", bias=False),
            *stacked("kv_proj", ("k_proj", "v_proj"), (width, width), bias=False),
            *affine("out_proj", "output_proj", bias=False),
        ]
        if config.qk_norm is not None:
            attention += [*affine("norm_query", "q_layer_norm"), *affine("norm_key", "k_layer_norm")]
        feed_forward = [
            *affine("norm", "ln"),
            *affine("up_proj", "fc", bias=False),
            *affine("down_proj", "c_proj", bias=False),
        ]
        rules += under(f"layers.{i}.attention.", f"blocks.{i}.0.", attention)
        rules += under(f"layers.{i}.feed_forward.", f"blocks.{i}.1.", feed_forward)
    return rules


def _idefics2(model: PerceiverResampler) -> list[Rule]:
    dim = model.config.dim
    config = require(
        model, "transformers' Idefics2PerceiverResampler", hidden_dim=(None, 4 * dim), activation=("swiglu", "geglu"),
        qk_norm=None, output_dim=None, **WITHOUT_EMBEDDINGS,
    )  # fmt: skip
    width = config.kv_heads * config.head_dim
    layer = [
        *affine("attention.norm_context", "input_context_norm", bias=False),
        *affine("attention.norm", "input_latents_norm", bias=False),
        *affine("attention.q_proj", "self_attn.q_proj", bias=False),
        *stacked("attention.kv_proj", _prefixed("self_attn", "k_proj", "v_proj"), (width, width), bias=False),
        *affine("attention.out_proj", "self_attn.o_proj", bias=False),
        *affine("feed_forward.norm", "post_attention_layernorm", bias=False),
        *stacked("feed_forward.up_proj", _prefixed("mlp", "up_proj", "gate_proj"), (4 * dim, 4 * dim), bias=False),
        *affine("feed_forward.down_proj", "mlp.down_proj", bias=False),
    ]
    rules = [*renamed("latents", "latents"), *affine("norm", "norm", bias=False)]
    for i in range(config.depth):
        rules += under(f"layers.{i}.", f"layers.{i}.", layer)
    return rules


def _prefixed(part: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{part}.{name}" for name in names)
