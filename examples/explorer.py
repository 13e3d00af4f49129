# SPDX-License-Identifier: Apache-2.0
"""Takes the picture of docs/howto/explore.md: the page that `nearsight explore RUN digits:3` writes, in a browser.

make demo
.venv/bin/python examples/explorer.py runs/demo docs/images/explore.png

Needs Chromium, and playwright, which the extra `dev` brings.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import sync_playwright

from nearsight import cli

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1180, 860


def photograph(page: Path, output: str) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"a picture of the explorer needs one of {', '.join(BROWSERS)}; none is installed")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"]) as chromium,
    ):
        window = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        window.goto(page.as_uri())
        window.wait_for_selector("html[data-ready]")
        window.wait_for_timeout(500)  # the small pictures are drawn when they come into sight
        window.screenshot(path=output)


def main(run: str, output: str) -> None:
    with TemporaryDirectory() as folder:
        page = Path(folder) / "six.html"
        if cli.main(["explore", run, "digits:3", "--output", str(page)]):
            sys.exit(1)
        photograph(page, output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
