"""Settings: what is accepted, and the one line that says what is wrong."""

import dataclasses

import pytest
from tdm.cli import main
from tdm.errors import TDMError
from tdm.training.config import DistillConfig
from tdm.training.reference import SECTIONS, descriptions, settings_reference
from tdm.training.settings import load_config


def test_file_then_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "updates: 7\nstudent: {lr: 1e-5, betas: [0, 0.95]}\ntrajectory:\n  timesteps: [900, 600, 300, 100]\n"
    )
    config = load_config(path, ["student.rank=8", "critic.target=clean", "objective.huber_c=null", "task.name=world"])
    assert (config.updates, config.student.lr, config.student.betas) == (7, 1e-5, (0.0, 0.95))
    assert all(type(beta) is float for beta in config.student.betas)  # AdamW refuses an int next to a float
    assert config.trajectory.timesteps == (900.0, 600.0, 300.0, 100.0)
    assert (config.student.rank, config.critic.target, config.objective.huber_c) == (8, "clean", None)
    assert config.task == {"name": "world"}
    assert load_config() == DistillConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batchsize=4", "unknown setting batchsize; did you mean batch_size?"),
        ("student.learn=1", "unknown setting student.learn; known:"),
        ("critic.per_studnt=2", "unknown setting critic.per_studnt; did you mean per_student?"),
        ("critic.target=cleen", "critic.target must be one of subinterval, clean, not 'cleen'"),
        ("updates=many", "updates must be of type int, not 'many'"),
        ("updates=true", "updates must be of type int, not True"),
        ("updates=1.5", "updates must be of type int, not 1.5"),
        ("objective.normalise=1", "objective.normalise must be of type bool, not 1"),
        ("student.lr=fast", "student.lr must be of type float, not 'fast'"),
        ("student=4", "student is a section with its own keys, not 4"),
        ("student.lr", "an override is key=value"),
        ("updates.x=1", "updates.x: updates is a value, not a section"),
        ("student.betas=[0.9]", "student.betas must be a list of 2"),
        ("updates=0", "updates must be positive, not 0"),
        ("student.rank=100000", "student.rank must be 1 to 8192, .*; it is 100000"),
        ("critic.rank=0", "critic.rank must be 1 to 8192"),
        ("seed=-1", "seed must be 0 or more"),
        ("student.lr=0", "student.lr must be positive"),
        ("critic.lr=-1", "critic.lr must be positive"),
        ("critic.betas=[0, 1]", r"critic.betas must be in \[0, 1\)"),
        ("objective.guidance_scale=0.5", "guidance_scale must be at least 1"),
        ("trajectory.timesteps=[900, 600]", "has 2 entries for 4 steps"),
        ("trajectory.timesteps=[900, 600, 600, 100]", "must strictly decrease"),
        ("trajectory.timesteps=[900, 600, 300, 0]", "stay positive"),
        ("trajectory.tau_min=0.99", "tau_min < tau_max"),
        ("trajectory.margin=0", r"margin must be in \(0, 0.5\)"),
        ("ema.decay=1", r"ema.decay must be in \[0, 1\)"),
        ("output.log_every=0", "output.log_every"),
        ("output.preview_every=-1", "output.preview_every must not be negative"),
    ],
)
def test_wrong_settings_are_one_line(override, message):
    first = {"updates.x=1": ["updates=1"]}.get(override, [])
    with pytest.raises(TDMError, match=message) as error:
        load_config(None, [*first, override])
    assert "\n" not in str(error.value)


def test_wrong_files_are_one_line(tmp_path):
    with pytest.raises(TDMError, match="no configuration file"):
        load_config(tmp_path / "none.yaml")
    for text, message in (("updates: [1", "not valid YAML"), ("- 1", "must hold 'key: value' settings")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(TDMError, match=message) as error:
            load_config(tmp_path / "bad.yaml")
        assert "\n" not in str(error.value)


def test_several_configurations_are_merged_in_order_and_settings_come_last(tmp_path):
    (tmp_path / "a.yaml").write_text("updates: 7\nstudent: {lr: 1e-5, rank: 4}\ntask: {name: pipeline, model: x}\n")
    (tmp_path / "b.yaml").write_text("student: {rank: 8}\ntask: {prompts: p.txt}\n")
    config = load_config([tmp_path / "a.yaml", str(tmp_path / "b.yaml")], ["student.alpha=2"])
    assert (config.updates, config.student.lr, config.student.rank, config.student.alpha) == (7, 1e-5, 8, 2.0)
    assert config.task == {"name": "pipeline", "model": "x", "prompts": "p.txt"}
    assert load_config([tmp_path / "b.yaml", tmp_path / "a.yaml"]).student.rank == 4


CLASSES = [(section, cls) for section, classes in SECTIONS.items() for cls in classes]


@pytest.mark.parametrize(("section", "cls"), CLASSES, ids=[cls.__name__ for _, cls in CLASSES])
def test_every_setting_is_shown_with_its_default_and_what_it_does(section, cls):
    block = settings_reference(section).split("\n\n")[SECTIONS[section].index(cls)]
    printed = block.splitlines()
    prefix = "" if section == "run" else f"{section}."
    for field in dataclasses.fields(cls):
        if field.name in SECTIONS and field.name != "task":
            continue
        line = next(i for i, line in enumerate(printed) if line.startswith(f"{prefix}{field.name}="))
        assert printed[line + 1].startswith("    ")
        words = descriptions(cls)[field.name].replace("`", "").replace("None:", "null:").split()
        assert words
        assert " ".join(printed[line + 1 :]).split()[: len(words)] == words


def test_the_shown_defaults_load_as_the_defaults():
    """The printed defaults are valid settings. All `key=value` lines together load as the defaults."""
    lines = [line for section in SECTIONS if section != "task" for line in settings_reference(section).splitlines()]
    given = [line.partition("  (")[0] for line in lines if "=" in line and not line.startswith((" ", "#", "task="))]
    assert len(given) > 60
    assert load_config(None, given) == DistillConfig()


def test_no_section_is_missing_from_the_shown_settings():
    assert {f.name for f in dataclasses.fields(DistillConfig) if dataclasses.is_dataclass(f.default_factory)} <= {
        *SECTIONS
    }


def test_the_command_shows_a_section_and_refuses_another(capsys):
    assert main(["distill", "--settings", "objective"]) == 0
    assert "objective.name=matching  (matching | consistency | regression)" in capsys.readouterr().out
    assert main(["distill", "--settings", "nonsense"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nonsense is no section of the settings" in line
    assert "trajectory, objective, student, critic" in line
