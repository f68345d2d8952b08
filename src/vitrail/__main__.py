"""The command `vitrail`, and `python -m vitrail`: Ctrl-C while Python is still loading the program is no traceback."""

from __future__ import annotations

import sys

INTERRUPTED = 130
"""what a shell says of a program that Ctrl-C ended: 128 and the number of SIGINT"""


def main() -> int:
    """Runs the command line and returns its exit code."""
    try:
        from vitrail.cli import main as run  # takes a second or more, most of it PyTorch
    except KeyboardInterrupt:
        print("stopped before anything was done", file=sys.stderr)
        return INTERRUPTED
    return run()


if __name__ == "__main__":
    sys.exit(main())
