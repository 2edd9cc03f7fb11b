"""Cost formulas: those of the kernel files' headers, of FlopCounterMode and of the planner are the same."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import perceiver_kernels
from perceiver_kernels import reference
from perceiver_kernels.cost import (
    Cost,
    absorbed_cost,
    output_absorbed_cost,
    output_projected_cost,
    pack_cost,
    projected_cost,
    shared_kv_cost,
)
from perceiver_kernels.device import H200
from perceiver_kernels.nn import CrossAttention, OutputCrossAttention
from perceiver_kernels.ops import shared_kv as op
from perceiver_kernels.problem import CrossAttentionProblem, OutputCrossAttentionProblem

B, R, M, C = 2, 6, 10, 32
KERNELS = Path(perceiver_kernels.__file__).parent / "backends" / "triton"


def header(name: str) -> str:
    return " ".join((KERNELS / name).read_text().split('"""')[1].split())


def counted_flops(needs_dq: bool, needs_dx: bool) -> tuple[int, int]:
    """FLOPs that FlopCounterMode counts of the op, forward and backward."""
    q, x = torch.randn(B, R, C, requires_grad=needs_dq), torch.randn(B, M, C, requires_grad=needs_dx)
    with FlopCounterMode(display=False) as forward:
        z, _, _ = op.shared_kv_attention(q, x, None, None, None, 1.0, 0.0, ("reference", "reference"))
    with FlopCounterMode(display=False) as backward:
        z.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_header_of_shared_kv_kernels_states_the_counted_flops() -> None:
    stated = {name: int(factor) for name, factor in re.findall(r"(forward|dq|dx) (\d+)BRMC", header("shared_kv_kernels.py"))}
    assert stated.keys() == {"forward", "dq", "dx"}
    products = {"forward": 2, "dq": 3, "dx": 4}
    for name, factor in stated.items():
        assert shared_kv_cost(B, R, M, C, 2, products=products[name]).flops == factor * B * R * M * C
    forward, dq = counted_flops(True, False)
    assert (forward, dq) == (stated["forward"] * B * R * M * C, stated["dq"] * B * R * M * C)
    assert counted_flops(False, True)[1] == stated["dx"] * B * R * M * C
    assert counted_flops(True, True)[1] == (stated["dq"] + stated["dx"]) * B * R * M * C


def test_forward_flops_are_those_of_the_specification() -> None:
    q, x = torch.randn(B, R, C), torch.randn(B, M, C)
    with FlopCounterMode(display=False) as counter:
        reference.shared_kv_attention(q, x)
    assert counter.get_total_flops() == shared_kv_cost(B, R, M, C, 4).flops


@pytest.mark.parametrize("reads", [1, 3])
def test_shared_kv_reads_the_inputs_so_many_times(reads: int) -> None:
    """Header: forward and dq read x once, B M C e bytes."""
    assert "read x once (B M C e)" in header("shared_kv_kernels.py")
    longer, shorter = (shared_kv_cost(B, R, m, C, 2, reads=reads).bytes for m in (M + 1, M))
    assert longer - shorter == reads * B * C * 2


def test_header_of_pack_kernels_states_the_bytes() -> None:
    assert "Reads B M C_content e_in (+ positions), writes B M C_padded e_out + 4 B M (rstd)" in header("pack_kernels.py")
    assert pack_cost(B, M, 261, 3, 4, 2).bytes == B * M * 3 * 4 + B * M * 272 * 2 + 4 * B * M


PROBLEM = CrossAttentionProblem(
    B=2, H=4, N=3, M=11, C=20, d_qk=3, d_v=7, dtype=torch.bfloat16, device_type="cuda", packed=True, needs_grad=False,
    inputs_need_grad=False,
)  # fmt: skip


def test_layer_counts_the_same_products() -> None:
    """The planner's FLOPs of one forward are the layer's, less the query and output projections it shares with both."""
    p = PROBLEM
    layer = CrossAttention(9, p.C, num_heads=p.H, qk_channels=p.H * p.d_qk, v_channels=p.H * p.d_v)
    outside = 2 * p.B * p.N * (9 * p.H * p.d_qk + p.H * p.d_v * 9)
    assert absorbed_cost(p).flops == layer.flops(p.B, p.N, p.M, method="absorbed") - outside
    assert projected_cost(p).flops == layer.flops(p.B, p.N, p.M, method="projected") - outside


@pytest.mark.parametrize("cost", [absorbed_cost, projected_cost])
def test_gradients_cost_more(cost) -> None:
    plain, train, inputs = (
        cost(dataclasses.replace(PROBLEM, needs_grad=grad, inputs_need_grad=dx))
        for grad, dx in ((False, False), (True, False), (True, True))
    )
    assert plain.flops < train.flops < inputs.flops and plain.bytes < train.bytes <= inputs.bytes


DECODE = OutputCrossAttentionProblem(
    B=2, query_batch=1, H=1, O=11, N=3, C=32, C_out=7, d_qk=5, d_v=9, dtype=torch.bfloat16, device_type="cuda", packed=True,
    constants=0, bias_channels=0, needs_grad=False, queries_need_grad=False,
)  # fmt: skip


def test_decoder_counts_the_same_products() -> None:
    """The planner's FLOPs of one forward are the layer's, less the key and value projections that both methods share."""
    p = DECODE
    layer = OutputCrossAttention(p.C, 6, qk_channels=p.d_qk, v_channels=p.d_v, out_channels=p.C_out)
    for cost, method in ((output_absorbed_cost, "absorbed"), (output_projected_cost, "projected")):
        outside = 2 * p.B * p.N * 6 * (p.d_qk + p.d_v)
        assert cost(p).flops == layer.flops(p.B, p.O, p.N, query_batch=1, method=method) - outside


@pytest.mark.parametrize("cost", [output_absorbed_cost, output_projected_cost])
def test_gradients_of_a_decoder_cost_more(cost) -> None:
    plain, train, queries = (
        cost(dataclasses.replace(DECODE, needs_grad=grad, queries_need_grad=dq))
        for grad, dq in ((False, False), (True, False), (True, True))
    )
    assert plain.flops < train.flops < queries.flops and plain.bytes < train.bytes <= queries.bytes
    assert cost(dataclasses.replace(DECODE, packed=False)).bytes > plain.bytes


def test_packing_costs_once() -> None:
    unpacked = dataclasses.replace(PROBLEM, packed=False)
    assert absorbed_cost(unpacked).bytes - absorbed_cost(PROBLEM).bytes == pack_cost(2, 11, 20, 20, 2, 2).bytes


def test_time_is_the_larger_of_arithmetic_and_memory() -> None:
    assert Cost(788e12, 0).seconds(H200, torch.bfloat16) == 1.0
    assert Cost(788e12, 0).seconds(H200, torch.float32) == 2.0
    assert Cost(1.0, 8.6e12).seconds(H200, torch.bfloat16) == 2.0
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6) and Cost(1, 2) * 3 == Cost(3, 6)
