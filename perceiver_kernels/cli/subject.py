"""What is measured: a pass over a case, and what a workload offers to be judged and timed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from perceiver_kernels.cli.measure import Call
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.dispatch import use_backend

OURS = "ours"
CHUNKED = "ours-chunked"
ON_TRITON = "ours-triton"
GRAPHED, COMPILED = "-graphed", "-compiled"
"""Ends of the names of a whole model as a CUDA graph, and through torch.compile with mode "reduce-overhead"."""
OWN = (OURS, CHUNKED, ON_TRITON, OURS + GRAPHED, OURS + COMPILED)
"""Implementations whose wrong result fails a command; the others are stock."""


@dataclass(frozen=True)
class Pass:
    """One thing to measure."""

    name: str
    level: Literal["kernel", "layer", "model"]
    title: str


class Subject(Protocol):
    """One case as something to judge and time: `Gate` and `Bench` know no more of a workload than this.

    Args:
        regime: name of the regime, as the command line has it.
        case: named sizes, of `testing.cases`.
        device, dtype: where and in what the work is done.
        norms: in how many norms the accuracy rule holds: 2 for L2 and maximum, 1 for L2 alone.
    """

    regime: str
    case: Any
    device: torch.device
    dtype: torch.dtype
    norms: int

    @property
    def title(self) -> str:
        """The case in one line."""
        ...

    def peers(self, names: Iterable[str] | None, *, compiled: bool) -> list[Peer]:
        """Return the peers asked for, or all that the device has; compiled: with those that torch.compile makes."""
        ...

    def ours(self, which: str) -> Call:
        """Return our callable for a pass; it gives the tensors that `names` lists."""
        ...

    def calls(self, which: str, peers: Sequence[Peer]) -> dict[str, Call]:
        """Return implementation -> callable for a pass: ours first, then the peers that have such a pass."""
        ...

    def names(self, which: str) -> list[str]:
        """Return the names of the tensors that a pass gives."""
        ...

    def results(self, which: str, calls: Mapping[str, Call]) -> dict[str, Call]:
        """Return calls that give the tensors of `names`: the same calls where those do."""
        ...

    def specification(self, which: str, dtype: torch.dtype) -> Sequence[Tensor]:
        """Return what a pass should give: the specification in fp64, the textbook in any other dtype."""
        ...

    def terms(self, which: str) -> Mapping[str, Tensor]:
        """Return, of results that are sums which cancel, the sums of absolute values, once the specification is known."""
        ...

    def forget(self) -> None:
        """Let go of what earlier calls left: a call's memory is counted from before it left anything."""
        ...

    def labels(self, which: str, implementation: str) -> dict[str, str]:
        """Return what a row says of an implementation: its `backend`, and its `method` where there are several."""
        ...

    def flops(self, which: str, implementation: str) -> int:
        """Return the FLOPs that an implementation's rate is computed from."""
        ...

    def least(self, which: str) -> tuple[int, int]:
        """Return the fewest FLOPs and the fewest bytes of a pass, by whatever method."""
        ...


def shape_of(case: Any) -> dict[str, int]:
    """Return a case's sizes as plain values."""
    if (own := getattr(case, "shape", None)) is not None:
        return own
    # What a case does not have, shared key heads or a causal mask, is no size of it.
    return {name: size for name, size in dataclasses.asdict(case).items() if name != "name" and size not in (None, False)}


def peer_option(implementation: str) -> str:
    """Return the name of the peer, as the command line has it, that a stock implementation's row is of."""
    name = implementation.removesuffix(GRAPHED)
    return f"compiled-{name.removesuffix(COMPILED)}" if name.endswith(COMPILED) else name


def heads_of(case: Any) -> str:
    """Return a case's heads in words."""
    shared = f", {case.H_kv} of keys" if getattr(case, "H_kv", None) else ""
    return f"{case.H} head{'s' if case.H > 1 else ''} of {case.d_qk}/{case.d_v}{shared}"


def quiet(call: Call) -> Call:
    """Run a call without recording a graph."""

    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def under(peer: Peer | None, call: Call) -> Call:
    """Run a call with only the peer's SDPA backend allowed."""
    if peer is None:
        return call

    def run() -> Any:
        with peer.only():
            return call()

    return run


def on_triton(call: Call) -> Call:
    """Run a call with Triton's kernels alone."""

    def run() -> Any:
        with use_backend("triton"):
            return call()

    return run


def saved_gradients(forward: Callable[[], Tensor], leaves: Sequence[Tensor], gradient: Tensor) -> Call:
    """Return the callable of a backward alone: the first call builds the graph, every call walks it."""

    @functools.cache
    def graph() -> Tensor:
        # A compiled backward takes its saved tensors as scratch, and a graph is walked more than once here.
        with functorch_config.patch(donated_buffer=False):
            return forward()

    return lambda: torch.autograd.grad(graph(), leaves, gradient, retain_graph=True)
