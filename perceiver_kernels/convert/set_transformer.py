"""The Set Transformer of the authors' code: ``enc.0.mab0.fc_q`` is our ``encoder.0.read.q_proj``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perceiver_kernels.convert.rules import Rule, affine, renamed, under
from perceiver_kernels.models import SetTransformer

# Ours and theirs, in the order of the block.
_PARTS = (("q_proj", "fc_q"), ("k_proj", "fc_k"), ("v_proj", "fc_v"), ("out_proj", "fc_o"))
_NORMS = (("norm_attention", "ln0"), ("norm_out", "ln1"))


def _mab(ours: str, theirs: str, post_norm: bool) -> list[Rule]:
    parts = (*_PARTS, *_NORMS) if post_norm else _PARTS
    return under(f"{ours}.", f"{theirs}.", [rule for names in parts for rule in affine(*names)])


def _isab(post_norm: bool) -> list[Rule]:
    return [*renamed("inducing", "I"), *_mab("read", "mab0", post_norm), *_mab("write", "mab1", post_norm)]


def set_transformer(model: SetTransformer) -> list[Rule]:
    """Rules of the whole model.

    Raises:
        ValueError: the model has a layer that theirs lacks.
    """
    config = model.config
    if config.pooling_feed_forward:
        raise ValueError("pooling_feed_forward must be False, as in the authors' code, got True")
    norm = config.post_norm
    block = _mab("attention", "mab", norm) if config.num_inducing is None else _isab(norm)
    rules = [rule for i in range(config.encoder_blocks) for rule in under(f"encoder.{i}.", f"enc.{i}.", block)]
    # Their decoder is one sequence, in which dropout layers without weights have places too.
    dropout = config.pooling_dropout > 0
    pooling, after = (1, 3) if dropout else (0, 1)
    rules += under("pooling.", f"dec.{pooling}.", [*renamed("seeds", "S"), *_mab("attention", "mab", norm)])
    for i in range(config.decoder_blocks):
        rules += under(f"decoder.{i}.", f"dec.{after + i}.", _mab("attention", "mab", norm))
    return rules + affine("head", f"dec.{after + config.decoder_blocks}")


RULES: dict[type, Callable[[Any], list[Rule]]] = {SetTransformer: set_transformer}
