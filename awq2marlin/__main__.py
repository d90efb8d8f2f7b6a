"""``python -m awq2marlin``."""

import sys

from awq2marlin.cli import main

if __name__ == "__main__":
    sys.exit(main())
