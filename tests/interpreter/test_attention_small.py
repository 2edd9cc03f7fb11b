"""The bodies of tests/backends/test_attention_small.py on the Triton kernels, in Triton's interpreter."""

from tests.backends.test_attention_small import *  # noqa: F403
