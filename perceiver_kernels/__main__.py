"""`python -m perceiver_kernels` is the same program as `perceiver-kernels`."""

import sys

from perceiver_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
