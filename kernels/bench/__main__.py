"""Run `python -m tandem.kernels.bench`."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the working folder, whose files could otherwise replace modules of Python or of a library

from tandem.kernels.bench.command import main

sys.exit(main())
