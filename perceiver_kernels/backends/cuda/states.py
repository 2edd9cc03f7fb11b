"""What follows and precedes attention on CUDA C++, on any GPU: merged softmax states, sums of parts, products of rows."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends.cuda import ELEMENT_TYPES, address, binding, filled


@functools.lru_cache(maxsize=1024)
def _params(B: int, H: int, S: int, R: int, C: int, strides: tuple[int, ...], dtype: torch.dtype, device: int) -> Any:
    """What calls alike have in common; strides are z's of batch entry, head and row. Copied, not changed."""
    fields = {
        "batch": B * H, "heads": H, "splits": S, "rows": R, "channels": C, "stride_z_batch": strides[0],
        "stride_z_head": strides[1], "stride_z_row": strides[2], "z_type": ELEMENT_TYPES[dtype], "device": device,
    }  # fmt: skip
    return filled(binding().MergeStatesParams(), fields)


def merge_states(
    z_part: Tensor, lse_part: Tensor, state: tuple[Tensor, Tensor] | None, z: Tensor, lse: Tensor, rho: Tensor | None,
    stream: int,
) -> None:  # fmt: skip
    """Write (z, lse, rho) of the states of all splits, and of an earlier one where there is one.

    Args:
        z_part, lse_part: fp32 ``[B * H, S, R, C]`` and ``[B * H, S, R]``, contiguous; C a multiple of 4.
        state: fp32 ``(z, lse)`` of the earlier tokens, ``[B * H, R, C]`` and ``[B * H, R]``.
        z: ``[B, H, R, C]`` of any strides but the last, rows on 16 bytes.
        lse, rho: fp32 ``[B, H, R]``, contiguous; rho may be None.
        stream: the CUDA stream's handle.
    """
    B, H, R, C = z.shape
    z_state, lse_state = (None, None) if state is None else (t.float().contiguous() for t in state)
    addresses = {
        "z_part": address(z_part), "lse_part": address(lse_part), "z_state": address(z_state),
        "lse_state": address(lse_state), "z": z.data_ptr(), "lse": lse.data_ptr(), "rho": address(rho), "stream": stream,
    }  # fmt: skip
    params = _params(B, H, z_part.shape[1], R, C, z.stride()[:3], z.dtype, z.get_device())
    binding().merge_states(filled(binding().MergeStatesParams(params), addresses))


def sum_parts(part: Tensor, earlier: Tensor | None, out: Tensor, stream: int) -> None:
    """Write the sum of ``earlier`` and of the splits of ``part`` to ``out`` ``[B, R, C]``, rows on 16 bytes.

    ``part`` ``[B, S, R, C]`` and ``earlier`` are fp32, contiguous; ``earlier`` may be ``out``.
    """
    B, S, R, C = part.shape
    addresses = {"z_part": part.data_ptr(), "z_state": address(earlier), "z": out.data_ptr(), "stream": stream}
    params = _params(B, 1, S, R, C, (out.stride(0), 0, out.stride(1)), out.dtype, out.get_device())
    binding().merge_states(filled(binding().MergeStatesParams(params), addresses))


def row_products(dz: Tensor, z: Tensor, dlse: Tensor | None, stream: int) -> Tensor:
    """dz . z - dlse, fp32 ``[B, R]``: dz is bf16 or fp16 ``[B, R, C]``, rows on 16 bytes; z and dlse are fp32, contiguous."""
    B, R, C = z.shape
    delta = torch.empty(B, R, dtype=torch.float32, device=z.device)
    fields = {
        "dz": dz.data_ptr(), "stride_dz_batch": dz.stride(0), "stride_dz_row": dz.stride(1), "z": z.data_ptr(),
        "dlse": address(dlse), "delta": delta.data_ptr(), "batch": B, "rows": R, "channels": C,
        "type": ELEMENT_TYPES[dz.dtype], "device": dz.get_device(), "stream": stream,
    }  # fmt: skip
    binding().row_products(filled(binding().RowProductsParams(), fields))
    return delta
