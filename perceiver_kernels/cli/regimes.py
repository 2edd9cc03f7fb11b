"""The regimes that are measured: which cases, which passes, and the workload that makes calls of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from perceiver_kernels.cli.attention_workload import ATTENTION_PASSES, AttentionWorkload
from perceiver_kernels.cli.attention_workload import least_bytes as attention_bytes
from perceiver_kernels.cli.model_workload import MODEL_PASSES
from perceiver_kernels.cli.models import DEFAULT_MODELS, MODELS
from perceiver_kernels.cli.replaced import REPLACED, ReplacedWorkload
from perceiver_kernels.cli.same_model import workload as model_workload
from perceiver_kernels.cli.subject import Pass, Subject, shape_of
from perceiver_kernels.cli.wide_workload import WideCase, WideWorkload
from perceiver_kernels.cli.workload import PASSES, Workload
from perceiver_kernels.cli.workload import least_bytes as encode_bytes
from perceiver_kernels.testing.cases import DECODE, ENCODE, ENCODE_KV, ENCODE_WIDE, PROCESS, AttentionCase, EncodeCase


@dataclass(frozen=True)
class Regime:
    """What is measured under one name: a kind of attention, by the lengths of its two sides, or whole layers.

    Args:
        name: as the command line has it.
        meaning: in a few words.
        cases: name -> sizes.
        default_cases: names of what is measured when none is asked for.
        passes: name -> pass.
        workload: makes the tensors and calls of a case on a device, in a dtype.
        least_bytes: of a case, a pass and the bytes of an element: the fewest bytes that the pass moves; 0 where the sizes
            alone do not tell.
        default_passes: names of what is measured when no pass is asked for.
        cpu_inputs: tokens that a case is cut to on a CPU, unless somebody says otherwise; None where cases have none.
        axis: the size of a case that `--sizes` sets, None where there is none.
        chunks: whether our layer has a chunked form, whose memory is measured too, of cases that do not say otherwise.
    """

    name: str
    meaning: str
    cases: Mapping[str, Any]
    default_cases: tuple[str, ...]
    passes: Mapping[str, Pass]
    workload: Callable[[Any, torch.device, torch.dtype], Subject]
    least_bytes: Callable[[Any, str, int], int]
    default_passes: tuple[str, ...]
    cpu_inputs: int | None
    axis: str | None = None
    chunks: bool = False

    def sizes(self, name: str, device: torch.device, max_inputs: int | None, size: int | None = None) -> Any:
        """Return a case cut to what the device can do; ``size`` sets the axis, whatever the device."""
        case = self.cases[name]
        if device.type == "cpu":
            case = case.scaled(max_inputs or self.cpu_inputs)
        elif max_inputs:
            case = case.cut(max_inputs)
        return case if size is None or self.axis is None else dataclasses.replace(case, **{self.axis: size})

    def cut_of(self, case: Any, device: torch.device) -> str:
        """Return in words what of a named case a CPU does not measure; empty where that is nothing."""
        if device.type != "cpu" or case.name not in self.cases:
            return ""
        whole, here = shape_of(self.cases[case.name]), shape_of(case)
        less = [f"{name} {size:,} to {here[name]:,}" for name, size in whole.items() if here.get(name, size) < size]
        return f"cut to fit a CPU: {', '.join(less)}" if less else ""

    def passes_of(self, case: Any, passes: Iterable[Pass]) -> list[Pass]:
        """Return those of some passes that a case has: all of them, unless it says which."""
        known = getattr(case, "passes", self.passes)
        return [each for each in passes if each.name in known]

    def has_chunks(self, case: Any) -> bool:
        """Whether the layer of a case has a chunked form."""
        return self.chunks and getattr(case, "chunks", True)


def _encode(
    name: str, meaning: str, cases: Mapping[str, EncodeCase], default_cases: tuple[str, ...], level: str
) -> Regime:
    """A regime over inputs: the passes of one level are measured by default, those of `encode` hold both."""

    def workload(case: EncodeCase, device: torch.device, dtype: torch.dtype) -> Workload:
        return (WideWorkload if isinstance(case, WideCase) else Workload)(case, device, dtype, regime=name)

    layers = {name: each for name, each in PASSES.items() if each.level == "layer"}
    chosen = tuple(which for which, each in PASSES.items() if each.level == level)
    return Regime(
        name, meaning, cases, default_cases, layers if level == "layer" else PASSES, workload, encode_bytes, chosen,
        cpu_inputs=2048, axis="M", chunks=True,
    )  # fmt: skip


def _attention(
    name: str, meaning: str, cases: Mapping[str, AttentionCase], default_cases: tuple[str, ...], axis: str | None
) -> Regime:
    """A regime over given keys and values."""
    # torch's fp32 attention on a CPU exceeds the accuracy rule in sums over 2,048 keys, by 6 % (torch 2.13).
    return Regime(
        name, f"{meaning}, q, k, v given", cases, default_cases, ATTENTION_PASSES, functools.partial(AttentionWorkload, name),
        attention_bytes, tuple(ATTENTION_PASSES), cpu_inputs=512, axis=axis,
    )  # fmt: skip


WIDE = {name: WideCase(**dataclasses.asdict(case)) for name, case in ENCODE_WIDE.items()}
REGIMES = {
    each.name: each
    for each in (
        _encode(
            "encode", "few latents read many inputs", ENCODE, ("imagenet", "longctx", "flow", "multimodal", "c128", "c64"),
            "kernel",
        ),
        _encode(
            "layers", f"whole layers, LayerNorm to output projection; {', '.join(WIDE)} are projected, each head with keys of "
            "its own", {**ENCODE, **WIDE},
            ("imagenet", "longctx", "flow", "multimodal", "language", "resampler", "pointcloud"), "layer",
        ),
        _attention(
            "decode", "many queries read few latents", DECODE,
            ("decode-h8", "decode-h1", "decode-262k", "flow", "vecset"), "Lq",
        ),
        _attention(
            "process", "latents read each other", PROCESS,
            ("imagenet", "n512-d64", "multimodal", "language", "n2048-d64"), None,
        ),
        _attention(
            "encode-kv", "few latents read many inputs", ENCODE_KV,
            ("kv-256x1m-d256", "kv-64x16k-h16-d64", "kv-512x50k-d128", "kv-512x50k-h8-d64"), "Lk",
        ),
        Regime(
            "models", "whole models beside their originals, or beside themselves over PyTorch's attention", MODELS,
            DEFAULT_MODELS, MODEL_PASSES, model_workload, lambda case, which, itemsize: 0, tuple(MODEL_PASSES), cpu_inputs=None,
        ),
        Regime(
            "replaced", "models of other libraries before and after replace_attention", REPLACED, tuple(REPLACED), MODEL_PASSES,
            ReplacedWorkload, lambda case, which, itemsize: 0, tuple(MODEL_PASSES), cpu_inputs=None,
        ),
    )
}  # fmt: skip
