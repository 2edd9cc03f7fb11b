"""transformers' attention interface: ``attn_implementation="perceiver_kernels"``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from perceiver_kernels import functional
from perceiver_kernels.integrations.report import Entry, Report

NAME = "perceiver_kernels"
READERS = (
    "Blip2QFormerModel", "Idefics2PerceiverResampler", "InstructBlipQFormerModel", "InstructBlipVideoQFormerModel",
)  # fmt: skip
"""Models, parts of others, in which few queries read many tokens: ``replace_attention`` sets their attention."""


def register() -> None:
    """Make ``attn_implementation="perceiver_kernels"`` known to transformers, its attention and its masks; again does nothing.

    Any model that chooses its attention by name may then be loaded with it, or changed by
    ``model.set_attn_implementation("perceiver_kernels")``. Padding stays a mask of keys and is never read back from the GPU;
    causal and other masks are transformers' boolean ones. ``output_attentions`` gives None, as with "sdpa".
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask_of)


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers' layers call it.

    Args:
        module: the layer; its ``is_causal`` counts where the argument is None.
        query: [B, H, Lq, d].
        key: [B, H_kv, Lk, d], H_kv a divisor of H.
        value: likewise.
        attention_mask: bool, True where a key is visible, or additive, [B, 1 or H, 1 or Lq, Lk or more].
        dropout: probability of dropping a weight.
        scaling: factor on the scores; 1/sqrt(d) when None.
        is_causal: queries see keys up to themselves; only without a mask, and not for a single query.
        options: what other implementations take.

    Returns:
        [B, Lq, H, d], and None in place of the weights.

    Raises:
        ValueError: softcap, s_aux or position_bias, which these kernels do not have.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"{name} must be None with attn_implementation={NAME!r}, got {options[name]!r}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    masks: dict[str, Any] = {}
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[2]]
        is_padding = mask.dtype == torch.bool and tuple(mask.shape[1:3]) == (1, 1)
        masks = {"key_mask": mask[:, 0, 0].expand(query.shape[0], -1)} if is_padding else {"attn_mask": mask}
    out = functional.attention(
        query, key, value, is_causal=causal, dropout_p=dropout, scale=scaling, enable_gqa=key.shape[1] != query.shape[1],
        **masks,
    )
    return out.transpose(1, 2).contiguous(), None


def attention_mask_of(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
    mask_function: Any = bidirectional_mask_function, attention_mask: Tensor | None = None, **options: Any,
) -> Tensor | None:  # fmt: skip
    """The mask of a model's layers: [B, 1, 1, Lk] where it hides padding alone, else transformers' boolean one.

    transformers looks whether padding hides nothing, which waits for the GPU; here it is handed on as it is.
    """
    if mask_function is not bidirectional_mask_function:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            **options,
        )  # fmt: skip
    if attention_mask is None:
        return None
    mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if mask.shape[1] < kv_length:
        mask = nn.functional.pad(mask, (0, kv_length - mask.shape[1]))
    return mask[:, None, None]


def replace_implementation(model: nn.Module, report: Report) -> None:
    """Set the attention of READERS inside a model; what else chooses its attention by name is reported."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or id(module) in inside:
            continue
        kind = f"transformers {type(module).__name__}"
        if type(module).__name__ not in READERS:
            if module._can_set_attn_implementation() and not any(_readers_in(module)):
                inside |= {id(each) for each in module.modules()}
                reason = f"no reader of many tokens; after register(), set_attn_implementation({NAME!r}) converts it"
                report.kept.append(Entry(name, kind, reason))
            continue
        inside |= {id(each) for each in module.modules()}
        before = module.config._attn_implementation
        if before == NAME:
            report.kept.append(Entry(name, kind, "converted already"))
            continue
        report.converted.append(Entry(name, kind, f"attn_implementation={NAME!r}"))
        if not report.dry_run:
            register()
            module.set_attn_implementation(NAME)
            report._undo.append(functools.partial(module.set_attn_implementation, before))


def _readers_in(module: nn.Module) -> list[nn.Module]:
    return [each for each in module.modules() if type(each).__name__ in READERS]
