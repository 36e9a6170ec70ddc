"""Where `python -m vitdiv_kernels.train` was before; for one release it says so."""

import sys

if __name__ == "__main__":
    sys.exit("it has moved: run python -m vitdiv_kernels.train, with the same options")
