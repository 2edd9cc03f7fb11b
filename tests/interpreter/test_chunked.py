"""The bodies of tests/functional/test_chunked.py on the Triton kernels, in Triton's interpreter."""

from tests.functional.test_chunked import *  # noqa: F403
