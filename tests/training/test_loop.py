"""Whole runs: files, resume bit for bit, divergence, and what is refused."""

import json

import pytest
import torch
from PIL import Image
from tdm.errors import TDMError
from tdm.training.checkpoint import read_checkpoint
from tdm.training.config import RoleConfig
from tdm.training.loop import distill
from tdm.training.optimizers import learning_rate
from tdm.training.precision import best_precision
from tdm.training.preview import Preview
from tdm.training.settings import load_config
from tdm.training.tasks.mixture import MixtureTask

SMALL = [
    "updates=12",
    "batch_size=8",
    "student.rank=2",
    "critic.rank=2",
    "output.log_every=4",
    "ema.decay=0.9",
    "trajectory.stages=sample",
]
QUIET = ["output.teacher_steps=3", "output.preview_every=0", "output.evaluate_every=0", "output.checkpoint_every=6"]


class Task(MixtureTask):
    """A mixture with prompts that do nothing, and with pictures."""

    def __init__(self, width=8):
        super().__init__(width=width, samples=50)

    def conditions(self, n, generator):
        return {"label": torch.randint(3, (n,), generator=generator)}, (self.dim,)

    def preview(self, student, teacher, critic):
        noise, (cond, _) = torch.zeros(3, 2), self.conditions(3, torch.Generator().manual_seed(0))
        assert student(noise, cond).shape == teacher(noise, cond).shape == critic(noise, cond).shape == (3, 2)
        return Preview(Image.new("RGB", (2, 3)), {"diversity": 1.0})


def go(out, *overrides, task=None, **kwargs):
    config = load_config(None, [*SMALL, *QUIET, *overrides])
    return distill(task or Task(), config, out, report=lambda _: None, **kwargs)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def states_equal(a, b):
    return all(
        torch.equal(a.roles.state(role)[key], value)
        for role in ("student", "critic")
        for key, value in b.roles.state(role).items()
    )


def plain(saved):
    """What was saved, with moments of 8 bits as numbers."""
    if isinstance(saved, dict):
        return {key: plain(value) for key, value in saved.items()}
    return saved.dequantize() if type(saved).__name__ == "OptimState8bit" else saved


class KilledError(Exception):
    pass


def kill_at(step):
    def callback(_run, line):
        if line["step"] == step:
            raise KilledError

    return callback


def test_run_writes_metrics_previews_and_a_checkpoint(tmp_path):
    records, messages = [], []
    config = load_config(
        None, [*SMALL, "output.preview_every=6", "output.evaluate_every=6", "output.checkpoint_every=0"]
    )
    run = distill(
        Task(), config, tmp_path, callbacks=[lambda run, line: records.append((run.step, line))], report=messages.append
    )
    assert run.step == 12
    assert sorted(p.name for p in (tmp_path / "previews").iterdir()) == ["000006.png", "000012.png"]
    assert lines(tmp_path) == [line for _, line in records]
    training = [line for line in lines(tmp_path) if "student_loss" in line]
    assert [line["step"] for line in training] == [4, 8, 12]
    assert {f"gap_{i}" for i in range(4)} | {"critic_grad", "std_ratio", "seconds_per_update"} <= set(training[0])
    assert [line["step"] for line in lines(tmp_path) if "eval/energy" in line] == [6, 12]
    assert messages[0].startswith("update 4/12  ")
    assert "ETA" in messages[0]
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 12
    assert not list(tmp_path.glob("*.tmp"))


def test_same_seed_is_the_same_run_and_watching_changes_nothing(tmp_path):
    one = go(tmp_path / "1")
    two = go(tmp_path / "2", "output.preview_every=3", "output.evaluate_every=5", "output.log_every=1")
    assert states_equal(one, two)
    assert all(torch.equal(one.ema.weights[key], value) for key, value in two.ema.weights.items())
    assert not states_equal(one, go(tmp_path / "3", "seed=1"))


@pytest.mark.parametrize(
    "option",
    ["student.decay=constant", "student.decay=cosine", "full_weights=true", "memory.optimizer=adamw8bit"],
)
def test_a_killed_run_resumes_bit_for_bit(tmp_path, option):
    options = [option, "critic.warmup=5", "critic.per_student=2", "student.rank=32"]  # 8 bits from 4096 weights on

    def task():
        return Task(width=128)

    whole = go(tmp_path / "whole", *options, task=task())
    with pytest.raises(KilledError):
        go(tmp_path / "cut", *options, task=task(), callbacks=[kill_at(8)])
    assert read_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"] == 6
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "student')  # killed while writing
    resumed = go(tmp_path / "cut", *options, task=task(), resume=True)
    assert states_equal(whole, resumed)
    assert all(torch.equal(whole.ema.weights[key], value) for key, value in resumed.ema.weights.items())
    a, b = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    assert a.pop("config") == b.pop("config")
    torch.testing.assert_close(plain(a), plain(b), rtol=0, atol=0)  # optimisers, generator and counters too
    assert [line["step"] for line in lines(tmp_path / "cut")] == [4, 6, 8, 12]  # nothing twice


def test_a_longer_run_may_continue_but_other_settings_may_not(tmp_path):
    go(tmp_path)
    longer = go(tmp_path, "updates=16", "output.log_every=1", resume=True)
    assert longer.step == 16
    with pytest.raises(TDMError, match=r"critic.lr: 0.0004 there, 0.1 here; student.betas: \(0.0, 0.99\) there"):
        go(tmp_path, "updates=16", "critic.lr=0.1", "student.betas=[0.5, 0.9]", resume=True)
    decaying = tmp_path / "decay"
    go(decaying, "student.decay=linear")
    with pytest.raises(TDMError, match="updates: 12 there, 16 here"):
        go(decaying, "student.decay=linear", "updates=16", resume=True)


def test_a_run_is_never_overwritten_or_invented(tmp_path):
    with pytest.raises(TDMError, match="no checkpoint"):
        go(tmp_path, resume=True)
    go(tmp_path)
    with pytest.raises(TDMError, match="already holds a run"):
        go(tmp_path)


def test_divergence_names_the_update_and_keeps_the_last_checkpoint(tmp_path):
    class Breaks(Task):
        calls = 0

        def conditions(self, n, generator):
            self.calls += 1
            if self.calls == 11:
                with torch.no_grad():
                    self.base.outer.lora_B["student"].weight.fill_(float("nan"))
            return super().conditions(n, generator)

    with pytest.raises(TDMError, match=r"_loss is nan at update 11: lower \w+.lr") as error:
        go(tmp_path, task=Breaks())
    assert "\n" not in str(error.value)
    saved = read_checkpoint(tmp_path / "checkpoint.pt")
    assert saved["step"] == 6
    assert all(value.isfinite().all() for value in saved["adapters"]["student"].values())


def test_start_from_an_earlier_student(tmp_path):
    first = go(tmp_path / "first")
    start = [f"start_from={tmp_path / 'first' / 'checkpoint.pt'}", "updates=1", "student.lr=1e-30", "critic.lr=1e-30"]
    mean, critic = first.ema.weights, first.roles.state("critic")
    expected = {"checkpoint": critic, "student": mean}
    for where in ("checkpoint", "student", "teacher"):
        run = go(tmp_path / where, *start, f"critic.start={where}")
        torch.testing.assert_close(run.roles.state("student"), mean)
        if where in expected:
            torch.testing.assert_close(run.roles.state("critic"), expected[where])
        else:
            assert all(v.abs().max() < 1e-20 for key, v in run.roles.state("critic").items() if "lora_B" in key)


def test_head_start_leaves_student_and_mean_alone(tmp_path):
    updates = iter(range(1, 13))
    run = go(tmp_path, "critic.head_start=11", stop=lambda: next(updates) == 11)
    assert run.step == 11
    assert run.ema.count == 0
    assert all((value == 0).all() for key, value in run.roles.state("student").items() if "lora_B" in key)
    assert all("student_loss" not in line for line in lines(tmp_path))


def test_checkpointing_needs_a_base_that_can(tmp_path):
    with pytest.raises(TDMError, match="MixtureDenoiser cannot checkpoint"):
        go(tmp_path, "memory.gradient_checkpointing=true")
    with pytest.raises(TDMError, match="on a CPU bf16 cannot be checkpointed"):
        go(tmp_path, "memory.gradient_checkpointing=true", "precision=bf16")


def test_automatic_precision_is_settled_before_the_first_update(tmp_path, monkeypatch):
    assert go(tmp_path / "here", "precision=auto").config.precision == best_precision("cpu")
    for capabilities, precision in (({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        assert go(tmp_path / precision, "precision=auto").config.precision == precision
        saved = read_checkpoint(tmp_path / precision / "checkpoint.pt")["config"]
        assert saved["precision"] == precision


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("unit", ["avx512_bf16", "avx2"])
def test_bf16_on_a_cpu_that_has_no_units_for_it_is_told_of(tmp_path, monkeypatch, precision, unit):
    """bf16 saves nothing on such a CPU."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
    messages = []
    distill(Task(), load_config(None, [*SMALL, *QUIET, f"precision={precision}"]), tmp_path, report=messages.append)
    notes = [line for line in messages if "this cpu has no bf16 units" in line]
    assert len(notes) == (precision == "bf16" and unit == "avx2")
    assert messages[: len(notes)] == notes  # before the first update


def test_learning_rate_follows_the_update(tmp_path):
    run = go(tmp_path, "student.decay=cosine", "critic.warmup=100")
    for role, config in (("student", run.config.student), ("critic", run.config.critic)):
        saved = read_checkpoint(tmp_path / "checkpoint.pt")["optimizers"][role]["param_groups"][0]["lr"]
        assert saved == learning_rate(config, 11, 12) < config.lr / 5


def test_learning_rate_warms_up_and_decays():
    assert [learning_rate(RoleConfig(lr=1.0, warmup=3), i, 10) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = RoleConfig(lr=2.0, decay="linear", lr_end=0.5)
    assert [learning_rate(linear, i, 4) for i in (0, 2, 4)] == [2.0, 1.5, 1.0]
    cosine = RoleConfig(lr=1.0, decay="cosine")
    assert [round(learning_rate(cosine, i, 4), 6) for i in (0, 2, 4)] == [1.0, 0.5, 0.0]
