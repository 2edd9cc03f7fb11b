"""The bodies of tests/backends/test_attention.py on the Triton kernels, in Triton's interpreter."""

from tests.backends.test_attention import *  # noqa: F403
