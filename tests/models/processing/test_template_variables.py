"""Random templates made of what transformers gives a template, rendered both ways."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_batch.models.errors import ConfigError
from glm_batch.models.processing.chat import Chat
from tests.models.processing.conftest import SPECIAL_TOKENS, build_tokenizer

STANDARD = [f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
NAMES = [*STANDARD, "image_token", "turn_token", "absent_token"]
OTHERS = [
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if m.name %}({{ m.name }}){% endif %}{% endfor %}",
    "{% for m in messages %}{{ (bos_token or '') + m['content'] + (eos_token or '') }}{% endfor %}",
    "{% for m in messages if m.tool_calls %}{{ m.tool_calls | tojson }}{% endfor %}",
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}",
    "{% for tool in tools or [] %}{{ tool.function.name }}{{ pad_token }}{% endfor %}",
    "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}{{ sep_token }}\n{% endfor %}",
    "{{ documents is none }}{{ tools is none }}",
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{{ additional_special_tokens }}{{ extra_special_tokens }}",
]
WITH_NAME = [
    "{{ NAME }}",
    "{% if NAME %}[{{ NAME }}]{% endif %}",
    "{{ NAME is defined }}",
    "{{ (NAME or '-') + '\n' }}",
]
fragments = st.sampled_from(OTHERS) | st.builds(
    lambda text, name: text.replace("NAME", name),
    st.sampled_from(WITH_NAME),
    st.sampled_from(NAMES),
)
templates = st.lists(fragments, min_size=1, max_size=8).map("".join)
texts = st.lists(
    st.sampled_from(["a", " b", "\n", "你好", "{{ x }}", "<|user|>", "<sop>", "[gMASK]", "😀"]),
    max_size=4,
).map("".join)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": texts},
    optional={"name": texts, "tool_calls": st.just([{"function": {"name": "f", "x": "<sop>"}}])},
)
histories = st.lists(turns, min_size=1, max_size=4)
tools_of = st.none() | st.lists(
    texts.map(lambda name: {"type": "function", "function": {"name": name}}), min_size=1, max_size=2
)
documents_of = st.none() | st.lists(
    st.fixed_dictionaries({"title": texts, "text": texts}), min_size=1, max_size=2
)
tokens_of = st.dictionaries(
    st.sampled_from(NAMES[:-1]), st.sampled_from(SPECIAL_TOKENS), max_size=9
)


def added(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, **flags}


def write(
    folder: Path, place: str, named: dict[str, str], tokens: dict[str, str], form: str
) -> None:
    """The files of a tokenizer whose templates and token names lie where `place` and `form` say."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|user|>", "<|assistant|>"],
    }
    match form:
        case "strings":
            config |= tokens
        case "objects":
            config |= {
                name: {"__type": "AddedToken", **added(text)} for name, text in tokens.items()
            }
        case "map":
            described = {name: added(text) for name, text in tokens.items()}
            (folder / "special_tokens_map.json").write_text(json.dumps(described))
        case "unread map":
            config["added_tokens_decoder"] = {}
            (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
        case "extra":
            config["extra_special_tokens"] = {
                name: text for name, text in tokens.items() if name not in STANDARD
            }
            config |= {name: text for name, text in tokens.items() if name in STANDARD}
    match place:
        case "file":
            (folder / "chat_template.jinja").write_text(named["default"])
        case "text":
            config["chat_template"] = named["default"]
        case "list":
            entries = [{"name": name, "template": text} for name, text in named.items()]
            config["chat_template"] = entries
        case "object":
            config["chat_template"] = named
        case "folder":
            (folder / "chat_template.jinja").write_text(named["default"])
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text(named["tool_use"])
            config["chat_template"] = "not this one"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    build_tokenizer().save(str(folder / "tokenizer.json"))


@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_a_template_gets_what_transformers_gives_it(data: st.DataObject) -> None:
    """It once got none of the tokenizer's tokens: fine-tunes were asked with other prompts."""
    named = {name: data.draw(templates, name) for name in ("default", "tool_use")}
    place = data.draw(st.sampled_from(["file", "text", "list", "object", "folder"]))
    form = data.draw(st.sampled_from(["strings", "objects", "map", "unread map", "extra"]))
    tokens = data.draw(tokens_of)
    messages, tools = data.draw(histories), data.draw(tools_of)
    documents, asked = data.draw(documents_of), data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, place, named, tokens, form)
        theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
            messages, tools=tools, documents=documents, add_generation_prompt=asked, tokenize=False
        )
        ours = Chat.from_dir(name).render(
            messages, tools=tools, documents=documents, add_generation_prompt=asked
        )
    assert ours == theirs


def test_a_named_token_is_a_control_token_of_the_template_alone(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokens = {"bos_token": "[gMASK]", "eos_token": "<|endoftext|>"}
    write(tmp_path, "file", {"default": template}, tokens, "strings")
    chat = Chat.from_dir(str(tmp_path))
    ids = chat.prompt_ids([{"role": "user", "content": "[gMASK]"}])
    control = [chat.tokenizer.encode_control(text)[0] for text in tokens.values()]
    assert [ids[0], ids[-1]] == control
    assert ids[1:-1] == chat.tokenizer.encode("[gMASK]")


def test_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "object", {"rag": "x"}, {}, "strings")
    with pytest.raises(ConfigError, match=r"no entry named default, only \['rag'\]"):
        Chat.from_dir(str(tmp_path))
