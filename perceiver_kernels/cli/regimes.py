"""The regimes that are measured: which cases, which passes, and the workload that makes calls of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from perceiver_kernels.cli.attention_workload import ATTENTION_PASSES, AttentionWorkload
from perceiver_kernels.cli.subject import Pass, Subject
from perceiver_kernels.cli.workload import PASSES, Workload
from perceiver_kernels.testing.cases import DECODE, ENCODE, ENCODE_KV, PROCESS, AttentionCase


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
        cpu_inputs: tokens that a case is cut to on a CPU, unless somebody says otherwise.
        chunks: whether our layer has a chunked form, whose memory is measured too.
    """

    name: str
    meaning: str
    cases: Mapping[str, Any]
    default_cases: tuple[str, ...]
    passes: Mapping[str, Pass]
    workload: Callable[[Any, torch.device, torch.dtype], Subject]
    cpu_inputs: int
    chunks: bool = False

    def sizes(self, name: str, device: torch.device, max_inputs: int | None) -> Any:
        """Return a case cut to what the device can do."""
        case = self.cases[name]
        if device.type == "cpu":
            return case.scaled(max_inputs or self.cpu_inputs)
        return case.cut(max_inputs) if max_inputs else case


def _attention(
    name: str, meaning: str, cases: Mapping[str, AttentionCase], default_cases: tuple[str, ...]
) -> Regime:
    """A regime over given keys and values."""
    workload = functools.partial(AttentionWorkload, name)
    # torch's fp32 attention on a CPU exceeds the accuracy rule in sums over 2,048 keys, by 6 % (torch 2.13).
    return Regime(
        name, f"{meaning}, q, k, v given", cases, default_cases, ATTENTION_PASSES, workload, cpu_inputs=512
    )


REGIMES = {
    each.name: each
    for each in (
        Regime(
            "encode", "few latents read many inputs", ENCODE, ("imagenet", "longctx", "flow", "multimodal"),
            PASSES, Workload, cpu_inputs=2048, chunks=True,
        ),
        _attention(
            "decode", "many queries read few latents", DECODE,
            ("decode-h8", "decode-h1", "decode-262k", "flow"),
        ),
        _attention(
            "process", "latents read each other", PROCESS,
            ("imagenet", "n512-d64", "multimodal", "language", "n2048-d64"),
        ),
        _attention("encode-kv", "few latents read many inputs", ENCODE_KV, tuple(ENCODE_KV)),
    )
}  # fmt: skip
