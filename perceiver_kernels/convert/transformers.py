"""transformers' Perceiver classes: the seven with heads are PerceiverIO with the parts of the constructor that is named alike.

PerceiverForMaskedLM is ``language``, PerceiverForSequenceClassification ``text_classifier``,
PerceiverForImageClassification{Fourier,Learned,ConvProcessing} ``imagenet_{fourier,learned,conv}``, PerceiverForOpticalFlow
``optical_flow``, PerceiverForMultimodalAutoencoding ``multimodal``; all with ``like="transformers"`` for the same results.
The resamplers of IDEFICS and IDEFICS2 are PerceiverResampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn

from perceiver_kernels.convert.rules import Rule, affine, renamed, stacked, under
from perceiver_kernels.convert.transformers_resamplers import resampler
from perceiver_kernels.models import PerceiverEncoder, PerceiverIO, PerceiverResampler
from perceiver_kernels.models.heads import ClassHead, FlowHead, MultimodalHead, TokenHead
from perceiver_kernels.models.multimodal import CommonWidth, MultimodalPreprocessor
from perceiver_kernels.models.preprocessing import ConvPreprocessor, FlowPreprocessor, LearnedPreprocessor, TextPreprocessor
from perceiver_kernels.models.queries import LearnedQueries, MultimodalQueries
from perceiver_kernels.nn import LatentBlock

IN = "perceiver.input_preprocessor."


def _attention(norms: tuple[str, str]) -> list[Rule]:
    """A cross-attention; ``norms`` are our names of the norms on its queries and on what is read."""
    projections = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    rules = affine(norms[0], "self.layernorm1") + affine(norms[1], "self.layernorm2") + affine("out_proj", "output.dense")
    return rules + [rule for ours, theirs in projections.items() for rule in affine(ours, f"self.{theirs}")]


def _feed_forward() -> list[Rule]:
    rules = affine("norm", "layernorm") + affine("up_proj", "mlp.dense1") + affine("down_proj", "mlp.dense2")
    return under("feed_forward.", "", rules)


def _cross_block(*norms: str) -> list[Rule]:
    return under("attention.", "attention.", _attention((norms[0], norms[1]))) + _feed_forward()


def _latent_block(block: LatentBlock) -> list[Rule]:
    layer = block.attention
    names = [f"self.{name}" for name in ("query", "key", "value")]
    qkv = stacked("qkv_proj", names, (layer.qk_channels, layer.qk_channels, layer.v_channels))
    rules = affine("norm", "self.layernorm1") + qkv + affine("out_proj", "output.dense")
    return under("attention.", "attention.", rules) + _feed_forward()


def _encoder(encoder: PerceiverEncoder) -> list[Rule]:
    if len(encoder.cross_blocks) != 1 or len(encoder.latent_blocks) > 1:
        raise ValueError("transformers has one cross-attend and latent blocks that share their weights, this model has others")
    latents = Rule("latents", ("perceiver.embeddings.latents",), read=lambda t: t[None], write=lambda t: t[0])
    cross = _cross_block("norm_latents", "norm_inputs")
    rules = [latents, *under("cross_blocks.0.", "perceiver.encoder.cross_attention.", cross)]
    for stack in encoder.latent_blocks:
        for i, block in enumerate(cast(Iterable[LatentBlock], stack)):
            rules += under(f"latent_blocks.0.{i}.", f"perceiver.encoder.self_attends.{i}.", _latent_block(block))
    return rules


def _common_width(ours: str, theirs: str, common: CommonWidth) -> list[Rule]:
    return [rule for name in common.names for rule in renamed(f"{ours}padding.{name}", f"{theirs}padding.{name}")]


def _preprocessor(part: nn.Module) -> list[Rule]:
    """Names below ``preprocessor.`` and ``perceiver.input_preprocessor.``."""
    if isinstance(part, TextPreprocessor):
        return renamed("embedding.weight", "embeddings.weight") + renamed("positions.weight", "position_embeddings.weight")
    if isinstance(part, ConvPreprocessor):
        statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return affine("conv", "convnet.conv", bias=False) + renamed("batch_norm", "convnet.batchnorm", *statistics)
    if isinstance(part, LearnedPreprocessor):
        return [
            Rule("pixel_proj.weight", ("convnet_1x1.weight",), read=_squeezed, write=_unsqueezed),
            *renamed("pixel_proj.bias", "convnet_1x1.bias"),
            *renamed("positions.weight", "position_embeddings.position_embeddings"),
            *affine("position_proj", "positions_projection"),
        ]
    if isinstance(part, FlowPreprocessor):
        return affine("patch_proj", "conv_after_patches")
    if isinstance(part, MultimodalPreprocessor):
        masks = [rule for name in part.mask_tokens for rule in renamed(f"mask_tokens.{name}", f"mask.{name}")]
        return _common_width("common.", "", part.common) + masks
    return []


def _squeezed(weight: Tensor) -> Tensor:
    return weight[..., 0, 0]


def _unsqueezed(weight: Tensor) -> Tensor:
    return weight[..., None, None]


def _learned_queries(theirs: str) -> list[Rule]:
    return renamed("positions.weight", f"{theirs}output_position_encodings.position_embeddings")


def _perceiver_io(model: Any) -> list[Rule]:
    model_head = model.head
    decoder = "perceiver.decoder." if isinstance(model_head, TokenHead) else "perceiver.decoder.decoder."
    rules = under("encoder.", "", _encoder(model.encoder)) + under("preprocessor.", IN, _preprocessor(model.preprocessor))
    rules += under("decoder.", f"{decoder}decoding_cross_attention.", _cross_block("norm_queries", "norm_latents"))
    if isinstance(model.queries, LearnedQueries):
        rules += under("queries.", "", _learned_queries(decoder))
    if isinstance(model.queries, MultimodalQueries):
        label = _learned_queries("perceiver.decoder.modalities.label.decoder.")
        rules += under("queries.modalities.label.", "", label)
        rules += _common_width("queries.common.", "perceiver.decoder.", model.queries.common)
    if isinstance(model_head, TokenHead):
        rules += renamed("head.bias", "embedding_decoder.bias")
    if isinstance(model_head, (ClassHead, FlowHead, MultimodalHead)):
        rules += affine("head.proj", f"{decoder}final_layer")
    if isinstance(model_head, MultimodalHead):
        for name in model_head.modalities:
            rules += affine(f"head.modalities.{name}.proj", f"perceiver.output_postprocessor.modalities.{name}.classifier")
    return rules


RULES: dict[type, Callable[[Any], list[Rule]]] = {PerceiverIO: _perceiver_io, PerceiverResampler: resampler}
