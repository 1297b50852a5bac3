"""`tdm prove`, for real on the CPU: children that are killed and resumed, two processes, every storage, one table."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tdm.cli import main
from tdm.errors import TDMError
from tdm.prove.bases import Base
from tdm.prove.checks import NotAvailableError, Workplace, cards_row, preset_row, storage_row
from tdm.prove.child import DiedError, in_child
from tdm.prove.compare import distance, equal
from tdm.prove.jobs import Machine, machine
from tdm.prove.record import GIB
from tdm.prove.run import SECTIONS
from tdm.tests.commands import refused
from tdm.tests.processes import start
from tdm.tests.training.base_tasks import configs_of
from tdm.training.estimate.estimator import Estimator
from torchao.optim.subclass_8bit import OptimState8bit

Bases = Callable[[str], Path]
SIZE = ["task.height=16", "task.width=16", "student.rank=2", "critic.rank=2", "memory.optimizer=adamw"]
RUN = [*SIZE, "--device", "cpu", "--updates", "4", "--families", "sd15,pixart"]


def prove(out: Path, *arguments: str) -> int:
    return main(["prove", *arguments, "--out", str(out)])


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "prove.jsonl").read_text().splitlines()]


def states(out: Path) -> dict[str, str]:
    return {f"{line['row']['section']} {line['row']['name']}": line["result"]["state"] for line in lines(out)}


@pytest.fixture(scope="module")
def proved(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of the whole command with a U-Net and the shapes of a transformer, and its arguments."""
    folder = tmp_path_factory.mktemp("prove")
    shapes = configs_of(bases("pixart"), folder / "shapes")
    arguments = [*RUN, "--memory", "12gb", "--bases", str(bases("sd15")), str(shapes)]
    assert prove(folder / "out", *arguments) == 0
    return folder / "out", arguments


def test_every_section_has_its_rows_in_the_table(proved: tuple[Path, list[str]]) -> None:
    out, _ = proved
    ok = [f"bench {model}" for model in ("bundled", "sdxl", "sd3", "pixart", "cogvideox")]
    ok += ["presets pixart 12gb", "presets sd15 12gb", "cards data parallel", "cards sharded base"]
    ok += [f"storage {storage}" for storage in ("plain", "nf4", "int8", "llm_int8", "fp8", "compile")]
    assert states(out) == dict.fromkeys(ok, "ok") | {"storage offload": "not available"}
    title, _, _, _, _, *rows = (out / "prove.md").read_text().splitlines()
    assert title.startswith("`tdm prove task.height=16")
    assert f"torch {torch.__version__}" in title
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[1:]] == list(states(out))
    assert all(row.count("|") == 9 for row in rows)
    assert not (out / "work").exists()


def test_the_table_says_whose_weights_they_were(proved: tuple[Path, list[str]], bases: Bases) -> None:
    weights = {
        line["row"]["name"]: line["row"]["weights"] for line in lines(proved[0]) if line["row"]["section"] != "bench"
    }
    shapes = f"random, in the shapes of {proved[0].parent / 'shapes'}"
    assert weights.pop("sd15 12gb") == str(bases("sd15"))
    assert weights.pop("compile") == "random weights, pixart"
    assert set(weights.values()) == {shapes}  # the smallest base is that of cards and storage


def test_runs_are_killed_and_make_the_same_update_again(proved: tuple[Path, list[str]]) -> None:
    out, _ = proved
    for line in lines(out):
        if line["row"]["section"] == "presets":
            result = line["result"]
            assert "killed after update 4, resumed from 2: update 3 is the same bit for bit" in result["text"]
            assert result["seconds"] > 0
            assert result["peak_estimated"] > 0
            log = (out / "logs" / f"presets-{line['row']['name'].replace(' ', '-')}.log").read_text()
            assert [log.count(f"update {step}/4 ") for step in (1, 2, 3, 4)] == [1, 1, 2, 2]


def test_two_processes_train_the_student_of_one(proved: tuple[Path, list[str]]) -> None:
    for line in lines(proved[0]):
        if line["row"]["section"] == "cards":
            assert "gloo, two processes: " in line["result"]["text"]


def test_only_what_is_missing_is_run_again(
    proved: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last row was not finished, and the one before was cut short, as by a machine that lost its power."""
    shutil.copytree(proved[0], tmp_path / "out")
    record = tmp_path / "out/prove.jsonl"
    whole = record.read_text().splitlines()
    missing = [i for i, line in enumerate(whole) if '"bench"' in line][-2:]
    kept = [line for i, line in enumerate(whole) if i not in missing]
    record.write_text("\n".join([*kept, whole[missing[0]][:40]]))
    assert prove(tmp_path / "out", *proved[1]) == 0
    shown = [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines() if ": row " in line]
    assert shown == ["bench pixart", "bench cogvideox"]
    again = record.read_text().splitlines()
    assert again[: len(kept)] == kept
    assert len(again) == len(kept) + 1 + 2  # the torn line stays, and counts for nothing
    assert [row for row in (tmp_path / "out/prove.md").read_text().splitlines() if row.startswith("| bench")] != []


def test_a_killed_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--only", "bench"]
    killed = start(["prove", *arguments, "--out", str(tmp_path)], tmp_path / "stderr")
    until = time.monotonic() + 120
    while not (tmp_path / "prove.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.05)
    killed.kill()
    killed.join()
    before = lines(tmp_path)
    assert 0 < len(before) < 5
    assert prove(tmp_path, *arguments) == 0
    assert lines(tmp_path)[: len(before)] == before
    assert list(states(tmp_path).values()) == ["ok"] * 5
    assert f"row 1 of {5 - len(before)}" in capsys.readouterr().err


def test_a_broken_base_is_a_failed_row_and_the_rest_goes_on(bases: Bases, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(bases("pixart"), models / "good")
    shutil.copytree(bases("sd15"), models / "broken")
    (weights,) = (models / "broken/unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(bases("sd15"), models / "sd15")
    (models / "sd15/model_index.json").write_text("{")
    arguments = [*RUN, "--only", "presets", "--memory", "24gb", "--bases", str(models)]
    assert prove(tmp_path / "out", *arguments) == 1
    results = {line["row"]["weights"].rpartition("/")[2]: line["result"] for line in lines(tmp_path / "out")}
    assert {name: result["state"] for name, result in results.items()} == {
        "broken": "failed", "sd15": "failed", "good": "ok",
    }  # fmt: skip
    assert "unet" in results["broken"]["text"]
    assert "cannot read the base" in results["sd15"]["text"]
    shutil.copy(next((bases("sd15") / "unet").glob("*.safetensors")), weights)
    shutil.rmtree(models / "sd15")
    assert prove(tmp_path / "out", *arguments, "--retry") == 0
    assert list(states(tmp_path / "out").values()) == ["ok", "ok"]
    assert len(lines(tmp_path / "out")) == 3 + 1  # what went well is not run again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--updates", "3"], "at least 4"),
        (["sdxl"], "sdxl is no setting"),
        (["--families", "sdlx"], "--families has no 'sdlx'"),
        (["--only", "everything"], f"known: {', '.join(SECTIONS)}"),
        (["--memory", "nodes"], "--memory has no 'nodes'"),
        (["--device", "cuda:99"], "leave it out for the best there is"),
        (["--bases", "{tmp}"], "no model_index.json"),
        (["student.lrr=1"], "did you mean lr?"),
        (["--fresch"], "did you mean --fresh?"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert message in refused(["prove", *given, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out/prove.jsonl").exists()


def test_a_child_that_dies_or_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DiedError, match="exit code 3"):
        in_child(os._exit, 3, log=tmp_path / "log")
    with pytest.raises(TDMError, match="invalid literal for int"):
        in_child(int, "one", log=tmp_path / "log")
    assert "Traceback" in (tmp_path / "log").read_text()


def test_with_a_gpu_a_child_is_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork is not for processes that have asked a GPU what it can do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert in_child(machine, "cpu", log=tmp_path / "log").kind == "cpu"


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_gpu_is_known_by_its_name(device: str, kind: str | None, tmp_path: Path) -> None:
    work = on_gpu(tmp_path, device, 10 * GIB)
    assert (work.gpu and (work.gpu.name, work.gpu.memory)) == (kind and (kind, 10))


def test_what_a_gpu_cannot_do_is_not_available(bases: Bases, tmp_path: Path) -> None:
    work = on_gpu(tmp_path, "NVIDIA GeForce RTX 3060", GIB // 2)
    base = Base("sd15", str(bases("sd15")), "sd15", random=False)
    with pytest.raises(NotAvailableError, match=r"does not fit: 0\.6 of 0\.5 GiB, by tdm estimate"):
        preset_row(work, base, "12gb")
    with pytest.raises(NotAvailableError, match="NCCL needs two GPUs"):
        cards_row(work, base, shard=True)
    with pytest.raises(NotAvailableError, match="this base has convolutions"):
        storage_row(work, base, "offload")
    assert not (tmp_path / "logs").exists()  # no process was started


def on_gpu(folder: Path, device: str, memory: int) -> Workplace:
    here = Machine(device, "cuda", 1, memory, "")
    return Workplace(here, "cuda", folder, 4, ("task.height=16", "task.width=16"), Estimator())


def test_checkpoints_are_compared_to_the_last_bit() -> None:
    def state(last: float) -> dict[str, Any]:
        return {"step": 3, "weights": {"a.lora_A": torch.ones(2), "a.lora_B": torch.tensor([3.0, last])}, "list": [1]}

    assert equal(state(4.0), state(4.0))
    assert not equal(state(4.0), state(4.0000005))
    assert not equal(state(4.0), state(4.0) | {"list": [1, 2]})
    assert distance(state(4.5)["weights"], state(4.0)["weights"]) == pytest.approx(0.1)
    moments = [OptimState8bit.zeros((512,), True, 256), OptimState8bit.zeros((512,), True, 256)]
    assert equal(*moments)
    moments[1].codes[3] = 7
    assert not equal(*moments)
