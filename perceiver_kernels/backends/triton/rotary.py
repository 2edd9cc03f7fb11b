"""rotary_embedding on Triton: allocate, launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perceiver_kernels.backends.triton import reasons_against_device_and_dtype
from perceiver_kernels.backends.triton.attention_call import strides_of
from perceiver_kernels.backends.triton.describe import ceil_div
from perceiver_kernels.backends.triton.launch import launch
from perceiver_kernels.backends.triton.rotary_kernels import _rotary_fwd_kernel
from perceiver_kernels.device import device_facts
from perceiver_kernels.layouts import empty_heads, unit_stride, used_strides
from perceiver_kernels.plan import plan_rotary
from perceiver_kernels.problem import RotaryProblem

COMPOSITE = False


def reasons_against(problem: RotaryProblem) -> list[str]:
    """Sentences that say why this kernel cannot serve ``problem``."""
    reasons = reasons_against_device_and_dtype(problem.device_type, problem.dtype, problem.table_dtype)
    if problem.learned:
        reasons.append("triton gives no gradient to the tables cos and sin")
    return reasons


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, inverse: bool) -> Tensor:
    """x [B, H, L, d] turned, in memory as layouts.empty_heads has it."""
    B, H, L, d = x.shape
    out = empty_heads(x, B, H, L, d)
    if out.numel() == 0:
        return out
    x, cos, sin = unit_stride(x), unit_stride(cos), unit_stride(sin)
    strides = *strides_of(x, out), *((t.stride(0) if t.ndim == 3 else 0, t.stride(-2)) for t in (cos, sin))
    width = 2 * cos.shape[-1]
    plan = plan_rotary(
        B, H, L, d, width, interleaved=interleaved, itemsize=x.element_size(), strides=used_strides(x),
        device=device_facts(x.device),
    )  # fmt: skip
    with torch.cuda.device_of(x):
        launch(
            _rotary_fwd_kernel, ceil_div(L, plan.block_l) * ceil_div(H, plan.heads) * B, x, cos, sin, out, H, L, *strides,
            D=d, WIDTH=width, PAIRS=plan.pairs, COLUMNS=plan.columns, ITEMS=plan.items, BLOCK_L=plan.block_l,
            HEADS=plan.heads, ALIGN=plan.align, TABLE_ALIGN=math.gcd(plan.pairs, *used_strides(cos), *used_strides(sin)),
            INTERLEAVED=interleaved, INVERSE=inverse, num_warps=plan.num_warps,
        )  # fmt: skip
    return out
