"""Train the shipped tiny checkpoint, examples/tiny_glm, from nothing: `python
examples/train_tiny_glm.py`.

Owns the losses and the recipe. The model of tiny_model.py learns tickets, pictures and clips
together; ticket_tasks.py and shape_tasks.py know what is asked about them. Seeded, a second of one
core per step: under an hour on two. The shipped weights come from these settings with `--device
cuda`, whose rounding differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.pool import AsyncResult
from pathlib import Path

import torch
from held_out import media_accuracy, ticket_accuracy
from samples import IGNORED, Batch, stack
from sentences import EVAL
from shape_tasks import HINTS, MediaStream, Shown, load_prompts, make_batch
from ticket_tasks import load_tasks, tokenizer_texts, training_batches
from tiny_model import Size, build_model, forward, save_checkpoint
from tiny_tokenizer import ChatEncoder, train_tokenizer
from torch import nn
from transformers import Glm4vForConditionalGeneration
from world import LABELS, tickets

HERE = Path(__file__).parent
# counting takes longest to learn
QUESTIONS = ("shape", "shape", "colour", "count", "count", "count")
HINT_WEIGHT = 0.5
CENTRE_WEIGHT = 4.0  # few patches hold the centre of a figure


def answer_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Every answer weighs the same, however many tokens it has."""
    wanted = targets != IGNORED
    losses = nn.functional.cross_entropy(logits, targets[wanted], reduction="none")
    weights = (wanted / wanted.sum(dim=1, keepdim=True) / len(targets))[wanted]
    return (losses * weights).sum()


def hint_loss(guesses: torch.Tensor, hints: torch.Tensor) -> torch.Tensor:
    """How well the features of each patch tell what lies there: a centre, and its shape, colour and
    motion.
    """
    centre, *named = guesses.split([1, *(len(names) for names in HINTS)], dim=1)
    loss = nn.functional.binary_cross_entropy_with_logits(
        centre[:, 0],
        hints[:, 0].float(),
        pos_weight=torch.tensor(CENTRE_WEIGHT, device=centre.device),
    )
    for guess, hint in zip(named, hints[:, 1:].unbind(dim=1), strict=True):
        if (hint != IGNORED).any():
            loss = loss + nn.functional.cross_entropy(guess, hint, ignore_index=IGNORED)
    return loss


def ahead(
    pool: multiprocessing.pool.Pool, draw: Callable[[int], list[Shown]], depth: int = 8
) -> Iterator[list[Shown]]:
    """What `draw` gives for 0, 1, 2 and so on, in order, a few of them drawn beforehand by other
    processes.
    """
    waiting: deque[AsyncResult[list[Shown]]] = deque()
    for number in itertools.count():
        waiting.append(pool.apply_async(draw, (number,)))
        if len(waiting) > depth:
            yield waiting.popleft().get()


def make_optimizers(
    model: Glm4vForConditionalGeneration, hinter: nn.Linear, rates: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, heads, convolutions, norms and
    biases.
    """
    outer = {model.lm_head.weight, model.model.language_model.embed_tokens.weight}
    outer |= {model.model.visual.embeddings.position_embedding.weight}
    inner = [weight for weight in model.parameters() if weight.dim() == 2 and weight not in outer]
    rest = [weight for weight in model.parameters() if weight.dim() != 2 or weight in outer]
    adamw = torch.optim.AdamW(
        [*rest, *hinter.parameters()], rates[1], betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    return [torch.optim.Muon(inner, rates[0], weight_decay=0.01), adamw]


def train(
    model: Glm4vForConditionalGeneration,
    texts: Iterator[Batch],
    media: Iterator[tuple[Batch, torch.Tensor]],
    num_steps: int,
    rates: tuple[float, float],
) -> None:
    """Warm-up and cosine decay from `rates`, as make_optimizers has them; each step sees tickets
    and media.

    A linear head that is not kept makes the vision tower tell early what each patch shows.
    """
    num_guesses = 1 + sum(len(names) for names in HINTS)
    hinter = nn.Linear(model.config.text_config.hidden_size, num_guesses, device=model.device)
    weights = [*model.parameters(), *hinter.parameters()]
    optimizers = make_optimizers(model, hinter, rates)
    start = time.perf_counter()
    model.train()
    for step, (text, (shown, hints)) in enumerate(
        itertools.islice(zip(texts, media, strict=False), num_steps)
    ):
        warmth = min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate * warmth
        text, shown, hints = text.to(model.device), shown.to(model.device), hints.to(model.device)
        text_loss = answer_loss(forward(model, text)[0], text.targets)
        text_loss.backward()
        logits, features = forward(model, shown)
        media_loss, hinted = answer_loss(logits, shown.targets), hint_loss(hinter(features), hints)
        (media_loss + HINT_WEIGHT * hinted).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 100 == 0 or step == num_steps - 1:
            losses = (
                f"text {text_loss.item():.4f}  media {media_loss.item():.4f}  hints "
                f"{hinted.item():.4f}"
            )
            print(f"step {step:5d}  {losses}  {time.perf_counter() - start:6.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "tiny_glm")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--tickets", type=int, default=32, help="tickets a step")
    parser.add_argument("--images", type=int, default=32, help="pictures a step")
    parser.add_argument("--clips", type=int, default=12, help="clips a step")
    parser.add_argument(
        "--rates", type=float, nargs=2, default=(0.01, 1.5e-3), help="peak rates of Muon and AdamW"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    stream = MediaStream(
        split="train",
        seed=args.seed + 1,
        num_images=args.images,
        num_clips=args.clips,
        questions=QUESTIONS,
    )
    with multiprocessing.get_context("fork").Pool(
        args.workers, torch.set_num_threads, (1,)
    ) as pool:
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        tasks, prompts = load_tasks(), load_prompts()
        texts = itertools.chain(
            tokenizer_texts(tasks, args.seed), *(100 * [prompt] for prompt in prompts.values())
        )
        encoder = ChatEncoder(train_tokenizer(texts, num_base_tokens=2000))
        print({label: encoder.tokenizer.encode(label).tokens for label in LABELS})
        model = build_model(encoder, Size()).to(args.device)
        print(f"{encoder.tokenizer.get_vocab_size()} tokens, {model.num_parameters():,} parameters")
        media = (make_batch(encoder, prompts, shown) for shown in ahead(pool, stream.lot))
        text_batches = map(stack, training_batches(encoder, tasks, args.tickets, args.seed + 1))
        train(model, text_batches, media, args.steps, tuple(args.rates))

    sample = list(itertools.islice(tickets(EVAL, args.seed + 2), 1000))
    lots = MediaStream(split="eval", seed=args.seed + 2, num_images=40, num_clips=40)
    shown = [item for number in range(13) for item in lots.lot(number)]
    print("held out, fp32 weights:", json.dumps(ticket_accuracy(model, encoder, sample)))
    print("held out, fp32 weights:", json.dumps(media_accuracy(model, encoder, shown)))
    save_checkpoint(model, encoder, args.out)
    saved = Glm4vForConditionalGeneration.from_pretrained(args.out, dtype=torch.bfloat16)
    print("held out, as saved, in bf16:", json.dumps(ticket_accuracy(saved, encoder, sample[:200])))
    print("held out, as saved, in bf16:", json.dumps(media_accuracy(saved, encoder, shown[:400])))


if __name__ == "__main__":
    main()
