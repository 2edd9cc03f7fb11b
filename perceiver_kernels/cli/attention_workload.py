"""One case of attention over given keys and values as something to call: q, k, v, our function, stock PyTorch's.

Passes start from separate q [B, H, Lq, d_qk], k [B, H_kv, Lk, d_qk] and v [B, H_kv, Lk, d_v]. The backward gives the
gradients of all three from a forward that was saved, and is measured alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.cli import textbook
from perceiver_kernels.cli.measure import Call, seeded
from perceiver_kernels.cli.stock import ATTENTION_PEERS, Peer, compiled, peers_for
from perceiver_kernels.cli.subject import ON_TRITON, OURS, Pass, heads_of, on_triton, quiet, saved_gradients, under

ATTENTION_PASSES = {
    each.name: each
    for each in (
        Pass("forward", "kernel", "attention over given keys and values, forward"),
        Pass("backward", "kernel", "attention over given keys and values, backward from a saved forward"),
    )
}


class AttentionWorkload:
    """Tensors of one case: a `Subject`.

    Args:
        regime: name of the regime that the case belongs to.
        case: a `testing.cases.AttentionCase`.
        device, dtype: where and in what the work is done.
    """

    norms = 2

    def __init__(self, regime: str, case: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.regime, self.case, self.device, self.dtype = regime, case, device, dtype
        with seeded(0):
            self.q = self._randn(case.H, case.Lq, case.d_qk)
            self.k = self._randn(case.key_heads, case.Lk, case.d_qk)
            self.v = self._randn(case.key_heads, case.Lk, case.d_v)
            self.dout = self._randn(case.H, case.Lq, case.d_v)
        self.options: dict[str, Any] = {"enable_gqa": True} if case.H_kv else {}
        self.options |= {"is_causal": True, "causal_alignment": "bottom_right"} if case.causal else {}

    def _randn(self, heads: int, length: int, width: int) -> Tensor:
        return torch.randn(self.case.B, heads, length, width, device=self.device, dtype=self.dtype)

    @property
    def title(self) -> str:
        case = self.case
        causal = ", causal" if case.causal else ""
        return f"{case.name}: B={case.B}, {heads_of(case)}, {case.Lq:,} queries over {case.Lk:,} keys{causal}"

    def peers(self, names: Iterable[str] | None, *, compiled: bool) -> list[Peer]:
        widths = self.case.d_qk, self.case.d_v
        return peers_for(names, widths, self.device, compiled=compiled, offered=ATTENTION_PEERS)

    @functools.cached_property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as what gradients are taken of; the memory is theirs."""
        q, k, v = (tensor.detach().requires_grad_() for tensor in (self.q, self.k, self.v))
        return q, k, v

    def _operands(self, which: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.leaves if which == "backward" else (self.q, self.k, self.v)

    # ------ calls

    def ours(self, which: str) -> Call:
        """Return our callable for a pass; it gives the tensors that `names` lists."""
        return self._call(which, lambda q, k, v: pk.attention(q, k, v, **self.options))

    def stock(self, which: str, peer: Peer) -> Call:
        """Return a stock peer's callable for a pass."""
        attend: Any = functools.partial(peer.attend, scale=self.case.d_qk**-0.5, causal=self.case.causal)
        attend = compiled(attend) if peer.compiled else attend
        return under(peer, self._call(which, attend))

    def calls(self, which: str, peers: Sequence[Peer]) -> dict[str, Call]:
        """Return ours and the peers' callables for a pass."""
        calls = {OURS: self.ours(which)}
        if self.labels(which, OURS)["backend"] == "cuda" and pk.backends()["triton"][0]:
            # A graph of its own: the backward is chosen when it is built.
            calls[ON_TRITON] = on_triton(self.ours(which))
        return calls | {peer.name: self.stock(which, peer) for peer in peers}

    def _call(self, which: str, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
        q, k, v = self._operands(which)
        if which == "forward":
            return quiet(lambda: (attend(q, k, v),))
        return saved_gradients(lambda: attend(q, k, v), (q, k, v), self.dout)

    def names(self, which: str) -> list[str]:
        """Return the names of the tensors that a pass gives."""
        return ["out"] if which == "forward" else ["dq", "dk", "dv"]

    def results(self, which: str, calls: Mapping[str, Call]) -> dict[str, Call]:
        """Return the calls themselves."""
        return dict(calls)

    # ------ what a result is held against

    def specification(self, which: str, dtype: torch.dtype) -> Sequence[Tensor]:
        """Return what a pass should give, from the streamed textbook in a dtype."""
        if which == "forward":
            return [textbook.attention(self.q, self.k, self.v, dtype, causal=self.case.causal)]
        return textbook.attention_gradients(self.q, self.k, self.v, self.dout, dtype, causal=self.case.causal)

    def terms(self, which: str) -> dict[str, Tensor]:
        """Return none: these gradients are judged as they are."""
        return {}

    def forget(self) -> None:
        """Nothing: gradients are results of these calls, and nowhere else."""

    def labels(self, which: str, implementation: str) -> dict[str, str]:
        """Return an implementation's backend."""
        if implementation != OURS:
            return {"backend": "triton" if implementation == ON_TRITON else "stock"}
        with torch.set_grad_enabled(which == "backward"):
            explained = pk.explain("attention", *self._operands(which), **self.options)
        return {"backend": str((explained.backward if which == "backward" else None) or explained.backend)}

    def flops(self, which: str, implementation: str) -> int:
        """Return the FLOPs of a pass, whoever computes it."""
        return flops(self.case, which)

    def least(self, which: str) -> tuple[int, int]:
        """Return the FLOPs and the fewest bytes of a pass."""
        return flops(self.case, which), least_bytes(self.case, which, self.dtype.itemsize)


def flops(case: Any, which: str) -> int:
    """Return the FLOPs of a pass, a multiply and an add counted as two.

    Forward: S and out. Backward: S once more, dP, dq, dk and dv. Of a causal case the pairs that are seen.
    """
    widths = {"forward": case.d_qk + case.d_v, "backward": 3 * case.d_qk + 2 * case.d_v}
    pairs = case.Lq * case.Lk
    if case.causal:
        seeing = min(case.Lq, case.Lk)
        pairs = seeing * case.Lk - seeing * (seeing - 1) // 2
    return 2 * case.B * case.H * pairs * widths[which]


def least_bytes(case: Any, which: str, itemsize: int) -> int:
    """Return the fewest bytes a pass moves: every input read once, every result written once."""
    q, dout = case.H * case.Lq * case.d_qk, case.H * case.Lq * case.d_v
    k_and_v = case.key_heads * case.Lk * (case.d_qk + case.d_v)
    elements = {"forward": q + k_and_v + dout, "backward": 2 * (q + k_and_v) + dout}
    return itemsize * case.B * elements[which]
