"""`python -m vitdiv_kernels.train`."""

import sys

from .command import main

sys.exit(main())
