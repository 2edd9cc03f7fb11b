"""Which method computes a cross-attention layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perceiver_kernels.cost import absorbed_cost, projected_cost
from perceiver_kernels.device import DeviceFacts
from perceiver_kernels.plan.symbols import settled
from perceiver_kernels.problem import CrossAttentionProblem


@dataclass(frozen=True)
class CrossAttentionPlan:
    """Absorbed or projected, with the estimated time of both in seconds."""

    method: Literal["absorbed", "projected"]
    absorbed_seconds: float
    projected_seconds: float


def plan_cross_attention(problem: CrossAttentionProblem, device: DeviceFacts) -> CrossAttentionPlan:
    """The method whose roofline time, at the measured efficiency of its parts, is smaller."""
    problem = settled(problem)
    absorbed = absorbed_cost(problem, effective=True).seconds(device, problem.dtype)
    projected = projected_cost(problem, effective=True).seconds(device, problem.dtype)
    return CrossAttentionPlan("absorbed" if absorbed <= projected else "projected", absorbed, projected)
