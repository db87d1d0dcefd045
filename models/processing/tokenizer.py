"""Text to token ids and back, for the byte-level BPE tokenizers of the GLM checkpoints.

The template's control tokens are kept apart from the same characters in content, which are text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from glm_batch.models.checkpoint.directory import read_json
from glm_batch.models.errors import ConfigError, RowError


class Tokenizer:
    """A checkpoint's tokenizer. Build it with `from_dir`.

    `eos_token_ids` end a generation (generation_config.json, else config.json, else
    tokenizer_config.json), `control_tokens` are the strings that encode_control turns into one id
    each, the ids of the special ones among them, `special_ids`, are dropped from decoded text, and
    no id from `vocab_size` on stands for anything, although the model's embedding may be longer.
    `named_tokens` are the strings that a chat template knows by name, such as bos_token.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        pad_token_id: int | None = None,
    ) -> None:
        """Takes over `library`, which must be byte-level."""
        # Cutting and padding are the engine's business: a tokenizer.json that asks for them must
        # not shorten a row.
        library.no_truncation()
        library.no_padding()
        self._full = library
        self._plain = _without_added_tokens(library)
        # The library finds the leftmost added token, and the longest of those that begin at one
        # place.
        added = sorted(
            self._full.get_added_tokens_decoder().items(), key=lambda item: -len(item[1].content)
        )
        self._control_ids = [id for id, _ in added]
        self._control_pattern = _control_pattern([token for _, token in added])
        vocab = self._full.get_vocab(with_added_tokens=True)
        self._bytes = _bytes_of_tokens(vocab)
        self.vocab_size: int = max(vocab.values(), default=-1) + 1
        self.special_ids: frozenset[int] = frozenset(id for id, token in added if token.special)
        self.control_tokens: frozenset[str] = frozenset(token.content for _, token in added)
        self.eos_token_ids: tuple[int, ...] = tuple(eos_token_ids)
        self.pad_token_id: int | None = pad_token_id
        self.named_tokens: dict[str, str] = {}

    @classmethod
    def from_dir(cls, path: str) -> Tokenizer:
        """Reads a checkpoint. Raises ConfigError for an absent, broken or other tokenizer."""
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"{file}: no such file; a checkpoint in the Hugging Face layout has one"
            )
        try:
            library = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(
                f"{file}: it does not describe a tokenizer ({error}); restore the file"
            ) from error
        if not isinstance(library.decoder, tokenizers.decoders.ByteLevel):
            raise ConfigError(
                f"{file}: decoder {type(library.decoder).__name__}; this version reads byte-level "
                "BPE, whose decoder is ByteLevel, as every GLM checkpoint's is"
            )
        tokenizer = cls(library)
        tokenizer.named_tokens = _named_tokens(Path(path))
        tokenizer.eos_token_ids = tuple(tokenizer._configured_ids(Path(path), "eos_token"))
        tokenizer.pad_token_id = next(
            iter(tokenizer._configured_ids(Path(path), "pad_token")), None
        )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, as "<|user|>" in it is. Raises RowError for what is not Unicode."""
        return self._encode(self._plain, text).ids

    def encode_control(self, text: str) -> list[int]:
        """Ids of a template's own text: control-token strings become their ids."""
        return self._encode(self._full, text).ids

    def encode_raw(self, text: str) -> list[int]:
        """Ids of plain text between the special tokens of the checkpoint's post-processor."""
        return self._encode(self._plain, text, add_special_tokens=True).ids

    def encode_raw_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As encode_raw, with each token's half-open span; (0, 0) for the added specials.

        The tokens of a character that was split into several have the same span.
        """
        encoding = self._encode(self._plain, text, add_special_tokens=True)
        return encoding.ids, encoding.offsets

    def split_control(self, text: str) -> list[tuple[str, int | None]]:
        """(text, None) between the control-token strings of a text, (string, id) for each."""
        pieces: list[tuple[str, int | None]] = []
        start = 0
        for match in self._control_pattern.finditer(text):
            if match.start() > start:
                pieces.append((text[start : match.start()], None))
            assert match.lastindex is not None
            pieces.append((match.group(), self._control_ids[match.lastindex - 1]))
            start = match.end()
        if start < len(text):
            pieces.append((text[start:], None))
        return pieces

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._full.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; b"" for specials and ids without any."""
        return b"" if id in self.special_ids else self._bytes.get(id, b"")

    def _encode(
        self, tokenizer: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool = False
    ) -> tokenizers.Encoding:
        try:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            _refuse_broken_text(text)
            raise

    def _configured_ids(self, folder: Path, name: str) -> list[int]:
        """Ids of "eos_token" or "pad_token", from the first file that names one."""
        config = read_json(folder / "config.json", optional=True)
        nested = config.get("text_config")
        generation = read_json(folder / "generation_config.json", optional=True)
        for owner in (generation, config, nested or {}):
            value = owner.get(f"{name}_id")
            if value is not None:
                return list(value) if isinstance(value, list) else [value]
        content = self.named_tokens.get(name)
        if content is None:
            return []
        id = self._full.token_to_id(content)
        if id is None:
            raise ConfigError(
                f"{folder / 'tokenizer_config.json'}: {name} {content!r} is no token of "
                "tokenizer.json; correct it"
            )
        return [id]


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text as they come, never showing half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The text that became certain with this token; half a character is kept back."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """The rest: U+FFFD where the last character was never completed."""
        return self._decoder.decode(b"", final=True)


def _named_tokens(folder: Path) -> dict[str, str]:
    """The special tokens by name, as transformers gives them to templates.

    They are bos_token and all that end in _token, and those of an object extra_special_tokens.
    special_tokens_map.json counts where tokenizer_config.json has no added_tokens_decoder.
    """
    config = read_json(folder / "tokenizer_config.json", optional=True)
    if "added_tokens_decoder" not in config:
        config |= read_json(folder / "special_tokens_map.json", optional=True)
    given = {name: value for name, value in config.items() if name.endswith("_token")}
    for key in ("model_specific_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(key), dict):
            given |= config[key]
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in given.items()
    }
    return {name: text for name, text in contents.items() if isinstance(text, str)}


def _without_added_tokens(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, to which "<|user|>" is nothing but characters."""
    plain = tokenizers.Tokenizer(library.model)  # shares the model: no second copy of it
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if getattr(library, part) is not None:
            setattr(plain, part, getattr(library, part))
    return plain


def _refuse_broken_text(text: str) -> None:
    for position, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            raise RowError(
                "invalid_text",
                f"character {position} is U+{ord(character):04X}, half of a surrogate pair: the "
                "text is not valid Unicode; repair it at its source",
            )


def _control_pattern(tokens: list[tokenizers.AddedToken]) -> re.Pattern[str]:
    """Group i + 1 matches tokens[i], with the blanks around it that it swallows."""
    pattern = "|".join(f"({_token_pattern(token)})" for token in tokens) or r"(?!)"
    if not any(token.lstrip for token in tokens):
        first = "".join({token.content[0] for token in tokens})
        pattern = f"(?=[{re.escape(first)}])(?:{pattern})" if first else pattern  # 15 times as fast
    return re.compile(pattern)


def _token_pattern(token: tokenizers.AddedToken) -> str:
    pattern = re.escape(token.content)
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return (r"\s*" if token.lstrip else "") + pattern + (r"\s*" if token.rstrip else "")


def _bytes_of_tokens(vocab: dict[str, int]) -> dict[int, bytes]:
    """What each token stands for: bytes of the byte-level alphabet, else its UTF-8."""
    byte_of = _byte_alphabet()
    table: dict[int, bytes] = {}
    for text, id in vocab.items():
        try:
            table[id] = bytes([byte_of[character] for character in text])
        except KeyError:
            table[id] = text.encode()
    return table


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet (Radford et al. 2019): visible Latin-1 bytes are
    themselves, the others, in order, are the characters from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + i): byte for i, byte in enumerate(hidden)
    }
