"""Problems: what one call asks for, checked once, with every axis named.

``Problem.of(...)`` is the only place that validates tensors. A problem holds plain values, no tensors. Its *static* part (all
but the sizes that vary between calls) decides which backend serves it; the sizes decide how (plan/).
"""

from __future__ import annotations

from dataclasses import fields

from perceiver_kernels.problem.attention import AttentionProblem
from perceiver_kernels.problem.base import Problem
from perceiver_kernels.problem.checks import (
    CHANNEL_MULTIPLE,
    MAX_CHANNELS,
    check_device,
    check_eps,
    check_floating,
    check_is_tensor,
    check_key_visibility,
    check_like,
    check_probability,
    check_query_mask,
    check_rank,
    check_scale,
    check_shape,
    check_vectors,
    constant,
    needs_gradient,
    pad_channels,
    shape_of,
)
from perceiver_kernels.problem.inputs import CrossAttentionProblem, PackProblem, SharedKVProblem
from perceiver_kernels.problem.outputs import OutputCrossAttentionProblem
from perceiver_kernels.problem.rotary import RotaryProblem

_ALL = (PackProblem, SharedKVProblem, AttentionProblem, CrossAttentionProblem, OutputCrossAttentionProblem, RotaryProblem)
PROBLEMS = {cls.OP: cls for cls in _ALL}
for _problem in PROBLEMS.values():
    _problem.FIELDS = tuple(field.name for field in fields(_problem))

__all__ = [
    "AttentionProblem",
    "CHANNEL_MULTIPLE",
    "CrossAttentionProblem",
    "MAX_CHANNELS",
    "OutputCrossAttentionProblem",
    "PROBLEMS",
    "PackProblem",
    "Problem",
    "RotaryProblem",
    "SharedKVProblem",
    "check_device",
    "check_eps",
    "check_floating",
    "check_is_tensor",
    "check_key_visibility",
    "check_like",
    "check_probability",
    "check_query_mask",
    "check_rank",
    "check_scale",
    "check_shape",
    "check_vectors",
    "constant",
    "needs_gradient",
    "pad_channels",
    "shape_of",
]
