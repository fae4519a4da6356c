"""Prompt lookup: what followed the last tokens where they stood before in the text.

Saxena, "Prompt Lookup Decoding", 2023; Fu et al., "Lookahead Decoding", 2024, section 3.2, for n-grams of the answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvslim.speculative.estimates import HitRates

LONGEST_KEY, LONGEST_MATCH = 4, 12  # tokens that are looked up, and that are told apart
# By the number of tokens that match; the first is for none.
PRIORS = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.8, 0.85, 0.9)


def match_rates() -> HitRates:
    """How often the token behind a match is right, by the length of the match."""
    return HitRates(PRIORS)


class Lookup:
    """The n-grams of one text.

    Every token that is added shows whether what would have been proposed is right, proposed or not.

    Args:
        tokens: The text so far.
        rates: As `match_rates` gives them; they learn from what is added.
    """

    def __init__(self, tokens: Iterable[int], rates: HitRates) -> None:
        self.rates, self._text = rates, list[int]()
        self._places: dict[tuple[int, ...], int] = {}
        self._match, self._length = 0, 0
        for token in tokens:
            self._append(token)

    def add(self, token: int) -> None:
        """Adds a token that was drawn."""
        if self._length:
            self.rates.add(self._length, self._text[self._match] == token)
        self._append(token)

    def _append(self, token: int) -> None:
        text = self._text
        text.append(token)
        self._length = 0
        for size in range(1, min(LONGEST_KEY, len(text)) + 1):
            key = tuple(text[-size:])
            if (place := self._places.get(key)) is not None:
                self._match, self._length = place, size
            self._places[key] = len(text)
        if self._length == LONGEST_KEY:
            self._extend()

    def _extend(self) -> None:
        """Counts how many more tokens before the match are those before the end."""
        text, match = self._text, self._match
        while self._length < min(LONGEST_MATCH, match) and text[match - self._length - 1] == text[-self._length - 1]:
            self._length += 1

    def proposals(self, most: int) -> tuple[list[int], list[float]]:
        """Tokens that may come next, and the chance of each that it is right where those before it are."""
        if not self._length:
            return [], []
        found, shares = self._text[self._match : self._match + most], self.rates.shares
        while len(found) < most:  # a text that repeats itself goes on repeating
            found += found[: most - len(found)]
        chances = shares[self._length : self._length + most]
        return found, chances + [shares[-1]] * (most - len(chances))
