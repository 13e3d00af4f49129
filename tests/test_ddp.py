# SPDX-License-Identifier: Apache-2.0
"""Several processes: the batch norms, the loss curve of one process, and that they stop together."""

import csv
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from nearsight.training.batchnorm import synced_batch_norms

# A smooth network without batch norm: where a ReLU or a maximum turns on a rounding, two float32 runs part after some steps,
# be it of one process.
SMOOTH = "test_vit,patch_size=4"


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "nearsight", "train", *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def rows(output: Path) -> list[dict[str, float]]:
    with (output / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


# ----------------------------------------------------------------------------------------------------------- batch norm


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(2, 3, 2),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 4 * 3, 4),
        nn.BatchNorm1d(4),
    )
    return nn.Sequential(*layers).double()


def loss_of(network: nn.Module, part: slice) -> torch.Tensor:
    torch.manual_seed(1)
    images, labels = torch.randn(12, 2, 5, 4).double(), torch.randint(0, 4, (12,))
    return nn.functional.cross_entropy(network(images[part]), labels[part])


def one_process_of_two(rank: int, folder: str) -> None:
    patience = timedelta(minutes=2)  # where the other one fails
    dist.init_process_group("gloo", f"file://{folder}/meeting", patience, rank=rank, world_size=2)
    network = small_network()
    both = nn.parallel.DistributedDataParallel(network)
    with synced_batch_norms(network):
        loss_of(both, slice(rank, None, 2)).backward()
    if rank == 0:
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        torch.save({"gradients": gradients, "state": network.state_dict()}, f"{folder}/found.pt")
    dist.destroy_process_group()


def one_process_of_one_more(_: int, folder: str) -> None:
    one_process_of_two(1, folder)


@pytest.mark.slow
def test_batch_norms_of_two_processes_are_that_of_one(tmp_path):
    other = mp.start_processes(one_process_of_one_more, (str(tmp_path),), join=False, start_method="spawn")
    one_process_of_two(0, str(tmp_path))  # this one
    other.join()
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    network = small_network()
    loss_of(network, slice(None)).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(
            found["gradients"][name],
            parameter.grad,
            rtol=1e-9,
            atol=1e-12,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    state = network.state_dict()
    assert found["state"].keys() == state.keys()
    for name, tensor in state.items():  # the running means and variances among them
        torch.testing.assert_close(
            found["state"][name], tensor, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


# -------------------------------------------------------------------------------------------------------------- the run


def wait_for(epochs: int, output: Path, process: subprocess.Popen) -> None:
    while not (output / "metrics.csv").exists() or len(rows(output)) < epochs:
        assert process.poll() is None, f"the run ended before it had {epochs} epochs"
        time.sleep(0.02)


def children(process: subprocess.Popen) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in found.split()]


def assert_gone(processes: list[int]) -> None:
    for _ in range(100):  # the system takes a moment to bury them
        if not any(Path(f"/proc/{number}/cmdline").exists() for number in processes):
            break
        time.sleep(0.1)
    assert [number for number in processes if Path(f"/proc/{number}/cmdline").exists()] == []


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one_and_stop_together(tmp_path, monkeypatch):
    """The curve is that of the same global batch, augmented alike, as far as float32 sums in another order allow. SIGTERM
    stops both with advice, in the third epoch. What follows the advice goes on: test_resume.py, of two processes too."""
    # Not above: the processes of the test of batch norms read this file, and would wait for Lightning.
    from nearsight.training.recipe import Recipe
    from nearsight.training.train import train

    monkeypatch.setattr("nearsight.training.train.write_report", lambda *arguments: None)
    values = {"model": SMOOTH, "epochs": 3, "batch_size": 128, "lr": 0.003, "random_erasing": 0.5, "ema_decay": 0.9}
    train(Recipe(**values), tmp_path / "1")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    two_processes = command(*flags, "--devices=2", f"--output={tmp_path / '2'}")
    with subprocess.Popen(two_processes, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        wait_for(2, tmp_path / "2", process)
        others = children(process)
        assert others
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: nearsight train --resume --output {tmp_path / '2'}" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert_gone(others)
    assert not (tmp_path / "2" / "model.safetensors").exists(), "it ended before it was stopped"
    one, two = rows(tmp_path / "1")[:2], rows(tmp_path / "2")
    assert one[1]["train_loss"] < one[0]["train_loss"]
    for expected, found in zip(one, two, strict=True):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
        assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)
        assert found["train_accuracy"] == pytest.approx(expected["train_accuracy"], abs=2 / 1280)
