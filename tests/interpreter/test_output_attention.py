"""The bodies of tests/functional/test_output_attention.py on the Triton kernels, in Triton's interpreter."""

from tests.functional.test_output_attention import *  # noqa: F403
