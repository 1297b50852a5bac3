"""Libraries whose remarks on import would bury our output: about kernels for other machines and about each other."""

from __future__ import annotations

import logging

CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def hush() -> None:
    """Let them speak of errors alone."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
