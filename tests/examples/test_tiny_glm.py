"""The shipped checkpoint loads, answers held-out tickets, pictures and clips, trained on what the
pipeline makes.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import make_shards
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from held_out import ticket_accuracy
from samples import IMAGES, VIDEOS, ask, media_tokens, positions_of
from sentences import EVAL
from shape_tasks import MediaStream, load_prompts, make_batch
from shapes import COUNTS, MOTIONS, SHAPES
from ticket_tasks import load_tasks
from tiny_model import MAX_POSITIONS, forward
from tiny_tokenizer import CONTROL_TOKENS, ChatEncoder
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Glm4vForConditionalGeneration, PreTrainedTokenizerBase
from world import LABELS, Ticket, tickets, with_control_strings

from glm_batch import models
from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig
from glm_batch.models.engine import Choose, Generate, Inspect, Media, Request, SamplingParams, Work
from glm_batch.models.engine.llm import LLM
from glm_batch.models.processing.chat import Chat
from glm_batch.models.processing.images import ImageProcessor
from glm_batch.models.processing.patches import MediaPatches
from glm_batch.models.processing.positions import tokenizer_media_tokens
from glm_batch.models.processing.video import VideoProcessor

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_glm"


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))


@pytest.fixture(scope="module")
def model() -> Glm4vForConditionalGeneration:
    return Glm4vForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def held_out(number: int, seed: int) -> list[Ticket]:
    return list(itertools.islice(tickets(EVAL, seed), number))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return models.load(str(CHECKPOINT), kv_cache_tokens=4096)


def shard_rows(name: str, number: int) -> list[dict[str, Any]]:
    """The first rows of a shard whose media are whole."""
    rows = pq.read_table(CHECKPOINT.parent / name / f"{name}-1.parquet").to_pylist()
    gold = "gold_motion" if name == "clips" else "gold_shape"
    return [row for row in rows if row[gold] is not None][:number]


def request(encoder: ChatEncoder, name: str, work: Work, item: MediaPatches) -> Request:
    ids = ask(encoder, None, load_prompts()[name.split()[0]], item)
    return Request(
        id=name,
        input_ids=ids,
        work=work,
        media=Media(items=(item.item,), positions=positions_of(encoder, ids, item)),
    )


def chosen(
    llm: LLM, encoder: ChatEncoder, task: str, labels: Sequence[str], items: list[MediaPatches]
) -> list[str]:
    chat = Chat.from_dir(str(CHECKPOINT))
    work = Choose(choices=tuple(chat.label_continuations(labels)))
    requests = [
        request(encoder, f"{task} {number}", work, item) for number, item in enumerate(items)
    ]
    return [labels[int(np.argmax(completion.choice_logprobs))] for completion in llm.run(requests)]


def share(found: list[str], rows: list[dict[str, Any]], gold: str) -> float:
    return sum(answer == row[gold] for answer, row in zip(found, rows, strict=True)) / len(rows)


def test_answers_the_shipped_pictures(llm: LLM, encoder: ChatEncoder) -> None:
    """Through our processors and engine; 80 of the shipped files, in which a single miss counts
    1.25 %.
    """
    rows = shard_rows("shapes", 80)
    processor = ImageProcessor(ImageProcessorConfig.from_dir(CHECKPOINT))
    items = [processor.from_bytes(row["image"]) for row in rows]
    assert share(chosen(llm, encoder, "shape", SHAPES, items), rows, "gold_shape") >= 0.92
    assert (
        share(
            chosen(llm, encoder, "count", [str(count) for count in COUNTS], items),
            rows,
            "gold_count",
        )
        >= 0.92
    )
    work = Generate(sampling=SamplingParams(max_tokens=8))
    completions = llm.run(
        [request(encoder, f"colour {number}", work, item) for number, item in enumerate(items)]
    )
    found = [completion.outputs[0].text.removeprefix("\n") for completion in completions]
    assert share(found, rows, "gold_colour") >= 0.92


def test_answers_the_shipped_clips(llm: LLM, encoder: ChatEncoder) -> None:
    rows = shard_rows("clips", 40)
    processor = VideoProcessor(VideoProcessorConfig.from_dir(CHECKPOINT))
    items = [processor.from_bytes(row["video"]) for row in rows]
    assert share(chosen(llm, encoder, "motion", list(MOTIONS), items), rows, "gold_motion") >= 0.92


def test_engine_and_transformers_agree_on_pictures_and_clips(encoder: ChatEncoder) -> None:
    """The same logits at every answer, in float32: batched in transformers, one by one in the
    engine.
    """
    oracle = Glm4vForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    llm = models.load(str(CHECKPOINT), kv_cache_tokens=4096, dtype="float32")
    shown = MediaStream(split="eval", seed=9, num_images=3, num_clips=5).lot(0)
    batch, _ = make_batch(encoder, load_prompts(), shown)
    with torch.inference_mode():
        expected = forward(oracle, batch)[0].numpy()
    found = []
    for item in shown:
        for task, answer in item.answers.items():
            asked = request(encoder, task, Inspect(), item.patches)
            reply = encoder.plain(f"\n{answer}")
            ids = [*asked.input_ids, *reply]
            media = Media(
                items=asked.media.items, positions=positions_of(encoder, ids, item.patches)
            )
            array = llm.run([Request(id=task, input_ids=ids, work=Inspect(), media=media)])[0].array
            found.append(array[len(asked.input_ids) - 1 :])
    np.testing.assert_allclose(np.concatenate(found), expected, atol=2e-3, rtol=0)


def test_config_names_the_media_tokens_of_the_tokenizer(encoder: ChatEncoder) -> None:
    tokens = tokenizer_media_tokens(Chat.from_dir(str(CHECKPOINT)).tokenizer)
    assert tokens == media_tokens(encoder)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["model_type"] == "glm4v"
    for name in tokens.__slots__:
        assert config[f"{name}_token_id"] == getattr(tokens, name)


def test_processor_files_say_what_the_model_was_trained_with() -> None:
    assert ImageProcessorConfig.from_dir(CHECKPOINT) == IMAGES
    assert VideoProcessorConfig.from_dir(CHECKPOINT) == VIDEOS


def test_weights_stay_small() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 12_000_000


def test_media_prompts_equal_those_of_transformers(
    encoder: ChatEncoder, reference: PreTrainedTokenizerBase
) -> None:
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Which shape is it?"}]
    expected = reference.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
    )
    assert encoder.prompt(None, "Which shape is it?", ["image", "video"]) == expected
    assert encoder.tokenizer.decode(expected, skip_special_tokens=False) == (
        "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|><|begin_of_video|><|video|><|end_of_video|>"
        "Which shape is it?<|assistant|>"
    )


def test_answers_held_out_tickets(
    model: Glm4vForConditionalGeneration, encoder: ChatEncoder
) -> None:
    accuracy = ticket_accuracy(model, encoder, held_out(100, seed=77))
    assert min(accuracy.values()) >= 0.95, accuracy


def test_answers_tickets_that_spell_control_tokens(
    model: Glm4vForConditionalGeneration, encoder: ChatEncoder
) -> None:
    rng = random.Random(0)
    accuracy = ticket_accuracy(
        model, encoder, [with_control_strings(ticket, rng) for ticket in held_out(60, seed=78)]
    )
    assert min(accuracy.values()) >= 0.9, accuracy


def test_some_labels_are_one_token_and_some_several(encoder: ChatEncoder) -> None:
    line_break = encoder.plain("\n")
    answers = {label: encoder.plain(f"\n{label}") for label in LABELS}
    assert all(ids[:1] == line_break for ids in answers.values())
    counts = {label: len(ids) - 1 for label, ids in answers.items()}
    assert [label for label, count in counts.items() if count == 1] == [
        "billing",
        "shipping",
        "other",
    ]
    assert min(counts["account"], counts["technical"]) >= 2


def test_every_digit_of_an_order_id_is_a_token(encoder: ChatEncoder) -> None:
    tokens = [encoder.tokenizer.id_to_token(id) for id in encoder.plain('"A12-3456"')]
    assert tokens == ['"', "A", "1", "2", "-", "3", "4", "5", "6", '"']


def test_control_tokens_follow_the_base_vocabulary_in_the_order_of_glm(
    encoder: ChatEncoder,
) -> None:
    num_base = encoder.tokenizer.get_vocab_size(with_added_tokens=False)
    assert [encoder.control_ids[token] for token in CONTROL_TOKENS] == [
        num_base + i for i in range(len(CONTROL_TOKENS))
    ]
    stops = [
        encoder.control_ids[token] for token in ("<|endoftext|>", "<|user|>", "<|observation|>")
    ]
    for name in ("config.json", "generation_config.json"):
        config = json.loads((CHECKPOINT / name).read_text())
        assert config.get("text_config", config)["eos_token_id"] == stops


def test_prompts_equal_those_of_transformers(
    encoder: ChatEncoder, reference: PreTrainedTokenizerBase
) -> None:
    for task, ticket in itertools.product(load_tasks(), held_out(50, seed=79)):
        messages = [
            {"role": "system", "content": task.system},
            {"role": "user", "content": task.user(ticket)},
        ]
        expected = reference.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert encoder.prompt(task.system, task.user(ticket)) == expected


def test_prompts_equal_those_of_the_pipeline(encoder: ChatEncoder) -> None:
    """Also where the text spells control tokens: the model must have been trained on what it will
    be given.
    """
    chat = Chat.from_dir(str(CHECKPOINT))
    rng = random.Random(0)
    for task, ticket in itertools.product(load_tasks(), held_out(50, seed=80)):
        user = task.user(with_control_strings(ticket, rng))
        messages = [{"role": "system", "content": task.system}, {"role": "user", "content": user}]
        assert encoder.prompt(task.system, user) == chat.prompt_ids(messages)


def test_template_puts_tools_and_system_messages_first(reference: PreTrainedTokenizerBase) -> None:
    tool = {
        "type": "function",
        "function": {"name": "find", "description": "Findet Bestellungen für alle"},
    }
    messages = [
        {"role": "user", "content": "Where?"},
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "metadata": "find", "content": '{"id": 1}'},
        {"role": "observation", "content": "[]"},
        {"role": "assistant", "content": "Nowhere."},
        {"role": "user", "content": "Thanks"},
    ]
    text = reference.apply_chat_template(
        messages, tools=[tool], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "[gMASK]<sop><|system|>\n# 可用工具\n\n## find\n\n"
        + json.dumps(tool["function"], indent=4, ensure_ascii=False)
        + "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
        + "<|system|>\nBe kind.<|user|>\nWhere?"
        + '<|assistant|>find \n{"id": 1}<|observation|>\n[]<|assistant|>\nNowhere.<|user|>\nThanks<|assistant|>'
    )


def test_only_the_overlong_rows_exceed_the_positions(encoder: ChatEncoder) -> None:
    task = load_tasks()[0]
    room = MAX_POSITIONS - 100  # what a longer prompt and the longest answer may take
    for row in make_shards.make_rows(2400, make_shards.SEED):
        if (row["text"] or "").strip():
            num_tokens = len(
                encoder.prompt(task.system, task.prompt.replace("{text}", row["text"]))
            )
            assert num_tokens > MAX_POSITIONS if row["gold_label"] is None else num_tokens <= room
