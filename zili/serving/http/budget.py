"""Memory that requests may take together, so that many of them cannot take all of it."""

from __future__ import annotations

from contextlib import ExitStack


class Budget:
    """So much of something. For one thread."""

    def __init__(self, most: int) -> None:
        self.most = self._left = most

    def take(self, amount: int, held: ExitStack) -> bool:
        """Whether there is so much left. It is given back when `held` ends."""
        if amount > self._left:
            return False
        self._left -= amount
        held.callback(self._give_back, amount)
        return True

    def _give_back(self, amount: int) -> None:
        self._left += amount
