"""What can be exercised in this process: which backends, on which device, in which dtypes, at which sizes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from perceiver_kernels.backends.triton import interpreted
from perceiver_kernels.dispatch import TABLE, backends, refusals
from perceiver_kernels.problem import Problem
from perceiver_kernels.testing.cases import EncodeCase

F = TypeVar("F", bound=Callable[..., Any])

KERNEL_BACKENDS = ("cuda", "triton")
OFFLINE_TRITON = "3.6."
"""Registers and spills are limited as this compiler allocates them; its private parts are patched."""
# Kernels that serve plain calls alone, or lack some gradients. Tests that skip what is refused ask them, and say so: PARTIAL.
# Gradients that are lacking are Triton's there, which start from what this forward leaves.
PARTIAL = {("shared_kv_attention", "cuda"), ("attention", "cuda")}


@dataclass(frozen=True)
class Target:
    """One backend of one operation in one dtype."""

    op: str
    backend: str
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def is_kernel(self) -> bool:
        """Whether the backend is a forward and backward kernel pair, not a composition of torch's operations."""
        return self.backend in KERNEL_BACKENDS

    @property
    def is_partial(self) -> bool:
        return (self.op, self.backend) in PARTIAL

    @property
    def passes(self) -> tuple[str, str]:
        """The backends of the forward and of any backward."""
        return self.backend, "triton" if self.is_partial else self.backend

    def passes_of(self, problem: Problem) -> tuple[str, str]:
        """The backends of the forward and the backward of a problem."""
        return self.backend, "triton" if self.is_partial and refusals(problem, self.backend) else self.backend

    def refusals(self, problem: Problem) -> list[str]:
        """Why the backend cannot serve the problem, or its forward where it lacks gradients; empty where it can."""
        if self.is_partial:
            problem = replace(problem, needs_grad=False)  # type: ignore[call-arg]
        return refusals(problem, self.backend)


def machine() -> str:
    """ "interpreter" under TRITON_INTERPRET=1, else "gpu" where there is one, else "cpu"."""
    if interpreted():
        return "interpreter"
    return "gpu" if torch.cuda.is_available() else "cpu"


def why_not_offline() -> str | None:
    """Why kernels are not compiled for other machines in this process, or None where they are."""
    reasons = {"gpu": "a GPU is here: it compiles and runs the kernels themselves", "interpreter": "nothing is compiled in it"}
    if reason := reasons.get(machine()):
        return reason
    found = importlib.metadata.version("triton")
    if found.startswith(OFFLINE_TRITON):
        return None
    return f"registers and spills are known of Triton {OFFLINE_TRITON}*, got {found}"


def dtypes() -> tuple[torch.dtype, ...]:
    """Tested dtypes: the interpreter computes bf16 wrongly; on a GPU fp16 has bf16's kernels and a test of its own."""
    half = {"interpreter": (torch.float16,), "gpu": (torch.bfloat16,), "cpu": (torch.float16, torch.bfloat16)}
    return torch.float32, *half[machine()]


def targets(op: str) -> list[Target]:
    """Every available backend of ``op`` in every dtype; in the interpreter Triton alone, the others run outside it."""
    where = machine()
    names = [name for name in TABLE[op] if backends()[name][0]]
    if where == "interpreter":
        names = [name for name in names if name == "triton"]
    if where == "gpu" and op != "attention":
        # torch's own kernels: its cuDNN attention breaks the rule on masked rows (pytorch#196678); they are no oracle here.
        names = [name for name in names if name != "sdpa"]
    return [Target(op, name, "cuda" if where == "gpu" else "cpu", dtype) for name in names for dtype in dtypes()]


def only(*wanted: torch.dtype) -> Callable[[F], F]:
    """Decorates a test whose question does not depend on the dtype: ``target`` takes these alone."""

    def decorate(test: F) -> F:
        test.dtypes = wanted  # type: ignore[attr-defined]
        return test

    return decorate


def sized(case: EncodeCase) -> EncodeCase:
    """``case`` at a size that this machine computes in about a second: several tiles of keys, remainders kept."""
    if machine() == "interpreter":
        case = case.scaled(max_inputs=130, max_latents=20, max_batch=1)
        return replace(case, H=min(case.H, 2))
    return case.scaled(max_inputs=2048, max_latents=160, max_batch=3) if machine() == "gpu" else case.scaled()


def one_for_each_width(cases: Iterable[EncodeCase]) -> list[EncodeCase]:
    """The first case of every padded channel count: what a machine that is short of time needs of a list."""
    return list({case.C_padded: case for case in reversed(list(cases))}.values())[::-1]
