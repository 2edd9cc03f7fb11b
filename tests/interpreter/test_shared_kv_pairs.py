"""The bodies of tests/backends/test_shared_kv_pairs.py on the Triton kernels, in Triton's interpreter."""

from tests.backends.test_shared_kv_pairs import *  # noqa: F403
