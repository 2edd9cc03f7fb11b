"""Cross-attention layers of other packages with our weights, where their classes fit a case."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = {"transformers": "transformers", "perceiver-pytorch": "perceiver_pytorch"}
"""Name of an original -> the module it comes in."""
OURS = ("norm_latents", "norm_inputs", "q_proj", "k_proj", "v_proj", "out_proj")
"""The parts of our layer."""
Parts = Sequence[tuple[nn.Module, tuple[str, ...]]]


class OriginalLayer(nn.Module):
    """Another package's layer, called as ours is.

    Args:
        module: the layer.
        call: from the layer, latents [B, N, D] and inputs [B, M, C] to the output [B, N, D].
        parts: for each of their modules our modules that it stands for; of several, the rows follow each other.
        ours: our layer, whose weights it takes.
    """

    def __init__(
        self, module: nn.Module, call: Callable[[Any, Tensor, Tensor], Tensor], parts: Parts, ours: nn.Module
    ) -> None:  # fmt: skip
        super().__init__()
        self.module, self.call = module, call
        state = ours.state_dict()
        self.order = [name for name, _ in ours.named_parameters()]
        self.stands_for: dict[int, list[str]] = {}
        self.rows: dict[str, int] = {name: tensor.shape[0] for name, tensor in state.items()}
        with torch.no_grad():
            for theirs, names in parts:
                for kind, parameter in theirs.named_parameters():
                    mine = [f"{name}.{kind}" for name in names]
                    parameter.copy_(torch.cat([state[name] for name in mine]))
                    self.stands_for[id(parameter)] = mine

    def forward(self, latents: Tensor, inputs: Tensor) -> Tensor:
        return self.call(self.module, latents, inputs)

    def as_ours(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return gradients of our parameters, in our order, from those of `parameters()`; what follows stays."""
        parameters = list(self.parameters())
        found: dict[str, Tensor] = {}
        for parameter, gradient in zip(parameters, gradients, strict=False):
            names = self.stands_for[id(parameter)]
            found |= dict(zip(names, gradient.split([self.rows[name] for name in names]), strict=True))
        return [found[name] for name in self.order] + list(gradients[len(parameters) :])


def installed() -> list[str]:
    """Return the names of the originals that are installed here."""
    return [name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is not None]


def layer(name: str, case: Any, ours: nn.Module, device: torch.device, dtype: torch.dtype) -> OriginalLayer:
    """Return a package's cross-attention layer at the sizes of a case.

    Args:
        name: one of PACKAGES.
        case: a `testing.cases.EncodeCase`.
        ours: our layer, whose weights it takes.
        device, dtype: of the layer.

    Raises:
        RuntimeError: the package is not installed.
        ValueError: its class does not fit the case.
    """
    try:
        importlib.import_module(PACKAGES[name])
    except ImportError as error:
        raise RuntimeError(f"{name} cannot be imported: {error}") from error
    usual = torch.get_default_dtype()
    # Built where and as it shall be: parameters of fake tensors cannot be moved.
    torch.set_default_dtype(dtype)
    try:
        with device:
            return {"transformers": _transformers, "perceiver-pytorch": _perceiver_pytorch}[name](case, ours).eval()
    finally:
        torch.set_default_dtype(usual)


def _transformers(case: Any, ours: nn.Module) -> OriginalLayer:
    """PerceiverAttention: LayerNorms, projections with biases, attention written out, output projection."""
    from transformers import PerceiverConfig
    from transformers.models.perceiver.modeling_perceiver import PerceiverAttention

    module = PerceiverAttention(
        PerceiverConfig(attention_probs_dropout_prob=0.0), is_cross_attention=True, qk_channels=case.H * case.d_qk,
        v_channels=case.H * case.d_v, num_heads=case.H, q_dim=case.D, kv_dim=case.C, use_query_residual=False,
    )  # fmt: skip
    inner = module.self
    theirs = (inner.layernorm1, inner.layernorm2, inner.query, inner.key, inner.value, module.output.dense)
    parts = [(part, (name,)) for part, name in zip(theirs, OURS, strict=True)]
    return OriginalLayer(module, lambda attention, latents, inputs: attention(latents, inputs=inputs)[0], parts, ours)


def _perceiver_pytorch(case: Any, ours: nn.Module) -> OriginalLayer:
    """PreNorm over Attention, whose projections to queries, keys and values get the biases that ours have."""
    from perceiver_pytorch.perceiver_pytorch import Attention, PreNorm

    if case.d_qk != case.d_v:
        raise ValueError(
            f"perceiver-pytorch has heads of one width for queries, keys and values, got {case.d_qk} and {case.d_v}"
        )
    attention = Attention(case.D, case.C, heads=case.H, dim_head=case.d_qk)
    width = case.H * case.d_qk
    attention.to_q, attention.to_kv = nn.Linear(case.D, width), nn.Linear(case.C, 2 * width)
    module = PreNorm(case.D, attention, context_dim=case.C)
    parts = [
        (module.norm, ("norm_latents",)), (module.norm_context, ("norm_inputs",)), (attention.to_q, ("q_proj",)),
        (attention.to_kv, ("k_proj", "v_proj")), (attention.to_out, ("out_proj",)),
    ]  # fmt: skip
    return OriginalLayer(module, lambda normed, latents, inputs: normed(latents, context=inputs), parts, ours)
