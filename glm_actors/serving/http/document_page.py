"""Page: an OpenAPI document as one HTML page that needs neither scripts nor a network.

Owns what the page looks like. Knows nothing of the interface but what the document says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

Json = dict[str, Any]
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem; }
tr { border-top: 1px solid #ccc; } code, pre { font-family: ui-monospace, monospace; } pre { overflow-x: auto; }
h2 { margin-top: 2.5rem; border-top: 3px solid #444; }
"""
EXAMPLE = """curl "$URL/v1/chat/completions" -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" \\
  -d '{"model": "NAME", "messages": [{"role": "user", "content": "Where is my parcel?"}], "max_tokens": 64}'

curl "$URL/v1/models" -H "Authorization: Bearer $KEY"    # the names"""
BOUNDS = {
    "minimum": "from {}",
    "exclusiveMinimum": "above {}",
    "maximum": "to {}",
    "exclusiveMaximum": "below {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {}",
    "maxItems": "at most {}",
}


def page(document: Json) -> str:
    """The whole page as UTF-8 HTML; every text of the document is escaped."""
    info, schemas = document["info"], document.get("components", {}).get("schemas", {})
    title = escape(f"{info['title']} {info['version']}")
    parts = [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style></head><body><h1>{title}</h1><p>{escape(info.get('description', ''))}</p>",
        f"<pre>{escape(EXAMPLE)}</pre>",
        "<h2>Limits</h2>",
        _table(("limit", "value"), document.get("x-limits", {}).items()),
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts += _operation(f"{method.upper()} {path}", operation, schemas)
    return "".join([*parts, "</body></html>"])


def _operation(name: str, operation: Json, schemas: Json) -> Iterator[str]:
    yield f"<h2><code>{escape(name)}</code></h2><p>{escape(operation.get('description', ''))}</p>"
    content = operation.get("requestBody", {}).get("content", {})
    body = _resolved(content.get("application/json", {}).get("schema", {}), schemas)
    if body:
        yield f"<p>{escape(body.get('description', ''))}</p>"
        required = body.get("required", [])
        rows = [
            (field, type_text(schema, schemas), _note(schema, field in required))
            for field, schema in body["properties"].items()
        ]
        yield _table(("field", "what it takes", ""), rows)
    answers = [
        (status, answer.get("description", "")) for status, answer in operation["responses"].items()
    ]
    yield "<h3>Answers</h3>" + _table(("status", "meaning"), answers)


def _note(schema: Json, is_required: bool) -> str:
    default = schema.get("default")
    notes = ["required" if is_required else "", "" if default is None else f"default {default}"]
    return "; ".join(filter(None, [*notes, schema.get("description", "")]))


def type_text(schema: Json, schemas: Json) -> str:
    """What a JSON schema takes, in words."""
    schema = _resolved(schema, schemas)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(type_text(each, schemas) for each in schema[key])
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return ", ".join(map(repr, schema["enum"]))
    name = schema.get("type", "anything")
    if name == "array":
        name = f"list of ({type_text(schema.get('items', {}), schemas)})"
    elif "properties" in schema:
        name = (
            "{"
            + ", ".join(
                f"{key}: {type_text(each, schemas)}" for key, each in schema["properties"].items()
            )
            + "}"
        )
    bounds = [text.format(_number(schema[key])) for key, text in BOUNDS.items() if key in schema]
    return " ".join([name, *bounds])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else str(value)


def _resolved(schema: Json, schemas: Json) -> Json:
    reference = schema.get("$ref")
    found: Json = schemas[reference.rpartition("/")[2]] if reference else schema
    return found


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
