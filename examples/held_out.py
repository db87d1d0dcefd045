"""How well a model answers what it was not trained on: accuracy by task.

Owns the measures: the most probable label where the job chooses among labels, the exact greedy text
elsewhere. Knows nothing of how tickets and shapes are made.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from samples import IGNORED, Batch, make_sample, stack
from shape_tasks import Shown, load_prompts
from ticket_tasks import Task, load_tasks, ticket_sample
from tiny_model import forward
from tiny_tokenizer import ChatEncoder
from torch import nn
from transformers import Glm4vForConditionalGeneration
from world import LABELS, Ticket


@torch.inference_mode()
def label_log_probs(
    model: Glm4vForConditionalGeneration, encoder: ChatEncoder, task: Task, sample: list[Ticket]
) -> torch.Tensor:
    """log P(line break + label | ticket) for every label, [tickets, labels]."""
    columns = []
    for label in LABELS:
        relabelled = [replace(ticket, label=label) for ticket in sample]
        batch = stack([ticket_sample(encoder, task, ticket) for ticket in relabelled]).to(
            str(model.device)
        )
        last = (batch.targets != IGNORED).long().cumsum(dim=1).argmax(dim=1)
        batch.targets[torch.arange(len(sample)), last] = IGNORED  # the end token does not count
        wanted = batch.targets != IGNORED
        losses = nn.functional.cross_entropy(
            forward(model, batch)[0], batch.targets[wanted], reduction="none"
        )
        columns.append(
            -torch.zeros(wanted.shape, device=model.device)
            .masked_scatter(wanted, losses)
            .sum(dim=1)
        )
    return torch.stack(columns, dim=1)


@torch.inference_mode()
def greedy_hits(model: Glm4vForConditionalGeneration, batch: Batch) -> list[bool]:
    """Whether greedy decoding writes exactly the gold answer and stops, for each sample.

    Greedy decoding writes the answer exactly if every token of the answer is the most likely one
    after the tokens before it, so one forward pass tells.
    """
    batch = batch.to(str(model.device))
    wanted = batch.targets != IGNORED
    right = forward(model, batch)[0].argmax(dim=1) == batch.targets[wanted]
    hits: list[bool] = torch.ones_like(wanted).masked_scatter(wanted, right).all(dim=1).tolist()
    return hits


def ticket_accuracy(
    model: Glm4vForConditionalGeneration, encoder: ChatEncoder, sample: list[Ticket]
) -> dict[str, float]:
    """Accuracy of the three ticket tasks."""
    model.eval()
    hits: dict[str, list[bool]] = defaultdict(list)
    for task in load_tasks():
        for start in range(0, len(sample), 100):
            part = sample[start : start + 100]
            if task.name == "route":
                best = label_log_probs(model, encoder, task, part).argmax(dim=1).tolist()
                hits[task.name] += [
                    LABELS[index] == ticket.label for index, ticket in zip(best, part, strict=True)
                ]
            else:
                hits[task.name] += greedy_hits(
                    model, stack([ticket_sample(encoder, task, ticket) for ticket in part])
                )
    return {name: sum(of_task) / len(of_task) for name, of_task in hits.items()}


def media_accuracy(
    model: Glm4vForConditionalGeneration, encoder: ChatEncoder, shown: list[Shown]
) -> dict[str, float]:
    """Accuracy of the greedy answers about pictures and clips."""
    model.eval()
    prompts = load_prompts()
    hits: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(shown), 50):
        part = shown[start : start + 50]
        for task, prompt in prompts.items():
            asked = [item for item in part if task in item.answers]
            samples = [
                make_sample(encoder, (None, prompt), item.answers[task], (index, item.patches))
                for index, item in enumerate(asked)
            ]
            if samples:
                hits[task] += greedy_hits(model, stack(samples, [item.patches for item in asked]))
    return {name: sum(of_task) / len(of_task) for name, of_task in hits.items()}
