"""``python -m experiments.tour``."""

import sys

from experiments.tour.tour import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
