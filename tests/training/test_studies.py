"""Questions answered by training: equal budgets, runs that are kept, and tables that say what was measured."""

from __future__ import annotations

import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image
from tdm.cli import main
from tdm.errors import TDMError
from tdm.files import user_cache
from tdm.training.cost import passes
from tdm.training.studies import runs
from tdm.training.studies.question import Question, is_of, load_question, questions
from tdm.training.studies.report import at_passes, at_updates, interval, reached, table
from tdm.training.studies.runs import Point, StudyRun, answer, read_runs, results_file, save_picture, valid_runs

SMALL = """\
asks: does it work?
configs: [mixture]
settings: [task.samples=200, task.width=16, batch_size=16, student.rank=2, critic.rank=2, output.teacher_steps=8]
updates: 6
every: 2
seeds: [0, 1]
measure: energy
higher_is_better: false
reach: 10
variants:
  TDM: []
  LCM: [lcm]
  two critic updates: [critic.per_student=2]
"""


@pytest.fixture
def question(tmp_path: Path) -> Question:
    (tmp_path / "small.yaml").write_text(SMALL)
    return load_question(str(tmp_path / "small.yaml"))


def test_a_run_says_how_far_it_is_once_a_minute(question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, messages = itertools.count(step=25.0), []
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock))
    runs.train(replace(question, settings=(*question.settings, "output.log_every=1")), "TDM", 0, report=messages.append)
    paced = [line for line in messages if "ETA" in line]
    assert 1 <= len(paced) < 6
    assert all(re.fullmatch(r"    update [1-6]/6  ETA \d+ (s|min)", line) for line in paced)
    assert [line for line in messages if line not in paced] == [
        f"  TDM, seed 0: update {step}/6, energy {energy}"
        for step, energy in zip(
            (2, 4, 6), [line.rpartition(" ")[2] for line in messages if line not in paced], strict=True
        )
    ]


@pytest.mark.parametrize("name", questions())
def test_every_question_that_ships_is_sound_and_its_results_are_of_it(name: str) -> None:
    question = load_question(name)
    runs = read_runs(results_file(question))
    assert len(valid_runs(question, runs)) == len(runs)
    for variant in question.variants:
        config = question.config(variant, 0)
        cost, every = passes(config).total, config.output.evaluate_every
        assert config.updates >= question.updates or question.passes_only
        assert config.updates * cost >= question.budget()
        assert question.updates % every == 0
        least = 0 if question.passes_only else question.updates
        assert config.updates == least or (config.updates - every) * cost < question.budget()


def test_each_variant_gets_the_updates_and_the_passes_of_the_first(question: Question) -> None:
    costs = {variant: passes(question.config(variant, 0)).total for variant in question.variants}
    assert costs == {"TDM": 5.5 + 4, "LCM": 1.5 + 3 + 1 + 2, "two critic updates": 9.0 + 6}
    assert {v: question.config(v, 0).updates for v in question.variants} == {
        "TDM": 6,
        "LCM": 8,  # 6 * 9.5 / 7.5 = 7.6, in steps of 2
        "two critic updates": 6,
    }


def test_a_question_may_give_as_many_passes_and_no_more(question: Question) -> None:
    alike = replace(question, passes_only=True)
    assert {v: alike.config(v, 0).updates for v in alike.variants} == {
        "TDM": 6,
        "LCM": 8,
        "two critic updates": 4,  # 6 * 9.5 / 15 = 3.8, in steps of 1
    }
    assert ", 6 updates" in table(question, {})
    assert ", 6 updates" not in table(alike, {})


def test_runs_are_made_once_and_kept_one_by_one(question: Question, tmp_path: Path) -> None:
    path, messages = tmp_path / "results.jsonl", []
    stopped = answer(question, path, report=messages.append, stop=lambda: len(read_runs(path)) >= 4)
    assert set(stopped) == {("undistilled", 0), ("teacher", 0), ("TDM", 0), ("LCM", 0)}
    assert stopped["TDM", 0].curve[0].step == 2
    assert [p.step for p in stopped["LCM", 0].curve] == [2, 4, 6, 8]
    assert [p.passes for p in stopped["TDM", 0].curve] == [19, 38, 57]
    messages.clear()
    results = answer(question, path, report=messages.append)
    assert set(results) == {("undistilled", 0), ("teacher", 0), *question.runs()}
    assert not any("TDM, seed 0" in line for line in messages)
    assert results["TDM", 0] == stopped["TDM", 0]
    assert answer(question, path, report=messages.append) == results
    assert len(path.read_text().splitlines()) == 8


def test_a_run_that_was_stopped_goes_on_to_the_same_end(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = answer(question, tmp_path / "elsewhere" / "whole.jsonl", only=["TDM"], report=lambda _: None)["TDM", 0]
    path, messages, asked = tmp_path / "results.jsonl", [], itertools.count(1)
    assert ("TDM", 0) not in answer(question, path, only=["TDM"], report=messages.append, stop=lambda: next(asked) >= 3)
    (kept,) = (user_cache() / "studies").iterdir()

    def kill(line: str) -> None:
        if "update 4/6" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(question, path, only=["TDM"], report=kill)
    assert kept.exists()  # what the first stop left is still there
    messages.clear()
    resumed = answer(question, path, only=["TDM"], report=messages.append)["TDM", 0]
    assert resumed.curve == whole.curve
    assert [line.split()[4] for line in messages if line.startswith("  TDM, seed 0: update")] == ["4/6,", "6/6,"]
    assert not list((user_cache() / "studies").iterdir())
    assert resumed.seconds > 0
    assert not kept.exists()


def test_a_run_that_another_question_made_is_not_made_again(question: Question, tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    earlier = answer(question, first, only=["TDM", "two critic updates"])
    variants = {"as it is": [], "a larger rank": ["student.rank=3"], "critic twice": ["critic.per_student=2"]}
    messages: list[str] = []
    other = replace(question, name="other", variants=variants)
    results = answer(other, second, only=["as it is", "critic twice"], report=messages.append)
    assert messages == []
    assert {(name, seed) for name, seed in results if seed in (0, 1)} == {
        ("undistilled", 0), ("teacher", 0), ("as it is", 0), ("as it is", 1), ("critic twice", 0), ("critic twice", 1)
    }  # fmt: skip
    assert results["critic twice", 1].curve == earlier["two critic updates", 1].curve
    assert results["teacher", 0] == earlier["teacher", 0]
    here, there = tmp_path / "second" / "as-it-is.png", tmp_path / "first" / "tdm.png"
    assert Image.open(here).tobytes() == Image.open(there).tobytes()


def test_a_half_written_line_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(asdict(run_of([1.0]))) + "\n" + '{"variant": "TD')
    assert len(read_runs(path)) == 1
    path.write_text('{"variant": "TDM"}\n')
    with pytest.raises(TDMError, match="line 1, is no run"):
        read_runs(path)


def test_a_run_belongs_to_its_settings_and_a_younger_setting_does_not_matter(question: Question) -> None:
    config = question.config("TDM", 0)
    stored = json.loads(json.dumps(asdict(config)))
    assert is_of(stored, config)
    assert not is_of(stored, question.config("TDM", 1))
    del stored["critic"]["head_start"]  # as if the run were older than this setting
    assert is_of(stored, config)
    assert not is_of(stored, replace(config, critic=replace(config.critic, head_start=3)))
    stored["critic"]["gone"] = 1
    assert not is_of(stored, config)


def run_of(values: list[float], passes_each: float = 10.0) -> StudyRun:
    points = [Point(2 * (i + 1), passes_each * (i + 1), {"energy": v}) for i, v in enumerate(values)]
    return StudyRun("TDM", 0, {}, 1.0, "a machine", points)


def test_values_are_read_where_the_budgets_end(question: Question) -> None:
    dear, cheap = run_of([5.0, 4.0, 3.0, 2.0], 20.0), run_of([5.0, 4.0, 3.0, 2.0], 14.25)
    assert question.budget() == 57
    assert (at_updates(question, dear), at_passes(question, dear)) == (3.0, 4.0)
    assert (at_updates(question, cheap), at_passes(question, cheap)) == (3.0, 2.0)
    assert reached(replace(question, reach=3.5), dear) == (6, 60.0)
    assert reached(replace(question, reach=1.0), dear) is None
    assert reached(replace(question, reach=4.5, higher_is_better=True), dear) == (2, 20.0)


def test_an_interval_lies_between_the_seeds() -> None:
    assert interval([1.0, 2.0, 3.0]) == "2 (1 to 3)"
    assert interval([2.0]) == "2"
    assert interval([]) == "-"


def test_the_table_has_a_row_for_everything(question: Question, tmp_path: Path) -> None:
    results = answer(question, tmp_path / "results.jsonl", only=["TDM"], report=lambda _: None)
    lines = table(question, results).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["teacher", "undistilled", *question.variants]
    assert "| - | - |" in lines[-1]
    assert lines[4].endswith("| 2 | 2 to 2 (19 to 19) |")


@pytest.mark.usefixtures("question")
def test_the_command_answers_reports_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, results, out = str(tmp_path / "small.yaml"), str(tmp_path / "r.jsonl"), str(tmp_path / "out")
    common = ["study", name, "--results", results, "--out", out]
    assert main([*common, "--report"]) == 2
    assert "train some" in capsys.readouterr().err
    assert main([*common, "--only", "LCM", "TDM"]) == 0
    assert "| LCM | 7.5 |" in capsys.readouterr().out
    with Image.open(tmp_path / "out/small.png") as picture:
        assert picture.width > 500
    assert {file.name for file in (tmp_path / "r").iterdir()} == {
        "teacher.png", "undistilled.png", "tdm.png", "lcm.png"
    }  # fmt: skip
    with Image.open(tmp_path / "out/small-grid.png") as picture:
        assert picture.width > 4 * 100
    assert (tmp_path / "out/small.md").read_text().startswith("does it work?\n\n| variant |")
    assert main([*common, "--report", "--steps", "2"]) == 2
    assert "was evaluated at 2 steps" in capsys.readouterr().err
    before = set(valid_runs(load_question(name), read_runs(Path(results))))
    assert main([*common, "--only", "LCM", "two critic updates", "--seeds", "1"]) == 0
    after = set(valid_runs(load_question(name), read_runs(Path(results))))
    assert after - before == {("two critic updates", 1)}
    assert main([*common, "--seeds", "1", "7"]) == 2
    assert "has no seed 7; it has 0, 1" in capsys.readouterr().err
    assert main([*common, "--only", "GAN"]) == 2
    assert "has no variant 'GAN'; it has TDM, LCM" in capsys.readouterr().err
    assert main(["study", "baselines-mixtur"]) == 2
    assert "there is no question" in capsys.readouterr().err
    assert main(["study"]) == 0
    assert "baselines-mixture" in capsys.readouterr().out


def test_further_measures_have_a_table_and_a_plot_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SMALL + "further: {least_mode: {higher_is_better: true, reach: 0}, of_late: {higher_is_better: false}}\n"
    (tmp_path / "more.yaml").write_text(text)
    results = tmp_path / "r.jsonl"
    assert main(["study", str(tmp_path / "more.yaml"), "--results", str(results), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    shown = (tmp_path / "more-least_mode.md").read_text()
    assert shown.strip().partition("\n\n")[2] in out
    assert "updates (passes) to least_mode 0" in shown
    values = [run.curve[-1].measures["least_mode"] for run in read_runs(results) if run.variant == "TDM"]
    assert len(values) == 2
    assert interval(values) in shown
    assert (tmp_path / "more-least_mode.png").is_file()
    assert "no run has of_late" in out  # runs that are older than the measure
    assert not list(tmp_path.glob("more-of_late*"))


def test_a_unified_student_is_reported_at_each_of_its_step_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = "  unified: [unify]\n  2 steps alone: [trajectory.steps=2]\n"
    text = SMALL.replace("  LCM: [lcm]\n  two critic updates: [critic.per_student=2]\n", variants)
    (tmp_path / "both.yaml").write_text(text.replace("seeds: [0, 1]", "seeds: [0]"))
    common = ["study", str(tmp_path / "both.yaml"), "--results", str(tmp_path / "r.jsonl"), "--out", str(tmp_path)]
    assert main(common) == 0
    assert main([*common, "--report", "--steps", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()
    (unified,) = [row for row in rows if row.startswith("| unified") and row.endswith("| 1 |")]
    (alone,) = [row for row in rows if row.startswith("| 2 steps alone") and row.endswith("| 1 |")]
    last = {run.variant: run.curve[-1].measures for run in read_runs(tmp_path / "r.jsonl")}
    assert f"| {last['unified']['energy/2_steps']:.4g} |" in unified
    assert f"| {last['2 steps alone']['energy']:.4g} |" in alone
    assert any(row.startswith("| TDM") and row.endswith("| 0 |") for row in rows)
    assert main([*common, "--report", "--steps", "3"]) == 2
    assert "was evaluated at 3 steps" in capsys.readouterr().err
    assert (tmp_path / "both-2-steps.png").is_file()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("variants: {}", "with its variants"),
        ("variants: {TDM: steps=4}", "must be a list"),
        ("variants: {TDM: [trajectory.step=4]}", "did you mean steps"),
        ("variants: {TDM: []}\nsedes: [1]", "did you mean seeds"),
        ("variants: {TDM: []}\nevery: 4", "multiple of every"),
        ("variants: {TDM: []}\nfurther: {most_mode: {reach: 2}}", "further.most_mode.higher_is_better must be set"),
        ("variants: {TDM: []}\nfurther: {most_mode: 2}", "further.most_mode is a section"),
    ],
)
def test_an_unsound_question_is_refused_before_anything_is_trained(change: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "q.yaml").write_text(SMALL.partition("variants:")[0] + change)
    with pytest.raises(TDMError, match=line):
        load_question(str(tmp_path / "q.yaml"))


def test_two_who_share_a_question_may_write_a_picture_at_the_same_time(tmp_path: Path) -> None:
    """Both processes begin by copying the results of other questions."""
    picture = Image.effect_noise((256, 256), 50)
    with ThreadPoolExecutor(4) as pool:
        for written in [pool.submit(save_picture, tmp_path, "a", picture) for _ in range(40)]:
            written.result()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert Image.open(tmp_path / "a.png").tobytes() == picture.tobytes()
