"""Sizes that a tracer leaves open, where a plan needs numbers."""

from __future__ import annotations

from typing import TypeVar

import torch

from perceiver_kernels.problem import Problem

P = TypeVar("P", bound=Problem)

# What stands for a size that only the data tells; torch 2.10 would take this one whatever it is told.
_UNKNOWN = 4096


def settled(problem: P) -> P:
    """``problem`` of the sizes it was traced with: compared with one another, open ones would bind an exported program to them.

    Under torch.compile it stays as it is: a guard there is worth a plan for either side of it.
    """
    if torch.compiler.is_dynamo_compiling():
        from torch.fx.experimental import symbolic_shapes

        # Torch 2.10's Dynamo has no question for a size that it does not guard.
        traced = torch.compiler.is_exporting() and hasattr(symbolic_shapes, "optimization_hint")
    else:
        traced = any(isinstance(getattr(problem, name), torch.SymInt) for name in problem.SIZES)
    if not traced:
        return problem
    return problem.with_sizes(**{name: _hint(getattr(problem, name)) for name in problem.SIZES})


def _hint(size: int) -> int:
    from torch.fx.experimental import symbolic_shapes  # it would import sympy with the package

    if hasattr(symbolic_shapes, "optimization_hint"):
        return symbolic_shapes.optimization_hint(size, _UNKNOWN)
    return int(symbolic_shapes.hint_int(size, _UNKNOWN))
