"""The package imports in every way it is installed, and stays light."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tdm

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "transformers", "gradio", "comfy", "matplotlib")


def run(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def tracked() -> list[str]:
    """The files of a clean checkout (in a copy without git: every file that is no build product)."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    skip = (".venv", "__pycache__", ".git", "build", "outputs", "runs")
    return [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file() and not set(p.parts) & set(skip)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("custom_nodes") / "ComfyUI-TDM"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_import_is_light() -> None:
    code = f"import sys, tdm, tdm.cli, tdm.errors; print([m for m in {HEAVY} if m in sys.modules])"
    assert run(code) == "[]"


def test_what_a_student_file_says_is_read_without_torch() -> None:
    code = "import sys, tdm.cli; code = tdm.cli.main(['info', 'bundled']); "
    code += f"print(code, [m for m in {HEAVY} if m in sys.modules])"
    assert run(code).splitlines()[-1] == "0 []"


def test_python_runs_the_package_as_the_command() -> None:
    command = [sys.executable, "-m", "tdm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"tdm {tdm.__version__}\n")


def test_public_names() -> None:
    code = "import tdm; print(tdm.TDMPipeline.__name__, tdm.TDMScheduler.__name__, sorted(tdm.__all__))"
    assert run(code) == "TDMPipeline TDMScheduler ['TDMPipeline', 'TDMScheduler']"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        __import__("tdm").nothing  # noqa: B018


def test_a_clone_imports_under_another_name(clone: Path) -> None:
    """ComfyUI imports the folder as a module named after its path, and `tdm` is not importable."""
    code = f"""
import importlib.util, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
spec = importlib.util.spec_from_file_location("clone_x", {str(clone / "__init__.py")!r},
                                              submodule_search_locations=[{str(clone)!r}])
module = importlib.util.module_from_spec(spec); sys.modules["clone_x"] = module; spec.loader.exec_module(module)
print(module.TDMScheduler.__module__, module.TDMPipeline.__module__, "tdm" in sys.modules)
"""
    assert run(code) == "clone_x.pipelines.scheduler clone_x.pipelines.tdm_pipeline False"


def test_wheel_holds_the_code_the_configs_and_the_bundled_model(clone: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, clone]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    code = [n for n in tracked() if n.endswith(".py") and not n.startswith(("tests/", "docs/", "examples/"))]
    assert {f"tdm/{n}" for n in code} <= names
    assert {f"tdm/{n}" for n in tracked() if n.startswith(("bundled/", "training/configs/"))} <= names
    configs = {f"tdm/{n}" for n in tracked() if n.startswith("pipelines/base_configs/") and n.endswith(".json")}
    assert len(configs) == 59
    assert configs <= names
    assert not [n for n in names if n.startswith("tdm/tests")]
    where = run("import tdm; print(tdm.__file__)", PYTHONPATH=str(tmp_path / "site"))
    assert where == str(tmp_path / "site" / "tdm" / "__init__.py")
