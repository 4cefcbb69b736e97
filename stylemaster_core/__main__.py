"""`python -m stylemaster_core` is `stylemaster`."""

import sys

from .cli import main

sys.exit(main())
