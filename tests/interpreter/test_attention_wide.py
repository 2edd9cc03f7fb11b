"""The bodies of tests/backends/test_attention_wide.py on the Triton kernels, in Triton's interpreter."""

from tests.backends.test_attention_wide import *  # noqa: F403
