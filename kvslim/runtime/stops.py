"""Stop strings: where they end a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from kvslim.errors import UsageError


def checked_stops(strings: Sequence[str]) -> tuple[str, ...]:
    """The strings themselves.

    Raises:
        UsageError: One is empty.
    """
    if "" in strings:
        raise UsageError("a stop string is empty", where="stop", fix="give at least one character")
    return tuple(strings)


class StopStrings:
    """Cuts a text off before the stop string that is complete first, however the text is cut into pieces.

    Attributes:
        found: Whether one has come.

    Args:
        strings: The stop strings; none leaves the text as it is.

    Raises:
        UsageError: One is empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found = False
        self._strings, self._held = checked_stops(strings), ""

    def push(self, piece: str) -> str:
        """What is known not to be part of a stop string, now that a piece has come."""
        text = self._held + piece
        places = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._strings if stop in text]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)[1]]
        sure = len(text) - self._begun(text)
        self._held = text[sure:]
        return text[:sure]

    def rest(self) -> str:
        """What was held back as the possible beginning of a stop string, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _begun(self, text: str) -> int:
        """The length of the longest tail of a text that a stop string begins with."""
        longest = max(map(len, self._strings), default=1) - 1
        tails = (text[-length:] for length in range(min(longest, len(text)), 0, -1))
        return next((len(tail) for tail in tails if any(stop.startswith(tail) for stop in self._strings)), 0)
