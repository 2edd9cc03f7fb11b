"""Blocks whose activations are computed again for the gradient instead of being kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from perceiver_kernels.dispatch import computed_as_now


def run_block(block: nn.Module, *arguments: Any, checkpointing: bool) -> Any:
    """``block(*arguments)``; with ``checkpointing``, in training, only the arguments are kept for its gradient.

    Source: Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
    """
    if checkpointing and block.training and torch.is_grad_enabled():
        # Of compiled code one trace serves both runs.
        again = block if torch.compiler.is_compiling() else computed_as_now(block)
        return checkpoint(again, *arguments, use_reentrant=False)
    return block(*arguments)
