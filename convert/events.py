"""What a conversion, or an export, tells while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen3_ascend.convert.plan import Plan


class Events:
    """Hears nothing; a subclass overrides what it wants to hear.

    Each method may be called from any thread, but `done` by one at a time.
    """

    def planned(self, plan: Plan) -> None:
        """The plan of a conversion stands, and nothing has been written yet."""

    def begun(self, nbytes: int) -> None:
        """The work begins: what `done` will tell of comes to so many bytes of source tensors."""

    def arrived(self, nbytes: int) -> None:
        """So many more bytes of weights were downloaded; less than 0 takes some back."""

    def done(self, name: str, nbytes: int) -> None:
        """An item is written: its name and the bytes of its source tensors."""

    def working(self, what: str) -> None:
        """Something that takes a while has come a step further; what, for people."""

    def note(self, line: str) -> None:
        """A line for people, about a download or what an interrupted run has left."""
