"""The bodies of tests/backends/test_shared_kv.py on the Triton kernels, in Triton's interpreter."""

from tests.backends.test_shared_kv import *  # noqa: F403
