"""Train the shipped tiny checkpoint, examples/tiny_glm, from nothing: `python examples/train_tiny_glm.py`.

Owns the model's size, the training recipe and the held-out measurement. Prompts come from the shipped job files and
tickets from world.py, so the checkpoint fits both. CPU only, seeded, under half an hour on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from sentences import EVAL, TRAIN
from tiny_tokenizer import STOP_TOKENS, ChatEncoder, save_tokenizer, train_tokenizer
from torch import nn
from transformers import GenerationConfig, Glm4Config, Glm4ForCausalLM
from world import LABELS, Ticket, tickets, with_control_strings

HERE = Path(__file__).parent
MAX_POSITIONS = 2048
ONE_TOKEN_LABELS = ("billing", "shipping")  # the tokenizer never sees the other three as an answer
IGNORED = -100
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
        return {"route": ticket.label, "extract": ticket.order_json, "reply": ticket.reply}[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One conversation as ids; `targets` holds IGNORED wherever no loss is wanted."""

    input_ids: list[int]
    targets: list[int]


def load_tasks() -> list[Task]:
    """The three tasks as the job files spell them."""
    jobs = {name: yaml.safe_load((HERE / f"{name}.yaml").read_text())["task"] for name in ("route", "extract", "reply")}
    return [Task(name=name, system=task["system"], prompt=task["prompt"]) for name, task in jobs.items()]


def tokenizer_texts(tasks: list[Task], seed: int) -> Iterator[str]:
    """What the tokenizer learns from. No two digits meet, so that every digit of a number stays a token of its own."""
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
    """Makes training texts untidy, so that the model reads words and order ids instead of learning sentences by heart.

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
            words.insert(self._rng.randrange(len(words) + 1), mark + ticket.order_id + self._rng.choice(("", ".", ",")))
        return Ticket(text=" ".join(words), label=ticket.label, order_id=ticket.order_id)

    def draw(self, task: Task, ticket: Ticket) -> Ticket:
        """The ticket as it is, scrambled or, where only the order id counts, as a salad."""
        dice = self._rng.random()
        if task.name == "extract" and dice < 0.3:
            return self.salad(ticket)
        return self.scramble(ticket) if dice < 0.7 else ticket


def make_sample(encoder: ChatEncoder, task: Task, ticket: Ticket) -> Sample:
    """A conversation that ends with `<|user|>`, the loss on the answer only."""
    prompt = encoder.prompt(task.system, task.user(ticket))
    answer = [*encoder.plain(f"\n{task.answer(ticket)}"), encoder.control_ids["<|user|>"]]
    return Sample(input_ids=prompt + answer[:-1], targets=[IGNORED] * (len(prompt) - 1) + answer)


def training_batches(encoder: ChatEncoder, tasks: list[Task], size: int, seed: int) -> Iterator[list[Sample]]:
    """Batches of samples of like length, which keeps padding low."""
    rng = random.Random(seed)
    scrambler = Scrambler(seed)
    stream = noisy_tickets(seed)
    while True:
        pairs = [(rng.choice(tasks), ticket) for ticket in itertools.islice(stream, 16 * size)]
        pool = [make_sample(encoder, task, scrambler.draw(task, ticket)) for task, ticket in pairs]
        pool.sort(key=lambda sample: len(sample.input_ids))
        batches = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(batches)
        yield from batches


def stack(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and targets, [samples, longest]. Causal attention never looks at the padding."""
    longest = max(len(sample.input_ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    targets = torch.full((len(samples), longest), IGNORED)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        targets[row, : len(sample.targets)] = torch.tensor(sample.targets)
    return ids, targets


def answer_logits(model: Glm4ForCausalLM, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits at the positions that have a target, [targets, vocabulary], in row order."""
    return model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state[targets != IGNORED]).float()


def build_model(encoder: ChatEncoder) -> Glm4ForCausalLM:
    """A glm4 of about one million parameters. Sandwich norms give each sublayer an output of size 1, so the
    embeddings start near that size too, and the head starts as their small copy, which makes copying easy to learn."""
    num_tokens = encoder.tokenizer.get_vocab_size()
    config = Glm4Config(
        vocab_size=64 * math.ceil(num_tokens / 64),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        partial_rotary_factor=0.5,
        attention_bias=True,
        rms_norm_eps=1e-5,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=encoder.control_ids["<|endoftext|>"],
        eos_token_id=[encoder.control_ids[token] for token in STOP_TOKENS],
    )
    model = Glm4ForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
        model.lm_head.weight.copy_(0.1 * model.model.embed_tokens.weight)
    return model


def train(model: Glm4ForCausalLM, batches: Iterator[list[Sample]], num_steps: int, peak_rate: float) -> None:
    """AdamW with warm-up and cosine decay; every answer weighs the same, however many tokens it has."""
    decay = [weight for weight in model.parameters() if weight.dim() == 2]
    plain = [weight for weight in model.parameters() if weight.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98), fused=True
    )
    start = time.perf_counter()
    model.train()
    for step, samples in enumerate(itertools.islice(batches, num_steps)):
        rate = peak_rate * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, targets = stack(samples)
        wanted = targets != IGNORED
        losses = nn.functional.cross_entropy(answer_logits(model, ids, targets), targets[wanted], reduction="none")
        weights = (wanted / wanted.sum(dim=1, keepdim=True) / len(samples))[wanted]
        loss = (losses * weights).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == num_steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - start:6.0f} s", flush=True)


@torch.inference_mode()
def label_log_probs(model: Glm4ForCausalLM, encoder: ChatEncoder, task: Task, sample: list[Ticket]) -> torch.Tensor:
    """log P(line break + label | ticket) for every label, [tickets, labels]."""
    columns = []
    for label in LABELS:
        relabelled = [Ticket(text=ticket.text, label=label, order_id=ticket.order_id) for ticket in sample]
        ids, targets = stack([make_sample(encoder, task, ticket) for ticket in relabelled])
        last = (targets != IGNORED).long().cumsum(dim=1).argmax(dim=1)
        targets[torch.arange(len(sample)), last] = IGNORED  # the end token does not count
        wanted = targets != IGNORED
        losses = nn.functional.cross_entropy(answer_logits(model, ids, targets), targets[wanted], reduction="none")
        columns.append(-torch.zeros(wanted.shape).masked_scatter(wanted, losses).sum(dim=1))
    return torch.stack(columns, dim=1)


@torch.inference_mode()
def greedy_hits(model: Glm4ForCausalLM, encoder: ChatEncoder, task: Task, sample: list[Ticket]) -> torch.Tensor:
    """Whether greedy decoding writes exactly the gold answer and stops, [tickets].

    Greedy decoding writes the answer exactly if every token of the answer is the most likely one after the tokens
    before it, so one forward pass tells.
    """
    ids, targets = stack([make_sample(encoder, task, ticket) for ticket in sample])
    wanted = targets != IGNORED
    right = answer_logits(model, ids, targets).argmax(dim=1) == targets[wanted]
    return torch.ones(wanted.shape, dtype=torch.bool).masked_scatter(wanted, right).all(dim=1)


def held_out_accuracy(model: Glm4ForCausalLM, encoder: ChatEncoder, sample: list[Ticket]) -> dict[str, float]:
    """Accuracy by task: route by label log-probabilities, the others by exact greedy text."""
    model.eval()
    accuracy = {}
    for task in load_tasks():
        hits = []
        for start in range(0, len(sample), 100):
            part = sample[start : start + 100]
            if task.name == "route":
                gold = torch.tensor([LABELS.index(ticket.label) for ticket in part])
                hits.append(label_log_probs(model, encoder, task, part).argmax(dim=1) == gold)
            else:
                hits.append(greedy_hits(model, encoder, task, part))
        accuracy[task.name] = torch.cat(hits).float().mean().item()
    return accuracy


def save_checkpoint(model: Glm4ForCausalLM, encoder: ChatEncoder, folder: Path) -> None:
    """Write the whole Hugging Face folder, weights in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    stops = [encoder.control_ids[token] for token in STOP_TOKENS]
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stops, pad_token_id=encoder.control_ids["<|endoftext|>"]
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(encoder.tokenizer, folder, MAX_POSITIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "tiny_glm")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tasks = load_tasks()
    encoder = ChatEncoder(train_tokenizer(tokenizer_texts(tasks, args.seed), num_base_tokens=2000))
    print({label: encoder.tokenizer.encode(label).tokens for label in LABELS})
    model = build_model(encoder)
    print(f"{encoder.tokenizer.get_vocab_size()} tokens, {model.num_parameters():,} parameters")
    train(model, training_batches(encoder, tasks, args.batch, args.seed + 1), args.steps, args.rate)

    sample = list(itertools.islice(tickets(EVAL, args.seed + 2), 1000))
    print("held out, fp32 weights:", json.dumps(held_out_accuracy(model, encoder, sample)))
    save_checkpoint(model, encoder, args.out)
    saved = Glm4ForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16)
    print("held out, as saved, in bf16:", json.dumps(held_out_accuracy(saved, encoder, sample[:200])))


if __name__ == "__main__":
    main()
