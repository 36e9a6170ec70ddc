"""`python -m vitdiv_kernels.demo`, and `python -m vitdiv_kernels.demo segment`."""

import sys

from . import digits, segment

if __name__ == "__main__":  # the processes that train or measure memory import this module, too
    if sys.argv[1:2] == ["segment"]:
        sys.exit(segment.main(sys.argv[2:]))
    sys.exit(digits.main())
