"""Stickers: a small drawn world whose pictures can be checked.

Scenes (:mod:`.scene`) are described by captions (:mod:`.captions`), drawn by code (:mod:`.draw`) and read back from
pixels by a verifier (:mod:`.verify`). The bundled teacher learned this world from scratch.
"""
