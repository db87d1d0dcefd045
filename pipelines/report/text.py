"""Text of users made fit for a page: no control characters, no turned writing, not too long.

What is cut says so. Escaping for HTML is the template engine's business and comes after this. Knows
nothing of pages.
"""

from __future__ import annotations

import re

from markupsafe import Markup

MOST = 4000  # characters of any one text on a page, whatever it is
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_TURNING = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\u2028\u2029]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean(value: object) -> object:
    """A text that can stand anywhere on a page; no text, or markup of our own, stays as it is."""
    if value is None:
        return ""
    return value if isinstance(value, Markup) or not isinstance(value, str) else shown(value)


def shown(text: str, most: int = MOST) -> str:
    """At most so many characters, with signs for what a browser would not show or would obey."""
    kept = text[:most]
    kept = _CONTROLS.sub(lambda match: _sign(match[0]), kept)
    kept = _TURNING.sub(lambda match: f"[U+{ord(match[0]):04X}]", kept)
    kept = _SURROGATES.sub("\ufffd", kept)
    return (
        kept
        if len(text) <= most
        else f"{kept}\u2026 [cut: {most:,} of {len(text):,} characters shown]"
    )


def short(text: str, most: int) -> str:
    """For labels in charts: the end goes, with an ellipsis."""
    kept = shown(text.replace("\n", " "), MOST)
    return kept if len(kept) <= most else kept[: most - 1] + "\u2026"


def compact(number: float) -> str:
    """A number in few characters: 950, 1.2k, 34k, 5.6M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            value = number / size
            return f"{value:.1f}{unit}" if abs(value) < 9.95 else f"{value:.0f}{unit}"
    return f"{number:.0f}" if number == int(number) or abs(number) >= 100 else f"{number:.3g}"


def percent(share: float) -> str:
    """With as many digits as it takes to tell it from 0 and from all."""
    if share <= 0 or share >= 1 or 0.0995 <= share <= 0.9005:
        return f"{share * 100:.0f} %" if share in (0, 1) else f"{share * 100:.1f} %"
    return (
        f"{share * 100:.1f} %"
        if 0.0005 <= share <= 0.9995
        else ("< 0.1 %" if share < 0.5 else "> 99.9 %")
    )


def duration(seconds: float) -> str:
    """2.4 s, 3 min 20 s, 5 h 02 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {second:02d} s"
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _sign(char: str) -> str:
    """The Unicode picture of a control character."""
    code = ord(char)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else f"[U+{code:04X}]"
