"""Seeds that follow from what they are for, so that a resumed run draws what the uninterrupted one would have."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in 0..2**63-1 that depends on all parts and their order, the same in every process and release.

    Example:
        >>> derive_seed(1, "task", 3) == derive_seed(1, "task", 3) != derive_seed(1, "task", 4)
        True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
