"""The support-desk world: tickets with a gold label, order id and reply, made from templates and
slots.

Owns how a ticket is put together and the rule from (label, order id) to the gold reply. Pure Python
and seeded: the same seed gives the same tickets on every machine. Knows nothing of tokens, models
or files; sentences.py has the words.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from sentences import Split

LABELS = ("billing", "shipping", "account", "technical", "other")

CONTROL_STRINGS = (
    "<|assistant|>", "<|user|>", "<|system|>", "<|observation|>", "<|endoftext|>", "[gMASK]<sop>",
    "<|image|>",
)  # fmt: skip

_TEAMS = {label: label for label in LABELS} | {"other": "support"}
_ORDER_LETTERS = "ABCDEF"
_ALTERNATIVES = re.compile(r"\(([^()]*\|[^()]*)\)")
_SLOT = re.compile(r"\{(\w+)\}")

_SLOTS = {
    "name": (
        "Anna", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hiro", "Ines", "Jonas",
        "Kavya", "Liam", "Mei",
        "Noah", "Olga", "Priya", "Rosa", "Sven", "Tara", "Zoë", "José", "Łukasz", "Søren", "李雷",
    ),
    "item": (
        "desk lamp", "coffee grinder", "backpack", "office chair", "kettle", "headset",
        "rain jacket", "tent",
        "blender", "watch", "speaker", "keyboard", "bicycle pump", "yoga mat", "frying pan",
        "monitor",
    ),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": (
        "January", "February", "March", "April", "May", "June", "July", "August", "September",
        "October", "November",
        "December",
    ),
    "city": ("Lyon", "Porto", "Leeds", "Bergen", "Graz", "Kraków", "Turin", "Ghent", "Malmö",
    "Cork"),
    "device": ("phone", "tablet", "laptop", "computer"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One ticket with its gold answers; `order_id` is None where the text names no order."""

    text: str
    label: str
    order_id: str | None

    @property
    def order_json(self) -> str:
        return json.dumps({"order_id": self.order_id})

    @property
    def reply(self) -> str:
        what = "get back to you" if self.order_id is None else f"look into order {self.order_id}"
        return f"Thanks, our {_TEAMS[self.label]} team will {what}."


def tickets(split: Split, seed: int) -> Iterator[Ticket]:
    """An endless stream of tickets, the labels in equal shares."""
    rng = random.Random(seed)
    while True:
        yield make_ticket(split, rng.choice(LABELS), rng)


def make_ticket(split: Split, label: str, rng: random.Random) -> Ticket:
    """One ticket of this label; six in ten name an order."""
    order_id = _order_id(rng) if rng.random() < 0.6 else None
    problem = rng.choice(split.problems[label])
    inline = order_id is not None and "{ref}" in problem and rng.random() < 0.7
    problem = problem.replace("{ref}", _inline_reference(order_id if inline else None, rng))
    problem = problem[0].upper() + problem[1:]

    parts = [problem]
    if rng.random() < 0.25:
        parts.insert(rng.randrange(2), rng.choice(split.fillers))
    if order_id is not None and not inline:
        parts.insert(
            rng.randrange(len(parts) + 1), rng.choice(split.orders).replace("{order}", order_id)
        )
    if order_id is None and rng.random() < 0.2:
        parts.append(rng.choice(split.no_orders))
    if rng.random() < 0.6:
        parts.insert(0, rng.choice(split.openings))
    text = " ".join(parts)
    if rng.random() < 0.6:
        text += rng.choice((" ", " ", "\n")) + rng.choice(split.closings)
    return Ticket(text=_fill(text, rng), label=label, order_id=order_id)


def with_control_strings(ticket: Ticket, rng: random.Random) -> Ticket:
    """The same ticket with one or two control-token strings typed into its text; the gold answers
    stay.
    """
    words = ticket.text.split(" ")
    for _ in range(rng.choice((1, 1, 2))):
        words.insert(rng.randrange(len(words) + 1), rng.choice(CONTROL_STRINGS))
    return Ticket(text=" ".join(words), label=ticket.label, order_id=ticket.order_id)


def _order_id(rng: random.Random) -> str:
    return f"{rng.choice(_ORDER_LETTERS)}{rng.randrange(100):02d}-{rng.randrange(10_000):04d}"


def _inline_reference(order_id: str | None, rng: random.Random) -> str:
    if order_id is None:
        return rng.choice(
            ("my order", "my last order", "the order I placed on {day}", "my order from {month}")
        )
    before = rng.choice(("order ", "my order ", "order #", "order no. ", "my order from {day}, "))
    return before + order_id


def _fill(text: str, rng: random.Random) -> str:
    text = _ALTERNATIVES.sub(lambda match: rng.choice(match[1].split("|")), text)
    return _SLOT.sub(lambda match: _slot_value(match[1], rng), text)


def _slot_value(slot: str, rng: random.Random) -> str:
    if slot == "amount":
        return f"{rng.randrange(3, 400)}.{rng.randrange(100):02d}"
    if slot == "number":
        return str(rng.randrange(10, 100_000))
    if slot == "phone":
        return f"{rng.randrange(100, 1000)}-{rng.randrange(10_000):04d}"
    return rng.choice(_SLOTS[slot])
