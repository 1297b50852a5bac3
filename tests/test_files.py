"""Files and folders that appear whole or not at all, and what killed processes leave of them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from tdm.files import DAY, replacing, whole_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from tdm.files import replacing, whole_folder

with replacing(Path(sys.argv[1]) / "file", shared=True) as file, whole_folder(Path(sys.argv[1]) / "m", force=True) as m:
    file.write(b"half")
    m.mkdir()
    (m / "weights").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write(folder: Path) -> None:
    with replacing(folder / "file", shared=True) as file, whole_folder(folder / "m", force=True) as unfinished:
        file.write(b"whole")
        unfinished.mkdir()
        (unfinished / "weights").write_bytes(b"whole")


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert process.returncode == -9
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2  # neither under its own name
    assert all(name.endswith(".tmp") for name in left)
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "m"]
    assert (tmp_path / "m" / "weights").read_bytes() == b"whole"


def test_what_others_are_writing_stays(tmp_path: Path) -> None:
    alive, elsewhere = (
        tmp_path / f".file.1234.{owner}.tmp" for owner in (f"{os.getpid()}@{platform.node()}", "1@another.machine")
    )
    old = tmp_path / ".file.5678.1@another.machine.tmp"
    for path in (alive, elsewhere, old):
        path.write_bytes(b"half")
    os.utime(old, (0, old.stat().st_mtime - DAY - 1))
    write(tmp_path)
    assert alive.exists()
    assert elsewhere.exists()
    assert not old.exists()


def test_a_folder_comes_back_after_a_kill_between_two_names(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    replaced = tmp_path / f".m.{int(gone.stdout)}@{platform.node()}.old"
    replaced.mkdir()
    (replaced / "mine").write_bytes(b"precious")
    with pytest.raises(ValueError, match="exists; pass force=True"), whole_folder(tmp_path / "m", force=False):
        pass
    assert (tmp_path / "m" / "mine").read_bytes() == b"precious"
