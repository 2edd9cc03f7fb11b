"""Models of lucidrains/linformer (the package ``linformer``), ``reversible=False``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perceiver_kernels.convert.rules import Rule, affine, renamed, under
from perceiver_kernels.models import Linformer, LinformerLM


def _layer(share_kv: bool) -> list[Rule]:
    attention = [
        *affine("norm", "norm"),
        *(rule for ours, theirs in (("q_proj", "to_q"), ("k_proj", "to_k")) for rule in affine(ours, f"fn.{theirs}", False)),
        *renamed("mix_keys", "fn.proj_k"),
        *([] if share_kv else [*affine("v_proj", "fn.to_v", False), *renamed("mix_values", "fn.proj_v")]),
        *affine("out_proj", "fn.to_out"),
    ]
    feed_forward = [*affine("norm", "norm"), *affine("up_proj", "fn.w1"), *affine("down_proj", "fn.w2")]
    return [*under("attention.", "0.", attention), *under("feed_forward.", "1.", feed_forward)]


def linformer(model: Linformer) -> list[Rule]:
    """Rules of the stack."""
    config, layer = model.config, _layer(model.config.share_kv)
    return [rule for i in range(config.depth) for rule in under(f"layers.{i}.", f"net.layers.{i}.", layer)]


def linformer_lm(model: LinformerLM) -> list[Rule]:
    """Rules of the stack, the embeddings and the logits."""
    return [
        *affine("token_embedding", "token_emb", False),
        *affine("position_embedding", "pos_emb", False),
        *under("linformer.", "linformer.", linformer(model.linformer)),
        *affine("head", "to_logits"),
    ]


RULES: dict[type, Callable[[Any], list[Rule]]] = {Linformer: linformer, LinformerLM: linformer_lm}
