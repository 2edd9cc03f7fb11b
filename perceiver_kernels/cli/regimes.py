"""The regimes that are measured: which cases, which passes, and the workload that makes calls of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from perceiver_kernels.cli.subject import Pass, Subject
from perceiver_kernels.cli.workload import PASSES, Workload
from perceiver_kernels.testing.cases import ENCODE


@dataclass(frozen=True)
class Regime:
    """A kind of attention, by the lengths of its two sides.

    Args:
        name: as the command line has it.
        meaning: in a few words.
        cases: name -> sizes.
        default_cases: names of what is measured when none is asked for.
        passes: name -> pass.
        workload: makes the tensors and calls of a case on a device, in a dtype.
        chunks: whether our layer has a chunked form, whose memory is measured too.
    """

    name: str
    meaning: str
    cases: Mapping[str, Any]
    default_cases: tuple[str, ...]
    passes: Mapping[str, Pass]
    workload: Callable[[Any, torch.device, torch.dtype], Subject]
    chunks: bool = False


REGIMES = {
    each.name: each
    for each in (
        Regime(
            "encode", "few latents read many inputs", ENCODE, ("imagenet", "longctx", "flow", "multimodal"),
            PASSES, Workload, chunks=True,
        ),
    )
}  # fmt: skip
