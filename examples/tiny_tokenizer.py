"""The tokenizer of the tiny checkpoint: byte-level BPE with the GLM control tokens and a GLM-4 chat
template.

Owns training it, its files and how a conversation becomes ids. Knows nothing of the model or of
tickets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2.sandbox
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

CONTROL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>",
    "<|end_of_video|>", "<|image|>",
    "<|video|>",
)  # fmt: skip
STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL = re.compile("(" + "|".join(re.escape(token) for token in CONTROL_TOKENS) + ")")

# The conversation format of GLM-4-0414: tools and system messages first, no line break after the
# generation prompt. The parts of a user's message follow each other with nothing between, images
# and videos as in GLM-4.1V.
CHAT_TEMPLATE = """\
{%- macro written(content) %}
{%- if content is string %}
{{- content }}
{%- else %}
{%- for part in content %}
{%- if part.type == 'image' %}
{{- '<|begin_of_image|><|image|><|end_of_image|>' }}
{%- elif part.type == 'video' %}
{{- '<|begin_of_video|><|video|><|end_of_video|>' }}
{%- else %}
{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- endmacro %}
[gMASK]<sop>
{%- if tools %}
{{- '<|system|>\\n# 可用工具' }}
{%- for tool in tools %}
{%- set function = tool.function if tool.function is defined else tool %}
{{- '\\n\\n## ' + function.name + '\\n\\n' + (function | tojson(indent=4)) }}
{{- '\\n在调用上述函数时，请使用 Json 格式表示调用的参数。' }}
{%- endfor %}
{%- endif %}
{%- for message in messages if message.role == 'system' %}
{{- '<|system|>\\n' + message.content }}
{%- endfor %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'assistant' and message.metadata %}
{{- '<|assistant|>' + message.metadata + ' \\n' + message.content }}
{%- else %}
{{- '<|' + message.role + '|>\\n' + written(message.content) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""


def train_tokenizer(texts: Iterable[str], num_base_tokens: int) -> Tokenizer:
    """A BPE of at most `num_base_tokens` tokens, 256 of them bytes, with the control tokens after
    them.
    """
    tokenizer = _bare(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=num_base_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(CONTROL_TOKENS[1:]),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


class ChatEncoder:
    """Conversations to ids, where only the template writes control tokens: a user who types one
    writes plain text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.control_ids = {token: tokenizer.token_to_id(token) for token in CONTROL_TOKENS}
        self._plain = _bare(models.BPE(**_vocab_and_merges(tokenizer)))
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True
        )
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
        self._template = environment.from_string(CHAT_TEMPLATE)

    def plain(self, text: str) -> list[int]:
        """The ids of a text without control tokens, whatever it spells."""
        return self._plain.encode(text).ids

    def prompt(self, system: str | None, user: str, media: Sequence[str] = ()) -> list[int]:
        """The ids of one question up to and including `<|assistant|>`; `media` ("image", "video")
        go before `user`.
        """
        # the template sees two private characters, never the texts
        contents = {"\ue000": system, "\ue001": user}
        parts = [*({"type": kind} for kind in media), {"type": "text", "text": "\ue001"}]
        messages: list[dict[str, object]] = [{"role": "user", "content": parts}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": "\ue000"})
        rendered = self._template.render(messages=messages, add_generation_prompt=True)
        ids: list[int] = []
        for piece in _CONTROL.split(rendered):
            if piece in self.control_ids:
                ids.append(self.control_ids[piece])
            else:
                ids += self.plain("".join(contents.get(char, char) or "" for char in piece))
        return ids


def _bare(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _vocab_and_merges(tokenizer: Tokenizer) -> dict[str, object]:
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}
