"""Run in a process of its own by test_offsets.py: kernels on tensors whose neighbourhood is a trap.

``far``: row and batch strides of 2^30 elements and more, in memory that is reserved but hardly touched, so that an offset
computed in 32 bits points elsewhere. ``guarded``: every tensor ends (or begins) at a page that may not be read, and so does all
memory the launchers allocate: one element too far ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import reference
from perceiver_kernels.backends.triton import pack, rotary, shared_kv
from perceiver_kernels.device import CPU, H200, device_facts
from perceiver_kernels.positions import FourierPositions, rotary_tables

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
KEPT: list[Any] = []
real_empty = torch.empty


def reserve(size: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, size, flags=flags)
    KEPT.append(memory)
    return memory


def far(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The values of ``tensor`` at ``strides`` (elements) in reserved memory."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    memory = torch.frombuffer(reserve(count * tensor.element_size()), dtype=torch.uint8)
    return memory.view(tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def guarded(tensor: Tensor, before: bool = False) -> Tensor:
    """The values of ``tensor``, contiguous, right before a page that may not be touched (or right after one)."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-max(size, 1) // PAGE)
    memory = reserve((pages + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start, forbidden = (PAGE, address) if before else (pages * PAGE - size, address + pages * PAGE)
    if LIBC.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(PAGE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    if size == 0:
        return tensor
    view = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start).view(tensor.dtype).view(tensor.shape)
    return view.copy_(tensor)


def guarded_empty(*shape: Any, **options: Any) -> Tensor:
    plain = real_empty(*shape, **options)
    return guarded(plain) if plain.is_contiguous() else plain


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def attend(place: Callable[[Tensor], Tensor], C: int, dtype: torch.dtype, kind: str = "all", M: int = 4, R: int = 4) -> None:
    """Forward and backward of shared-KV attention with every input placed, against the specification."""
    q, x, dz = (randn(2, rows, C, dtype=dtype) for rows in (R, M, R))
    mask = torch.arange(M).expand(2, M) % 3 != 1 if kind == "key_mask" else None
    lengths = torch.tensor([M // 2, M], dtype=torch.int32) if kind == "lengths" else None
    seed, p = (torch.tensor([3]), 0.25) if kind == "dropout" else (None, 0.0)
    visible = reference.visible_keys(M, mask, lengths)
    x = x if visible is None else x.masked_fill(~visible[..., None], 0)
    placed = {name: None if t is None else place(t) for name, t in (("mask", mask), ("lengths", lengths), ("seed", seed))}
    options = {"scale": C**-0.5, "dropout_p": p, "dropout_seed": placed["seed"], "key_offset": 0}
    masks = placed["mask"], placed["lengths"]
    tensors = place(q), place(x)
    state = shared_kv.shared_kv_attention_forward(*tensors, *masks, **options)
    continued = shared_kv.shared_kv_attention_forward(
        *tensors, *masks, **options, state=tuple(place(s.float()) for s in state), out_dtype=torch.float32
    )
    assert all(part.isfinite().all() for part in continued)
    saved = [guarded(s) for s in state]
    drho = guarded(torch.ones(2, R)) if p else None
    delta = shared_kv.shared_kv_attention_delta(place(dz), saved[0], guarded(torch.zeros(2, R)), drho, saved[2])
    dq, dx = shared_kv.shared_kv_attention_backward(
        place(dz), delta, drho, *tensors, saved[1], *masks, **options, needs_dq=True, needs_dx=True
    )
    leaves = q.double().requires_grad_(), x.double().requires_grad_()
    z, lse, rho = reference.shared_kv_attention(
        *leaves, key_mask=mask, lengths=lengths, scale=C**-0.5, dropout_p=p, dropout_seed=seed
    )
    gradients = torch.autograd.grad(
        (z, rho) if p else z, leaves, (dz.double(), torch.ones(2, R).double()) if p else dz.double()
    )
    # Accuracy is judged elsewhere: a wrong address shows as a wrong number.
    for actual, expected in zip((*state, dq, dx), (z, lse, rho, *gradients), strict=True):
        finite = expected.isfinite()
        assert torch.equal(actual.isfinite(), finite)
        error = (actual.double() - expected)[finite].abs().max()
        assert error <= 0.03 * expected[finite].abs().max(), (kind, actual.shape, error)


def pack_tokens(place: Callable[[Tensor], Tensor], kind: str, C_content: int = 5, M: int = 5) -> None:
    content = randn(2, M, C_content, dtype=torch.float32)
    positions = {"none": None, "shared": randn(M, 3, dtype=torch.float32)}.get(kind, randn(2, M, 2, dtype=torch.float32).tanh())
    table = FourierPositions(3, (5.0, 5.0)).table() if kind == "fourier" else None
    mask = torch.arange(M).expand(2, M) % 3 != 1
    placed = [None if t is None else place(t) for t in (content, positions, table, mask)]
    packed, rstd = pack.pack_inputs_forward(*placed, normalize=True, eps=1e-5, dtype=torch.float32)
    expected, expected_rstd = reference.pack_inputs(content, positions, table, key_mask=mask)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rstd, expected_rstd, rtol=1e-4, atol=1e-5)
    channels = C_content + (0 if positions is None else positions.shape[-1] if table is None else table.shape[-1])
    dcontent = pack.pack_inputs_backward(
        place(torch.ones_like(packed)), guarded(packed), guarded(rstd), content_channels=C_content, channels=channels,
        normalize=True, dtype=torch.float32,
    )  # fmt: skip
    assert dcontent.isfinite().all() and not dcontent[~mask].any()


def turn(place: Callable[[Tensor], Tensor], H: int, d: int, width: int, interleaved: bool, L: int = 5) -> None:
    x, tables = randn(3, H, L, d, dtype=torch.float32), rotary_tables(torch.rand(3, L), width)
    out = rotary.rotary_embedding(place(x), *map(place, tables), interleaved=interleaved, inverse=False)
    expected = reference.rotary_embedding(x, *(table[:, None] for table in tables), interleaved=interleaved)
    torch.testing.assert_close(out, expected)


def far_rows(tensor: Tensor) -> Tensor:
    """Rows 2^30 elements apart: the third is past 2^31, though the stride fits in 32 bits. Vectors stay as they are."""
    if tensor.ndim == 4:
        return far(tensor, (tensor.shape[2] * 2**30, tensor.shape[3], 2**30, 1))
    return far(tensor, (4 * 2**30, 2**30, 1)) if tensor.ndim == 3 and tensor.shape[1] == 4 else tensor


def far_heads(tensor: Tensor) -> Tensor:
    """Heads 2^30 elements apart."""
    return far(tensor, (tensor.shape[1] * 2**30, 2**30, tensor.shape[3], 1)) if tensor.ndim == 4 else tensor


def far_batches(tensor: Tensor) -> Tensor:
    if tensor.ndim == 4:
        return far(tensor, (2**30, *tensor.stride()[1:]))
    return far(tensor, (2**31 + 16, tensor.shape[2], 1)) if tensor.ndim == 3 else tensor


def far_channels(tensor: Tensor) -> Tensor:
    """Channels first, as images are: 2^29 elements from one channel to the next."""
    return far(tensor, (5 * 2**29, 1, 2**29)) if tensor.ndim == 3 and tensor.shape[2] == 5 else tensor


def guarded_before(tensor: Tensor) -> Tensor:
    return guarded(tensor, before=True)


PLACES = {
    "rows": far_rows, "heads": far_heads, "batches": far_batches, "channels": far_channels, "after": guarded,
    "before": guarded_before,
}  # fmt: skip


def main(what: str, *places: str) -> None:
    """``what`` is done at each of the places, "where" or "where/plan", which are named on stderr before."""
    query_device, allocate = device_facts, torch.empty
    for each in places:
        print(f"{what} {each}", file=sys.stderr)
        where, _, plan = each.partition("/")
        shared_kv.device_facts = pack.device_facts = (lambda device: H200) if plan == "h200" else query_device
        torch.empty = guarded_empty if where in ("after", "before") else allocate
        run(what, where)


def run(what: str, where: str) -> None:
    place = PLACES[where]
    if what == "control":
        # One element past the end of a guarded tensor: this process must not survive it.
        tensor = guarded(torch.ones(8))
        ctypes.string_at(tensor.data_ptr() + 32, 4)
        return
    sizes = {"M": 70, "R": 9} if where in ("after", "before") else {}
    if what == "pack":
        for kind in ("none", "shared", "batched", "fourier"):
            pack_tokens(place, kind)
        return
    if what == "rotary":
        # All heads in one program, in whole vectors; a program for each head, in single elements.
        for facts, *shape in ((CPU, 4, 8, 8), (H200, 3, 13, 6)):
            rotary.device_facts = lambda device, facts=facts: facts
            for interleaved in (False, True):
                turn(place, *shape, interleaved)
        return
    C, dtype = {"fused": (32, torch.float16), "wide": (352, torch.float16), "float32": (48, torch.float32)}[what]
    # Far strides are the same whatever is masked; what is read beside the tokens is tried on each path.
    kinds = ("all", "key_mask", "lengths", "dropout") if what == "fused" else ("all", "key_mask")
    for kind in kinds if where == "after" else ("all",):
        attend(place, C, dtype, kind, **sizes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    main(*sys.argv[1:])
