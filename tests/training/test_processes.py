"""Several processes, for real: gloo on the CPU, started as torchrun and as Slurm start them."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from tdm.cli import main
from tdm.errors import TDMError
from tdm.training.checkpoint import read_checkpoint
from tdm.training.launcher import launched
from tdm.training.loop import distill
from tdm.training.processes import Processes, joined
from tdm.training.settings import load_config
from tdm.training.tasks.mixture import MixtureTask

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
    [[], ["trajectory.stages=sample", "micro_batch_size=2", "critic.share_noise=true"]],
    ids=["data-parallel", "micro-batches"],
)
def test_two_processes_train_the_student_of_one(config, tmp_path, settings):
    alone(config, tmp_path / "one", *settings)
    code, stderr = torchrun(config, tmp_path / "two", *settings)
    assert code == 0, stderr
    one, two = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    fresh = alone(config, tmp_path / "start", "updates=1", "student.lr=1e-12", "critic.lr=1e-12").roles
    moved = max(float((one["adapters"]["student"][k] - v).abs().max()) for k, v in fresh.state("student").items())
    assert furthest(one, two) < TOLERANCE < moved / 20
    assert stderr.count("update 12/12") == 3  # its losses, its evaluation and its health: one process talks, not two
    assert torch.equal(one["generator"], two["generator"])


def test_two_processes_start_from_what_the_first_of_them_reads(config, tmp_path):
    alone(config, tmp_path / "first", "seed=1", "student.lr=1e-2", "critic.lr=1e-2")
    start = f"start_from={tmp_path / 'first' / 'checkpoint.pt'}"
    alone(config, tmp_path / "one", start)
    returned, errors = torchrun(config, tmp_path / "two", start)
    assert returned == 0, errors
    one, two = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    assert furthest(one, two) < TOLERANCE
    assert furthest(one, read_checkpoint(tmp_path / "first" / "checkpoint.pt")) > TOLERANCE


@pytest.mark.parametrize("family", ["sd15", "sd3"])  # blocks within blocks, and a transformer
def test_a_sharded_base_trains_the_same_student(family, bases, tmp_path):
    """Half of every weight in each process, with gradient checkpointing: what AdamW makes of the order of sums differs,
    by 0.4 % (sd15, whose first updates have gradients that are nearly 0) and 0.002 % (sd3); nothing else.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cube\na cat\n")
    options = f"""
task: {{name: pipeline, model: {bases(family)}, prompts: {prompts}, cache: {tmp_path / "cache"}, height: 16, width: 16}}
batch_size: 4
updates: 2
student: {{rank: 4}}
critic: {{rank: 4}}
memory: {{gradient_checkpointing: true}}
objective: {{guidance_scale: 2.0}}
output: {{teacher_steps: 3}}
"""
    (tmp_path / "tiny.yaml").write_text(options)
    assert main(["distill", str(tmp_path / "tiny.yaml"), "--device", "cpu", "--out", str(tmp_path / "one")]) == 0
    code, stderr = torchrun(tmp_path / "tiny.yaml", tmp_path / "two", "memory.shard=true")
    assert code == 0, stderr
    one, two = (read_checkpoint(tmp_path / name / "checkpoint.pt")["ema"]["weights"] for name in ("one", "two"))
    learned = [key for key in one if "lora_B" in key]
    far = sum(float((one[key] - two[key]).square().sum()) for key in learned) ** 0.5
    assert far < 0.02 * sum(float(one[key].square().sum()) for key in learned) ** 0.5


def test_two_processes_resume_bit_for_bit(config, tmp_path):
    assert torchrun(config, tmp_path / "whole")[0] == 0
    assert torchrun(config, tmp_path / "cut", "updates=4")[0] == 0
    code, stderr = torchrun(config, tmp_path / "cut", resume=True)
    assert code == 0, stderr
    assert furthest(*(read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))) == 0


@pytest.mark.parametrize(("size", "after"), [(1, "taken apart\n"), (2, "")])
def test_one_of_several_leaves_with_its_exit_code_before_the_interpreter_is_taken_apart(size, after):
    """The state that FSDP2 leaves in gloo sometimes aborts a process while the interpreter is taken apart."""
    script = (
        "import atexit, sys; from tdm.cli import main; atexit.register(print, 'taken apart'); sys.exit(main(['stud']))"
    )
    env = os.environ | {"WORLD_SIZE": str(size), "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, after)
    assert done.stderr.startswith("tdm: ")


@contextmanager
def two_of_srun(config, out):
    """A long run in two processes, as srun starts them: without torchrun, so that nobody but the run itself notices."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tdm.cli", "distill", str(config), "updates=1000000", "--device", "cpu", "--out"]
    both = [
        subprocess.Popen(
            [*command, str(out)],
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        until = time.monotonic() + 120
        while not (out / "checkpoint.pt").exists() and time.monotonic() < until:
            time.sleep(0.1)
        yield both
    finally:
        for process in both:
            process.kill()


@pytest.mark.parametrize("sharded", [False, True], ids=["whole base", "sharded base"])
def test_a_process_that_dies_ends_the_run_with_a_message(sharded, config, bases, tmp_path):
    if sharded:  # its parts are exchanged in the middle of the network
        (tmp_path / "prompts.txt").write_text("a red cube\na cat\n")
        config.write_text(f"""
task: {{name: pipeline, model: {bases("sd3")}, prompts: {tmp_path / "prompts.txt"}, height: 16, width: 16}}
batch_size: 4
student: {{rank: 4}}
critic: {{rank: 4}}
memory: {{shard: true}}
output: {{preview_every: 0, checkpoint_every: 4}}
""")
    with two_of_srun(config, tmp_path / "run") as (first, second):
        second.send_signal(signal.SIGKILL)
        _, stderr = first.communicate(timeout=60)
    assert first.returncode == 2, stderr
    assert "another process of this run has ended" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] >= 4


@pytest.mark.parametrize(
    ("size", "place", "line"),
    [
        ("2", {}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: start the processes with"),
        ("2", {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": ""}, "but MASTER_ADDR, MASTER_PORT not set"),
    ],
)
def test_a_launcher_that_says_half_is_one_line(size, place, line, monkeypatch):
    for name, value in {"WORLD_SIZE": size, **place}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TDMError, match=line), joined("cpu"):
        pass


@pytest.mark.parametrize("size", ["", " ", "1", "many"])
def test_an_environment_without_several_processes_is_one_process(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert not launched()
    with joined("cpu") as (processes, device):
        assert (processes.size, device.type) == (1, "cpu")


def test_one_process_that_is_asked_to_stop_stops_all_after_the_same_update(config, tmp_path):
    with two_of_srun(config, tmp_path / "run") as both:
        both[1].send_signal(signal.SIGTERM)
        stderrs = [process.communicate(timeout=60)[1] for process in both]
    done = read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"]
    assert [process.returncode for process in both] == [130, 0], stderrs
    assert f"tdm: stopped after update {done}; the same command with --resume goes on" in stderrs[0]


def test_an_alarm_stops_all_processes(config, tmp_path):
    code, stderr = torchrun(config, tmp_path, "critic.lr=0.1", "updates=400", "output.stop_on_alarm=true")
    assert code != 0
    done = read_checkpoint(tmp_path / "checkpoint.pt")["step"]
    assert done < 400
    assert f"; stopped after update {done}: resume to go on as it is" in stderr
    assert "another process" not in stderr


def test_what_cannot_be_shared_is_refused(config, tmp_path, monkeypatch):
    with pytest.raises(TDMError, match="cannot be shared evenly by 3"):
        alone(config, tmp_path, processes=Processes(0, 3))
    with pytest.raises(TDMError, match="micro_batch_size 8 does not divide the 12"):
        alone(config, tmp_path, "batch_size=24", "micro_batch_size=8", processes=Processes(0, 2))
    with pytest.raises(TDMError, match=r"memory\.shard needs several processes"):
        alone(config, tmp_path, "memory.shard=true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(TDMError, match="names one GPU"), joined("cuda:1"):
        pass
