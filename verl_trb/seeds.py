"""Seeds of single requests, for reruns that are equal bit by bit (trb.deterministic=true).

A seed is a hash of what it is for, so that it depends neither on the order of requests nor on what ran before: a
resumed run draws what the uninterrupted one would have drawn.
"""

import hashlib


def derive(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on every part and on their order."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
