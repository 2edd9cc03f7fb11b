"""torch.nn.functional.scaled_dot_product_attention, replaced for a while."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.backends import torch_attention
from perceiver_kernels.functional import scaled_dot_product_attention


@dataclass
class SDPACalls:
    """Calls inside a block: ``ours`` of them ran here, ``torchs`` on torch's function for the counted ``reasons``."""

    ours: int = 0
    torchs: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


_blocks: list[SDPACalls] = []
_lock = threading.Lock()


def _refusal(query: Any, key: Any, value: Any) -> str | None:
    """Why torch's function is called without asking ours, or None."""
    if torch.compiler.is_compiling():
        # What stands for tensors there has no such type.
        return None
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"{name} is a {type(tensor).__name__}"
    return None


def _count(reason: str | None) -> None:
    if torch.compiler.is_compiling():
        return
    for calls in _blocks:
        if reason is None:
            calls.ours += 1
        else:
            calls.torchs += 1
            calls.reasons[reason] += 1


def _replaced(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0, is_causal: Any = False, **options: Any
) -> Tensor:
    reason = _refusal(query, key, value)
    if reason is None:
        try:
            out = scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        except (TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
        else:
            _count(None)
            return out
    _count(reason)
    return torch_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)


@contextlib.contextmanager
def sdpa_override() -> Iterator[SDPACalls]:
    """Send calls of ``torch.nn.functional.scaled_dot_product_attention`` inside the block to this package where it serves them.

        with perceiver_kernels.sdpa_override() as calls:
            model(x)
        print(calls)

    A call that ours refuses (NestedTensor and other subclasses of Tensor, an argument that it does not take) runs on torch's
    function. The function is replaced for the process, all threads, until the last of nested blocks ends; names that were
    bound to it before (``from torch.nn.functional import scaled_dot_product_attention``) still mean torch's. Calls of compiled
    code are not counted.

    Yields:
        Counts of the calls inside the block, and the reasons for torch's.
    """
    calls = SDPACalls()
    with _lock:
        _blocks.append(calls)
        F.scaled_dot_product_attention = _replaced  # type: ignore[assignment]
    try:
        yield calls
    finally:
        with _lock:
            _blocks[:] = [each for each in _blocks if each is not calls]
            if not _blocks:
                F.scaled_dot_product_attention = torch_attention
