"""The bodies of tests/backends/test_pack.py on the Triton kernels, in Triton's interpreter."""

from tests.backends.test_pack import *  # noqa: F403
