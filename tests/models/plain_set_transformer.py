"""The Set Transformer written out from the paper's equations, under the parameter names of the authors' code: an oracle."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """MAB: one head after the other, with every weight matrix as it stands in the equations."""

    def __init__(self, query_dim: int, input_dim: int, dim: int, heads: int, post_norm: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.fc_q, self.fc_k, self.fc_v = nn.Linear(query_dim, dim), nn.Linear(input_dim, dim), nn.Linear(input_dim, dim)
        self.fc_o = nn.Linear(dim, dim)
        if post_norm:
            self.ln0, self.ln1 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)

    def forward(self, y: Tensor, x: Tensor, visible: Tensor | None = None) -> Tensor:
        y = y.expand(x.shape[0], -1, -1)
        out = []
        for q, k, v in zip(*(t.chunk(self.heads, -1) for t in (self.fc_q(y), self.fc_k(x), self.fc_v(x))), strict=True):
            weights = (torch.einsum("bnd,bmd->bnm", q, k) / self.dim**0.5).exp()
            if visible is not None:
                weights = weights * visible[:, None]
            # A query that sees nothing keeps itself.
            total = weights.sum(-1, keepdim=True)
            out.append(q + torch.einsum("bnm,bmd->bnd", weights / total.where(total > 0, 1), v))
        h = torch.cat(out, -1)
        h = self.ln0(h) if hasattr(self, "ln0") else h
        h = h + self.fc_o(h).clamp(min=0)
        return self.ln1(h) if hasattr(self, "ln1") else h


class PlainSAB(nn.Module):
    def __init__(self, input_dim: int, dim: int, heads: int, post_norm: bool) -> None:
        super().__init__()
        self.mab = Block(input_dim, input_dim, dim, heads, post_norm)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        return self.mab(x, x, visible)


class PlainISAB(nn.Module):
    def __init__(self, input_dim: int, dim: int, inducing: int, heads: int, post_norm: bool) -> None:
        super().__init__()
        self.I = nn.Parameter(torch.randn(1, inducing, dim))
        self.mab0 = Block(dim, input_dim, dim, heads, post_norm)
        self.mab1 = Block(input_dim, dim, dim, heads, post_norm)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        return self.mab1(x, self.mab0(self.I, x, visible))


class PlainPMA(nn.Module):
    def __init__(self, dim: int, seeds: int, heads: int, post_norm: bool) -> None:
        super().__init__()
        self.S = nn.Parameter(torch.randn(1, seeds, dim))
        self.mab = Block(dim, dim, dim, heads, post_norm)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        return self.mab(self.S, x, visible)


class PlainSetTransformer(nn.Module):
    """enc and dec as the authors lay them out; ``dropout`` puts two layers without weights around the pooling."""

    def __init__(
        self, input_dim: int, output_dim: int, *, outputs: int = 1, dim: int, heads: int, inducing: int | None,
        encoder: int = 2, decoder: int = 2, post_norm: bool = False, dropout: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = [input_dim] + [dim] * (encoder - 1)
        if inducing is None:
            blocks = [PlainSAB(width, dim, heads, post_norm) for width in widths]
        else:
            blocks = [PlainISAB(width, dim, inducing, heads, post_norm) for width in widths]
        self.enc = nn.ModuleList(blocks)
        pooling: list[nn.Module] = [PlainPMA(dim, outputs, heads, post_norm)]
        pooling = [nn.Identity(), *pooling, nn.Identity()] if dropout else pooling
        after = [PlainSAB(dim, dim, heads, post_norm) for _ in range(decoder)]
        self.dec = nn.ModuleList([*pooling, *after, nn.Linear(dim, output_dim)])

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        for block in self.enc:
            x = block(x, visible)
        for block in self.dec:
            x = block(x, visible) if isinstance(block, PlainPMA) else block(x)
        return x
