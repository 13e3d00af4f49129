# SPDX-License-Identifier: Apache-2.0
"""`nearsight bench layers` from a working tree: see src/nearsight/bench/layers.py.

python bench/layers.py [--quick] [--threads N] [--json FILE]
"""

import sys

from nearsight.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "layers", *sys.argv[1:]]))
