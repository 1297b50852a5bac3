"""Several processes, for real: gloo on the CPU, started as torchrun and as Slurm start them."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from tdm.errors import TDMError
from tdm.training.checkpoint import read_checkpoint
from tdm.training.config import load_config
from tdm.training.loop import distill
from tdm.training.mixture import MixtureTask
from tdm.training.processes import Processes, joined

CONFIG = """
task: {name: mixture, width: 16, samples: 200}
batch_size: 16
updates: 12
output: {log_every: 4, evaluate_every: 6, checkpoint_every: 4}
"""
# The same gradients up to the order of sums; AdamW divides them by their own size, so that an entry which is nearly 0
# may move differently by a part of its rate (4e-4). Twelve updates at that rate move weights by up to 5e-3.
TOLERANCE = 2e-5


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(config, out, *settings, n=2, resume=False):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port"]
    command = [*launcher, str(free_port()), "-m", "tdm.cli", "distill", str(config), *settings, "--out", str(out)]
    command += ["--device", "cpu", *(["--resume"] if resume else [])]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    return done.returncode, done.stderr


def alone(config, out, *settings, **kwargs):
    task = MixtureTask(width=16, samples=200)
    return distill(task, load_config(config, settings), out, **kwargs, report=lambda _: None)


def furthest(one, two):
    """The largest difference of two checkpoints' weights, and the largest move of the first from its start."""
    pairs = [(one["adapters"][role], two["adapters"][role]) for role in ("student", "critic")]
    pairs.append((one["ema"]["weights"], two["ema"]["weights"]))
    return max(float((a[key] - b[key]).abs().max()) for a, b in pairs for key in a)


@pytest.mark.parametrize(
    "settings",
    [[], ["trajectory.stages=sample", "micro_batch_size=2", "critic.share_noise=true"], ["memory.shard=true"]],
    ids=["data-parallel", "micro-batches", "sharded-base"],
)
def test_two_processes_train_the_student_of_one(config, tmp_path, settings):
    alone(config, tmp_path / "one", *[s for s in settings if "shard" not in s])
    code, told = torchrun(config, tmp_path / "two", *settings)
    assert code == 0, told
    one, two = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    fresh = alone(config, tmp_path / "start", "updates=1", "student.lr=1e-12", "critic.lr=1e-12").roles
    moved = max(float((one["adapters"]["student"][k] - v).abs().max()) for k, v in fresh.state("student").items())
    assert furthest(one, two) < TOLERANCE < moved / 20
    assert told.count("update 12/12") == 2  # its losses and its evaluation: one process talks, not two
    assert torch.equal(one["generator"], two["generator"])


def test_two_processes_resume_bit_for_bit(config, tmp_path):
    assert torchrun(config, tmp_path / "whole")[0] == 0
    assert torchrun(config, tmp_path / "cut", "updates=4")[0] == 0
    code, told = torchrun(config, tmp_path / "cut", resume=True)
    assert code == 0, told
    assert furthest(*(read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))) == 0


def test_a_process_that_dies_ends_the_run_with_a_message(config, tmp_path):
    """Started without torchrun, as srun does, so that nobody but the run itself can notice."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "tdm.cli",
        "distill",
        str(config),
        "updates=1000000",
        "--out",
        str(tmp_path / "run"),
    ]
    first, second = (
        subprocess.Popen(
            [*command, str(tmp_path / "run")],
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < until:
            time.sleep(0.1)
        second.send_signal(signal.SIGKILL)
        _, told = first.communicate(timeout=60)
    finally:
        first.kill()
        second.kill()
    assert first.returncode == 2
    assert "another process of this run has ended" in told.splitlines()[-1]
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] >= 4


def test_what_cannot_be_shared_is_refused(config, tmp_path, monkeypatch):
    with pytest.raises(TDMError, match="cannot be shared evenly by 3"):
        alone(config, tmp_path, processes=Processes(0, 3))
    with pytest.raises(TDMError, match="micro_batch_size 8 does not divide the 12"):
        alone(config, tmp_path, "batch_size=24", "micro_batch_size=8", processes=Processes(0, 2))
    with pytest.raises(TDMError, match=r"memory\.shard needs several processes"):
        alone(config, tmp_path, "memory.shard=true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TDMError, match="names one GPU"), joined("cuda:1"):
        pass
