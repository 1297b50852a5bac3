"""What a pipeline's tokenizer knows."""

from __future__ import annotations

import re
from typing import Any


def unknown_words(pipe: Any, prompt: str) -> list[str]:
    """Words that the tokenizer does not know, which a small vocabulary silently drops."""
    tokenizer = pipe.tokenizer
    pieces = {w: tokenizer(w, add_special_tokens=False).input_ids for w in re.findall(r"\w+", prompt.lower())}
    return [w for w, ids in pieces.items() if tokenizer.unk_token_id in ids]  # CLIP's ends every prompt, too
