"""``python -m syncbn``."""

import sys

from syncbn._src.cli import main

if __name__ == "__main__":
    sys.exit(main())
