"""Prompts as ComfyUI's users write them, for the text encoders of a pipeline: weights, (red:1.3), and embeddings.

The syntax and the meaning of both are core's. A weight w moves the encoder's output at a word's tokens to
``empty + w * (text - empty)``, where `empty` is the output for the empty prompt. An embedding stands in the place of
tokens at the encoder's input.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import comfy.sd1_clip as core
import folder_paths
import torch
from torch import Tensor

from ..errors import TDMError
from ..pipelines.families import Condition, Family
from .faces import warn, write_on_face

# Family -> the tokenizers behind its "text", one after another along the tokens. Core itself gives language models,
# which the other families have, the brackets as text.
_TOKENIZERS = {
    "sd15": ("tokenizer",),
    "sdxl": ("tokenizer",),
    "sd3": ("tokenizer", "tokenizer_3"),
    "flux": ("tokenizer_2",),
    "pixart": ("tokenizer",),
    "cogvideox": ("tokenizer",),
    "wan": ("tokenizer",),
}
_EMBEDDING = re.compile(r"(?:(?<=\s)|^)embedding:(\S+)")
_WEIGHT = re.compile(r"\([^()]+:\s*\d*\.?\d+\s*\)")
_PLACEHOLDERS = ("x", "a", "the", "red")  # words of one token in most tokenizers


class Piece(NamedTuple):
    """A part of a prompt with one weight; `embedding` is the name of a file in models/embeddings."""

    text: str
    weight: float = 1.0
    embedding: str | None = None


def pieces_of(prompt: str) -> list[Piece]:
    """A prompt without its brackets, in pieces."""
    pieces = []
    for text, weight in core.token_weights(core.escape_important(prompt), 1.0):
        text = core.unescape_important(text)
        end = 0
        for match in _EMBEDDING.finditer(text):
            pieces.append(Piece(text[end : match.start()], weight))
            pieces.append(Piece("", weight, match[1].rstrip(",")))
            end = match.start() + len("embedding:") + len(match[1].rstrip(","))
        pieces.append(Piece(text[end:], weight))
    return [piece for piece in pieces if piece.text or piece.embedding]


def encode(family: Family, pipe: Any, prompt: str) -> Condition:
    """The condition of one prompt, [1, ...]. No text at all is the unconditional prompt.

    Raises:
        TDMError: an embedding does not exist, or is not for these text encoders.
    """
    if family.name not in _TOKENIZERS:
        if match := _EMBEDDING.search(prompt):
            raise TDMError(f"embeddings do not fit the text encoder of {family.name}: remove {match[0]!r}")
        match = _WEIGHT.search(prompt)
        text = (
            f"The text encoder of {family.name} has no prompt weights: it reads {match[0]!r} as text." if match else ""
        )
        write_on_face(text)
        if text:
            warn(text)
        return family.encode_text(pipe, [prompt]) if prompt else family.encode_null(pipe)
    pieces = pieces_of(prompt)
    if not pieces:
        return family.encode_null(pipe)
    vectors = _vectors_of(pipe, pieces)
    pieces = [_with_placeholders(pipe, piece, vectors) for piece in pieces]
    text = "".join(piece.text for piece in pieces)
    with _embedded(family, pipe, pieces, vectors):
        cond = family.encode_text(pipe, [text])
    if any(piece.weight != 1 for piece in pieces):
        cond["text"] = _weighted(family, pipe, pieces, cond["text"])
    return cond


# ---------------------------------------------------------------------- weights


def _weighted(family: Family, pipe: Any, pieces: list[Piece], text: Tensor) -> Tensor:
    """`text` [1, L, D] with each token's distance from the empty prompt's times its weight."""
    empty = family.encode_text(pipe, [""])["text"].to(text)
    length = text.shape[1]
    lengths = [length]
    if family.name == "sd3":
        lengths = [pipe.tokenizer_max_length, length - pipe.tokenizer_max_length]
    weights = torch.cat(
        [
            _weights(family, getattr(pipe, name), pieces, each)
            for name, each in zip(_TOKENIZERS[family.name], lengths, strict=True)
        ]
    ).to(text)
    if empty.shape[1] < length:
        empty = torch.nn.functional.pad(empty, (0, 0, 0, length - empty.shape[1]))
    return empty + weights[:, None] * (text - empty[:, :length])


def _weights(family: Family, tokenizer: Any, pieces: list[Piece], length: int) -> Tensor:
    """The weight of each of `length` tokens; 1 for those that are not the prompt's."""
    weights = torch.ones(length)
    if tokenizer is None:
        return weights
    front, back = _special_tokens(tokenizer)
    for (start, end), piece in zip(_places(family, tokenizer, pieces), pieces, strict=True):
        weights[front + start : min(front + end, length - back)] = piece.weight
    return weights


def _places(family: Family, tokenizer: Any, pieces: list[Piece]) -> list[tuple[int, int]]:
    """Where the tokens of each piece begin and end, without special tokens."""
    text, start, places = "", 0, []
    for piece in pieces:
        text += piece.text
        end = _count(family, tokenizer, text)
        places.append((start, end))
        start = end
    return places


def _count(family: Family, tokenizer: Any, text: str) -> int:
    text = text.strip()
    return len(_tokens(tokenizer, text.lower() if family.name == "pixart" else text))  # as its pipeline prepares it


def _tokens(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _special_tokens(tokenizer: Any) -> tuple[int, int]:
    """How many tokens a tokenizer puts in front of a prompt and behind it."""
    plain, whole = _tokens(tokenizer, "a"), _tokens(tokenizer, "a", special=True)
    front = whole.index(plain[0])
    return front, len(whole) - front - len(plain)


# ---------------------------------------------------------------------- embeddings


def _encoders(pipe: Any) -> Iterator[tuple[str, Any, Any]]:
    """(number, tokenizer, text encoder) of each text encoder that a pipeline has."""
    for number in ("", "_2", "_3"):
        tokenizer, encoder = (getattr(pipe, f"{part}{number}", None) for part in ("tokenizer", "text_encoder"))
        if tokenizer is not None and encoder is not None:
            yield number, tokenizer, encoder


def _vectors_of(pipe: Any, pieces: list[Piece]) -> dict[str, dict[str, Tensor]]:
    """Embedding -> number of the text encoder -> its vectors, (N, D).

    Raises:
        TDMError: there is no such file, or it lacks vectors for a text encoder.
    """
    vectors: dict[str, dict[str, Tensor]] = {}
    for name in {piece.embedding for piece in pieces if piece.embedding}:
        for number, _, encoder in _encoders(pipe):
            width = encoder.get_input_embeddings().weight.shape[1]
            clip = "CLIP" in type(encoder).__name__
            key = ("clip_l" if number == "" else "clip_g") if clip else "t5xxl"
            vector = core.load_embed(name, folder_paths.get_folder_paths("embeddings"), width, key)
            if vector is None:
                raise TDMError(f"there is no embedding {name!r} in models/embeddings")
            vector = vector.reshape(-1, vector.shape[-1])
            if vector.shape[1] != width:
                raise TDMError(
                    f"embedding {name!r} is {vector.shape[1]} wide, not the {width} of text_encoder{number}: it is for "
                    "another model"
                )
            vectors.setdefault(name, {})[number] = vector
        if len({len(vector) for vector in vectors[name].values()}) > 1:
            raise TDMError(f"embedding {name!r} has other numbers of vectors for each text encoder")
    return vectors


def _with_placeholders(pipe: Any, piece: Piece, vectors: dict[str, dict[str, Tensor]]) -> Piece:
    """A piece whose embedding is written as words of one token each, whose place it takes."""
    if piece.embedding is None:
        return piece
    n = len(next(iter(vectors[piece.embedding].values())))
    for word in _PLACEHOLDERS:
        text = f" {' '.join([word] * n)} "
        if all(len(_tokens(tokenizer, text.strip())) == n for _, tokenizer, _ in _encoders(pipe)):
            return piece._replace(text=text)
    raise TDMError(f"the tokenizer of this pipeline has no place for embedding {piece.embedding!r}")


@contextlib.contextmanager
def _embedded(family: Family, pipe: Any, pieces: list[Piece], vectors: dict[str, dict[str, Tensor]]) -> Iterator[None]:
    """Text encoders that get the vectors of embeddings in their places, for the length of a `with`."""
    hooks = []
    if vectors:
        for number, tokenizer, encoder in _encoders(pipe):
            front, _ = _special_tokens(tokenizer)
            rows = [
                (front + start, vectors[piece.embedding][number])
                for (start, _), piece in zip(_places(family, tokenizer, pieces), pieces, strict=True)
                if piece.embedding
            ]
            hooks.append(_input_embeddings(encoder).register_forward_hook(_replace(rows)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _input_embeddings(encoder: Any) -> Any:
    """The module that the encoder itself calls: T5 has a second one that shares its weight."""
    stack = getattr(encoder, "encoder", None)
    return getattr(stack, "embed_tokens", None) or encoder.get_input_embeddings()


def _replace(rows: list[tuple[int, Tensor]]) -> Any:
    def hook(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        embedded = embedded.clone()
        for start, vector in rows:
            room = embedded.shape[1] - start
            embedded[:, start : start + len(vector)] = vector[:room].to(embedded)
        return embedded

    return hook
