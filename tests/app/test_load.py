"""Many clients at once: each is served or knows its place in the queue, and a cancelled request leaves it."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import psutil
from gradio_client import Client
from tdm.tests.app.conftest import App
from tdm.tests.app.load import crowd

CLIENTS = 50


def test_fifty_clients_are_served_and_memory_stays(app: App) -> None:
    process = psutil.Process(app.process.pid)
    first = crowd(app.url, CLIENTS, 1)
    before = process.memory_info().rss
    second = crowd(app.url, CLIENTS, 1)
    for figures in (first, second):
        assert figures.ends["served"] + figures.ends["cancelled"] == CLIENTS, figures.ends
        assert figures.ends["served"] >= CLIENTS * 4 // 5
        assert figures.notified > 0
        assert max(figures.places) > 5
    # One model of 16 MB, and nothing that a request leaves behind: 50 of them held would be far more.
    assert process.memory_info().rss - before < 64 << 20


def test_a_cancelled_request_gives_its_turn_back(app: App) -> None:
    client = Client(app.url, verbose=False)
    job = client.submit("a green heart on the beach", 1, api_name="/compare")
    while not job.outputs():
        assert not job.done()
    job.cancel()
    drawn, record = client.predict("a green heart on the beach", 1, 4, api_name="/generate")
    assert record["calls"] == 4
    assert Path(drawn).is_file()
    assert urllib.request.urlopen(app.url).status == 200
