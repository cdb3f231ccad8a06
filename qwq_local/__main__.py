"""The way in: `qwq` and `python -m qwq_local`."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line and leave the process with its exit status."""
    try:
        from qwq_local.cli.pipes import mend_streams

        if not mend_streams():
            sys.exit("qwq: standard output is closed: there is nowhere to write to.")
        from qwq_local.cli.main import main

        status = main(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    run()
