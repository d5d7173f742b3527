"""Run `python -m tandem.kernels.bench`."""

import sys

from tandem.kernels.bench.command import main

sys.exit(main())
