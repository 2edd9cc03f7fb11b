"""transformers' Perceiver: whole layers, its mask of ones, its Fourier features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.perceiver.modeling_perceiver import (
    PerceiverFourierPositionEncoding,
    PerceiverLayer,
    PerceiverModel,
    apply_chunking_to_forward,
)

from perceiver_kernels import functional
from perceiver_kernels.functional.heads import merge_heads, split_heads
from perceiver_kernels.integrations.adapter import SHADOW, Adapter, dropout_of, dropping, unlike
from perceiver_kernels.integrations.assembly import Readers, heads_of
from perceiver_kernels.integrations.filled import attend_filled, blind_entries
from perceiver_kernels.nn import CrossAttention

MOST_TABLES = 8
"""Fourier features that one module keeps: an image size, a dtype and a device each."""


def _hides_keys_alone(mask: Tensor | None) -> bool:
    """Whether a mask is none, or says the same of every query; others are scores that are added."""
    return mask is None or (mask.ndim == 4 and tuple(mask.shape[1:3]) == (1, 1))


def _seen(mask: Tensor | None) -> Tensor | None:
    """Which keys an additive mask [B, 1, 1, M] leaves visible, bool [B, M]; None for all, as [1, 1, 1, 1] says too."""
    return None if mask is None or tuple(mask.shape) == (1, 1, 1, 1) else mask[:, 0, 0] == 0


class FusedPerceiverLayer(PerceiverLayer):
    """One layer: LayerNorms and projections fused with attention; with ``output_attentions`` the original, which holds them."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inputs: Tensor | None = None,
        inputs_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> Any:
        """As the original's."""
        mask = attention_mask if inputs is None else inputs_mask
        own = self.attention.self
        parts = (own.layernorm1, own.layernorm2, own.query, own.key, own.value, self.attention.output.dense)
        elsewhere = output_attentions or dropout_of(own.dropout) == 1.0 or not _hides_keys_alone(mask)
        if elsewhere or not self.__dict__[SHADOW].are_of(*parts):
            return super().forward(hidden_states, attention_mask, inputs, inputs_mask, output_attentions)
        seen = _seen(mask)
        attended = self._attend(hidden_states, None, seen) if inputs is None else self._read(hidden_states, inputs, seen)
        fed = apply_chunking_to_forward(
            self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, attended
        )
        return (fed + attended,)

    def _attend(self, hidden_states: Tensor, inputs: Tensor | None, seen: Tensor | None) -> Tensor:
        """With keys and values of the inputs, or of the latents themselves."""
        own, heads = self.attention.self, self.attention.self.num_heads
        normed = own.layernorm1(hidden_states)
        if inputs is None:
            query, key, value = heads_of(normed, heads, (own.query, 1), (own.key, 1), (own.value, 1))
        else:
            query = split_heads(own.query(normed), heads)
            key, value = heads_of(own.layernorm2(inputs), heads, (own.key, 1), (own.value, 1))
        return self._result(attend_filled(query, key, value, seen, dropout_p=dropout_of(own.dropout)), hidden_states)

    def _read(self, hidden_states: Tensor, inputs: Tensor, seen: Tensor | None) -> Tensor:
        layers: Readers = self.__dict__[SHADOW]
        B, N, _ = hidden_states.shape
        # One set of latents for the whole batch is projected once.
        shared = hidden_states.stride(0) == 0 and not (hidden_states.is_leaf and hidden_states.requires_grad)
        latents = hidden_states[:1] if B == 1 or shared else hidden_states
        layer = layers.of(N, inputs.shape[1])
        if seen is None:
            return dropping(layer, dropout_of(self.attention.self.dropout))(latents, inputs)
        if not isinstance(layer, CrossAttention):
            return self._attend(hidden_states, inputs, seen)
        own = self.attention.self
        blind = blind_entries(seen)
        query = split_heads(own.query(own.layernorm1(latents)), own.num_heads)
        # An entry that sees nothing reads all of it evenly: the lowest number, added to every score, leaves no difference.
        query = torch.where(blind[:, None, None, None], 0.0, query)
        attended = functional.input_cross_attention(
            query, inputs, own.key.weight, own.value.weight, b_k=own.key.bias, b_v=own.value.bias,
            norm_weight=own.layernorm2.weight, norm_bias=own.layernorm2.bias, eps=own.layernorm2.eps,
            key_mask=seen | blind[:, None], dropout_p=dropout_of(own.dropout),
        )  # fmt: skip
        return self._result(attended, hidden_states)

    def _result(self, attended: Tensor, hidden_states: Tensor) -> Tensor:
        """Of values that were read [B, H, N, d]: projected, with the residual."""
        out = self.attention.output.dense(merge_heads(attended))
        return out + hidden_states if self.attention.use_query_residual else out


def _readers(layer: Any) -> Readers:
    own, output = layer.attention.self, layer.attention.output
    return Readers(
        norm_queries=own.layernorm1, norm_inputs=own.layernorm2, q_proj=own.query, k_proj=own.key, v_proj=own.value,
        out_proj=output.dense, num_heads=own.num_heads, residual=layer.attention.use_query_residual,
    )  # fmt: skip


def _refuses_layer(layer: Any) -> str | None:
    return unlike(
        layer, attention__self__query=nn.Linear, attention__self__key=nn.Linear, attention__self__value=nn.Linear,
        attention__output__dense=nn.Linear, attention__self__layernorm1=nn.LayerNorm,
        attention__self__layernorm2=(nn.LayerNorm, nn.Identity),
    )  # fmt: skip


class UnmaskedPerceiverModel(PerceiverModel):
    """The model without the mask of ones that the original makes where none is given, and reads back from the GPU."""

    def forward(self, inputs: Any, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        if attention_mask is None:
            # Four axes are taken as they are; a single 0 hides nothing from anybody.
            attention_mask = torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=self.device)
        elif attention_mask.ndim == 2:
            hidden = torch.finfo(self.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=self.dtype).masked_fill(~attention_mask.bool(), hidden)
            attention_mask = attention_mask[:, None, None]
        return super().forward(inputs, attention_mask, *args, **kwargs)


class KeptFourierPositionEncoding(PerceiverFourierPositionEncoding):
    """Fourier features of a grid, made once for every size, dtype and device; the original makes them at each call."""

    def forward(  # type: ignore[override]
        self, index_dims: Any, batch_size: int, device: torch.device, dtype: torch.dtype, pos: Tensor | None = None
    ) -> Tensor:
        """As the original's."""
        if pos is not None:
            return super().forward(index_dims, batch_size, device, dtype, pos)
        # Sizes that compiled code holds as symbols are no constants; a range has none.
        sizes = tuple(len(range(size)) for size in index_dims)
        return self._table(sizes, torch.device(device), dtype).expand(batch_size, -1, -1)

    # A method, since a function's argument would have to be a constant itself, which a module is not to torch 2.11.
    @torch.compiler.assume_constant_result
    def _table(self, index_dims: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Features [1, M, C]. Compiled, they are a constant: the original makes them on the CPU."""
        tables = self.__dict__[SHADOW]
        key = (index_dims, device, dtype)
        table = tables.get(key)
        if table is None:
            # An inference tensor could never be saved for a later backward pass.
            with torch.inference_mode(False):
                table = tables[key] = super().forward(list(index_dims), 1, device, dtype)
            # Another thread may be doing the same.
            for oldest in list(tables)[:-MOST_TABLES]:
                tables.pop(oldest, None)
        return table

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files make their own: an image's features take 50 MB."""
        return {**self.__dict__, SHADOW: {}}


ADAPTERS = [
    Adapter(
        PerceiverLayer, FusedPerceiverLayer,
        "fused LayerNorms, projections and attention; the original where output_attentions asks for the weights",
        _refuses_layer, _readers,
    ),
    Adapter(
        PerceiverModel, UnmaskedPerceiverModel, "no mask where none is given, so that nothing waits for the GPU", whole=False
    ),
    Adapter(
        PerceiverFourierPositionEncoding, KeptFourierPositionEncoding, "features made once, not at each call",
        assembled=lambda module: {},
    ),
]  # fmt: skip
