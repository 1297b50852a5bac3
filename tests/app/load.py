"""A crowd on the demo: many clients at once, and what became of each.

    python -m tdm.tests.app.load                                starts a demo of its own, 50 clients, 4 pictures each
    python -m tdm.tests.app.load --url http://127.0.0.1:7860    asks one that runs

Prints how many requests were served, refused, lost and cancelled, whether each waiting client got its place, how long
they took, and how the memory of the demo's process grew. Exit code 1 if one was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import httpx
import psutil
from gradio_client import Client
from gradio_client.exceptions import AppError

from ...demo import APP

PROMPT = "two red stars above a blue ball at night"
PATIENCE = 600.0  # seconds until a request counts as lost


@dataclass
class Figures:
    """What became of all requests."""

    ends: Counter[str] = field(default_factory=Counter)  # served, cancelled, refused, lost
    waits: list[float] = field(default_factory=list)  # seconds, of those that were served
    notified: int = 0  # of those that had to wait, how many heard their place
    places: list[int] = field(default_factory=list)  # the largest place of each
    lock: threading.Lock = field(default_factory=threading.Lock)


def visit(client: Client, number: int, pictures: int, figures: Figures) -> None:
    """One client: asks for pictures one after another; every fifth takes its first request back."""
    for i in range(pictures):
        begun, places = time.monotonic(), set()
        job: Any = client.submit(PROMPT, number * 1_000 + i, api_name="/generate")
        if cancelled := i == 0 and number % 5 == 0:
            time.sleep(0.5)
            job.cancel()
        end = "lost"
        while time.monotonic() - begun < PATIENCE:
            place = job.status().rank
            if place is not None:
                places.add(place)
            if job.done():
                # Of one that was taken back the server may still send an empty answer, which the client cannot read.
                end = "cancelled" if cancelled else _end(job)
                break
            time.sleep(0.1)
        with figures.lock:
            figures.ends[end] += 1
            if end == "served":
                figures.waits.append(time.monotonic() - begun)
            if places:
                figures.notified += 1
                figures.places.append(max(places))


def _end(job: Any) -> str:
    try:
        return "served" if job.result()[0] is not None else "cancelled"
    except CancelledError:
        return "cancelled"
    except AppError:
        return "refused"
    except httpx.HTTPError:  # no answer in the client's own time
        return "lost"


def crowd(url: str, clients: int, pictures: int) -> Figures:
    """All clients at once; returns when the last is done."""
    figures = Figures()
    visitors = [Client(url, verbose=False, httpx_kwargs={"timeout": PATIENCE}) for _ in range(clients)]
    threads = [
        threading.Thread(target=visit, args=(client, number, pictures, figures), daemon=True)
        for number, client in enumerate(visitors)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in visitors:
        client.close()
    return figures


@contextlib.contextmanager
def demo() -> Iterator[tuple[str, psutil.Process]]:
    """A demo of this copy on a free port, for the length of a `with`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(APP), "--port", str(port), "--out", out]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ})
        url = f"http://127.0.0.1:{port}"
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(url).close()
                    break
                time.sleep(0.2)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="tdm.tests.app.load", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", help="of a demo that runs (default: one is started)")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=4, help="that each client asks for")
    parser.add_argument("--rounds", type=int, default=3, help="of the whole crowd; memory is read after each")
    args = parser.parse_args()
    started: Any = contextlib.nullcontext((args.url, None)) if args.url else demo()
    lost = 0
    with started as (url, process):
        for number in range(1, args.rounds + 1):
            begun = time.monotonic()
            figures = crowd(url, args.clients, args.pictures)
            spent = time.monotonic() - begun
            asked = args.clients * args.pictures
            memory = f", {process.memory_info().rss / 2**20:.0f} MiB" if process else ""
            ends = ", ".join(f"{n} {end}" for end, n in sorted(figures.ends.items()))
            print(f"round {number}: {asked} requests of {args.clients} clients in {spent:.1f} s: {ends}{memory}")
            if figures.waits:
                tail = quantiles(figures.waits, n=20)[-1] if len(figures.waits) > 1 else figures.waits[0]
                print(f"  seconds until served: median {median(figures.waits):.2f}, 95 % below {tail:.2f}")
            furthest = max(figures.places, default=0)
            print(f"  told their place in the queue: {figures.notified}, the furthest back {furthest + 1}", flush=True)
            lost += figures.ends["lost"] + figures.ends["refused"]
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
