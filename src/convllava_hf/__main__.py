"""`python -m convllava_hf`: the same as the command `convllava`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
