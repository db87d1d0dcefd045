"""SchemaChecker: whether decoding can follow a schema or grammar, found out in a process apart.

A schema may make its compiler search for ages, in native code that no thread can end. What has
passed here is compiled by the engine as fast.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from glm_batch.glm_actors.faults.child import Answer, Child, ChildError, Json, serve

REMEMBERED = 256
MEMORY_BYTES = 2 << 30
MODULE = "glm_batch.glm_actors.faults.schema_check"  # this one, which the child runs


class SchemaChecker:
    """Checks one schema at a time; several threads may call it. What was found is remembered."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._child = Child(MODULE, {}, num_bytes=MEMORY_BYTES, timeout_s=timeout_s, quiet=True)
        self._problem = lru_cache(REMEMBERED)(self._find_problem)

    def problem(self, text: str, kind: str = "json_schema") -> str:
        """What is wrong with a schema (JSON text) or a grammar (kind lark); empty if nothing is."""
        return self._problem(text, kind)

    def close(self) -> None:
        """Ends the process, whatever it is at."""
        self._child.close()

    def _find_problem(self, text: str, kind: str) -> str:
        try:
            reply, _ = self._child.ask({"kind": kind}, text.encode())
        except ChildError as error:
            if error.why == "time":
                return f"it takes longer than {self._timeout_s:g} s to compile; make it simpler"
            return "its compiler ran out of memory; make it simpler"
        return str(reply["problem"])


def _build(_: Any) -> Answer:
    import llguidance

    def answer(request: Json, data: Any) -> tuple[Json, bytes]:
        text = bytes(data) if isinstance(data, memoryview) else data.read()
        grammar = llguidance.grammar_from(request["kind"], text.decode())
        problem = llguidance.LLMatcher.validate_grammar(grammar)
        if not problem:
            matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
            matcher.compute_bitmask()
            problem = matcher.get_error()
        return {"problem": " ".join(problem.split())}, b""

    return answer


if __name__ == "__main__":
    serve(_build)
