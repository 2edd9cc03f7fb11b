"""The one accuracy rule: an error may be twice that of eager PyTorch in the same dtype, plus output rounding.

    |actual - oracle| <= 2 |eager - oracle| + |round(oracle) - oracle| + FLOOR |terms|

in the L2 norm and in the maximum norm, over the whole tensor. oracle is fp64 on the same rounded inputs;
round() is to actual's dtype. The floor is what fp32 accumulation leaves behind: far below the other terms for
bf16 and fp16, it decides only where eager was exact by luck, in tiny tensors or in sums that cancel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perceiver_kernels.reference import shared_kv_attention

EAGER_FACTOR = 2.0

FLOOR = 4 * torch.finfo(torch.float32).eps
"""A softmax weight passes a product, an exponential, a sum and a division: four fp32 roundings."""


@dataclass(frozen=True)
class Comparison:
    """One norm of one tensor's errors, each relative to the oracle's norm (absolute where the oracle is 0).

    Args:
        norm: "L2" or "max".
        error, eager: error of the tensor under test and of eager PyTorch.
        rounding: error of the oracle itself in the dtype of the tensor under test.
        floor: what fp32 accumulation leaves behind.
    """

    norm: str
    error: float
    eager: float
    rounding: float
    floor: float

    @property
    def bound(self) -> float:
        """The largest error that passes."""
        return EAGER_FACTOR * self.eager + self.rounding + self.floor

    @property
    def passes(self) -> bool:
        """Whether the error is within the bound; an error that is NaN is not."""
        return self.error <= self.bound

    def __str__(self) -> str:
        return (
            f"relative {self.norm} error {self.error:.3e}, bound {self.bound:.3e} = {EAGER_FACTOR:g} x "
            f"{self.eager:.3e} (eager) + {self.rounding:.3e} (rounding) + {self.floor:.3e} (fp32 floor)"
        )


def compare(
    actual: Tensor, eager: Tensor, oracle: Tensor, *, terms: Tensor | None = None
) -> tuple[Comparison, Comparison]:
    """Errors of actual beside those of eager, in the L2 and in the maximum norm.

    Infinities of the oracle (the lse of empty rows) are left out here; assert_as_accurate compares them.

    Args:
        actual: bf16, fp16 or fp32: the tensor under test.
        eager: the same result from PyTorch's own operations in the dtype of the inputs.
        oracle: fp64, the reference on the same inputs.
        terms: fp64, for results that cancel: the sum of the absolute values of what each element adds up;
            |oracle| when None.

    Raises:
        TypeError: actual is not of a lower precision than fp64, or the oracle is not fp64.
        ValueError: the oracle holds NaN, or eager is not finite where the oracle is: neither can judge.
    """
    if oracle.dtype != torch.float64:
        raise TypeError(f"oracle must be float64, got {oracle.dtype}")
    if not actual.is_floating_point() or actual.dtype == torch.float64:
        raise TypeError(f"actual must be of a lower precision than its oracle's float64, got {actual.dtype}")
    if oracle.isnan().any():
        raise ValueError("oracle must not hold NaN")
    finite = oracle.isfinite()
    actual, eager, oracle = actual.detach(), eager.detach().to(oracle), oracle.detach()
    if not eager[finite].isfinite().all():
        raise ValueError("eager must be finite where the oracle is")
    truth = oracle.where(finite, 0)
    errors = {
        "error": (actual.to(oracle) - truth).where(finite, 0),
        "eager": (eager - truth).where(finite, 0),
        "rounding": truth.to(actual.dtype).to(oracle) - truth,
        "floor": FLOOR * (truth if terms is None else terms.detach().to(oracle)),
    }
    return _in_norm("L2", 2, truth, errors), _in_norm("max", torch.inf, truth, errors)


def _in_norm(name: str, order: float, truth: Tensor, errors: dict[str, Tensor]) -> Comparison:
    def size(tensor: Tensor) -> float:
        return float(torch.linalg.vector_norm(tensor, order)) if tensor.numel() else 0.0

    scale = size(truth) or 1.0
    return Comparison(name, **{kind: size(error) / scale for kind, error in errors.items()})


def assert_as_accurate(
    actual: Tensor, eager: Tensor, oracle: Tensor, name: str, *, terms: Tensor | None = None
) -> None:
    """Fail unless actual is as accurate as this module's rule asks.

    Args:
        actual, eager, oracle, terms: as in compare.
        name: what the tensor is called in the message.

    Raises:
        AssertionError: another shape, a value that is not finite where the oracle's is, another infinity, or
            too large an error; the message gives the errors and the worst element.
        TypeError, ValueError: as in compare.
    """
    if not actual.shape == eager.shape == oracle.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (actual, eager, oracle))
        raise AssertionError(f"{name}: actual, eager and oracle must have one shape, got {shapes}")
    actual, eager, oracle = actual.detach(), eager.detach(), oracle.detach()
    comparisons = compare(actual, eager, oracle, terms=terms)
    values = actual.to(oracle)
    finite = oracle.isfinite()
    if not torch.equal(values[~finite], oracle[~finite]):
        raise AssertionError(f"{name}: {_worst(values, eager, oracle, (values != oracle) & ~finite)}")
    if not values[finite].isfinite().all():
        raise AssertionError(f"{name}: {_worst(values, eager, oracle, ~values.isfinite() & finite)}")
    failures = [str(comparison) for comparison in comparisons if not comparison.passes]
    if failures:
        distance = (values - oracle).abs().where(finite, 0)
        raise AssertionError(f"{name}: {'; '.join(failures)}; {_worst(values, eager, oracle, distance)}")


def _worst(actual: Tensor, eager: Tensor, oracle: Tensor, badness: Tensor) -> str:
    index = tuple(int(i) for i in torch.unravel_index(badness.double().argmax(), oracle.shape))
    return (
        f"worst at {index}: {float(actual[index]):.9g} where fp64 gives {float(oracle[index]):.9g} "
        f"and eager {float(eager[index]):.9g}"
    )


def shared_kv_gradient_terms(
    q: Tensor, x: Tensor, dz: Tensor, *, key_mask: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Terms of dq and dx of shared-KV attention, for compare: a row that sees one key, almost, cancels.

    ds_ij = p_ij (dz_i . x_j - dz_i . z_i) has the terms p_ij (|dz_i| . |x_j| + |dz_i| . |z_i|), and so on. Weights are
    recomputed from lse, which is kept in fp32: one rounding of |lse|, beside the four of FLOOR, is an error of p.

    Args:
        q, x, dz: [B, R, C], [B, M, C] and [B, R, C], of any float dtype.
        key_mask: bool [B, M], True = visible.
        scale: of the scores.

    Returns:
        fp64 [B, R, C] and [B, M, C].

    Source: Dao et al., arXiv 2205.14135, appendix B.2, every product with the absolute values of its factors.
    """
    q, x, dz = (tensor.detach().double() for tensor in (q, x, dz))
    z, lse, _ = shared_kv_attention(q, x, key_mask=key_mask, scale=scale)
    if key_mask is not None:
        x = x.masked_fill(~key_mask[..., None], 0)
    p = (scale * q @ x.mT - lse[..., None]).exp().nan_to_num(0, 0, 0)
    if key_mask is not None:
        p = p.masked_fill(~key_mask[:, None], 0)
    p = p * (1 + lse.abs().nan_to_num(posinf=0.0) / 4)[..., None]
    q, x, z, dz = (tensor.abs() for tensor in (q, x, z, dz))
    ds = p * (dz @ x.mT + (dz * z).sum(-1, keepdim=True))
    return abs(scale) * ds @ x, abs(scale) * ds.mT @ q + p.mT @ dz
