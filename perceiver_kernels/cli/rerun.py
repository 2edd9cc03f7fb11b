"""The command that measures one row again: what of a call decides about it, where it is not the default."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from perceiver_kernels.cli.regimes import Regime
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.subject import COMPILED, OURS, OWN, peer_option

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SECONDS = 0.3
"""Sampling time per implementation and pass."""


def default_dtype(device: torch.device) -> torch.dtype:
    """Return what is computed in on a device unless somebody says otherwise."""
    return DTYPES["bf16" if device.type == "cuda" else "fp32"]


@dataclass(frozen=True)
class Conditions:
    """How a case is measured.

    Args:
        device, dtype, seconds: as in `Bench`.
        max_inputs: what cases were cut to, None for what the device can do.
        size: the one of a sweep that the case has.
        backends: those that were allowed, None for all.
        compiled: whether all peers includes what torch.compile makes.
    """

    device: torch.device
    dtype: torch.dtype
    seconds: float = SECONDS
    max_inputs: int | None = None
    size: int | None = None
    backends: Sequence[str] | None = None
    compiled: bool = False

    def command(self, regime: Regime, case: str, which: str, implementation: str, peers: Iterable[Peer]) -> str | None:
        """Return the command of one row; None for a case that the command line has no name for.

        Args:
            regime, case, which, implementation: what was measured.
            peers: that were measured beside it.
        """
        if case not in regime.cases:
            return None
        words = [f"perceiver-kernels bench {regime.name} --case {case} --passes {which}"]
        if self.size is not None:
            words.append(f"--sizes {self.size}")
        on_gpu = self.device.type == "cuda"
        cut = None if regime.cpu_inputs is None else self.max_inputs
        if cut is not None and (on_gpu or cut != regime.cpu_inputs):
            words.append(f"--max-inputs {cut}")
        if not on_gpu:
            # The default where there is no GPU, but the row is one of a CPU wherever it is measured again.
            words.append("--device cpu")
        if self.dtype != default_dtype(self.device):
            words += [f"--dtype {name}" for name, dtype in DTYPES.items() if dtype == self.dtype]
        if self.seconds != SECONDS:
            words.append(f"--seconds {self.seconds}")
        if self.backends is not None:
            words.append(f"--backend {','.join(self.backends)}")
        return " ".join(words + self._peers(implementation, peers))

    def _peers(self, implementation: str, peers: Iterable[Peer]) -> list[str]:
        """A row of a peer names it, one of ours compiled the peer that it comes with; others are measured beside any."""
        if implementation == OURS + COMPILED:
            return [f"--peers {peer.name}" for peer in peers if peer.compiled][:1]
        if implementation not in OWN:
            return [f"--peers {peer_option(implementation)}"]
        return ["--no-compile"] if self.device.type == "cuda" and not self.compiled else []
