"""Which tokens may come next so that an output matches its constraint, by llguidance."""

from __future__ import annotations

import functools
import json
import reprlib

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from glm_batch.models.engine.api.request import Constraint
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.tokenizer import Tokenizer

# Whitespace between JSON tokens is bounded: a model that falls into a run of blanks would use up
# its whole budget.
JSON_WHITESPACE = r"[ \t\r\n]{0,64}"
MAX_COMPILED = 256
_NAMES = {
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "lark": "the grammar",
}


class Constraints:
    """Compiles constraints for one tokenizer, each text once. Build one per engine."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = ll_tokenizer(tokenizer, tokenizer.vocab_size)
        self._compiled = functools.lru_cache(maxsize=MAX_COMPILED)(self._compile)

    def start(self, constraint: Constraint) -> Matcher:
        """A matcher at the beginning of an output. ConfigError for an unusable constraint."""
        return self._compiled(constraint).copy()

    def _compile(self, constraint: Constraint) -> Matcher:
        where = f"{_NAMES[constraint.kind]} {reprlib.repr(constraint.text)}"
        try:
            grammar = _grammar(constraint)
        except ValueError as error:
            raise ConfigError(f"{where} cannot be used: {error}; correct it") from error
        matcher = Matcher(
            LLMatcher(
                self._tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False)
            )
        )
        if matcher.error:
            raise ConfigError(f"{where} cannot be used: {matcher.error}; correct it")
        if matcher.is_dead_end:
            raise ConfigError(f"{where} matches no text at all; correct it")
        return matcher


class Matcher:
    """How far one sequence has come in its grammar. Made by Constraints.start."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_done(self) -> bool:
        """True when the text is complete and nothing but EOS may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def may_stop(self) -> bool:
        """True when the text so far matches, so that EOS is allowed."""
        return self._matcher.is_accepting() and not self._matcher.is_error()

    @property
    def error(self) -> str:
        """Why the matcher cannot go on, or "" when it can."""
        # the grammar made of the constraint follows
        reason, _, _ = self._matcher.get_error().partition("\n   1 | ")
        return reason.strip()

    @property
    def is_dead_end(self) -> bool:
        """True when no text can follow and the text so far does not match either."""
        self._matcher.compute_bitmask()  # what follows is looked at on demand
        return self._matcher.is_stopped() and not self._matcher.is_accepting()

    def bitmask(self) -> NDArray[np.int32]:
        """The allowed ids: int32 [ceil(vocab_size / 32)], bit i % 32 of word i // 32 for id i, EOS
        ids included.

        Raises RowError when the grammar has become too complex to follow.
        """
        bits = self._matcher.compute_bitmask()
        self._raise_error()
        words = np.zeros((len(bits) + 3) // 4, np.int32)
        words.view(np.uint8)[: len(bits)] = np.frombuffer(bits, np.uint8)
        return words

    def accept(self, token_id: int) -> None:
        """Moves on by one token. Raises RowError when the grammar does not allow it here."""
        self._matcher.consume_token(token_id)
        self._raise_error()

    def forced_tokens(self) -> list[int]:
        """The ids that must follow whatever the model thinks, in the tokenizer's own way of writing
        them; often none.

        They are not accepted yet.
        """
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens

    def copy(self) -> Matcher:
        """An independent matcher at the same place."""
        return Matcher(self._matcher.deep_copy())

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            raise RowError(
                "constraint_failed", f"the output cannot be held to its constraint: {self.error}"
            )


def ll_tokenizer(tokenizer: Tokenizer, num_ids: int) -> LLTokenizer:
    """The tokenizer as llguidance sees it, with masks of `num_ids`. ConfigError without end ids."""
    if not tokenizer.eos_token_ids:
        raise ConfigError(
            "constrained output needs to know how the model ends its answer: name "
            "eos_token_id in the checkpoint's generation_config.json"
        )
    return LLTokenizer(
        TokenizerWrapper(_Vocabulary(tokenizer, num_ids)),
        n_vocab=num_ids,
        eos_token=list(tokenizer.eos_token_ids),
    )


class _Vocabulary:
    """What llguidance asks of a tokenizer: every id's bytes, and plain text to ids.

    No control token is ever text, whether the checkpoint calls it special or not: GLM-4.1V's
    `</answer>` inside a JSON string would end the answer.
    """

    def __init__(self, tokenizer: Tokenizer, num_ids: int) -> None:
        control = {id for text in tokenizer.control_tokens for id in tokenizer.encode_control(text)}
        self.tokens = [b"" if id in control else tokenizer.token_bytes(id) for id in range(num_ids)]
        self.special_token_ids = [id for id, token in enumerate(self.tokens) if not token]
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.bos_token_id = None
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _grammar(constraint: Constraint) -> str:
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "lark":
        return LLMatcher.grammar_from_lark(constraint.text)
    try:
        schema = json.loads(constraint.text)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(schema, dict):
        raise ValueError("a schema must be a JSON object")
    return LLMatcher.grammar_from_json_schema(
        schema, defaults={"whitespace_pattern": JSON_WHITESPACE}
    )
