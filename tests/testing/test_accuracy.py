"""The accuracy rule: that it fails when it should, passes when it should, and says where."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from perceiver_kernels import reference
from perceiver_kernels.testing import EDGE, EncodeCase, assert_as_accurate, compare, shared_kv_gradient_terms

LOW = [torch.bfloat16, torch.float16, torch.float32]
NAN, INF = float("nan"), float("inf")


def oracle_and_eager(dtype: torch.dtype, size: int = 4096) -> tuple[Tensor, Tensor]:
    """fp64 values, and eager's: rounded, with one more rounding's worth of noise."""
    generator = torch.Generator().manual_seed(size)
    oracle = torch.randn(size, generator=generator, dtype=torch.float64)
    noise = torch.rand(size, generator=generator, dtype=torch.float64) - 0.5
    return oracle, (oracle * (1 + torch.finfo(dtype).eps * noise)).to(dtype)


def with_error(oracle: Tensor, factor: float, eager: Tensor) -> Tensor:
    """The oracle with an error of `factor` times eager's in every element, so in every norm, kept in fp32."""
    return (oracle + factor * (eager.double() - oracle)).float()


class TestRule:
    @pytest.mark.parametrize("dtype", LOW)
    def test_passes_eager_itself_and_the_rounded_oracle(self, dtype: torch.dtype) -> None:
        oracle, eager = oracle_and_eager(dtype)
        assert_as_accurate(eager, eager, oracle, "out")
        assert_as_accurate(oracle.to(dtype), eager, oracle, "out")
        assert_as_accurate(oracle.to(dtype), oracle.to(dtype), oracle, "out")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_allows_twice_the_error_and_no_more(self, dtype: torch.dtype) -> None:
        oracle, eager = oracle_and_eager(dtype)
        assert_as_accurate(with_error(oracle, 1.99, eager), eager, oracle, "out")
        with pytest.raises(AssertionError, match=r"out: relative L2 error .* relative max error"):
            assert_as_accurate(with_error(oracle, 2.02, eager), eager, oracle, "out")

    @pytest.mark.parametrize("dtype", LOW)
    def test_counts_the_rounding_of_the_output_dtype(self, dtype: torch.dtype) -> None:
        """An exact eager leaves one rounding, for fp32 a floor; three of bf16 or fp16 are too many."""
        oracle, _ = oracle_and_eager(dtype)
        once = oracle.to(dtype)
        l2, _ = compare(once, oracle, oracle)
        assert l2.eager == 0 and l2.error == l2.rounding <= l2.bound
        thrice = oracle + 3 * (once.double() - oracle)
        if dtype != torch.float32:
            with pytest.raises(AssertionError):
                assert_as_accurate(thrice.to(dtype), oracle, oracle, "out")

    def test_one_wrong_element_among_many_fails(self) -> None:
        """The L2 norm of a million elements hides it; the maximum does not."""
        oracle, eager = oracle_and_eager(torch.bfloat16, 1_000_000)
        actual = oracle.bfloat16()
        actual[123_456] += 0.5
        with pytest.raises(AssertionError, match=r"^dq: relative max error .* worst at \(123456,\)"):
            assert_as_accurate(actual, eager, oracle, "dq")

    def test_a_small_error_everywhere_fails(self) -> None:
        """The maximum hides a bias below the largest rounding; the L2 norm does not."""
        oracle, eager = oracle_and_eager(torch.bfloat16)
        actual = (oracle + 2.9 * (oracle.abs().max() * 2**-9)).float()
        eager[0] = oracle[0] + 0.01 * oracle.abs().max()
        with pytest.raises(AssertionError, match=r"^dx: relative L2 error [^;]*; worst at"):
            assert_as_accurate(actual, eager, oracle, "dx")

    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("wrong", ["zero", "sign", "scaled", "shifted"])
    def test_wrong_results_fail(self, dtype: torch.dtype, wrong: str) -> None:
        oracle, eager = oracle_and_eager(dtype)
        results = {"zero": 0 * oracle, "sign": -oracle, "scaled": 1.05 * oracle, "shifted": oracle.roll(1)}
        with pytest.raises(AssertionError):
            assert_as_accurate(results[wrong].to(dtype), eager, oracle, "out")

    def test_the_message_names_numbers_and_place(self) -> None:
        oracle = torch.ones(2, 3, dtype=torch.float64)
        actual = oracle.float()
        actual[1, 2] = 1.25
        message = (
            r"^z: relative L2 error 1\.021e-01, bound 4\.768e-07 = 2 x 0\.000e\+00 \(eager\) \+ 0\.000e\+00 "
            r"\(rounding\) \+ 4\.768e-07 \(fp32 floor\); relative max error 2\.500e-01, .*; "
            r"worst at \(1, 2\): 1\.25 where fp64 gives 1 and eager 1$"
        )
        with pytest.raises(AssertionError, match=message):
            assert_as_accurate(actual, oracle.float(), oracle, "z")


class TestZeros:
    def test_an_oracle_of_zeros_is_judged_by_the_absolute_error(self) -> None:
        oracle, eager = torch.zeros(5, dtype=torch.float64), torch.full((5,), 1e-7)
        assert_as_accurate(torch.full((5,), 1.9e-7), eager, oracle, "db_k")
        with pytest.raises(AssertionError, match=r"worst at \(0,\): 2\.49999999e-07 where fp64 gives 0"):
            assert_as_accurate(torch.full((5,), 2.5e-7), eager, oracle, "db_k")

    def test_terms_allow_what_cancels(self) -> None:
        """With one key ds = p (dp - delta) = 0: fp32 leaves rounding of the terms, a bug much more."""
        oracle = torch.zeros(4, dtype=torch.float64)
        residue, terms = torch.full((4,), 3e-7), torch.full((4,), 2.0, dtype=torch.float64)
        with pytest.raises(AssertionError):
            assert_as_accurate(residue, oracle.float(), oracle, "dq")
        assert_as_accurate(residue, oracle.float(), oracle, "dq", terms=terms)
        with pytest.raises(AssertionError):
            assert_as_accurate(10 * residue, oracle.float(), oracle, "dq", terms=terms)

    @pytest.mark.parametrize("masked", [False, True])
    def test_gradient_terms_bound_the_gradients(self, masked: bool) -> None:
        """They exceed every gradient, are 0 where nothing is visible, positive where one key cancels."""
        generator = torch.Generator().manual_seed(0)
        q, x, dz = (torch.randn(2, size, 4, generator=generator, dtype=torch.float64) for size in (3, 5, 3))
        mask = torch.tensor([[True, False, True, True, False], [False] * 5]) if masked else None
        x[:, 1] = NAN if masked else 1.0
        leaves = q.requires_grad_(), x.requires_grad_()
        z, _, _ = reference.shared_kv_attention(*leaves, key_mask=mask, scale=0.7)
        gradients = torch.autograd.grad(z, leaves, dz)
        terms = shared_kv_gradient_terms(q, x, dz, key_mask=mask, scale=0.7)
        for gradient, term in zip(gradients, terms, strict=True):
            assert (gradient.abs() <= term).all()
            assert not masked or not term[1].any()
        alone, _ = shared_kv_gradient_terms(q, torch.ones(2, 1, 4), dz)
        assert (alone > 0).all()

    def test_nothing_to_compare(self) -> None:
        nothing = torch.zeros(0, 3)
        assert_as_accurate(nothing, nothing, nothing.double(), "out")


class TestNotFinite:
    lse = torch.tensor([1.0, -INF, 2.0], dtype=torch.float64)

    def test_infinities_must_be_the_oracles(self) -> None:
        assert_as_accurate(self.lse.float(), self.lse.float(), self.lse, "lse")
        for wrong in (0.0, INF, NAN):
            actual = self.lse.float()
            actual[1] = wrong
            with pytest.raises(AssertionError, match=r"lse: worst at \(1,\): .* where fp64 gives -inf"):
                assert_as_accurate(actual, self.lse.float(), self.lse, "lse")

    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_other_values_must_be_finite(self, value: float) -> None:
        actual = self.lse.float()
        actual[2] = value
        with pytest.raises(AssertionError, match=r"lse: worst at \(2,\): (nan|-?inf) where fp64 gives 2"):
            assert_as_accurate(actual, self.lse.float(), self.lse, "lse")

    def test_an_eager_that_is_not_finite_judges_nothing(self) -> None:
        """Twice an infinite error would pass everything."""
        eager = self.lse.float()
        eager[0] = NAN
        with pytest.raises(ValueError, match="eager must be finite where the oracle is"):
            assert_as_accurate(self.lse.float(), eager, self.lse, "lse")

    def test_an_oracle_with_nan_judges_nothing(self) -> None:
        oracle = torch.tensor([NAN, 1.0], dtype=torch.float64)
        with pytest.raises(ValueError, match="oracle must not hold NaN"):
            assert_as_accurate(torch.ones(2), torch.ones(2), oracle, "out")


class TestMisuse:
    def test_tensors_of_a_graph_are_compared_without_a_warning(self) -> None:
        x = torch.ones(2, requires_grad=True)
        with warnings.catch_warnings(), pytest.raises(AssertionError):
            warnings.simplefilter("error")
            assert_as_accurate(2 * x, x, x.double(), "out")

    def test_oracle_must_be_fp64(self) -> None:
        with pytest.raises(TypeError, match=r"oracle must be float64, got torch\.float32"):
            assert_as_accurate(torch.ones(2), torch.ones(2), torch.ones(2), "out")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
    def test_actual_must_be_of_lower_precision(self, dtype: torch.dtype) -> None:
        oracle = torch.ones(2, dtype=torch.float64)
        with pytest.raises(TypeError, match=f"actual must be of a lower precision .*, got {dtype}"):
            assert_as_accurate(oracle.to(dtype), oracle.float(), oracle, "out")

    def test_shapes_must_agree(self) -> None:
        """A broadcast comparison would pass a result of the wrong shape."""
        with pytest.raises(AssertionError, match=r"out: .* one shape, got \(2, 1\), \(2, 3\), \(2, 3\)"):
            assert_as_accurate(torch.ones(2, 1), torch.ones(2, 3), torch.ones(2, 3).double(), "out")


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "case", [EDGE["M=1"], EDGE["M=2"], EDGE["M=257"], EDGE["N=1"], EDGE["C=1"]], ids=lambda c: c.name
)
def test_an_honest_kernel_passes_and_a_sloppy_one_fails(case: EncodeCase, dtype: torch.dtype) -> None:
    """What a kernel does: keys in two halves, base-2 exponentials, unnormalised weights in the dtype."""
    generator = torch.Generator().manual_seed(case.M)
    q = torch.randn(2, case.R, case.C_padded, generator=generator).mul(case.C_padded**-0.5).to(dtype)
    x = torch.randn(2, case.M, case.C_padded, generator=generator).to(dtype)
    eager, eager_lse, _ = reference.shared_kv_attention(q, x)
    oracle, oracle_lse, _ = reference.shared_kv_attention(q.double(), x.double())
    z, lse = flash(q, x, dtype)
    assert_as_accurate(z, eager, oracle, "z")
    assert_as_accurate(lse, eager_lse, oracle_lse, "lse")
    if case.M > 2 and dtype == torch.float32:
        with pytest.raises(AssertionError):
            assert_as_accurate(flash(q, x, torch.bfloat16)[0], eager, oracle, "z")


def flash(q: Tensor, x: Tensor, weights_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    maximum = q.new_full((*q.shape[:2], 1), -INF, dtype=torch.float32)
    total, accumulated = torch.zeros_like(maximum), torch.zeros(q.shape)
    for block in x.split(max(1, x.shape[1] // 2), 1):
        scores = q.float() @ block.float().mT * math.log2(math.e)
        new = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        weights, rescale = torch.exp2(scores - new), torch.exp2(maximum - new)
        total = total * rescale + weights.sum(-1, keepdim=True)
        accumulated = accumulated * rescale + weights.to(weights_dtype).float() @ block.float()
        maximum = new
    lse = (maximum + total.log2()) * math.log(2)
    return (accumulated / total).to(q.dtype), lse[..., 0]
