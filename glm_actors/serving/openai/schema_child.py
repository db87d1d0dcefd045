"""The process in which SchemaChecker has schemas compiled: kind and text on each line in, what is
wrong with it out.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Literal

import llguidance


def main() -> None:
    """Reads until the parent closes the pipe. Its argument is how many bytes of memory it may have."""
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(problem(*json.loads(line))), flush=True)


def problem(kind: Literal["json_schema", "lark"], text: str) -> str:
    """What is wrong with a schema (JSON text) or grammar, on one line; empty when decoding can
    follow it.
    """
    grammar = llguidance.grammar_from(kind, text)
    found = llguidance.LLMatcher.validate_grammar(grammar)
    if not found:
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
        matcher.compute_bitmask()
        found = matcher.get_error()
    return " ".join(found.split())


if __name__ == "__main__":
    main()
