# SPDX-License-Identifier: Apache-2.0
"""Explorers of four networks, made when the site is built; a page shows one with the directive ``{explorer} NAME``.

They lie in explorers/ of the English site, are shared by both languages, and are made again only when the package changed.
"""

from __future__ import annotations

import hashlib
import shutil
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

FOLDER = "explorers"
PARTS = {".py", ".jinja", ".css", ".js", ".safetensors"}  # of the package, what a page comes from
LABELS = {"en": "This explorer on a page of its own", "fr": "Cet explorateur sur une page à lui"}
TITLES = {"en": "Explorer", "fr": "Explorateur"}


def digits(page: Path) -> None:
    """Trained: the weights that come with the package, by the command that the documentation names."""
    from nearsight import cli

    with redirect_stdout(StringIO()):
        assert cli.main(["explore", "sasa_nano", "digits:3", "--output", str(page)]) == 0


def converted(page: Path) -> None:
    """Trained: a small residual network of convolutions, on digits for some seconds, and then converted exactly."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    import nearsight as ns

    torch.manual_seed(0)
    data: Any = load_digits()
    pictures, labels = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)
    test, train = torch.randperm(len(labels)).split([360, len(labels) - 360])
    model = ns.create_model("sasa_nano", num_classes=10, in_chans=1, attention_stages=())
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(4):
        for batch in train[torch.randperm(len(train))].split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(pictures[batch]), labels[batch]).backward()
            optimiser.step()
    model.eval()
    ns.convert(model, init="exact")
    with torch.no_grad():
        correct = (model(pictures[test]).argmax(1) == labels[test]).float().mean().item()
    assert correct > 0.9, correct
    ns.explore(
        model,
        pictures[test[0]],
        classes=[str(n) for n in range(10)],
        title="A residual network of convolutions, converted exactly",
        subtitle=f"Trained on digits for a few seconds ({correct:.0%} of 360 test pictures), then converted.",
    ).save(page)


def untrained(name: str, page: Path, size: int = 64) -> None:
    """With random weights, on a photograph that comes with scikit-learn."""
    import numpy as np
    import torch
    from PIL import Image
    from sklearn.datasets import load_sample_image

    import nearsight as ns

    torch.manual_seed(0)
    model = ns.create_model(name).eval()
    photograph = Image.fromarray(load_sample_image("flower.jpg")).crop((107, 0, 534, 427)).resize((size, size))
    pixels = torch.tensor(np.asarray(photograph) / 255, dtype=torch.float32).movedim(-1, 0)
    ns.explore(model, (pixels - 0.5) / 0.25, picture=pixels, title=f"{name}, random weights").save(page)


MAKERS = {
    "sasa_nano": digits,
    "resnet_converted": converted,
    "nat_mini": partial(untrained, "nat_mini"),
    "halo_h0": partial(untrained, "halo_h0"),
}


def state() -> str:
    """A hash of all that an explorer is made from."""
    import nearsight

    package = Path(nearsight.__file__).parent
    files = [Path(__file__), *(file for file in sorted(package.rglob("*.*")) if file.suffix in PARTS)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class Explorer(SphinxDirective):
    """A frame with one of them, and a link to it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name, language = self.arguments[0], self.config.language or "en"
        if name not in MAKERS:
            raise self.error(f"there is no explorer {name!r}; there are {', '.join(MAKERS)}")
        up = "../" * (self.env.current_document.docname.count("/") + (language == "fr"))
        page, title = f"{up}{FOLDER}/{name}.html", f"{TITLES[language]}: {name}"
        frame = f'<iframe class="explorer" src="{page}" title="{title}" loading="lazy"></iframe>'
        return [nodes.raw("", f'{frame}<p><a href="{page}">{LABELS[language]}</a></p>', format="html")]


def make(app: Any, error: Exception | None) -> None:
    """Of the English build, which is the last; what is there of the same package stays."""
    if error is not None or app.builder.format != "html" or app.config.language == "fr":
        return
    kept = Path(app.srcdir).parent / "build" / "docs" / FOLDER
    noted = kept / "state"
    if not noted.exists() or noted.read_text() != state():
        kept.mkdir(parents=True, exist_ok=True)
        for name, maker in MAKERS.items():
            maker(kept / f"{name}.html")
        noted.write_text(state())
    shutil.copytree(kept, Path(app.outdir) / FOLDER, dirs_exist_ok=True, ignore=shutil.ignore_patterns("state"))


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("explorer", Explorer)
    app.connect("build-finished", make, priority=300)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
