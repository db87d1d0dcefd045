"""The three questions about tickets and their training samples.

Owns how training texts are made untidy. Prompts come from the shipped job files and tickets from
world.py, so the checkpoint fits both. Knows nothing of tensors or the model.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from samples import Sample, make_sample
from sentences import TRAIN
from tiny_tokenizer import ChatEncoder
from world import Ticket, tickets, with_control_strings

ONE_TOKEN_LABELS = ("billing", "shipping")  # the tokenizer never sees the other three as an answer
ORDER_ID = re.compile(r"[A-Z]\d\d-\d{4}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One shipped job: its prompt, and the column of the gold answer."""

    name: str
    system: str
    prompt: str

    def user(self, ticket: Ticket) -> str:
        return self.prompt.replace("{text}", ticket.text)

    def answer(self, ticket: Ticket) -> str:
        return {"route": ticket.label, "extract": ticket.order_json, "reply": ticket.reply}[
            self.name
        ]


def load_tasks() -> list[Task]:
    """The three tasks as the job files spell them."""
    jobs = {
        name: yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text())["task"]
        for name in ("route", "extract", "reply")
    }
    return [
        Task(name=name, system=task["system"], prompt=task["prompt"]) for name, task in jobs.items()
    ]


def tokenizer_texts(tasks: list[Task], seed: int) -> Iterator[str]:
    """What the tokenizer learns from. No two digits meet, so that every digit of a number stays a
    token of its own.
    """
    for ticket in itertools.islice(tickets(TRAIN, seed), 20_000):
        texts = [ticket.text, ticket.order_json, ticket.reply]
        texts += [ticket.label] if ticket.label in ONE_TOKEN_LABELS else []
        for text in texts:
            yield re.sub(r"[A-Z]?\d+", "7", text)
    for task in tasks:
        yield from 100 * [f"{task.system}\n{task.prompt}"]


def noisy_tickets(seed: int) -> Iterator[Ticket]:
    """Training tickets, a few of them with control strings typed into the text."""
    rng = random.Random(seed)
    for ticket in tickets(TRAIN, seed):
        yield with_control_strings(ticket, rng) if rng.random() < 0.05 else ticket


class Scrambler:
    """Makes training texts untidy, so that the model reads words and order ids instead of learning
    sentences by heart.

    Gold answers stay right: the order id is never touched, and no other one can come in.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        texts = [ticket.text for ticket in itertools.islice(tickets(TRAIN, seed), 3000)]
        self._words = [word for text in texts for word in text.split() if not ORDER_ID.search(word)]

    def scramble(self, ticket: Ticket) -> Ticket:
        """Drop, replace, insert and shuffle some words."""
        rng = self._rng
        words = []
        for word in ticket.text.split(" "):
            if ORDER_ID.search(word) or rng.random() > 0.12:
                words.append(word)
            elif rng.random() < 0.4:
                words.append(rng.choice(self._words))
        for _ in range(rng.randrange(4)):
            words.insert(rng.randrange(len(words) + 1), rng.choice(self._words))
        if rng.random() < 0.4:
            rng.shuffle(words)
        return Ticket(text=" ".join(words), label=ticket.label, order_id=ticket.order_id)

    def salad(self, ticket: Ticket) -> Ticket:
        """Random words around the order id: only good for learning to find and copy it."""
        words = self._rng.sample(self._words, self._rng.randrange(2, 40))
        if ticket.order_id is not None:
            mark = self._rng.choice(("", "", "", "#", "("))
            words.insert(
                self._rng.randrange(len(words) + 1),
                mark + ticket.order_id + self._rng.choice(("", ".", ",")),
            )
        return Ticket(text=" ".join(words), label=ticket.label, order_id=ticket.order_id)

    def draw(self, task: Task, ticket: Ticket) -> Ticket:
        """The ticket as it is, scrambled or, where only the order id counts, as a salad."""
        dice = self._rng.random()
        if task.name == "extract" and dice < 0.3:
            return self.salad(ticket)
        return self.scramble(ticket) if dice < 0.7 else ticket


def ticket_sample(encoder: ChatEncoder, task: Task, ticket: Ticket) -> Sample:
    """The task's question about a ticket and its gold answer."""
    return make_sample(encoder, (task.system, task.user(ticket)), task.answer(ticket))


def training_batches(
    encoder: ChatEncoder, tasks: list[Task], size: int, seed: int
) -> Iterator[list[Sample]]:
    """Batches of samples of like length, which keeps padding low."""
    rng = random.Random(seed)
    scrambler = Scrambler(seed)
    stream = noisy_tickets(seed)
    while True:
        pairs = [(rng.choice(tasks), ticket) for ticket in itertools.islice(stream, 16 * size)]
        pool = [
            ticket_sample(encoder, task, scrambler.draw(task, ticket)) for task, ticket in pairs
        ]
        pool.sort(key=lambda sample: len(sample.input_ids))
        batches = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(batches)
        yield from batches
