"""ReasoningStream: a growing text, parted into reasoning and answer as it comes.

Owns when a piece is certain: tags and blanks at the end may yet turn out to be no part of either.
What is a tag says models.processing.chat.
"""

from __future__ import annotations

from glm_batch.models.processing.chat import REASONING_TAGS, Chat


class ReasoningStream:
    """One output. Joined, what `add` returns is what Chat.split_reasoning makes of the whole text."""

    def __init__(self, chat: Chat, *, thinking: bool) -> None:
        self._chat = chat
        self._thinking = thinking
        self._text = ""
        self._reasoning = self._answer = ""

    def add(self, piece: str, *, last: bool) -> tuple[str, str]:
        """(reasoning, answer) that became certain with this piece of text."""
        self._text += piece
        certain = (
            self._text
            if last
            else self._text[: len(self._text) - _unfinished(self._text, self._chat.separator)]
        )
        reasoning, answer = self._chat.split_reasoning(certain, thinking=self._thinking)
        if not last:
            reasoning, answer = (reasoning or "").rstrip(), answer.rstrip()
        more_reasoning, self._reasoning = _gain(self._reasoning, reasoning or "")
        more_answer, self._answer = _gain(self._answer, answer)
        return more_reasoning, more_answer


def _gain(known: str, now: str) -> tuple[str, str]:
    """What `now` has beyond what is known already; nothing can be taken back."""
    return (now[len(known) :], now) if now.startswith(known) else ("", known)


def _unfinished(text: str, separator: str) -> int:
    """Characters at the end that may be the beginning of a tag or, where nothing else stands, of
    the separator.
    """
    if len(text) < len(separator) and separator.startswith(text):
        return len(text)
    tail = text[-max(map(len, REASONING_TAGS)) :]
    start = tail.rfind("<")
    if start >= 0 and any(
        tag.startswith(tail[start:]) and tag != tail[start:] for tag in REASONING_TAGS
    ):
        return len(tail) - start
    return 0
