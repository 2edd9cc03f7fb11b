"""The bodies of tests/backends/test_rotary.py and tests/ops/test_rotary.py on the Triton kernel, in Triton's interpreter."""

from tests.backends.test_rotary import *  # noqa: F403
from tests.ops.test_rotary import *  # noqa: F403
