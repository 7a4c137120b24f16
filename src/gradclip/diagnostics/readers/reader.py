"""What reads one family of logs."""

from typing import Protocol

from gradclip.diagnostics.readers.source import Source
from gradclip.diagnostics.readers.table import Table

__all__ = ["Reader"]


class Reader(Protocol):
    """A module with these two functions."""

    def claims(self, source: Source) -> bool:
        """Return whether the beginning of the file shows that it is of this family."""

    def read(self, source: Source) -> Table:
        """Read the numbers of the file.

        Raises:
            LogError: It is damaged; with the line.
        """
