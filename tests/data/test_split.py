import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zili.data.split import Split, content_key, cut
from zili.errors import DataError


def test_key_and_share_follow_sha256() -> None:
    assert content_key("自立") == int(hashlib.sha256("自立".encode()).hexdigest()[:16], 16)
    split = Split.of(0.1)
    held_out = sum(split.holds_out(f"document {i}") for i in range(5000))
    assert abs(held_out - 500) < 5 * 21  # five standard deviations
    assert str(split.threshold) in split.rule


def test_at_least_the_smallest_key_is_held_out() -> None:
    texts = ["one", "two", "three"]
    split = Split.of(1e-9, min(map(content_key, texts)))
    assert sum(map(split.holds_out, texts)) == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 5])
def test_fraction_must_leave_both_sides(fraction: float) -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        Split.of(fraction)


@given(st.text(alphabet="ab \n自", max_size=300), st.integers(1, 20))
def test_pieces_join_to_the_text(text: str, size: int) -> None:
    pieces = list(cut(text, size))
    assert "".join(pieces) == text
    assert all(size <= len(piece) <= 2 * size + 1 for piece in pieces[:-1])
    assert len(pieces[-1]) <= 2 * size


def test_blank_lines_are_preferred() -> None:
    assert list(cut("aa bb\ncc dd\n\nee ff", 4)) == ["aa bb\n", "cc dd\n\n", "ee ff"]
