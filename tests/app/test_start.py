"""Starting the demo: what it takes, what it refuses, and who may reach it."""

from __future__ import annotations

import argparse
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from gradio_client import Client
from playwright.sync_api import Browser, expect
from tdm.cli import app as command
from tdm.demo.waiting import Waiting
from tdm.errors import TDMError
from tdm.tests.app.accessibility import violations
from tdm.tests.app.conftest import App, start
from tdm.tests.commands import refused
from tdm.tests.processes import finish


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prt", "7000"], "did you mean --port?"),
        (["--port", "70000"], "--port must be 1 to 65535"),
        (["--port", "x"], "invalid int value"),
        (["--auth", "me"], "--auth is NAME:PASSWORD"),
        (["--auth", ":secret"], "--auth is NAME:PASSWORD"),
        (["--students-folder", "{tmp}/none"], "is no folder"),
        (["--config", "{tmp}/none.yaml"], "no configuration file"),
        (["--config", "sdlx"], "did you mean sdxl?"),
        (["--student", "{tmp}/none.safetensors"], "no such file"),
        (["--model", "{tmp}"], "neither a pipeline"),
        (["--out", "{tmp}/file/out"], "cannot make the folder"),
        (["--listen", "300.1.1.1", "--port", "7999"], "cannot serve on 300.1.1.1"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert message in refused(["app", *(a.replace("{tmp}", str(tmp_path)) for a in arguments)], capsys)


def test_a_wrong_port_in_the_environment_and_one_that_is_taken_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_SERVER_PORT", "many")
    assert "GRADIO_SERVER_PORT is 'many'" in refused(["app"], capsys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("GRADIO_SERVER_PORT", str(port := taken.getsockname()[1]))
        assert str(port) in refused(["app"], capsys)


def test_without_gradio_it_says_what_to_install(tmp_path: Path) -> None:
    assert finish(["app", "--out", str(tmp_path / "out")], tmp_path / "err", missing="gradio") == 2
    assert "pip install 'gradio[mcp]>=6'" in (tmp_path / "err").read_text()


def test_it_answers_before_it_is_there(app: App) -> None:
    assert app.waited
    assert set(app.waited) == {503}  # which clients take for "come back", and no more than a page is given away


def test_who_waits_is_told_what_for_and_then_gets_what_was_asked_for(browser: Browser) -> None:
    """With a server of its own in the place of Gradio's, which takes longer to come."""
    asked: list[str] = []

    class Demo(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404 if self.path == "/starting" else 200)
            self.end_headers()
            self.wfile.write(b"<h1>The demo</h1>")

        def log_message(self, *_: object) -> None:
            pass

    page = browser.new_page()
    with Waiting("127.0.0.1", None) as waiting:
        page.goto(f"{waiting.url}?seed=5")
        expect(page.locator("#doing")).to_have_text("Loading libraries")
        waiting.say("the model")
        expect(page.locator("#doing")).to_have_text("Loading the model")
        assert violations(page) == []
        with pytest.raises(TDMError, match=f"port {waiting.port}"):
            Waiting("127.0.0.1", waiting.port)
        with Waiting("127.0.0.1", None) as other:
            assert other.port != waiting.port
    with ThreadingHTTPServer(("127.0.0.1", waiting.port), Demo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        expect(page.locator("h1")).to_have_text("The demo")
        server.shutdown()
    assert "/?seed=5" in asked
    page.close()


def test_who_waits_for_what_has_failed_is_told_where_to_look(browser: Browser) -> None:
    page = browser.new_page()
    with Waiting("127.0.0.1", None) as waiting:
        page.goto(waiting.url)
    expect(page.locator("#doing")).to_contain_text("It does not answer", timeout=30_000)
    page.close()


def test_it_is_on_the_loopback_alone(app: App) -> None:
    port = int(app.url.rpartition(":")[2])
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].rpartition(":")[2], 16) == port
    ]
    assert listening == [f"0100007F:{port:04X}"]


def test_visitors_without_the_password_get_nothing(tmp_path: Path) -> None:
    command = ["-m", "tdm.cli", "app", "--auth", "me:secret", "--listen", "0.0.0.0"]
    running = start(command, tmp_path / "out")
    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{running.url}/gradio_api/info")
        with pytest.raises(ValueError, match="Could not login"):
            Client(running.url, auth=("me", "wrong"), verbose=False)
        client = Client(running.url, auth=("me", "secret"), verbose=False)
        assert client.predict(api_name="/info")["base"] == "bundled"
    finally:
        running.stop()


def test_who_may_distil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def tabs(*arguments: str) -> set[str]:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        page = command.build(parser.parse_args(list(arguments)))
        return {block.label for block in page.blocks.values() if type(block).__name__ == "Tab"}

    assert "Distil" in tabs()
    assert "Distil" not in tabs("--listen")
    assert "Distil" in tabs("--listen", "--auth", "me:secret")
    for thread in threading.enumerate():
        if thread.name == "warm-up":  # one that draws while this process ends would abort it
            thread.join()


@pytest.mark.parametrize("draws", [False, True], ids=["while it warms up", "while it draws"])
def test_ctrl_c_ends_it_whatever_it_is_doing(draws: bool, tmp_path: Path) -> None:
    running = start(["-m", "tdm.cli", "app"], tmp_path / "out")
    try:
        if draws:
            Client(running.url, verbose=False).submit(["a red star"], [50, 49], 8, api_name="/explore")
            time.sleep(5)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(60) in (0, 130)
        assert "terminate" not in running.log.read_text()
    finally:
        running.process.kill()
