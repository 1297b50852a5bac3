"""Work in processes of its own: whatever happens there, out of memory or a crash, the one that asked for it goes on."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..chatter import hush
from ..errors import TDMError, first_line
from ..training.launcher import leave


class DiedError(Exception):
    """A process ended without an answer.

    Args:
        code: its exit code; -N if signal N ended it.
    """

    def __init__(self, code: int | None) -> None:
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        memory = ", which is often a lack of main memory" if code == -9 else ""
        super().__init__(f"the process was ended by {how}{memory}")
        self.code = code


def in_child(function: Callable[..., Any], *arguments: Any, log: Path, processes: int = 1) -> Any:
    """Call a function of a module in one process or in several that share its work, as Slurm starts them.

    Args:
        function, arguments: picklable.
        log: file that takes what they print.
        processes: how many; their ``joined`` finds the others.

    Returns:
        What the first process returns.

    Raises:
        TDMError: the function raised something; the message is its first line.
        DiedError: a process ended without an answer.
    """
    context, task = _context(), pickle.dumps((function, arguments))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    log.parent.mkdir(parents=True, exist_ok=True)
    children: list[Any] = []
    answers: dict[Connection, Any] = {}
    try:
        for rank in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            place = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            child = context.Process(target=_work, args=(sender, log, place, torch.get_num_threads(), task))
            child.start()
            sender.close()
            children.append(child)
            answers[receiver] = child
        results = []
        while answers:
            ready: list[Any] = wait(list(answers))
            for receiver in ready:
                results.append(_answer(receiver, answers.pop(receiver)))
        return next(result for rank, result in results if rank == 0)
    finally:
        for child in children:
            child.kill()
            child.join()


def _answer(receiver: Connection, child: Any) -> tuple[int, Any]:
    """(rank, result) of a child."""
    try:
        well, rank, result = receiver.recv()
    except EOFError:
        child.join()
        raise DiedError(child.exitcode) from None
    if not well:
        raise TDMError(result)
    return rank, result


def _context() -> Any:
    """Processes are forked from one that has imported everything already, where the system can do that. Not with a GPU:
    some libraries ask it what it can do when they are imported, and what is forked after that cannot use it.
    """
    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preload"])
    return context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _work(
    sender: Connection,
    log: Path,
    place: dict[str, str],
    threads: int,
    task: bytes,
) -> None:
    os.environ |= place
    hush()
    with log.open("a", encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is shared with other processes, and a killed one would leave it behind
    try:
        function, arguments = pickle.loads(task)  # here, so that what its imports print is in the log
        well, result = True, function(*arguments)
    except Exception as error:
        traceback.print_exc()
        well, result = False, first_line(error)
    sender.send((well, int(place.get("RANK", 0)), result))
    sender.close()
    leave(0)


def _end_with_parent() -> None:
    """A process without a parent must not keep a GPU's memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
