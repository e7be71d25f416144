"""Channels that must be scaled together: a union-find whose members carry the sign of their exponent."""

from __future__ import annotations

__all__ = ["Components"]


class Components:
    """Disjoint sets of channels; the scale of a member is its set's scale to the power of 1 or -1.

    Channels are numbered from 1 on, in the order in which they are made; 0 stands for no channel.
    """

    def __init__(self) -> None:
        self._parent, self._sign = [0], [1]
        self._blocked: set[int] = set()
        self._unshifted: set[int] = set()

    def make(self, count: int) -> int:
        """The first number of ``count`` new channels, each alone in its set."""
        start = len(self._parent)
        self._parent += range(start, start + count)
        self._sign += [1] * count
        return start

    def find(self, channel: int) -> tuple[int, int]:
        """The number that stands for the channel's set, and the channel's exponent in it."""
        path, sign = [], 1
        while self._parent[channel] != channel:
            path.append(channel)
            channel = self._parent[channel]
        for member in reversed(
            path
        ):  # nearest to the root first: each then knows its own exponent towards the root
            sign *= self._sign[member]
            self._parent[member], self._sign[member] = channel, sign
        return channel, sign

    def tie(self, first: int, second: int, exponent: int) -> None:
        """Make the scale of ``second`` that of ``first`` to the power of ``exponent``, 1 or -1.

        A set in which that contradicts what was tied before must not be scaled.
        """
        (a, sign_a), (b, sign_b) = self.find(first), self.find(second)
        if a == b:
            if sign_a * sign_b != exponent:
                self._blocked.add(a)
            return
        self._parent[b], self._sign[b] = a, sign_a * sign_b * exponent
        for marks in (self._blocked, self._unshifted):
            if b in marks:
                marks.add(a)

    def block(self, channel: int) -> None:
        """The channel's set must stay as it is."""
        self._blocked.add(self.find(channel)[0])

    def keep_zero(self, channel: int) -> None:
        """The channel's set may be scaled, not shifted."""
        self._unshifted.add(self.find(channel)[0])

    def is_free(self, root: int) -> bool:
        """Whether the set may be scaled."""
        return root not in self._blocked

    def is_shifted(self, root: int) -> bool:
        """Whether the set may be shifted as well."""
        return root not in self._unshifted
