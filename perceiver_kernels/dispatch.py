"""Which backend serves a call: one literal table, refusals in sentences, no silent fallback from an explicit choice."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from perceiver_kernels.problem import PROBLEMS, Problem

ENVIRONMENT_VARIABLE = "PERCEIVER_KERNELS_BACKEND"
BACKENDS = ("cuda", "triton", "sdpa", "reference")
FUSED = "fused"
"""What calls inside ``fused_operators`` name: the kernels of whichever backend has them."""

# operation -> backend -> module, in order of preference.
TABLE: dict[str, dict[str, str]] = {
    "pack_inputs": {"cuda": "cuda.pack", "triton": "triton.pack", "sdpa": "sdpa", "reference": "reference"},
    "shared_kv_attention": {
        "cuda": "cuda.shared_kv", "triton": "triton.shared_kv", "sdpa": "sdpa", "reference": "reference",
    },
    "attention": {"cuda": "cuda.attention", "triton": "triton.attention", "sdpa": "sdpa", "reference": "reference"},
    "rotary_embedding": {"triton": "triton.rotary", "sdpa": "sdpa", "reference": "reference"},
}


def _parse_names(names: tuple[str, ...], source: str) -> tuple[str, ...]:
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"{source} must name backends among {', '.join(BACKENDS)}, got {name!r}")
    return names


class _Block:
    """Backends that calls are restricted to, in order, until it ends; None: all, in the table's order."""

    def __init__(self, names: tuple[str, ...] | None) -> None:
        self.names = names


_blocks: list[_Block] = []
"""Those that have not ended, of all threads: autograd has some of its own. The last is in force."""

_environment = tuple(name for name in os.environ.get(ENVIRONMENT_VARIABLE, "").replace(",", " ").split())


def _in_force() -> tuple[str, ...] | None:
    for block in _blocks[-1:]:
        return block.names
    return None


@contextmanager
def _restricted(names: tuple[str, ...] | None) -> Iterator[None]:
    block = _Block(names)
    _blocks.append(block)
    try:
        yield
    finally:
        # Threads end theirs in any order.
        _blocks.remove(block)


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Restrict every call, of all threads, inside the block to ``names``, tried in that order; one that none can serve raises.

    A backend that lacks an operation altogether is passed over for that operation only if another name in the list has it.
    The restriction holds for the process, all threads; of blocks that overlap, the one that began last is in force. What
    activation checkpointing computes again for a gradient runs as it did at first, inside of the block or after it.
    The environment variable ``PERCEIVER_KERNELS_BACKEND`` (names separated by commas) does the same for a process.

    Raises:
        ValueError: a name that is not one of cuda, triton, sdpa, reference.
    """
    if not names:
        raise ValueError("use_backend needs at least one backend name")
    with _restricted(_parse_names(names, "use_backend")):
        yield


def computed_as_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, restricted at every call to the backends that are in force now."""
    names = _in_force()

    def restricted(*args: Any, **kwargs: Any) -> Any:
        with _restricted(names):
            return function(*args, **kwargs)

    return restricted


_fused_operators = False


@contextmanager
def fused_operators() -> Iterator[None]:
    """Send every call inside the block through the operators of the fused kernels, whatever the device and what runs on it.

    For fake tensors, whose operators only describe their results: shapes, and with them memory. No kernel is run.
    """
    global _fused_operators
    previous, _fused_operators = _fused_operators, True
    try:
        yield
    finally:
        _fused_operators = previous


@functools.cache
def _unavailable(name: str) -> str | None:
    """Why backend ``name`` cannot run in this process, or None."""
    if name in ("reference", "sdpa"):
        return None
    package = importlib.import_module(f"perceiver_kernels.backends.{name}")
    return package.unavailable()


def backends() -> dict[str, tuple[bool, str]]:
    """Every backend, whether it can run in this process, and if not, why."""
    return {name: (_unavailable(name) is None, _unavailable(name) or "available") for name in BACKENDS}


# Filled by ``load``; a plain dictionary, because torch.compile can read one but cannot trace an import.
_modules: dict[tuple[str, str], ModuleType] = {}


def load(op: str, backend: str) -> ModuleType:
    """The module that serves ``op`` for ``backend``; the first ``select`` has imported it before compiled code gets here."""
    if (op, backend) not in _modules:
        _modules[op, backend] = importlib.import_module(f"perceiver_kernels.backends.{TABLE[op][backend]}")
    return _modules[op, backend]


@functools.cache
def _load_available() -> None:
    """Import what every available backend serves, once: torch.compile reads ``_modules`` as it was when a trace first did."""
    for op, modules in TABLE.items():
        for name in modules:
            if _unavailable(name) is None:
                load(op, name)


def refusals(problem: Problem, name: str) -> list[str]:
    """Why backend ``name`` cannot serve ``problem``; empty where it can."""
    if name not in TABLE[problem.OP]:
        return [f"{name} has no {problem.OP}"]
    reason = _unavailable(name)
    return [reason] if reason else load(problem.OP, name).reasons_against(problem)


def _failure(problem: Problem, reasons: dict[str, list[str]]) -> ValueError:
    lines = [f"no backend can serve {problem.OP} as asked"]
    lines += [f"  {name}: {'; '.join(why)}" for name, why in reasons.items()]
    return ValueError("\n".join(lines))


@torch.compiler.assume_constant_result
def _choose(op: str, static_values: tuple[Any, ...], names: tuple[str, ...]) -> str:
    return _choose_once(op, static_values, names)


@functools.lru_cache(maxsize=4096)
def _choose_once(op: str, static_values: tuple[Any, ...], names: tuple[str, ...]) -> str:
    _load_available()
    problem = PROBLEMS[op](*static_values)
    reasons: dict[str, list[str]] = {}
    for name in names:
        reasons[name] = refusals(problem, name)
        if not reasons[name]:
            return name
    raise _failure(problem, reasons)


def candidates(op: str, backend: str | None) -> tuple[str, ...]:
    """The backends that may serve ``op``: the explicit one, or those in force, or all of the table."""
    if backend is not None:
        return _parse_names((backend,), "backend")
    if (names := _in_force()) is not None:
        return names
    return _parse_names(_environment, ENVIRONMENT_VARIABLE) or tuple(TABLE[op])


@torch.compiler.assume_constant_result
def _choose_passes(
    op: str, static_values: tuple[Any, ...], forward_values: tuple[Any, ...], names: tuple[str, ...]
) -> tuple[str, str]:
    return _choose_passes_once(op, static_values, forward_values, names)


@functools.lru_cache(maxsize=4096)
def _choose_passes_once(
    op: str, static_values: tuple[Any, ...], forward_values: tuple[Any, ...], names: tuple[str, ...]
) -> tuple[str, str]:
    backward = _choose_once(op, static_values, names)
    if load(op, backward).COMPOSITE:
        return backward, backward
    forward = _choose_once(op, forward_values, names)
    if load(op, forward).COMPOSITE:
        return backward, backward
    return (
        _with_alternative(op, forward, forward_values, names, "leaves"),
        _with_alternative(op, backward, static_values, names, "leaves_backward"),
    )


def _with_alternative(op: str, chosen: str, values: tuple[Any, ...], names: tuple[str, ...], rule: str) -> str:
    """``chosen``, and after a comma the next kernel backend of ``names`` where the first leaves it some calls."""
    if not hasattr(load(op, chosen), rule):
        return chosen
    problem, others = PROBLEMS[op](*values), names[names.index(chosen) + 1 :]
    kernels = (name for name in others if not refusals(problem, name) and not load(op, name).COMPOSITE)
    return ",".join([chosen, *list(kernels)[:1]])


def is_composite(op: str, backend: str) -> bool:
    """Whether ``backend`` is a composition of torch's operations."""
    return backend != FUSED and "," not in backend and load(op, backend).COMPOSITE


def serving(op: str, backend: str, sizes: tuple[int, ...], rule: str = "leaves") -> str:
    """The backend that serves a call of ``sizes``: of two alternatives the first, unless it leaves such calls to the second.

    Its ``rule`` says that: "leaves" for the forward, "leaves_backward" for the backward.
    """
    if "," not in backend:
        return backend
    first, second = backend.split(",")
    return second if getattr(load(op, first), rule)(sizes) else first


def select_passes(problem: Problem, backend: str | None = None) -> tuple[str, str]:
    """The backends that serve the forward and the backward of ``problem``, chosen apart; ``serving`` tells which of two does.

    Two kernel backends for one of them ("cuda,triton") are alternatives between which the sizes of a call decide.

    A backward starts from what any kernels' forward leaves, so a backend without a gradient may still serve the forward. A
    composition of torch's operations serves both or neither.

    Raises:
        ValueError: as ``select`` of ``problem``, whose backward must be served where it needs a gradient.
    """
    if _fused_operators:
        return FUSED, FUSED
    names = candidates(problem.OP, backend)
    static = problem.static_values()
    without = tuple([False if name == "needs_grad" else v for name, v in zip(problem.FIELDS, static, strict=True)])
    return _choose_passes(problem.OP, static, without, names)


def select(problem: Problem, backend: str | None = None) -> str:
    """The backend that serves ``problem``; static facts decide, never sizes, so compiled graphs are not specialised.

    Raises:
        ValueError: ``backend`` (or every backend in force) cannot serve the problem; the message holds every reason.
    """
    return _choose(problem.OP, problem.static_values(), candidates(problem.OP, backend))
