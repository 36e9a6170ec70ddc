"""`python -m vitdiv_kernels.demo`."""

import sys

from .digits import main

if __name__ == "__main__":  # the processes that measure memory import this module, too
    sys.exit(main())
