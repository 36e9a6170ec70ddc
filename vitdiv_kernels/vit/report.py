"""Where `python -m vitdiv_kernels.report` was before; for one release it says so."""

import sys

if __name__ == "__main__":
    sys.exit("it has moved: run python -m vitdiv_kernels.report, with the same options")
