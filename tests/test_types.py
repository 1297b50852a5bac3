"""A script of a user is clean under pyright (and under mypy: `make types`), and help() says what a call does."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import tdm
from tdm import TDMPipeline

ROOT = Path(tdm.__file__).parent


def test_pyright_finds_nothing_in_it(tmp_path: Path) -> None:
    (tmp_path / "tdm").symlink_to(ROOT)  # as an installation has it
    script = tmp_path / "script.py"
    script.write_text((ROOT / "tests" / "user_script.py").read_text())
    settings = {"typeCheckingMode": "standard", "include": ["script.py"]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    script.write_text("from tdm import TDMPipeline\n\nTDMPipeline.from_pretrained().use_attention(3)\n")
    assert (
        "use_attention" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    )  # it does look


def test_the_package_says_that_it_has_types_and_names() -> None:
    assert (ROOT / "py.typed").is_file()
    assert {"TDMPipeline", "TDMScheduler", "__version__"} <= set(dir(tdm))


def test_help_of_a_call_says_whose_defaults_it_has() -> None:
    pipe = TDMPipeline.from_pretrained()
    text = inspect.getdoc(pipe.__call__) or ""
    assert text.startswith("Draw, with the student's own settings")
    assert "num_inference_steps" in text
    assert pipe.call_defaults()["num_inference_steps"] == 4
