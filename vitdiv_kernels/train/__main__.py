"""`python -m vitdiv_kernels.train`."""

import sys

from .cli import main

sys.exit(main())
