"""`python -m vitdiv_kernels.demo`."""

import sys

from .digits import main

sys.exit(main())
