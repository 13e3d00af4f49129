# SPDX-License-Identifier: Apache-2.0
"""`nearsight bench core` from a working tree: see src/nearsight/bench/core.py.

python bench/core.py [--quick] [--threads N] [--json FILE]
"""

import sys

from nearsight.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "core", *sys.argv[1:]]))
