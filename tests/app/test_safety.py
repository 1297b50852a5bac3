"""Files and paths from visitors: nothing outside the demo's own folders can be read, and no file can hurt it."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import urllib.error
import urllib.request
import uuid
import zlib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tdm.demo.catalogue import Catalogue
from tdm.demo.pictures import LARGEST, Pictures, read_settings
from tdm.demo.runs import Runs
from tdm.demo.settings import Settings
from tdm.errors import TDMError
from tdm.tests.app.conftest import ROOT, App

GOOD = Settings("a red star", 1, 4, 64, 64, "bundled")


def png(width: int = 8, height: int = 8, **text: str) -> bytes:
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG", pnginfo=info)
    content = bytearray(buffer.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def status(url: str, data: bytes | None = None, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/proc/self/environ",
        "{root}/pyproject.toml",
        "{root}/bundled/student.safetensors",
        "{root}/.git",
        "{out}/app.log",
        "{out}/pictures/../app.log",
        "{out}/pictures/%2e%2e/app.log",
        "{out}/runs/first/checkpoint.pt",
        "app.log",
        "../../../../etc/passwd",
        "http://127.0.0.1:1/",
    ],
)
def test_no_file_of_the_machine_is_served(app: App, path: str) -> None:
    path = path.format(root=ROOT, out=app.out)
    assert status(f"{app.url}/gradio_api/file={path}") in (403, 404)


def ask(app: App, fn_index: int, data: list[object]) -> dict[str, object]:
    """An event of the page, as a browser sends it; its last message."""
    session = uuid.uuid4().hex
    body = json.dumps({"data": data, "fn_index": fn_index, "session_hash": session}).encode()
    request = urllib.request.Request(f"{app.url}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{app.url}/gradio_api/queue/data?session_hash={session}") as stream:
        for line in stream:
            message = json.loads(line.removeprefix(b"data: ")) if line.strip() else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("the stream ended without an answer")


def test_a_client_cannot_name_a_file_that_it_did_not_upload(app: App) -> None:
    """The event of a dropped picture, with a picture of the machine in the place of an upload."""
    config = json.load(urllib.request.urlopen(f"{app.url}/config"))
    (dropped,) = (c["id"] for c in config["components"] if c["type"] == "file")
    (event,) = (d["id"] for d in config["dependencies"] if [dropped, "upload"] in d["targets"])
    picture = app.out / "mine.png"
    picture.write_bytes(png(tdm=json.dumps(GOOD.to_dict())))

    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body += picture.read_bytes() + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    request = urllib.request.Request(f"{app.url}/gradio_api/upload", body, headers)
    (uploaded,) = json.load(urllib.request.urlopen(request))

    def answer(path: str) -> dict[str, object]:
        return ask(app, event, [{"path": path, "meta": {"_type": "gradio.FileData"}}])

    assert GOOD.prompt in json.dumps(answer(uploaded))
    for path in (str(picture), "/etc/passwd", f"{uploaded}/../../../../..{picture}"):
        refused = answer(path)
        assert refused["success"] is False
        assert GOOD.prompt not in json.dumps(refused)


def test_a_huge_upload_is_refused(app: App) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body += bytes(LARGEST + (1 << 20)) + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert status(f"{app.url}/gradio_api/upload", body, **headers) == 413


class Evil:
    def __reduce__(self):
        return os.mkdir, ("hurt",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no whole PNG"),
        (b"hello", "no whole PNG"),
        (pickle.dumps(Evil()), "no whole PNG"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "no whole PNG"),
        (png(tdm="{}")[:30], "no whole PNG"),
        (png(200_000, 200_000, tdm="{}"), "no whole PNG"),  # 160 GB of pixels
        (png(), "no settings in it"),
        (png(tdm="nonsense"), "no settings in it"),
        (png(tdm="[1, 2]"), "no settings in it"),
        (png(tdm="[" * 100_000), "no settings in it"),
        (bytes(LARGEST + 1), "larger than 32 MB"),
    ],
)
def test_a_wrong_picture_is_one_line(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(TDMError, match=message):
        read_settings(tmp_path / "a.png")
    assert not (tmp_path / "hurt").exists()


def test_a_picture_keeps_its_settings_and_the_folder_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = Pictures(tmp_path / "pictures")
    first = pictures.save(Image.new("RGB", (8, 8)), GOOD)
    assert read_settings(first) == GOOD.to_dict()
    assert pictures.save(Image.new("RGB", (8, 8)), GOOD) == first
    os.utime(first, (0, 0))
    monkeypatch.setattr("tdm.demo.pictures.KEPT", 3)
    later = [pictures.save(Image.new("RGB", (8, 8), (i, 0, 0)), GOOD) for i in range(1, 4)]
    assert not first.exists()
    assert all(path.exists() for path in later)


def test_students_are_found_by_name_alone(tmp_path: Path) -> None:
    folder = tmp_path / "students"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.safetensors").write_bytes(b"")
    for name in ("a.safetensors", "sub/b.pt", "notes.txt", "checkpoint.pt", ".hidden.pt"):
        (folder / name).write_bytes(b"")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    catalogue = Catalogue("bundled", {"students": folder, "runs": tmp_path / "none"})
    assert catalogue.names() == ["bundled", "students/a.safetensors", "students/sub/b.pt"]
    for name in ("students/../secret.safetensors", "students/link.safetensors", str(folder / "a.safetensors"), "a", 7):
        with pytest.raises(TDMError, match="no student"):
            catalogue.source(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "/tmp/x", "a" * 41, "a b", "-x", None])
def test_a_run_cannot_be_named_out_of_its_folder(name: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs")
    for ask in (lambda: runs.start(name, "bundled", []), lambda: runs.state(name), lambda: runs.student(name)):
        with pytest.raises(TDMError, match="name of a run"):
            ask()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "setting", "message"),
    [
        ("/etc/passwd", "seed=1", "no configuration"),
        ("bundled", "task.prompts=/etc/passwd", "cannot be set here"),
        ("bundled", "start_from=/etc/passwd", "cannot be set here"),
        ("bundled", "/etc/passwd", "key=value"),
        ("bundled", "student.yaml", "key=value"),
        ("bundled", "student.lrr=1", "did you mean lr?"),
        ("bundled", "student", "key=value"),
        ("bundled", "updates=0", "updates must be positive"),
    ],
)
def test_a_visitor_sets_no_paths_of_a_run(config: str, setting: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TDMError, match=message):
        Runs(tmp_path / "runs").start("mine", config, [setting])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(TDMError, match="is a link"):
        Runs(tmp_path / "runs").state("mine")
