"""Where `python -m vitdiv_kernels.train` was before; for one release it says so."""

import sys

if __name__ == "__main__":
    sys.exit(
        "vitdiv_kernels.vit.train is vitdiv_kernels.train now: python -m vitdiv_kernels.train, with the same options"
    )
