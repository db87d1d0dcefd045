"""How many tokens a step may have: fewer after memory ran out, then more again."""

from __future__ import annotations

import logging

# How torch and its libraries put it; torch.OutOfMemoryError is a RuntimeError with the first of
# these.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "_status_alloc_failed",
)
STEPS_TO_RECOVER = 64  # that must succeed before twice as many tokens are tried
MAX_STEPS_TO_RECOVER = 1024

log = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a step failed for want of memory, on whatever device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY)


class StepSize:
    """`tokens` is the limit of the next step, at most `most`."""

    def __init__(self, most: int) -> None:
        self.tokens = most
        self.num_failures = 0
        self._most = most
        self._fitted = most  # the limit under which a step last succeeded
        self._successes = 0
        self._patience = STEPS_TO_RECOVER

    def succeeded(self) -> None:
        """After enough steps the limit doubles; a doubled one that fails makes that rarer."""
        self._fitted = self.tokens
        if self.tokens == self._most:
            return
        self._successes += 1
        if self._successes >= self._patience:
            self._successes = 0
            self.tokens = min(2 * self.tokens, self._most)

    def failed(self, num_tokens: int, reason: str) -> bool:
        """A step of so many tokens did not fit; False when there is no smaller one to try."""
        self.num_failures += 1
        self._successes = 0
        if num_tokens <= 1:
            # one row was too large by itself: the others need not pay for it
            self.tokens = self._fitted
            return False
        if self.tokens > self._fitted:
            self._patience = min(2 * self._patience, MAX_STEPS_TO_RECOVER)
        self.tokens = max(1, min(self.tokens, num_tokens) // 2)
        log.warning(
            "out of memory in a step of %d tokens; next: %d tokens. %s",
            num_tokens,
            self.tokens,
            reason,
        )
        return True
