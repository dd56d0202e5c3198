"""`python -m dispatcher.server`, as existing scripts call it."""

import sys

from dispatcher.server.cli import main

sys.exit(main())
