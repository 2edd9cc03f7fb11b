"""attention on Triton: allocate, describe, launch, reduce."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.backends.triton import reasons_against_device_and_dtype, wide_attention
from perceiver_kernels.backends.triton.attention_call import Call, Saved, Tensors, partials, strides_of, with_parts
from perceiver_kernels.backends.triton.attention_kernels import (
    _attention_bwd_dkv_kernel,
    _attention_bwd_dq_kernel,
    _attention_fwd_kernel,
)
from perceiver_kernels.backends.triton.attention_resident_kernels import (
    _attention_decode_bwd_dq_kernel,
    _attention_decode_fwd_kernel,
    _attention_encode_bwd_kernel,
)
from perceiver_kernels.backends.triton.attention_small_kernels import _attention_small_bwd_kernel, _attention_small_fwd_kernel
from perceiver_kernels.backends.triton.attention_steps import Hides
from perceiver_kernels.backends.triton.combine import head_products, merge_splits, sum_splits
from perceiver_kernels.backends.triton.describe import ceil_div, contiguous, row_arguments, tile_argument
from perceiver_kernels.backends.triton.launch import launch
from perceiver_kernels.backends.triton.repetition import repeated
from perceiver_kernels.backends.triton.wide import Span
from perceiver_kernels.backends.triton.wide_attention import ProductSums
from perceiver_kernels.layouts import empty_heads, result_dtype, unit_stride
from perceiver_kernels.masks import Masks
from perceiver_kernels.plan import AttentionPlan, Resident, StoredScores
from perceiver_kernels.problem import AttentionProblem
from perceiver_kernels.tiles import AttentionTile, SmallTile

COMPOSITE = False


def reasons_against(problem: AttentionProblem) -> list[str]:
    """Sentences that say why these kernels cannot serve ``problem``."""
    reasons = reasons_against_device_and_dtype(problem.device_type, problem.dtype)
    if problem.attn_mask == "learned":
        reasons.append("triton has no gradient of attn_mask")
    return reasons


def attention_forward(
    query: Tensor, keys: Tensors, values: Tensors, masks: Masks, *, scale: float, dropout_p: float,
    dropout_seed: Tensor | None, plan: AttentionPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, lse, statistics): statistics [2, B, H, Lq] are the row maximum and log l under an additive mask, else empty."""
    tensors = (query, *keys, *values, *masks.tensors, dropout_seed)
    return repeated(
        "attention_forward", (len(keys), masks.causal, scale, dropout_p, plan), tensors,
        lambda: _forward(query, keys, values, masks, scale, dropout_p, dropout_seed, plan),
    )  # fmt: skip


def _forward(
    query: Tensor, keys: Tensors, values: Tensors, masks: Masks, scale: float, dropout_p: float, dropout_seed: Tensor | None,
    plan: AttentionPlan | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, Lq, _ = query.shape
    d_v, additive = values[0].shape[3], masks.attn_mask is not None and masks.attn_mask.dtype != torch.bool
    out = empty_heads(query, B, H, Lq, d_v, result_dtype(query.dtype, dropout_p))
    lse = torch.empty(B, H, Lq, dtype=torch.float32, device=query.device)
    statistics = torch.empty((2, B, H, Lq) if additive else (0,), dtype=torch.float32, device=query.device)
    if out.numel() == 0 or sum(key.shape[2] for key in keys) == 0:
        return out.zero_(), lse.fill_(-torch.inf), statistics.zero_()
    call = Call(query, keys, values, masks, scale, dropout_p, dropout_seed, plan)
    with torch.cuda.device_of(query):
        if call.plan.small is not None:
            _launch_small_forward(call, call.plan.small, out, lse, statistics)
        elif call.plan.decode_forward is not None:
            _launch_decode_forward(call, call.plan.decode_forward, out, lse, statistics)
        elif (tile := call.forward_tile) is not None:
            _launch_forward(call, tile, out, lse, statistics)
        else:
            wide_attention.forward(call, out, lse, statistics)
    return out, lse, statistics


def _launch_forward(call: Call, tile: AttentionTile, out: Tensor, lse: Tensor, statistics: Tensor) -> None:
    B, H, _, Lq, _, _, d_v = call.sizes
    splits, tma = call.plan.forward_splits, call.streams_keys_by_tma
    S = splits.total
    part, lse_part, strides = out, lse, with_parts(out)
    if S > 1:
        part, strides = partials(B * H, S, Lq, d_v, H, out.device)
        lse_part = torch.empty(B * H, S, Lq, dtype=torch.float32, device=out.device)
    launch(
        _attention_fwd_kernel, ceil_div(Lq, tile.block_q) * S * H * B, call.query,
        *row_arguments(call.keys[0], tile.block_kv, tile.pieces_qk, tma),
        *row_arguments(call.values[0], tile.block_kv, tile.pieces_v, tma), call.keys[-1], call.values[-1], part, lse_part,
        statistics, *call.common, (S, splits.first, splits.length, call.Lk_first),
        *strides_of(call.query, call.keys[0], call.values[0], call.keys[-1], call.values[-1]), strides, call.stride_mask,
        SEGMENTS=len(call.keys), **call.options(tile, tma),
    )  # fmt: skip
    if S > 1:
        merge_splits(part, lse_part, out, lse)


def _launch_decode_forward(call: Call, resident: Resident, out: Tensor, lse: Tensor, statistics: Tensor) -> None:
    B, H = call.sizes[:2]
    tile, parts, tma = resident.tile, resident.parts, call.streams_queries_by_tma()
    launch(
        _attention_decode_fwd_kernel, parts.total * H * B, *row_arguments(call.query, tile.block_q, tile.pieces_qk, tma),
        call.keys[0], call.values[0], out, lse, statistics, *call.common, (parts.total, parts.length),
        *strides_of(call.query, call.keys[0], call.values[0], out), call.stride_mask,
        BLOCKS=ceil_div(call.Lk, tile.block_kv), **call.options(tile, tma),
    )  # fmt: skip


def _launch_small_forward(call: Call, tile: SmallTile, out: Tensor, lse: Tensor, statistics: Tensor) -> None:
    B, H = call.sizes[:2]
    key, value = call.keys[0], call.values[0]
    launch(
        _attention_small_fwd_kernel, ceil_div(B * H, tile.problems), call.query, key, value, out, lse, statistics, *call.common,
        *strides_of(call.query, key, value, out), call.stride_mask, **call.small_options(tile),
    )  # fmt: skip


def attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, statistics: Tensor, query: Tensor, keys: Tensors,
    values: Tensors, masks: Masks, *, scale: float, dropout_p: float, dropout_seed: Tensor | None, needs_dq: bool = True,
    needs_dkv: bool = True, into: tuple[Tensor, Tensor, Tensor] | None = None, plan: AttentionPlan | None = None,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv], dk and dv over the keys of all segments; what is not needed may be empty.

    ``into`` is where all of them go; fresh memory when None.
    """
    tensors = (dout, dlse, out, lse, statistics, query, *keys, *values, *masks.tensors, dropout_seed, *(into or (None,) * 3))
    return repeated(
        "attention_backward", (len(keys), masks.causal, scale, dropout_p, needs_dq, needs_dkv, plan), tensors,
        lambda: _backward(
            dout, dlse, out, lse, statistics, query, keys, values, masks, scale, dropout_p, dropout_seed, needs_dq, needs_dkv,
            into, plan,
        ),
    )  # fmt: skip


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, statistics: Tensor, query: Tensor, keys: Tensors,
    values: Tensors, masks: Masks, scale: float, dropout_p: float, dropout_seed: Tensor | None, needs_dq: bool,
    needs_dkv: bool, into: tuple[Tensor, Tensor, Tensor] | None, plan: AttentionPlan | None,
) -> list[Tensor]:  # fmt: skip
    Lk = sum(key.shape[2] for key in keys)
    dq, dk, dv = into or (
        empty_heads(query, *query.shape),
        *(
            empty_heads(parts[0], *parts[0].shape[:2], Lk, parts[0].shape[3]) if needs_dkv else query.new_empty(0)
            for parts in (keys, values)
        ),
    )
    if out.numel() == 0 or Lk == 0:
        return [dq.zero_(), dk.zero_(), dv.zero_()]
    call = Call(query, keys, values, masks, scale, dropout_p, dropout_seed, plan)
    dout, out = unit_stride(dout), unit_stride(out)
    (dlse,) = contiguous(dlse)
    saved = Saved(dout, dlse, out, lse, statistics, torch.empty_like(lse))
    with torch.cuda.device_of(query):
        if call.plan.small is not None:
            _launch_small_backward(call, call.plan.small, saved, dq, (dk, dv) if needs_dkv else None)
        elif call.plan.encode_backward is not None and needs_dkv:
            _launch_encode_backward(call, call.plan.encode_backward, saved, dq, dk, dv)
        elif call.plan.stored is not None and needs_dq and needs_dkv:
            _stored_backward(call, call.plan.stored, saved, dq, dk, dv)
        elif call.plan.dq is not None and call.plan.dkv is not None:
            # The kernel of dq leaves delta for the one of dk and dv.
            if call.plan.decode_dq is not None:
                _launch_decode_dq(call, call.plan.decode_dq, saved, dq)
            else:
                _launch_dq(call, call.plan.dq, saved, dq)
            if needs_dkv:
                _launch_dkv(call, call.plan.dkv, saved, dk, dv)
        else:
            wide_attention.backward(call, saved, dq if needs_dq else None, (dk, dv) if needs_dkv else None)
        if scale <= 0.0:
            # positive_scale moved the sign, or the zero, into the queries.
            dq.neg_() if scale < 0.0 else dq.zero_()
    return [dq if needs_dq else query.new_empty(0), dk, dv]


def _launch_dq(call: Call, tile: AttentionTile, saved: Saved, dq: Tensor) -> None:
    B, H, _, Lq, _, d_qk, _ = call.sizes
    splits, tma = call.plan.dq_splits, call.streams_keys_by_tma
    S = splits.total
    part, strides = (dq, with_parts(dq)) if S == 1 else partials(B * H, S, Lq, d_qk, H, dq.device)
    launch(
        _attention_bwd_dq_kernel, ceil_div(Lq, tile.block_q) * S * H * B, call.query,
        *row_arguments(call.keys[0], tile.block_kv, tile.pieces_qk, tma),
        *row_arguments(call.values[0], tile.block_kv, tile.pieces_v, tma), call.keys[-1], call.values[-1], saved.out,
        saved.dout, saved.dlse, saved.lse, saved.statistics, saved.delta, part, *call.common,
        (S, splits.first, splits.length, call.Lk_first),
        *strides_of(call.query, call.keys[0], call.values[0], call.keys[-1], call.values[-1], saved.out, saved.dout), strides,
        call.stride_mask, SEGMENTS=len(call.keys), HAS_DLSE=saved.dlse is not None,
        FEW_KEYS=any(call.hides[:5]) or call.hides.attn_mask != "none" or call.Lk <= tile.block_kv, **call.options(tile, tma),
    )  # fmt: skip
    if S > 1:
        sum_splits(part, dq)


def _launch_decode_dq(call: Call, resident: Resident, saved: Saved, dq: Tensor) -> None:
    B, H = call.sizes[:2]
    tile, parts = resident.tile, resident.parts
    tma = call.streams_queries_by_tma(saved.out, saved.dout)
    q, out, dout = (
        row_arguments(tensor, tile.block_q, pieces, tma)
        for tensor, pieces in ((call.query, tile.pieces_qk), (saved.out, tile.pieces_v), (saved.dout, tile.pieces_v))
    )
    launch(
        _attention_decode_bwd_dq_kernel, parts.total * H * B, *q, call.keys[0], call.values[0], *out, *dout, saved.dlse,
        saved.lse, saved.statistics, saved.delta, dq, *call.common, (parts.total, parts.length),
        *strides_of(call.query, call.keys[0], call.values[0], saved.out, saved.dout, dq), call.stride_mask,
        BLOCKS=ceil_div(call.Lk, tile.block_kv), HAS_DLSE=saved.dlse is not None, **call.options(tile, tma),
    )  # fmt: skip


def _stored_backward(call: Call, stored: StoredScores, saved: Saved, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """dk and dv of some of the batch's entries at a time, which leave ds, and dq, its product with the keys."""
    B, H, _, Lq, Lk, d_qk, _ = call.sizes
    tile, product = call.plan.dkv, stored.product
    saved = saved._replace(delta=head_products(saved.dout, saved.out, saved.dlse))
    rows, columns = (ceil_div(length, size) * size for length, size in ((Lk, tile.block_kv), (Lq, product.rows)))
    ds = torch.empty(min(B, stored.entries), H, rows, columns, dtype=dq.dtype, device=dq.device)
    for first in range(0, B, stored.entries):
        part = slice(first, min(first + stored.entries, B))
        entries = call.entries(part)
        of_part = Saved(*(None if t is None else t[part] for t in saved[:4]), saved.statistics, saved.delta[part])
        _launch_dkv(entries, tile, of_part, dk[part], dv[part], ds)
        key, hidden = entries.keys[0], entries.masks[0]
        # dq = (ds^T)^T k is what dk = ds^T q is, with queries for keys and a key mask for a query mask.
        sums = ProductSums(
            key, dq[part], (key.shape[0], H, 1, Lk, Lq, d_qk, d_qk), (None, None, hidden, None, None, None),
            Hides(query_mask=hidden is not None), product, lambda rows, keys: stored.slices, call.plan.tma,
        )  # fmt: skip
        sums.add(ds, 0, Span(0, Lk, 0, Lq))


def _launch_dkv(call: Call, tile: AttentionTile, saved: Saved, dk: Tensor, dv: Tensor, ds: Tensor | None = None) -> None:
    """dk and dv, and scale ds [B, H, keys in whole blocks, queries] where one is given."""
    B, H, G, _, Lk, d_qk, d_v = call.sizes
    H_kv, slices = H // G, call.plan.dkv_slices
    tma = call.streams_queries_by_tma(saved.dout)
    parts, strides = (dk, dv), [with_parts(dk), with_parts(dv)]
    if slices.total > 1:
        made = [partials(B * H_kv, slices.total, Lk, width, H_kv, dk.device) for width in (d_qk, d_v)]
        parts, strides = tuple(part for part, _ in made), [stride for _, stride in made]
    first_blocks = ceil_div(call.Lk_first, tile.block_kv)
    blocks = first_blocks + ceil_div(Lk - call.Lk_first, tile.block_kv)
    launch(
        _attention_bwd_dkv_kernel, blocks * slices.total * H_kv * B,
        *row_arguments(call.query, tile.block_q, tile.pieces_qk, tma),
        *row_arguments(saved.dout, tile.block_q, tile.pieces_v, tma), call.keys[0], call.values[0], call.keys[-1],
        call.values[-1], saved.lse, saved.statistics, saved.delta, *parts,
        None if ds is None else tile_argument(ds, tile.block_kv, tile.block_q, tma),
        call.masks, call.key_windows, *call.common[1:], (blocks, first_blocks, tile.block_kv, call.Lk_first),
        (slices.total, slices.length),
        *strides_of(call.query, saved.dout, call.keys[0], call.values[0], call.keys[-1], call.values[-1]), *strides,
        (0, 0, 0) if ds is None else tuple(ds.stride()[:3]), call.stride_mask, SEGMENTS=len(call.keys), KEEP_DS=ds is not None,
        **call.options(tile, tma),
    )  # fmt: skip
    if slices.total > 1:
        for part, gradient in zip(parts, (dk, dv), strict=True):
            sum_splits(part, gradient)


def _launch_encode_backward(call: Call, resident: Resident, saved: Saved, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    B, H, _, Lq, _, d_qk, _ = call.sizes
    tile, parts, tma = resident.tile, resident.parts, call.streams_keys_by_tma
    delta = head_products(saved.dout, saved.out, saved.dlse)
    part, strides = (dq, with_parts(dq)) if parts.total == 1 else partials(B * H, parts.total, Lq, d_qk, H, dq.device)
    launch(
        _attention_encode_bwd_kernel, parts.total * H * B, call.query,
        *row_arguments(call.keys[0], tile.block_kv, tile.pieces_qk, tma),
        *row_arguments(call.values[0], tile.block_kv, tile.pieces_v, tma), saved.dout, saved.lse, saved.statistics, delta, part,
        dk, dv, *call.common, (parts.total, parts.length), *strides_of(call.query, call.keys[0], call.values[0], saved.dout),
        strides, *strides_of(dk, dv), call.stride_mask, **call.options(tile, tma),
    )  # fmt: skip
    if parts.total > 1:
        sum_splits(part, dq)


def _launch_small_backward(
    call: Call, tile: SmallTile, saved: Saved, dq: Tensor, dkv: tuple[Tensor, Tensor] | None
) -> None:
    B, H = call.sizes[:2]
    key, value = call.keys[0], call.values[0]
    dk, dv = dkv or (dq, dq)
    launch(
        _attention_small_bwd_kernel, ceil_div(B * H, tile.problems), call.query, key, value, saved.dout, saved.dlse,
        dq, dk, dv, *call.common,
        *strides_of(call.query, key, value, saved.dout, dq, dk, dv), call.stride_mask,
        HAS_DLSE=saved.dlse is not None, NEEDS_DKV=dkv is not None, **call.small_options(tile),
    )  # fmt: skip
