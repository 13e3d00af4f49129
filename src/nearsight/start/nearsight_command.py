# SPDX-License-Identifier: Apache-2.0
"""``nearsight`` for processes that the package starts itself: ``python PATH/nearsight_command.py train ...``.

``python -m nearsight`` would look for every module in the current folder first, and run a ``tqdm.py`` that lies there. A
script has its own folder there, which is why this one stands alone in one; and Lightning starts the processes of a run on
several devices in the same way as it was started itself. Python 3.11 has ``-P`` for this, 3.10 has not.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # After all others: where nearsight is not installed, as in a checkout, it is found all the same.
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parents[2])]

    from nearsight.cli import main

    sys.exit(main())
