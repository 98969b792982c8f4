"""How many requests a server has at a time: found by trying, and given back when it says so. Pure.

Additive-increase, multiplicative-decrease, as TCP has it, with one more rule. A server that refuses
(429, 503) or lets requests time out gets fewer. One that takes everything, and only makes it wait,
would get more and more: so after each growth the tokens a second are compared with those before. By
Little's law they are requests in flight over latency, so where latency grew as much as the window
did, nothing was won, and the growth is taken back. docs/decisions/0013 has the reasons.
"""

from __future__ import annotations

import math

#: Where it begins.
START = 8
#: While nothing was ever refused, and after that.
FAST, SLOW = 2.0, 1.25
#: What is left after a refusal.
SHRINK = 0.7
#: Of the growth of the window, what the tokens a second must grow by. Less is not worth the wait
#: of everybody else's requests.
WORTH = 0.3
#: Rounds after a growth that wasn't worth it, before the next one is tried.
HOLD_ROUNDS = 10
#: Answers by which a round is judged, at the least; and so many windows of them.
FEWEST, WINDOWS = 32, 2


class Concurrency:
    """Times are seconds of any one clock that never goes back."""

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._window = float(min(max(START, least), most))
        self._has_shrunk = False
        self._shrunk_at = -math.inf
        self._before: tuple[float, float] | None = None  # the window it grew from, and its pace
        self._hold = 0
        # Of the round: when it began, since when it counts, and what came since.
        self._began_at = -math.inf
        self._measured_from: float | None = None
        self._num_answers = self._num_full = self._tokens = 0

    @property
    def window(self) -> int:
        """Requests that the server may have at a time."""
        return int(self._window)

    def answered(self, *, sent_at: float, now: float, tokens: int, num_in_flight: int) -> None:
        """An answer came. `num_in_flight`: when it was sent, itself included."""
        self._num_answers += 1
        if self._measured_from is None:
            # What was under way before the window changed says little: let it pass.
            if sent_at >= self._began_at and self._num_answers >= self.window:
                self._measured_from, self._num_answers = now, 0
            return
        self._num_full += num_in_flight >= self.window
        self._tokens += max(tokens, 1)
        if self._num_answers >= max(WINDOWS * self.window, FEWEST) and now > self._measured_from:
            self._close(now, self._tokens / (now - self._measured_from))

    def refused(self, *, sent_at: float, now: float) -> None:
        """The server had no room, or no time. Of those that were sent together one counts."""
        if sent_at < self._shrunk_at:
            return
        self._window = max(self._window * SHRINK, float(self._least))
        self._has_shrunk, self._shrunk_at, self._before = True, now, None
        self._begin(now)

    def _begin(self, now: float) -> None:
        self._began_at = now
        self._measured_from = None
        self._num_answers = self._num_full = self._tokens = 0

    def _close(self, now: float, pace: float) -> None:
        was_full = self._num_full * 2 > self._num_answers
        self._begin(now)
        if not was_full:
            self._before = None  # there was too little to do; the pace says nothing
            return
        if self._before is not None:
            window, pace_before = self._before
            if pace < pace_before * (1 + WORTH * (self.window / int(window) - 1)):
                self._window, self._before, self._hold = window, None, HOLD_ROUNDS
                return
        if self._hold:
            self._hold -= 1
            return
        grown = self._window * (SLOW if self._has_shrunk else FAST)
        larger = min(max(grown, self._window + 1), float(self._most))
        self._before = (self._window, pace) if larger > self._window else None
        self._window = larger
