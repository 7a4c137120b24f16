"""The digest that tells whether all ranks have the same: exact, and without near collisions."""

import pytest

from gradclip.clipping.ranks.digest import NUMBERS, digest, numbers


def test_each_integer_travels_with_its_square():
    assert numbers((1, 2, 3)) == [1, 1, 2, 4, 3, 9]
    assert numbers((1, 2, 3), ranks=4) == [4, 4, 8, 16, 12, 36]
    assert len(numbers((0, 0, 0))) == NUMBERS


@pytest.mark.parametrize("ranks", [1, 2, 3, 2048, 2049, 4096, 100_000])
def test_sums_of_squares_are_exact(ranks):
    words = [word for n in range(200) for word in digest([bytes([n])], ranks)]
    assert all(ranks * word * word < 2**53 for word in words)
    expected = 21 if ranks <= 2048 else (53 - (ranks - 1).bit_length()) // 2
    assert max(words).bit_length() == expected


def test_where_parts_end_is_part_of_it():
    assert digest([b"ab", b"c"], 2) != digest([b"a", b"bc"], 2)
    assert digest([b"ab", b""], 2) != digest([b"ab"], 2)


def test_sets_that_collided_in_sixteen_bits_do_not():
    """A cyclic checksum is linear: two sets that collide once do so whatever else there is."""
    sets = (
        {0, 2, 5, 7, 9, 10, 11, 12, 15, 16, 21, 23},
        {0, 8, 9, 10, 11, 12, 14, 16, 17, 18, 19, 21},
    )
    first, second = (digest([b"", bytes(n in each for n in range(24))], 2) for each in sets)
    assert first != second


def test_many_sets_have_many_digests():
    seen = {digest([n.to_bytes(4, "little")], 2) for n in range(20_000)}
    assert len(seen) == 20_000
