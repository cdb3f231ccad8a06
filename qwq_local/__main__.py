"""The entry point of `qwq` and of `python -m qwq_local`."""

from __future__ import annotations

import sys


def run() -> None:
    """Runs the command line and ends the process with its exit status."""
    try:
        from qwq_local.cli.environment import open_missing_streams

        if not open_missing_streams():
            sys.exit("qwq: standard output is closed: there is nowhere to write to.")
        from qwq_local.cli.main import main

        status = main(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    run()
