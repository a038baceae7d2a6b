"""`python -m vispruner_kernels.demo`."""

import sys

from vispruner_kernels.demo import main

sys.exit(main())
