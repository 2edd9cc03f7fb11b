"""The bodies of tests/ops/test_compiled.py on the Triton kernels, in Triton's interpreter."""

from tests.ops.test_compiled import *  # noqa: F403
