"""A digest of what all ranks should have alike, as numbers whose sums tell whether they have.

A digest has 63 bits: three integers of 21 bits. With each integer c travels its square. Over n
ranks the sums are n c and n c^2 exactly if all have the same c: other integers with the same sum
have a larger sum of squares. float64 is exact up to 2^53, so 21 bits serve 2048 ranks. Beyond
that the integers are shorter.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

NUMBERS = 6
"""How many numbers travel: three integers, each with its square."""

_BITS, _EXACT = 21, 53


def digest(parts: Iterable[bytes], ranks: int) -> tuple[int, int, int]:
    """Return the digest of some bytes.

    Args:
        parts: In an order that is the same on all ranks; where one ends is part of it.
        ranks: How many ranks add it up.
    """
    hashed = blake2b(digest_size=24)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    bits = min(_BITS, (_EXACT - (ranks - 1).bit_length()) // 2)
    whole = hashed.digest()
    first, second, third = (
        int.from_bytes(whole[start : start + 8], "little") & ((1 << bits) - 1)
        for start in (0, 8, 16)
    )
    return first, second, third


def numbers(words: Sequence[int], ranks: int = 1) -> list[float]:
    """Return what travels; or what so many ranks add up to, if all have the same."""
    return [float(ranks * value) for word in words for value in (word, word * word)]
