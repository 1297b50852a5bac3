"""A distillation from the page: its own process, which pages and even the demo itself do not take down."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Page, expect
from tdm.demo.distil import html
from tdm.demo.runs import Runs, State
from tdm.errors import TDMError
from tdm.tests.app.accessibility import violations
from tdm.tests.app.conftest import App

TINY = [
    "batch_size=4",
    "student.rank=4",
    "critic.rank=4",
    "output.log_every=1",
    "output.preview_every=2",
    "output.evaluate_every=0",
    "output.teacher_steps=2",
    "output.checkpoint_every=1",
]


def config(tmp_path: Path) -> Path:
    """A config of the bundled teacher with few prompts to encode. A visitor of the page cannot set this."""
    file = tmp_path / "tiny.yaml"
    task = f"{{name: pipeline, model: bundled, prompts: stickers, prompt_count: 8, cache: {tmp_path / 'prompts'}}}"
    file.write_text(f"task: {task}\ntrajectory: {{steps: 4}}\nobjective: {{guidance_scale: 5.0}}\n")
    return file


def wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 900  # a run starts with imports, which a busy machine makes long
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_run_is_stopped_resumed_and_outlives_what_started_it(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", [str(config(tmp_path))])
    runs.start("long", "tiny", [*TINY, "updates=100000"])
    try:
        with pytest.raises(TDMError, match="one at a time"):
            runs.start("other", "tiny", TINY)
        wait(lambda: runs.state("long").step >= 2)
        process = runs._process(runs._note(tmp_path / "runs" / "long"))
        assert process is not None
        assert process.pid != psutil.Process().pid
        assert os.getsid(process.pid) == process.pid  # no terminal's Ctrl-C reaches it
        later = Runs(tmp_path / "runs", [str(config(tmp_path))])  # as after the demo was started anew
        assert later.names() == ["long"]
        assert later.state("long").running
        later.stop("long")
        wait(lambda: not runs.state("long").running)
        state = runs.state("long")
        assert state.stopped
        assert state.resumable
        assert "--resume goes on" in state.last_line
        later.resume("long")
        wait(lambda: runs.state("long").step >= state.step + 2)
        assert runs.student("long") == "long/student.safetensors"  # of a run that goes on: its last checkpoint
    finally:
        runs.stop("long")
        wait(lambda: not runs.state("long").running)


def test_a_run_says_how_long_it_will_take() -> None:
    lines = [{"step": 10, "critic_loss": 1.0, "seconds_per_update": 3.0}, {"step": 10, "alarm/lazy": 1.0}]
    state = State(
        True, 10, 210, lines, ["x0 does not change"], None, "a remark of a library", stopped=False, resumable=False
    )
    shown = html("mine", state)
    assert "mine: update 10 of 210, 10 min left" in shown  # the line of an alarm, which has no pace, does not hide it
    assert "x0 does not change" in shown
    assert "a remark of a library" not in shown
    ended = dataclasses.replace(state, running=False)
    assert "a remark" in html("mine", ended)  # why it ended may stand there
    assert "mine ended with an error at update 10 of 210" in html("mine", ended)
    assert "mine was stopped at update 10 of 210" in html("mine", dataclasses.replace(ended, stopped=True))


def test_the_next_run_has_a_free_name(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    assert runs.free_name() == "run-1"
    (tmp_path / "run-1").mkdir()
    assert runs.free_name() == "run-2"


def test_the_page_starts_watches_and_draws_with_a_run(app: App, open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.get_by_role("tab", name="Distil").click()
    for button in ("#stop-run", "#resume-run", "#use-run"):  # there is no run yet
        expect(page.locator(button)).to_be_disabled()
    page.fill("#run-name input, #run-name textarea", "tiny")
    page.fill("#updates input", "2")
    page.fill("#more textarea", "task.prompts=/etc/passwd")
    page.click("#start")
    expect(page.get_by_text("cannot be set here")).to_be_visible()
    page.fill("#more textarea", "\n".join(TINY))
    page.click("#start")
    page.wait_for_selector("#live .status:has-text('tiny')")
    expect(page.locator("#stop-run")).to_be_enabled()
    expect(page.locator("#run-name input, #run-name textarea")).to_have_value("run-1")  # of the next
    page.close()  # which does not end the run
    page = open_page()
    page.get_by_role("tab", name="Distil").click()
    page.wait_for_selector("#live .status:has-text('tiny is done: 2 updates')", timeout=400_000)
    expect(page.locator("#live .curves svg")).not_to_have_count(0)
    expect(page.locator("#live")).to_contain_text("No alarms")
    expect(page.locator("#live img")).to_have_count(1)
    assert violations(page) == []
    expect(page.locator("#stop-run")).to_be_disabled()
    expect(page.locator("#resume-run")).to_be_disabled()
    panel = page.locator(".curves figure", has_text="critic_loss")
    expect(panel).to_contain_text("should stay level")
    expect(panel.locator(".x")).to_have_text(re.compile("update 1 *2"))
    expect(panel.locator(".y span")).to_have_count(2)
    page.locator("#live .enlarge").press("Enter")
    enlarged = page.locator("dialog.enlarged img").bounding_box()
    assert enlarged is not None
    assert enlarged["width"] > 1200  # of a window of 1280
    assert violations(page) == []
    page.keyboard.press("Escape")
    expect(page.locator("dialog.enlarged")).to_have_count(0)
    student = shlex.split(page.locator("#live .line").inner_text())[-1]  # of the command to try
    assert (app.out / student).is_file()  # from the folder that the demo was started in
    before = page.locator("#stage img").nth(0).get_attribute("src")
    page.click("#use-run")
    expect(page.locator("#go")).to_be_visible()
    page.wait_for_url("**student=runs%2Ftiny%2Fstudent.safetensors**")
    expect(page.locator("#gallery img")).to_have_count(2)
    expect(page.locator("#stage figcaption").nth(0)).to_contain_text("runs/tiny/student.safetensors, 4 steps")
    assert page.locator("#stage img").nth(0).get_attribute("src") != before
    assert {file.name for file in (app.out / "runs" / "tiny").iterdir()} >= {"student.safetensors", "curves.png"}
