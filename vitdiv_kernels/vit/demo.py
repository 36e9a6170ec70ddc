"""Where `python -m vitdiv_kernels.demo` was before; for one release it says so."""

import sys

if __name__ == "__main__":
    sys.exit(
        "vitdiv_kernels.vit.demo is vitdiv_kernels.demo now: python -m vitdiv_kernels.demo, with the same options"
    )
