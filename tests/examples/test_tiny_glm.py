"""The shipped checkpoint loads, answers held-out tickets, and was trained on the ids that the pipeline makes."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import make_shards
import pytest
import torch
from sentences import EVAL
from tiny_tokenizer import CONTROL_TOKENS, ChatEncoder
from tokenizers import Tokenizer
from train_tiny_glm import MAX_POSITIONS, held_out_accuracy, load_tasks
from transformers import AutoTokenizer, Glm4ForCausalLM, PreTrainedTokenizerBase
from world import LABELS, Ticket, tickets, with_control_strings

from models.processing.chat import Chat

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_glm"


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))


@pytest.fixture(scope="module")
def model() -> Glm4ForCausalLM:
    return Glm4ForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def held_out(number: int, seed: int) -> list[Ticket]:
    return list(itertools.islice(tickets(EVAL, seed), number))


def test_answers_held_out_tickets(model: Glm4ForCausalLM, encoder: ChatEncoder) -> None:
    accuracy = held_out_accuracy(model, encoder, held_out(100, seed=77))
    assert min(accuracy.values()) >= 0.95, accuracy


def test_answers_tickets_that_spell_control_tokens(model: Glm4ForCausalLM, encoder: ChatEncoder) -> None:
    rng = random.Random(0)
    accuracy = held_out_accuracy(
        model, encoder, [with_control_strings(ticket, rng) for ticket in held_out(60, seed=78)]
    )
    assert min(accuracy.values()) >= 0.9, accuracy


def test_some_labels_are_one_token_and_some_several(encoder: ChatEncoder) -> None:
    line_break = encoder.plain("\n")
    answers = {label: encoder.plain(f"\n{label}") for label in LABELS}
    assert all(ids[:1] == line_break for ids in answers.values())
    counts = {label: len(ids) - 1 for label, ids in answers.items()}
    assert [label for label, count in counts.items() if count == 1] == ["billing", "shipping", "other"]
    assert min(counts["account"], counts["technical"]) >= 2


def test_every_digit_of_an_order_id_is_a_token(encoder: ChatEncoder) -> None:
    tokens = [encoder.tokenizer.id_to_token(id) for id in encoder.plain('"A12-3456"')]
    assert tokens == ['"', "A", "1", "2", "-", "3", "4", "5", "6", '"']


def test_control_tokens_follow_the_base_vocabulary_in_the_order_of_glm(encoder: ChatEncoder) -> None:
    num_base = encoder.tokenizer.get_vocab_size(with_added_tokens=False)
    assert [encoder.control_ids[token] for token in CONTROL_TOKENS] == [
        num_base + i for i in range(len(CONTROL_TOKENS))
    ]
    stops = [encoder.control_ids[token] for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((CHECKPOINT / name).read_text())["eos_token_id"] == stops


def test_prompts_equal_those_of_transformers(encoder: ChatEncoder, reference: PreTrainedTokenizerBase) -> None:
    for task, ticket in itertools.product(load_tasks(), held_out(50, seed=79)):
        messages = [{"role": "system", "content": task.system}, {"role": "user", "content": task.user(ticket)}]
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert encoder.prompt(task.system, task.user(ticket)) == expected


def test_prompts_equal_those_of_the_pipeline(encoder: ChatEncoder) -> None:
    """Also where the text spells control tokens: the model must have been trained on what it will be given."""
    chat = Chat.from_dir(str(CHECKPOINT))
    rng = random.Random(0)
    for task, ticket in itertools.product(load_tasks(), held_out(50, seed=80)):
        user = task.user(with_control_strings(ticket, rng))
        messages = [{"role": "system", "content": task.system}, {"role": "user", "content": user}]
        assert encoder.prompt(task.system, user) == chat.prompt_ids(messages)


def test_template_puts_tools_and_system_messages_first(reference: PreTrainedTokenizerBase) -> None:
    tool = {"type": "function", "function": {"name": "find", "description": "Findet Bestellungen für alle"}}
    messages = [
        {"role": "user", "content": "Where?"},
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "metadata": "find", "content": '{"id": 1}'},
        {"role": "observation", "content": "[]"},
        {"role": "assistant", "content": "Nowhere."},
        {"role": "user", "content": "Thanks"},
    ]
    text = reference.apply_chat_template(messages, tools=[tool], add_generation_prompt=True, tokenize=False)
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
            num_tokens = len(encoder.prompt(task.system, task.prompt.replace("{text}", row["text"])))
            assert num_tokens > MAX_POSITIONS if row["gold_label"] is None else num_tokens <= room
