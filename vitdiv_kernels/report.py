"""How far a trained ViT has collapsed: `python -m vitdiv_kernels.report RUN`."""

import sys

from .train.report import main

if __name__ == "__main__":
    sys.exit(main())
