"""Cases, the accuracy rule and awkward tensors: shared by tests, benchmarks and the command line's check."""

from perceiver_kernels.testing.accuracy import (
    Comparison,
    assert_as_accurate,
    compare,
    shared_kv_gradient_terms,
)
from perceiver_kernels.testing.cases import (
    DECODE,
    EDGE,
    ENCODE,
    ENCODE_KV,
    ENCODE_WIDE,
    PROCESS,
    AttentionCase,
    EncodeCase,
)
from perceiver_kernels.testing.tensors import (
    LAYOUTS,
    broadcast,
    column_major,
    gapped_rows,
    misaligned,
    nan_tail,
    permuted,
    poisoned_memory,
    runs_that_differ,
    same_bits,
)

__all__ = [
    "DECODE",
    "EDGE",
    "ENCODE",
    "ENCODE_KV",
    "ENCODE_WIDE",
    "LAYOUTS",
    "PROCESS",
    "AttentionCase",
    "Comparison",
    "EncodeCase",
    "assert_as_accurate",
    "broadcast",
    "column_major",
    "compare",
    "gapped_rows",
    "misaligned",
    "nan_tail",
    "permuted",
    "poisoned_memory",
    "runs_that_differ",
    "same_bits",
    "shared_kv_gradient_terms",
]
