"""Where `python -m vitdiv_kernels.demo` was before; for one release it says so."""

import sys

if __name__ == "__main__":
    sys.exit("it has moved: run python -m vitdiv_kernels.demo, with the same options")
