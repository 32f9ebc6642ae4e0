"""``python -m syncbn``."""

import sys

from syncbn.cli import main

if __name__ == "__main__":
    sys.exit(main())
