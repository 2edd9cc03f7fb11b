"""The feed-forward layer and its activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels import functional
from perceiver_kernels.absorption import fold_norm
from perceiver_kernels.checks import autocasts
from perceiver_kernels.nn.aligned import zero_padded
from perceiver_kernels.nn.attention import Linear
from perceiver_kernels.nn.called import is_plain, parameter_of
from perceiver_kernels.nn.checks import check_choice, check_count, check_sequence
from perceiver_kernels.nn.drop_path import drop_path
from perceiver_kernels.nn.norms import NormKind, make_norm
from perceiver_kernels.problem import MAX_CHANNELS, check_eps, check_probability

LEAST_PACKED = 2**22
"""Elements of a sequence of odd width from which on it is packed."""

Activation = Literal["gelu", "gelu_tanh", "relu", "squared_relu", "geglu", "swiglu"]


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


# The activation, and whether the hidden layer has a second half that it weighs the first with.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "gelu": (F.gelu, False),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), False),
    "relu": (F.relu, False),
    "squared_relu": (_squared_relu, False),
    "geglu": (F.gelu, True),
    "swiglu": (F.silu, True),
}


def check_activation(activation: object) -> None:
    check_choice("activation", activation, tuple(_ACTIVATIONS))


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, applied to every token.

        out = W_2 act(W_1 norm(x) + b_1) + b_2  (+ x, when ``residual``)

    A gated activation has W_1 x = [h | g], halves side by side, and act is h a(g).

    Args:
        dim: D, channels of the sequence.
        widening_factor: the hidden layer has ``widening_factor * dim`` channels, twice as many before a gate.
        activation: "gelu" (x Phi(x), as transformers computes it), "gelu_tanh" (its approximation, as DeepMind's code does),
            "relu", "squared_relu" (Perceiver AR), or gated: "geglu" (a = gelu) and "swiglu" (a = silu).
        bias: biases of both linear layers.
        dropout: probability of dropping a channel of the result before the residual, in training.
        hidden_dropout: probability of dropping a channel of the hidden layer after its activation, in training.
        norm: "layer", "rms" or None, the norm on the sequence.
        residual: add the sequence, as it came in, to the result.
        hidden_dim: channels of the hidden layer, instead of ``widening_factor * dim``.
        out_dim: channels of the result; ``dim`` when None, as ``residual`` requires.
        drop_path: probability of dropping a batch entry's whole result before the residual, in training.
        eps: of the norm.

    Source: Perceiver, arXiv 2103.03206, section 3.1, whose models have widening factor 1; GLU Variants Improve Transformer,
    arXiv 2002.05202; squared ReLU: Primer, arXiv 2109.08668.
    """

    def __init__(
        self,
        dim: int,
        widening_factor: int = 1,
        *,
        activation: Activation = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        norm: NormKind | None = "layer",
        residual: bool = True,
        hidden_dim: int | None = None,
        out_dim: int | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("widening_factor", widening_factor)
        check_activation(activation)
        for name, p in (("dropout", dropout), ("hidden_dropout", hidden_dropout), ("drop_path", drop_path)):
            check_probability(name, p)
        check_eps(eps)
        if hidden_dim is not None:
            check_count("hidden_dim", hidden_dim)
        out_dim = dim if out_dim is None else out_dim
        check_count("out_dim", out_dim)
        if residual and out_dim != dim:
            raise ValueError(f"out_dim must be dim={dim} with a residual, got {out_dim}")
        self.out_dim = out_dim
        self.dim, self.hidden_dim = dim, widening_factor * dim if hidden_dim is None else hidden_dim
        self.activation, self.dropout, self.residual = activation, dropout, residual
        self.hidden_dropout, self.drop_path = hidden_dropout, drop_path
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = make_norm(norm, dim, eps, **where)
        self.up_proj = Linear(dim, self.hidden_dim * (2 if _ACTIVATIONS[activation][1] else 1), bias, **where)
        self.down_proj = Linear(self.hidden_dim, out_dim, bias, **where)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, out_dim]."""
        check_sequence("x", x, "B, N, D", self.dim, parameter_of(self.up_proj))
        packs = self._packs(x)
        hidden = self._packed_up(x) if packs else self.up_proj(x if self.norm is None else self.norm(x))
        activate, gated = _ACTIVATIONS[self.activation]
        if gated:
            value, gate = hidden.chunk(2, dim=-1)
            hidden = value * activate(gate)
        else:
            hidden = activate(hidden)
        if self.hidden_dropout:
            hidden = F.dropout(hidden, self.hidden_dropout, self.training)
        out = self._packed_down(hidden) if packs else self.down_proj(hidden)
        if self.dropout:
            out = F.dropout(out, self.dropout, self.training)
        out = drop_path(out, self.drop_path, self.training)
        return x + out if self.residual else out

    def _packs(self, x: Tensor) -> bool:
        """Whether x, of an odd width on a GPU, is long enough to be packed: normalised and padded by one kernel.

        Products of rows that are no multiples of 16 bytes run several times slower, and torch's LayerNorm of such rows too: of
        182,528 x 322 in bf16 an H200 takes 1.16 ms for it, and 0.31 ms for each product. Few rows are not worth a dozen
        small kernels that lay out the weights.
        """
        odd = self.dim % 8 or self.hidden_dim % 8 or self.out_dim % 8
        split = _ACTIVATIONS[self.activation][1] and self.hidden_dim % 8
        if not odd or split or self.dim > MAX_CHANNELS:
            return False
        if not x.is_cuda or x.dtype.itemsize != 2 or x.numel() < LEAST_PACKED or autocasts(x.device):
            return False
        return isinstance(self.norm, nn.LayerNorm) and is_plain(self.norm, self.up_proj, self.down_proj)

    def _packed_up(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D_up], zeros after it up to a multiple of 8; the norm's weight and bias are in the product's."""
        norm, linear = cast(nn.LayerNorm, self.norm), self.up_proj
        packed = functional.pack_inputs(x, eps=norm.eps).data
        weight, bias = fold_norm(linear.weight, linear.bias, norm.weight, norm.bias, packed.shape[-1], x.dtype)
        missing = -weight.shape[0] % 8
        return F.linear(packed, F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing)))

    def _packed_down(self, hidden: Tensor) -> Tensor:
        """[B, N, D_hidden and zeros] to [B, N, D_out]."""
        linear, width = self.down_proj, self.out_dim + -self.out_dim % 8
        weight, bias = zero_padded((linear.weight, (width, hidden.shape[-1])), (linear.bias, (width,)))
        assert weight is not None
        return F.linear(hidden, weight, bias)[..., : self.out_dim]

    def flops(self, batch: int, N: int) -> int:
        """FLOPs of the matrix products of one forward: 2BN(D D_up + D_hidden D_out), D_up twice D_hidden before a gate."""
        return 2 * batch * N * (self.dim * self.up_proj.out_features + self.hidden_dim * self.out_dim)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, dropout={self.dropout}, residual={self.residual}"
