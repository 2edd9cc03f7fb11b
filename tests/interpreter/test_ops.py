"""The bodies of tests/ops on the Triton kernels, in Triton's interpreter."""

from tests.ops.test_schema import *  # noqa: F403
from tests.ops.test_transforms import *  # noqa: F403
