"""Bodies of tests/functional/test_cross_attention.py on the Triton kernels, in Triton's interpreter.

Those that ask for what the kernels compute; the algebra of the layer's switches is the same on every backend.
"""

from tests.functional.test_cross_attention import (  # noqa: F401
    OP,
    test_autocast,
    test_dropout_is_that_of_the_weights,
    test_hidden_tokens,
    test_inputs_packed_once_serve_every_layer,
    test_latents_shared_by_the_batch,
    test_methods_agree_and_the_planner_takes_one_of_them,
    test_raw_bytes_are_normalised_as_floats,
    test_textbook,
)
