"""Where `python -m vitdiv_kernels.report` was before; for one release it says so."""

import sys

if __name__ == "__main__":
    sys.exit(
        "vitdiv_kernels.vit.report is vitdiv_kernels.report now: python -m vitdiv_kernels.report, with the same options"
    )
