"""The bodies of tests/ops/test_compiled.py on the Triton kernels, in Triton's interpreter."""

from tests.ops.test_compiled import *  # noqa: F403

# What these add, one graph for all lengths, is traced alike for every backend; each takes ten seconds or more here.
del test_chunks, test_one_graph_for_every_length  # noqa: F821
