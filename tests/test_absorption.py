"""The products that move projections to the latent side: as exact under autocast as without."""

from __future__ import annotations

import torch

from perceiver_kernels.absorption import absorb_queries, fold_norm
from perceiver_kernels.testing import same_bits

H, N, D_QK, C = 2, 6, 16, 64


def test_autocast_does_not_round_what_is_folded() -> None:
    """q' and the shift of a projection are sums in fp32, rounded once; autocast would round their terms first."""
    q, w_k = torch.randn(1, H, N, D_QK), torch.randn(H * D_QK, C) / 8
    weight, bias = torch.rand(C) + 0.5, torch.randn(C)
    plain = absorb_queries(q, w_k, weight, C, torch.bfloat16), *fold_norm(w_k, None, weight, bias, C, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = absorb_queries(q, w_k, weight, C, torch.bfloat16), *fold_norm(w_k, None, weight, bias, C, torch.float32)
    assert all(map(same_bits, cast, plain))
    exact = absorb_queries(q.double(), w_k.double(), weight.double(), C, torch.float64)
    assert (cast[0].double() - exact).norm() <= 2 * (exact.bfloat16().double() - exact).norm()
