"""`scripts/prepare_data.py DATASET`: the same as `python -m verl_trb.prepare_data DATASET`."""

import sys

from verl_trb.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())
