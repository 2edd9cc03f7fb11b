"""Which method computes a layer whose output queries read the latents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from perceiver_kernels.cost import output_absorbed_cost, output_projected_cost
from perceiver_kernels.device import DeviceFacts
from perceiver_kernels.plan.symbols import settled
from perceiver_kernels.problem import OutputCrossAttentionProblem


@dataclass(frozen=True)
class OutputCrossAttentionPlan:
    """Absorbed or projected, with the estimated time of both in seconds; what speaks against absorption makes its infinite."""

    method: Literal["absorbed", "projected"]
    absorbed_seconds: float
    projected_seconds: float
    against_absorption: tuple[str, ...]


def plan_output_cross_attention(problem: OutputCrossAttentionProblem, device: DeviceFacts) -> OutputCrossAttentionPlan:
    """The method whose roofline time, at the measured efficiency of its parts, is smaller."""
    problem = settled(problem)
    reasons = problem.against_absorption
    absorbed = math.inf if reasons else output_absorbed_cost(problem, effective=True).seconds(device, problem.dtype)
    projected = output_projected_cost(problem, effective=True).seconds(device, problem.dtype)
    method: Literal["absorbed", "projected"] = "projected" if reasons or projected < absorbed else "absorbed"
    return OutputCrossAttentionPlan(method, absorbed, projected, reasons)
