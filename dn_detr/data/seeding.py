"""Seeds that are functions of numbers, so that no global random state decides anything."""

from __future__ import annotations

import hashlib


def stable_seed(*numbers: int) -> int:
    """Hash integers to a seed that is the same in every process, on every machine.

    Args:
        *numbers: any integers, order matters; for a sample (seed, epoch, index).

    Returns:
        An integer in [0, 2**63).
    """
    text = ",".join(str(int(number)) for number in numbers)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
