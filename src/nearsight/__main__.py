# SPDX-License-Identifier: Apache-2.0
"""``python -m nearsight``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    from nearsight.cli import main

    # Lightning starts the other processes of a run as this one says that it was started: without the current folder.
    __spec__ = None
    sys.argv[0] = str(Path(__file__).parent / "start" / "nearsight_command.py")
    sys.exit(main())
