# SPDX-License-Identifier: Apache-2.0
"""Several processes: the batch norms, the loss curve of one process, and that they stop together."""

import csv
import os
import signal
import subprocess
import sys
import time
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
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    network = small_network()
    both = nn.parallel.DistributedDataParallel(network)
    with synced_batch_norms(network):
        loss_of(both, slice(rank, None, 2)).backward()
    if rank == 0:
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        torch.save({"gradients": gradients, "state": network.state_dict()}, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_batch_norms_of_two_processes_are_that_of_one(tmp_path):
    mp.start_processes(one_process_of_two, (str(tmp_path),), nprocs=2, start_method="spawn")
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


def wait_for(file: Path, process: subprocess.Popen) -> None:
    while not file.exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
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
def test_two_processes_that_are_stopped_and_go_on_give_the_loss_curve_of_one(tmp_path):
    """SIGTERM stops both with advice. The curve is that of the same global batch, augmented alike, as far as float32 sums in
    another order allow. Where nothing is stopped they end with the same bytes, and a run that is killed goes on as well:
    test_resume.py."""
    # Not above: the processes of the test of batch norms read this file, and would wait for Lightning.
    from nearsight.training.recipe import Recipe
    from nearsight.training.train import train

    values = {"model": SMOOTH, "epochs": 2, "batch_size": 128, "lr": 0.003, "random_erasing": 0.5, "ema_decay": 0.9}
    train(Recipe(**values), tmp_path / "1")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    two_processes = command(*flags, "--devices=2", f"--output={tmp_path / '2'}")
    with subprocess.Popen(two_processes, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "2" / "last.ckpt", process)
        others = children(process)
        assert others
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: nearsight train --resume --output {tmp_path / '2'}" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert_gone(others)
    assert not (tmp_path / "2" / "model.safetensors").exists(), "it ended before it was stopped"
    subprocess.run(command("--resume", f"--output={tmp_path / '2'}"), env=environment(), check=True)
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert one[1]["train_loss"] < one[0]["train_loss"]
    for expected, found in zip(one, two, strict=True):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
        assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)
        assert found["train_accuracy"] == pytest.approx(expected["train_accuracy"], abs=2 / 1280)
