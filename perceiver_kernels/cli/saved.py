"""What autograd keeps between a forward and its backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.cli.measure import Call

SAVED_METHOD = (
    "storages that autograd saves in a forward (torch.autograd.graph.saved_tensors_hooks), each once and whole, without "
    "those of parameters, buffers, latents and inputs"
)


def saved_bytes(forward: Call, given: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps after a forward, for its backward.

    A storage counts once and whole, however many tensors and whatever parts of it are saved; an array that is saved and
    also a result counts too. What a function of autograd keeps otherwise, such as raw inputs that are the caller's, is
    not seen. The graph cannot be walked afterwards.

    Args:
        forward: records a graph.
        given: tensors whose storages are there anyway: parameters, buffers, latents, inputs.

    Returns:
        Bytes.
    """
    known = {tensor.untyped_storage()._cdata for tensor in given}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            # Held, so that no later storage gets its address.
            kept[storage._cdata] = storage

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda _: None):
        result = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total
