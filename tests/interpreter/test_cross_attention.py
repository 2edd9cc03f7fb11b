"""The bodies of tests/functional/test_cross_attention.py on the Triton kernels, in Triton's interpreter."""

from tests.functional.test_cross_attention import *  # noqa: F403
