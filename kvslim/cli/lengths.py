"""Option values that are numbers: lengths like `512,4k`, and counts."""

from __future__ import annotations

from kvslim.errors import UsageError

THOUSAND = 1024
MOST_DIGITS = 12


def read_lengths(text: str, option: str) -> tuple[int, ...]:
    """Token counts like `512,4k,16k`, where k is 1,024.

    Raises:
        UsageError: One of them is not a positive number.
    """
    return tuple(read_length(part.strip(), option) for part in text.split(","))


def read_length(text: str, option: str) -> int:
    """A token count like `16k`, where k is 1,024.

    Raises:
        UsageError: It is not a positive number.
    """
    digits, factor = (text[:-1], THOUSAND) if text[-1:] in {"k", "K"} else (text, 1)
    if not (digits.isascii() and digits.isdigit() and len(digits) <= MOST_DIGITS and int(digits)):
        raise UsageError(f"{text!r} is not a number of tokens", where=option, fix="write lengths like 512,4k,16k")
    return int(digits) * factor


def read_counts(text: str, option: str) -> tuple[int, ...]:
    """Positive numbers like `1,4`.

    Raises:
        UsageError: One of them is not a positive number.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit() and len(part) <= MOST_DIGITS and int(part)):
            raise UsageError(f"{part!r} is not a positive number", where=option, fix="write numbers like 1,4")
    return tuple(int(part) for part in parts)
