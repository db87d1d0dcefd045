"""Checkpoint directories without weights: a small byte-level BPE with GLM's control tokens and four
chat templates.

The templates are our own; they behave as the ones of the published checkpoints do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

GLM_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
]  # fmt: skip
MEDIA_TOKENS = ["<|image|>", "<|video|>"]
REASONING_TOKENS = ["<think>", "</think>", "<answer>", "</answer>"]

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Which shape is it? circle square triangle\n",
    "Please route this ticket to billing, shipping, account, technical or other support.\n\n",
    "你好，世界！请问这张发票为什么被收取了两次？谢谢。今天天气很好，我们去公园散步。\n",
    '{"name": "get_weather", "parameters": {"city": "北京", "days": 3}}\n',
    "user system assistant observation think answer 1234567890 <|> </ [] it's we'll don't\n",
]

GLM4_CHAT = """[gMASK]<sop>{% for item in messages %}
{% if item['tools'] is defined %}<|system|>
可用工具:{% for tool in item['tools'] %}

## {{ tool['function']['name'] }}

{{ tool['function'] | tojson(indent=4) }}{% endfor %}{% endif %}
{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}
{{ item['content'] }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""

_TOOLS = """{% if tools is not none %}<|system|>
# 可用工具{% for tool in tools %}
{% set function = tool['function'] if 'function' in tool else tool %}


## {{ function['name'] }}

{{ function | tojson(indent=4) }}
使用 Json 格式。{% endfor %}{% endif %}
{% for message in messages if message['role'] == 'system' %}<|system|>
{{ message['content'] }}{% endfor %}
"""

GLM4_0414 = (
    "[gMASK]<sop>"
    + _TOOLS
    + """{% for message in messages %}
{% if message['role'] == 'user' %}<|user|>
{{ message['content'] }}
{%- elif message['role'] == 'assistant' %}<|assistant|>
{%- if message['metadata'] %}{{ message['metadata'] }} {% endif %}

{{ message['content'] }}
{%- elif message['role'] == 'observation' %}<|observation|>
{{ message['content'] }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
)

GLM_Z1 = (
    "[gMASK]<sop>"
    + _TOOLS
    + """{% for message in messages %}
{% if message['role'] == 'user' %}<|user|>
{{ message['content'].strip() }}
{%- elif message['role'] == 'assistant' %}<|assistant|>
{{ message['content'].split('</think>')[-1].strip() }}
{%- elif message['role'] == 'observation' %}<|observation|>
{{ message['content'] }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>
<think>{% endif %}"""
)

GLM_41V = """[gMASK]<sop>
{%- for message in messages %}
{% if message['role'] == 'system' %}<|system|>
{{ message['content'] }}
{%- elif message['role'] == 'user' %}<|user|>
{% if message['content'] is string %}{{ message['content'] }}{% else %}
{% for part in message['content'] %}
{% if part['type'] == 'image' or 'image' in part %}<|begin_of_image|><|image|><|end_of_image|>
{%- elif part['type'] == 'video' or 'video' in part %}<|begin_of_video|><|video|><|end_of_video|>
{%- else %}{{ part['text'] }}{% endif %}
{% endfor %}{% endif %}
{%- elif message['role'] == 'assistant' %}<|assistant|>
{{ message['content'] }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

TEMPLATES = {"glm4_chat": GLM4_CHAT, "glm4_0414": GLM4_0414, "glm_z1": GLM_Z1, "glm41v": GLM_41V}


def build_tokenizer(
    *, reasoning: bool = False, media: bool = False, adds_prefix: bool = False
) -> tokenizers.Tokenizer:
    """`reasoning` adds GLM-4.1V's tags, `media` its placeholders, `adds_prefix` what writes
    `[gMASK]<sop>`.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(GLM_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    if media:
        tokenizer.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in MEDIA_TOKENS]
        )
    if reasoning:
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in REASONING_TOKENS])
    byte_level = processors.ByteLevel(trim_offsets=False)
    if adds_prefix:
        pair = [(token, tokenizer.token_to_id(token)) for token in ("[gMASK]", "<sop>")]
        prefix = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=pair)
        tokenizer.post_processor = processors.Sequence([byte_level, prefix])
    else:
        tokenizer.post_processor = byte_level
    return tokenizer


def write_checkpoint(folder: Path, kind: str, *, adds_prefix: bool | None = None) -> Path:
    """The tokenizer and chat files of one of TEMPLATES; glm4_chat's post-processor adds the prefix
    unless told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(
        reasoning=kind == "glm41v",
        media=kind == "glm41v",
        adds_prefix=kind == "glm4_chat" if adds_prefix is None else adds_prefix,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ends = ["<|endoftext|>", "<|user|>", "<|observation|>"] + ["</answer>"] * (kind == "glm41v")
    generation = {"eos_token_id": [tokenizer.token_to_id(end) for end in ends]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "chat_template.jinja").write_text(TEMPLATES[kind], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(kind): a directory with the tokenizer and template of that kind, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_checkpoint(tmp_path_factory.mktemp("checkpoints") / kind, kind)
        return made[kind]

    return get
