"""Text that comes token by token: never half a character, and nothing that a stop string ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT_CHARACTER = "\ufffd"


class TextStream:
    """Text of a growing list of tokens; never half a character.

    All pieces together equal the text of all tokens decoded at once.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], step: Callable[[int], str | None]
    ) -> None:
        """Takes how to decode all tokens, and what text one more token completes."""
        self._decode = decode
        self._step = step
        self._tokens: list[int] = []
        self._length = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._tokens.append(token)
        piece = self._step(token) or ""
        self._length += len(piece)
        return piece

    def finish(self) -> str:
        """What is left at the end, such as the replacement for an unfinished character."""
        return self._decode(self._tokens)[self._length :]


class WholeTextStream(TextStream):
    """For tokenizers in Python, which have no decoder for single tokens: decodes all of them at
    every step, and holds back what ends in an unfinished character."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        super().__init__(decode, self._new_text)

    def _new_text(self, token: int) -> str:
        text = self._decode(self._tokens)
        return "" if text.endswith(REPLACEMENT_CHARACTER) else text[self._length :]


class StopFilter:
    """Withholds stop strings, and text that may yet become one, from a stream of pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is safe to show; sets `stopped` once a stop string is complete.

        Of several, the one that is complete first counts (and of two that end together, the
        longer), so that the result does not depend on how the text was cut into pieces.
        """
        self._held += piece
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was withheld for a stop string that never came."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
