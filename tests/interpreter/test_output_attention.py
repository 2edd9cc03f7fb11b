"""Bodies of tests/functional/test_output_attention.py on the Triton kernels, in Triton's interpreter.

Those that meet what only this layer asks of the kernels: queries packed with ones, keys that carry biases. The rest of the
kernels' behaviour is that of attention and of packing, whose tests run here in full.
"""

from tests.functional.test_output_attention import (  # noqa: F401
    OP,
    test_ones_take_spare_channels_or_sixteen_more,
    test_pixels_with_fourier_positions_ask,
    test_textbook,
)
