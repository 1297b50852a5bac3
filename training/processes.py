"""The processes of one run: data parallel, one device each, as torchrun, accelerate launch or Slurm start them.

Every process draws the whole batch, computes its part, and takes the mean of all gradients: those of the adapters,
which is all there is to exchange, the base being frozen. So no wrapper around the network is needed (three roles share
it, and DDP knows one), and every process makes the same step. ``shard`` spreads the base over the processes (FSDP2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import TDMError, first_line
from .launcher import launched, require_place

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # for a process that is still at work, as one that builds the prompt cache


@dataclass(frozen=True)
class Processes:
    """This process among its fellows. The default is a run of one process.

    Attributes:
        rank: from 0; the first one writes the files and talks.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @torch.no_grad()
    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their mean over the processes, in one exchange.

        Raises:
            TDMError: another process has ended.
        """
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _fellows_live():
            torch.distributed.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def from_first_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of the first process.

        Raises:
            TDMError: another process has ended.
        """
        if self.size == 1:
            return
        with _fellows_live():
            for tensor in tensors:
                torch.distributed.broadcast(tensor.data, 0)

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether ``here`` is true in any process. With several of them this waits for the device.

        Raises:
            TDMError: another process has ended.
        """
        if self.size == 1:
            return here
        share = torch.tensor([float(here)], device=device)
        self.mean_([share])
        return bool(share)

    def wait(self) -> None:
        """Go on when all processes are here.

        Raises:
            TDMError: another process has ended.
        """
        if self.size > 1:
            with _fellows_live():
                torch.distributed.barrier()

    def first_alone(self, work: Callable[[], T]) -> T:
        """Let the first process do the work, and the others when it is done (they find what it left on the disk)."""
        if not self.first:
            self.wait()
        result = work()
        if self.first:
            self.wait()
        return result


@contextmanager
def joined(device: str | None) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that a launcher started and the device of this one; without a launcher, one process.

    Args:
        device: "cpu", "cuda" or "cuda:N"; None is a GPU if there is one. Several processes get one GPU each.

    Raises:
        TDMError: no such device, several processes on one named GPU, or one that was not told where the others are;
            inside: another process has ended.
    """
    kind, _, number = (device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
    if kind not in ("cpu", "cuda") or not (number or "0").isdecimal():
        raise TDMError(f"--device must be cpu, cuda or cuda:1 and so on, not {device}")
    if kind == "cuda" and int(number or 0) >= (there := torch.cuda.device_count()):
        raise TDMError(f"--device {device}: this machine has {there} GPUs; leave it out for the best there is")
    if not launched():
        yield Processes(), torch.device(device or kind)
        return
    if number:
        raise TDMError(f"--device {device} names one GPU, but several processes were started; give cuda or nothing")
    require_place()
    from accelerate import PartialState

    state = PartialState(cpu=kind == "cpu", timeout=PATIENCE)
    try:
        with _fellows_live(whatever=False):  # a sharded base talks to the others in the middle of the network
            yield Processes(state.process_index, state.num_processes), torch.device(state.device)
    finally:
        state.destroy_process_group()


def shard(base: nn.Module, keep: Iterable[nn.Parameter]) -> None:
    """Spread a frozen network over the processes, block by block; each gathers a block when it runs it (FSDP2).

    Args:
        keep: parameters that stay whole everywhere: the adapters, which are small and stepped alike in all processes.
    """
    from torch.distributed.fsdp import fully_shard

    kept = set(keep)
    blocks = set(getattr(base, "_no_split_modules", None) or ())
    for module in reversed(list(base.modules())):  # inner blocks first, as FSDP2 wants them
        if type(module).__name__ in blocks:
            fully_shard(module, ignored_params=kept)
    fully_shard(base, ignored_params=kept)


@contextmanager
def _fellows_live(*, whatever: bool = True) -> Iterator[None]:
    """Any error, or that of an exchange alone, becomes one line about the other processes.

    Raises:
        TDMError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no class of their own: they name the file that raised them.
        if not (whatever or isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)):
            raise
        raise TDMError(
            "another process of this run has ended, its own message says why; go on from the last checkpoint with "
            f"--resume ({first_line(error)})"
        ) from error
