"""Stochastic depth: whole branches dropped, by batch entry."""

from __future__ import annotations

from torch import Tensor


def drop_path(branch: Tensor, probability: float, training: bool) -> Tensor:
    """``branch`` [B, ...] before its residual, 0 for a random share of the batch and 1/(1 - probability) of itself else.

    Source: Deep Networks with Stochastic Depth, arXiv 1603.09382.
    """
    if not training or probability == 0.0:
        return branch
    keep = 1 - probability
    kept = branch.new_empty(branch.shape[0], *(1 for _ in branch.shape[1:])).bernoulli_(keep)
    return branch * kept.div_(keep)
