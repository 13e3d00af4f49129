# SPDX-License-Identifier: Apache-2.0
"""A trained convolutional network, rewritten as attention and fine-tuned, against itself fine-tuned as long.

.venv/bin/python examples/convert_fashion_mnist.py --output runs/convert

For every seed: train a small ResNet on Fashion-MNIST; convert it exactly and compare every prediction on the test images;
fine-tune both for the same steps on the same images; measure both on clean and on corrupted test images. Stopped at any
moment, the same command goes on after the last whole step. The folder then holds table.csv, summary.json, heads.csv with
heads.svg, and for every seed the weights and the measurements. docs/howto/convert.md says what came out.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import convert_heads
import torch
import torch.nn.functional as F
from convert_heads import Head
from safetensors.torch import load_file, save
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as change

import nearsight as ns
from nearsight.conversion import ConversionReport, GatedPositionalSelfAttention
from nearsight.files import make_folder, write_bytes, write_text
from nearsight.pages.style import to_svg_file
from nearsight.training.data import Pictures, load_pictures

BATCH_SIZE = 128
# Of the learning rates the peak, after a tenth of the steps. The heads' own parameters are few and count in cells.
TRAIN_LR, TUNE_LR, HEADS_LR = 3e-3, 1e-3, 3e-3
WEIGHT_DECAY = 0.05
ARMS = ("trained", "convolution", "attention")

# Images are in [0, 1]; each corruption has five severities.
CORRUPTIONS: dict[str, tuple[tuple[float, ...], Callable[[Tensor, float], Tensor]]] = {
    "noise": ((0.05, 0.1, 0.15, 0.2, 0.3), lambda x, sigma: (x + sigma * _noise_like(x)).clamp(0, 1)),
    "blur": ((0.6, 0.8, 1.0, 1.3, 1.6), lambda x, sigma: change.gaussian_blur(x, [9, 9], [sigma, sigma])),
    "contrast": ((0.7, 0.55, 0.4, 0.3, 0.2), lambda x, factor: change.adjust_contrast(x, factor)),
    "rotation": ((8, 14, 20, 28, 36), lambda x, degrees: change.rotate(x, degrees, change.InterpolationMode.BILINEAR)),
    "translation": ((2, 3, 4, 5, 6), lambda x, cells: change.affine(x, 0, [int(cells), int(cells)], 1, [0, 0])),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/convert"), help="folder (default: runs/convert)")
    parser.add_argument("--data-root", help="folder that holds Fashion-MNIST; else the usual places are searched")
    parser.add_argument("--seeds", type=int, default=3, help="runs from different starts (default: 3)")
    parser.add_argument("--train-epochs", type=int, default=3, help="of the convolutional network (default: 3)")
    parser.add_argument("--tune-epochs", type=int, default=2, help="of both afterwards (default: 2)")
    parser.add_argument(
        "--margin", type=int, default=1, help="cells that heads may reach beyond the kernel (default: 1)"
    )
    parser.add_argument("--corrupted", type=int, default=2000, help="test images of each corruption (default: 2000)")
    options = parser.parse_args()

    pictures = load_pictures("fashion-mnist", options.data_root)
    make_folder(options.output)
    results = {}
    for seed in range(options.seeds):
        folder = options.output / f"seed-{seed}"
        make_folder(folder)
        results[seed] = run_seed(folder, seed, pictures, options)
        write_results(options.output, results)


# ------------------------------------------------------------------------------------------------------- one seed


def run_seed(folder: Path, seed: int, pictures: Pictures, options: argparse.Namespace) -> dict[str, Any]:
    """What is measured of one start, arm by arm; what the folder holds already is not done again."""
    torch.manual_seed(seed)
    network = small_resnet(len(pictures.classes))
    trained = folder / "trained.safetensors"
    if trained.exists():
        network.load_state_dict(load_file(trained))
    else:
        fit(network, pictures, options.train_epochs, TRAIN_LR, seed)
        write_bytes(trained, save(network.state_dict()))

    attention = deepcopy(network)
    torch.manual_seed(seed)  # of the queries and keys, whether the weights were trained just now or read
    report = ns.convert(attention, init="exact", margin=options.margin)
    found = {
        "conversion": _once(folder / "conversion.json", lambda: compare(network, attention, pictures, report)),
        "trained": _once(folder / "trained.json", lambda: measure(network, pictures, options.corrupted)),
    }
    for name, model in (("convolution", network), ("attention", attention)):

        def tune_and_measure(name: str = name, model: nn.Module = model) -> dict[str, Any]:
            fit(model, pictures, options.tune_epochs, TUNE_LR, seed + 1000)
            write_bytes(folder / f"{name}.safetensors", save(model.state_dict()))
            return measure(model, pictures, options.corrupted)

        found[name] = _once(folder / f"{name}.json", tune_and_measure)
    return found


def _once(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The file's content; the work is done, and written there, only if it is not there yet."""
    if not path.exists():
        print(f"{path.parent.name}: {path.stem} ...", flush=True)
        write_text(path, json.dumps(work(), indent=1) + "\n")
    return json.loads(path.read_text())


def small_resnet(classes: int) -> nn.Sequential:
    """A ResNet of 3 x 3 convolutions for grey pictures of 28 x 28: a stem of stride 2 and two blocks of timm's."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        BasicBlock(16, 32, stride=2, downsample=downsample_conv(16, 32, kernel_size=1, stride=2)),
        BasicBlock(32, 64, stride=2, downsample=downsample_conv(32, 64, kernel_size=1, stride=2)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)),
    )


def fit(network: nn.Module, pictures: Pictures, epochs: int, lr: float, seed: int) -> None:
    """AdamW with a cosine; the seed decides the order of the images and how each is changed, whatever the network."""
    images, labels = pictures.train.images, pictures.train.labels  # pyright: ignore[reportAttributeAccessIssue]
    per_epoch = len(labels) // BATCH_SIZE
    groups = _groups(network, lr)
    optimizer = torch.optim.AdamW(groups)
    peaks = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peaks, total_steps=epochs * per_epoch, pct_start=0.1, cycle_momentum=False
    )
    torch.manual_seed(seed)
    network.train()
    for epoch in range(epochs):
        losses = []
        for batch in torch.randperm(len(labels))[: per_epoch * BATCH_SIZE].split(BATCH_SIZE):
            x = pictures.augment(_seen(images[batch].float() / 255, pictures))
            loss = F.cross_entropy(network(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"  epoch {epoch + 1} of {epochs}: loss {sum(losses) / len(losses):.4f}", flush=True)


def _groups(network: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Weights, what is never decayed, and where the heads look."""
    heads = [
        parameter
        for module in network.modules()
        if isinstance(module, GatedPositionalSelfAttention)
        for parameter in (module.shift, module.spread, module.gate)
    ]
    others = [parameter for parameter in network.parameters() if all(parameter is not head for head in heads)]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "lr": lr, "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in others if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
        {"params": heads, "lr": HEADS_LR, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# ----------------------------------------------------------------------------------------------------- measurements


def compare(before: nn.Module, after: nn.Module, pictures: Pictures, report: ConversionReport) -> dict[str, Any]:
    """Every test image through both networks: as it is deployed, and with attention computed, as it is trained."""
    images = pictures.test.images.float() / 255  # pyright: ignore[reportAttributeAccessIssue]
    one, two = logits(before, images, pictures), logits(after, images, pictures)
    three = logits(after, images, pictures, gradients=True)
    return {
        "images": len(images),
        "changed_predictions": [int((one.argmax(1) != other.argmax(1)).sum()) for other in (two, three)],
        "relative_error": [((one - other).abs().max() / one.abs().max()).item() for other in (two, three)],
        "parameters": [report.parameters_before, report.parameters_after],
        "converted": list(report.converted),
    }


def measure(network: nn.Module, pictures: Pictures, corrupted: int) -> dict[str, Any]:
    """Correct answers on all clean test images, the accuracy on a part of them for every corruption, and the heads."""
    images, labels = pictures.test.images.float() / 255, torch.as_tensor(pictures.test.labels)  # pyright: ignore
    correct = int((logits(network, images, pictures).argmax(1) == labels).sum())
    part = torch.arange(0, len(labels), max(1, len(labels) // corrupted))
    shares: dict[str, dict[str, float]] = {}
    for name, (severities, corrupt) in CORRUPTIONS.items():
        answers = {
            severity: logits(network, corrupt(images[part], severity), pictures).argmax(1) for severity in severities
        }
        shares[name] = {f"{severity:g}": _share(answer == labels[part]) for severity, answer in answers.items()}
    return {"clean": correct / len(labels), "correct": correct, "corrupted": shares, "heads": heads(network)}


def logits(network: nn.Module, images: Tensor, pictures: Pictures, gradients: bool = False) -> Tensor:
    """(n, classes) in evaluation mode; with gradients the attention layers leave nothing out."""
    network.eval()
    with torch.set_grad_enabled(gradients):
        return torch.cat([network(_seen(part, pictures)).detach() for part in images.split(500)])


def heads(network: nn.Module) -> dict[str, Any]:
    """Where the heads of every converted layer look: centres in cells, how wide, and how much content they let in."""
    return {
        name: {
            "centres": module.centres.tolist(),
            "spread": module.spread.detach().clamp(min=0).tolist(),
            "gate": module.gate.detach().clamp(0, 1).tolist(),
        }
        for name, module in network.named_modules()
        if isinstance(module, GatedPositionalSelfAttention)
    }


def _noise_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def _seen(images: Tensor, pictures: Pictures) -> Tensor:
    return (images - pictures.mean[0]) / pictures.std[0]


def _share(right: Tensor) -> float:
    return right.double().mean().item()


# ----------------------------------------------------------------------------------------------------------- results


def write_results(output: Path, results: dict[int, dict[str, Any]]) -> None:
    """Every measured accuracy in table.csv, means over the seeds in summary.json and on the screen, and the heads."""
    rows = [row for seed, found in results.items() for arm in ARMS for row in _rows(seed, arm, found[arm])]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("seed", "arm", "corruption", "severity", "accuracy"), *rows])
    write_text(output / "table.csv", text.getvalue())

    kinds = ("clean", *CORRUPTIONS)
    summary: dict[str, Any] = {"seeds": len(results), "conversion": [found["conversion"] for found in results.values()]}
    for arm in ARMS:
        summary[arm] = {
            kind: _mean_and_sd([mean_over(found[arm], kind) for found in results.values()]) for kind in kinds
        }
    gains = {
        kind: [
            mean_over(found["attention"], kind) - mean_over(found["convolution"], kind) for found in results.values()
        ]
        for kind in kinds
    }
    summary["attention - convolution"] = {kind: _mean_and_sd(differences) for kind, differences in gains.items()}
    write_text(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    for name in (*ARMS, "attention - convolution"):
        cells = [f"{kind} {100 * mean:.2f} +- {100 * sd:.2f}" for kind, (mean, sd) in summary[name].items()]
        print(f"{name}: {', '.join(cells)}", flush=True)
    heads = gathered(results)
    write_text(output / "heads.csv", convert_heads.to_csv(heads))
    write_bytes(output / "heads.svg", to_svg_file(convert_heads.draw(heads)))


def _rows(seed: int, arm: str, found: dict[str, Any]) -> list[tuple[Any, ...]]:
    corrupted = found["corrupted"]
    rows = [(seed, arm, kind, severity, share) for kind in corrupted for severity, share in corrupted[kind].items()]
    return [(seed, arm, "clean", "", found["clean"]), *rows]


def mean_over(found: dict[str, Any], kind: str) -> float:
    """The accuracy on clean images, or the mean over a corruption's severities."""
    if kind == "clean":
        return found["clean"]
    shares = found["corrupted"][kind].values()
    return sum(shares) / len(shares)


def _mean_and_sd(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def gathered(results: dict[int, dict[str, Any]]) -> list[Head]:
    """The heads of every seed, layer by layer, after attention was tuned."""
    return [
        Head(seed, layer, number, row, column, gate)
        for seed, found in results.items()
        for layer, looked in found["attention"]["heads"].items()
        for number, ((row, column), gate) in enumerate(zip(looked["centres"], looked["gate"], strict=True), start=1)
    ]


if __name__ == "__main__":
    main()
