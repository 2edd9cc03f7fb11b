"""Correctness first: a result is compared with the specification in fp64 before anything of it is timed.

A result passes when its error is at most twice that of the textbook in the same dtype, plus the rounding of
the output (testing/accuracy.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perceiver_kernels.cli.measure import OUT_OF_MEMORY, is_out_of_memory, release
from perceiver_kernels.cli.subject import Subject
from perceiver_kernels.testing.accuracy import assert_as_accurate, compare

PIECE_ELEMENTS = 2**27
"""Elements that are compared at a time; every piece has to pass."""
ZERO = 1e-9
"""Norms below this are fp64 rounding of a zero."""


@dataclass(frozen=True)
class Verdict:
    """Errors of one result against fp64, the textbook's own beside, and what is wrong, if anything."""

    errors: dict[str, float]
    eager_errors: dict[str, float]
    failure: str | None

    @property
    def is_wrong(self) -> bool:
        """Whether a stock peer's result is useless, not merely less accurate: not finite or far from fp64."""
        pairs = ((error, self.eager_errors[name]) for name, error in self.errors.items())
        return any(not error <= max(0.05, 10 * eager) for error, eager in pairs)


class Gate:
    """Judges results of one workload; specification and textbook are computed once per pass."""

    def __init__(self, workload: Subject) -> None:
        self.workload = workload

    def judge(self, which: str, subjects: dict[str, Callable[[], Sequence[Tensor]]]) -> dict[str, Verdict]:
        """Compare what callables give with the specification.

        Args:
            which: name of the pass.
            subjects: name -> callable that is known to run.

        Returns:
            name -> Verdict.
        """
        names = self.workload.names(which)
        try:
            oracle = self.workload.specification(which, torch.float64)
            eager = self.workload.specification(which, self.workload.dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            release()
            return dict.fromkeys(subjects, Verdict({}, {}, f"not judged: {OUT_OF_MEMORY} in the specification"))
        terms = self.workload.terms(which)
        verdicts = {
            name: verdict(call(), eager, oracle, names, terms, norms=self.workload.norms) for name, call in subjects.items()
        }
        del oracle, eager
        release()
        return verdicts


def verdict(
    actual: Sequence[Tensor], eager: Sequence[Tensor], oracle: Sequence[Tensor], names: list[str],
    terms: Mapping[str, Tensor] | None = None, *, norms: int = 2,
) -> Verdict:  # fmt: skip
    """Judge the tensors of one result; ``terms`` of those that are sums which cancel, as testing/accuracy.py has it.

    ``norms`` counts the norms that the rule holds in: both, or the L2 norm alone.
    """
    failure = None
    errors: dict[str, float] = {}
    eager_errors: dict[str, float] = {}
    largest = max((float(truth.abs().max()) for truth in oracle if truth.numel()), default=0.0)
    for name, mine, textbook, truth in zip(names, actual, eager, oracle, strict=True):
        if mine.shape != truth.shape:
            return Verdict({}, {}, f"{name} must be {tuple(truth.shape)}, got {tuple(mine.shape)}")
        errors[name], eager_errors[name] = relative_error(mine, truth), relative_error(textbook, truth)
        # Of one input all gradients of scores are zero: what cancels there is taken to be as large as the other gradients.
        zero = _is_zero(truth) and largest > ZERO
        cancelling = truth.new_tensor(largest) if zero else (terms or {}).get(name)
        try:
            for my_part, textbook_part, true_part in _pieces(mine, textbook, truth):
                part = cancelling if cancelling is None or cancelling.ndim else cancelling.expand_as(true_part)
                _check(my_part, textbook_part, true_part, name, part, norms)
        except (AssertionError, ValueError) as error:
            failure = failure or " ".join(str(error).split())
    return Verdict(errors, eager_errors, failure)


def _check(mine: Tensor, textbook: Tensor, truth: Tensor, name: str, terms: Tensor | None, norms: int) -> None:
    if norms == 2:
        assert_as_accurate(mine, textbook, truth, name, terms=terms)
    elif not (judged := compare(mine, textbook, truth, terms=terms)[0]).passes:
        raise AssertionError(f"{name}: {judged}")


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """Return the relative L2 error; the absolute one where the oracle is zero but for its own rounding.

    That is the gradient of the key projection's bias, which the softmax cancels.
    """
    distance = size = 0.0
    for mine, truth in _pieces(actual, oracle):
        distance += float((mine.to(truth) - truth).square().sum())
        size += float(truth.square().sum())
    distance, size = distance**0.5, size**0.5
    return distance / size if size > ZERO else distance


def _is_zero(oracle: Tensor) -> bool:
    return sum(float(part.square().sum()) for (part,) in _pieces(oracle)) <= ZERO**2


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors side by side; billions of elements in slices, as comparing takes several fp64 copies."""
    if tensors[0].ndim < 2:
        return iter([tensors])
    rows = tensors[0].shape[-2]
    size = max(1, PIECE_ELEMENTS * rows // max(tensors[0].numel(), 1))
    return zip(*(tensor.split(size, dim=-2) for tensor in tensors), strict=True)
