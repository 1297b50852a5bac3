"""Encoded prompts on disk: the text encoders run once, before training, and are never in memory with the denoiser.

A cache is one folder for one text encoder and one list of prompts, named by a hash of both: another encoder, or other
prompts, get another folder, and none ever holds what does not belong in it.

    index.json           the encoder as hashes of its files, a hash of each prompt, the length of unmasked text, and how
                         many prompts were longer than the encoder reads
    null.safetensors     no prompt, for guidance
    00000.safetensors    256 prompts: "<i>.text" [L_i, D] and what else the encoder gives, without padding, and in the
                         header a checksum of them, which is compared when a run first opens the file; and so on

Every file is written under a temporary name and renamed. A build that was killed goes on with the first missing
file. Each file depends only on its own prompts, so the result is the same to the bit.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import TDMError
from ...files import replacing
from ...pipelines.families import Condition
from ...pipelines.families.base import pad_text
from ..progress import Progress, Report, print_line

FORMAT = 2
SHARD = 256  # prompts per file
BATCH = 32  # prompts per call of the encoders


def encoder_dtype(device: torch.device) -> torch.dtype:
    """What text encoders compute in on a device."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


class TextEncoders(NamedTuple):
    """What a family's text encoders give: `encode_text`, `encode_null`, `too_long` and `text_limit` of `Family`, on
    loaded encoders.
    """

    prompts: Callable[[list[str]], Condition]
    null: Callable[[], Condition]
    too_long: Callable[[list[str]], int] = lambda _: 0
    limit: int = 0


class PromptCache:
    """The conditions of a list of prompts, read from the folder that `build_cache` fills.

    Args:
        root: folder of all caches.
        encoder: what identifies the text encoder (JSON): hashes of its files, its dtype and options.
        prompts: all that a run needs; those that occur twice are stored once.
        negative_prompt: what the teacher is guided away from, in the place of no prompt.

    Attributes:
        folder: of this cache.
        prompts: each one once, in the order of the files.
    """

    def __init__(self, root: Path, encoder: dict[str, Any], prompts: Sequence[str], negative_prompt: str = "") -> None:
        self.prompts = list(dict.fromkeys(prompts))
        hashes = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in self.prompts]
        self.identity: dict[str, Any] = {"format": FORMAT, "encoder": encoder, "prompts": hashes}
        if negative_prompt:
            self.identity["negative_prompt"] = negative_prompt
        self.folder = root / hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]
        self.index, self.null_file = self.folder / "index.json", self.folder / "null.safetensors"
        starts = range(0, len(self.prompts), SHARD)
        self.shards = {self.folder / f"{i:05}.safetensors": self.prompts[s : s + SHARD] for i, s in enumerate(starts)}
        self._places = {prompt: (path, i) for path, part in self.shards.items() for i, prompt in enumerate(part)}
        self._open: dict[Path, Any] = {}

    def missing(self) -> list[Path]:
        """The files that are still to be built: not there, or damaged."""
        return [path for path in (self.null_file, self.index, *self.shards) if not _readable(path)]

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        try:
            return json.loads(self.index.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise self._damaged(self.index) from None

    @property
    def _text_length(self) -> int | None:
        """The length of all texts, where padding is part of what the network sees; None where it is left out."""
        return self._facts["text_length"]

    @property
    def cut(self) -> int:
        """How many prompts are longer than `limit`."""
        return self._facts["cut"]

    @property
    def limit(self) -> int:
        """How many tokens of a prompt the text encoder reads."""
        return self._facts["limit"]

    @functools.cached_property
    def null(self) -> Condition:
        """The condition of no prompt, or of the negative one, [1, ...].

        Raises:
            TDMError: its file is gone or damaged.
        """
        file = self._opened(self.null_file)
        one = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file, not a dict)
        return _padded([one], self._text_length or len(one["text"]))

    def conditions(self, prompts: Sequence[str]) -> Condition:
        """The conditions of prompts as one batch [B, ...] on the CPU.

        Text that ends with its mask is padded to the longest of the batch (or the null prompt, so that this fits),
        other text to the length that the encoder itself gives.

        Raises:
            TDMError: a prompt is not in the cache, or its file is gone or damaged.
        """
        ones = [self._one(prompt) for prompt in prompts]
        longest = max(self.null["text"].shape[1], *(len(one["text"]) for one in ones))
        return _padded(ones, self._text_length or longest)

    def _one(self, prompt: str) -> Condition:
        if prompt not in self._places:
            raise TDMError(f"the prompt {prompt!r} is not among those that this run encoded")
        path, i = self._places[prompt]
        keys = list(self.null)
        file = self._opened(path)
        return {key: file.get_tensor(f"{i}.{key}") for key in keys}

    def _opened(self, path: Path) -> Any:
        """A file of tensors, which is compared with its checksum when it is opened."""
        if path not in self._open:
            try:
                file = safe_open(path, "pt")
                whole = (file.metadata() or {}).get("sha256") == _sha256(file.get_tensor, file.keys())
            except (OSError, SafetensorError):
                whole = False
            if not whole:
                raise self._damaged(path)
            self._open[path] = file
        return self._open[path]

    def _damaged(self, path: Path) -> TDMError:
        return TDMError(
            f"the encoded prompts in {path} are gone or damaged; delete the file if it is there, and run the same "
            "command again: it is made again"
        )


def build_cache(
    cache: PromptCache,
    open_encoders: Callable[[], AbstractContextManager[TextEncoders]],
    report: Report = print_line,
) -> None:
    """Encode what is missing of a cache; if nothing is, nothing is loaded.

    One process of a run calls this; the others read once it is done. Two that do it at once only do the work twice.

    Args:
        open_encoders: loads the text encoders for the length of a `with`.
        report: takes the progress lines.

    Raises:
        TDMError: the folder cannot be written.
    """
    missing = cache.missing()
    if not missing:
        return
    shards = {path: prompts for path, prompts in cache.shards.items() if path in missing}
    progress = Progress("encoding prompts", sum(map(len, shards.values())), report)
    with torch.no_grad(), open_encoders() as encoders:
        null = encoders.null()
        _save(cache.null_file, _unpadded(null)[0])
        if cache.index in missing:
            index = {
                **cache.identity,
                "text_length": None if _end(null) is not None else null["text"].shape[1],
                "cut": encoders.too_long(cache.prompts),
                "limit": encoders.limit,
            }
            with _replacing(cache.index) as file:
                file.write(json.dumps(index).encode())
        for path, prompts in shards.items():
            ones: list[Condition] = []
            for start in range(0, len(prompts), BATCH):
                part = prompts[start : start + BATCH]
                ones += _unpadded(encoders.prompts(part))
                progress.add(len(part))
            _save(path, {f"{i}.{key}": value for i, one in enumerate(ones) for key, value in one.items()})


# ---------------------------------------------------------------------- conditions of single prompts


def _end(cond: Condition) -> list[int] | None:
    """Where each prompt of a batch ends, if the network leaves out what is behind; None if it sees the padding."""
    if "mask" in cond:
        return [_last(row) for row in cond["mask"]]
    return cond["length"].tolist() if "length" in cond else None


def _last(row: Tensor) -> int:
    """The number of entries up to the last that is not zero, at least 1."""
    places = row.nonzero()
    return int(places.max()) + 1 if len(places) else 1


def _unpadded(cond: Condition) -> list[Condition]:
    """Each prompt of a batch alone and on the CPU, cut where it ends; padding that is seen is cut where it is zero."""
    ends = _end(cond) or [_last(text.any(1)) for text in cond["text"]]
    return [
        {key: (v[i, :end] if key in ("text", "mask") else v[i]).cpu().contiguous().clone() for key, v in cond.items()}
        for i, end in enumerate(ends)
    ]


def _padded(ones: Sequence[Condition], length: int) -> Condition:
    """The inverse of `_unpadded`, with text [B, length, D]."""
    return {
        key: torch.cat(
            [pad_text(one[key][None], length) if key in ("text", "mask") else one[key][None] for one in ones]
        )
        for key in ones[0]
    }


# ---------------------------------------------------------------------- files


def _readable(path: Path) -> bool:
    """Whether a file is there and whole: of tensors, the header says how long it must be."""
    if not path.is_file():
        return False
    try:
        if path.suffix == ".json":
            return {"text_length", "cut", "limit"} <= json.loads(path.read_text(encoding="utf-8")).keys()
        with safe_open(path, "pt"):
            return True
    except (OSError, ValueError, SafetensorError):
        return False


def _sha256(tensor: Callable[[str], Tensor], keys: Iterable[str]) -> str:
    """The SHA-256 of the names and values of tensors."""
    digest = hashlib.sha256()
    for key in sorted(keys):
        digest.update(key.encode())
        digest.update(tensor(key).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    with _replacing(path) as file:
        save_file(tensors, file.name, {"sha256": _sha256(tensors.__getitem__, tensors)})


_replacing = functools.partial(replacing, shared=True, remedy="make room, or set task.cache")
