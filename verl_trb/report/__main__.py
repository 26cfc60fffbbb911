"""python -m verl_trb.report RUN [RUN ...] [--out FOLDER]"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from verl_trb.report.page import write_report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m verl_trb.report", description="Report of one or several runs: report.html and its pictures."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder (with a metrics.jsonl)")
    parser.add_argument("--out", type=Path, help="folder of report.html and the pictures; default: the first run's")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0]
    try:
        written = write_report(args.runs, out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or out}: {error.strerror or error}.", file=sys.stderr)
        return 2
    print(f"wrote {', '.join(str(file) for file in written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
