"""Small calls of every CUDA C++ kernel, for compute-sanitizer to watch: `make gpu-sanitize` runs this file.

Every width of Hopper's kernels, ragged ends of rows, tokens and channels, splits and one part, masks and none. The process
ends with an error where a result is not what the specification gives, so that it is not an empty run that is found clean.

What the copy engine writes is unknown to initcheck: parts of dq that are read again would be reported. So memory is filled with
NaN when it is allocated, which counts as written, and would show in a result that reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from perceiver_kernels import reference
from perceiver_kernels.backends.cuda import attention, attention_plans, pack, shared_kv
from perceiver_kernels.masks import NO_MASKS


def widths(kernels: Iterable[int], less: int) -> Iterator[tuple[torch.dtype, int]]:
    """Every kernel, in bfloat16 of as many channels as it has columns, in float16 of fewer."""
    for columns in kernels:
        yield torch.bfloat16, columns
        yield torch.float16, columns - less


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def packs() -> Iterator[tuple[str, Tensor, Tensor]]:
    for channels, positions in ((3, 0), (61, 0), (261, 0), (700, 0), (29, 35)):
        content = randn(2, 37, channels, dtype=torch.bfloat16)
        located = randn(37, positions, dtype=torch.bfloat16) if positions else None
        found, _ = pack.pack_inputs_forward(content, located, None, None, normalize=True, eps=1e-5, dtype=torch.bfloat16)
        expected, _ = reference.pack_inputs(content.double(), None if located is None else located.double())
        yield f"pack of {channels} + {positions}", found, expected


def pack_backwards() -> Iterator[tuple[str, Tensor, Tensor]]:
    for content_type, packed_type in itertools.product((torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)):
        for channels, positions in ((3, 0), (61, 0), (261, 0), (500, 0), (700, 0), (29, 35)):
            content = randn(2, 37, channels, dtype=content_type).double().requires_grad_()
            located = randn(37, positions, dtype=torch.bfloat16).double() if positions else None
            packed, rstd = reference.pack_inputs(content, located)
            dpacked = torch.randn_like(packed)
            (expected,) = torch.autograd.grad(packed, content, dpacked)
            given = (dpacked.to(packed_type), packed.detach().to(packed_type), rstd.detach().float())
            sizes = {"content_channels": channels, "channels": channels + positions}
            found = pack.pack_inputs_backward(*given, **sizes, normalize=True, dtype=content_type)
            yield f"backward of a pack of {channels} + {positions}, {packed_type}", found, expected


def shared_kv_attentions() -> Iterator[tuple[str, Tensor, Tensor]]:
    for dtype, channels in widths(shared_kv.BLOCK_KV, 8):
        for M, masked in ((70, False), (1300, True)):
            q, x = randn(2, 130, channels, dtype=dtype), randn(2, M, channels, dtype=dtype)
            mask = torch.rand(2, M, device="cuda") < 0.8 if masked else None
            lengths = None if masked else torch.tensor([M, 5], dtype=torch.int32, device="cuda")
            options = {"scale": channels**-0.5, "dropout_p": 0.0}
            found, *_ = shared_kv.shared_kv_attention_forward(
                q, x, mask, lengths, dropout_seed=None, key_offset=0, **options
            )
            expected, *_ = reference.shared_kv_attention(
                q.double(), x.double(), key_mask=mask, lengths=lengths, **options
            )
            yield f"shared-KV attention, {channels} channels, {M} tokens, {dtype}", found, expected


def shared_kv_backwards() -> Iterator[tuple[str, Tensor, Tensor]]:
    """One split and several, rows and tokens that end within a tile, an entry that sees nothing; dq alone, and added up."""
    for dtype, channels in widths(shared_kv.DQ_BLOCK_KV, 8):
        for B, R, M, kind in ((2, 130, 70, "lengths"), (1, 200, 1300, "mask"), (70, 130, 300, "all")):
            q, x, dz = (randn(B, rows, channels, dtype=dtype) for rows in (R, M, R))
            mask = torch.rand(B, M, device="cuda") < 0.8 if kind == "mask" else None
            lengths = torch.tensor([M - 7, 0], dtype=torch.int32, device="cuda") if kind == "lengths" else None
            visible = reference.visible_keys(M, mask, lengths)
            x = x if visible is None else x.masked_fill(~visible[..., None], 0)
            options = {"scale": channels**-0.5, "dropout_p": 0.0}
            leaves = q.double().requires_grad_(), x.double().requires_grad_()
            z, lse, rho = reference.shared_kv_attention(*leaves, key_mask=mask, lengths=lengths, **options)
            expected = torch.autograd.grad(z, leaves, dz.double())
            lse = lse.detach().float()
            delta = shared_kv.shared_kv_attention_delta(dz, z.detach().float(), None, None, rho)
            total = torch.ones(B, R, channels, device="cuda") if kind == "mask" else None
            options |= {"dropout_seed": None, "key_offset": 0, "needs_dq": True, "needs_dx": True, "dq_sum": total}
            found = shared_kv.shared_kv_attention_backward(dz, delta, None, q, x, lse, mask, lengths, **options)
            for name, ours, theirs in zip(("dq", "dx"), found, expected, strict=True):
                theirs = theirs + 1 if total is not None and name == "dq" else theirs
                yield f"{name} of shared-KV attention, {channels} channels, {B} x {R} x {M}, {dtype}", ours, theirs


def attentions() -> Iterator[tuple[str, Tensor, Tensor]]:
    for dtype, channels in widths(attention_plans.BLOCK_KV, 24):
        for Lq, Lk in ((200, 130), (20, 1500), (70, 8200)):
            query = randn(2, 4, Lq, channels, dtype=dtype)
            key, value = (randn(2, 2, Lk, channels, dtype=dtype) for _ in range(2))
            found, *_ = attention.attention_forward(
                query, (key,), (value,), NO_MASKS, scale=channels**-0.5, dropout_p=0.0, dropout_seed=None
            )
            keys, values = (t.double().repeat_interleave(2, 1) for t in (key, value))
            weights = (query.double() @ keys.mT * channels**-0.5).softmax(-1)
            yield f"attention, {channels} channels, {Lq} x {Lk}, {dtype}", found, weights @ values


def attention_backwards() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Splits, slices of the queries, balanced tiles, none; rows that end within a block, keys that several heads read."""
    for dtype, channels in widths(attention_plans.BACKWARD_BLOCK_Q, 24):
        for B, H_kv, Lq, Lk in ((40, 2, 200, 300), (1, 2, 130, 1500), (1, 4, 4500, 200), (4, 2, 130, 4200)):
            query, dout = (randn(B, 4, Lq, channels, dtype=dtype) for _ in range(2))
            key, value = (randn(B, H_kv, Lk, channels, dtype=dtype) for _ in range(2))
            leaves = [t.double().requires_grad_() for t in (query, key, value)]
            keys, values = (t.repeat_interleave(4 // H_kv, 1) for t in leaves[1:])
            scores = leaves[0] @ keys.mT * channels**-0.5
            expected = torch.autograd.grad(scores.softmax(-1) @ values, leaves, dout.double())
            out = (scores.softmax(-1) @ values).detach().to(dtype)
            lse = scores.logsumexp(-1).detach().float()
            options = {"scale": channels**-0.5, "dropout_p": 0.0, "dropout_seed": None}
            found = attention.attention_backward(
                dout, None, out, lse, lse.new_empty(0), query, (key,), (value,), NO_MASKS, **options
            )
            for name, ours, theirs in zip(("dq", "dk", "dv"), found, expected, strict=True):
                yield f"{name} of attention, {channels} channels, {B} x {Lq} x {Lk}, {dtype}", ours, theirs


def main() -> None:
    torch.manual_seed(0)
    # Fills what torch.empty gives; operations of the expected results may have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1, device="cuda").isnan().all(), "torch.empty was to be filled with NaN"
    count = 0
    every = (packs, pack_backwards, shared_kv_attentions, shared_kv_backwards, attentions, attention_backwards)
    for calls in (each() for each in every):
        for name, found, expected in calls:
            error = ((found.double() - expected).norm() / expected.norm()).item()
            assert error < 0.01, f"{name}: relative error {error:.2g}"
            count += 1
    torch.cuda.synchronize()
    print(f"{count} calls, all as specified")


if __name__ == "__main__":
    main()
