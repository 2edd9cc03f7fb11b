"""Rotary positions as layers take them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perceiver_kernels import functional


@dataclass(frozen=True, eq=False)
class Rotary:
    """Where the tokens of a sequence are, as the tables of ``rotary_tables``.

    Args:
        cos: ``[L, r/2]`` or ``[B, L, r/2]`` for the L keys of an attention; its queries are the last of them.
        sin: likewise.
        interleaved: pairs are neighbouring channels, see ``functional.rotary_embedding``.

    Source: RoFormer, arXiv 2104.09864.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    @property
    def length(self) -> int:
        """L."""
        return self.cos.shape[-2]

    def turn(self, x: Tensor, start: int) -> Tensor:
        """x [B, H, n, d], the tokens start..start + n of the sequence, turned by their positions."""
        tables = (table[..., start : start + x.shape[2], :] for table in (self.cos, self.sin))
        return functional.rotary_embedding(x, *tables, interleaved=self.interleaved)
