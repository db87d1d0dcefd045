"""The tables of the reference, made of the code: a hook of mkdocs.

`<!-- generated: NAME -->` in a page becomes what the function TABLES[NAME] gives. The text of a key
is the comment behind its field, or above it; that of a section is its class's docstring.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

import glm_batch.jobs.__main__ as command_line
from glm_batch.glm_actors.serving.http.http_app import build_app
from glm_batch.glm_actors.serving.http.http_metrics import Metrics
from glm_batch.glm_actors.serving.openai.api_errors import STATUS_OF_CODE
from glm_batch.glm_actors.serving.openai.serve_settings import ServeSettings
from glm_batch.jobs.files.sections import describe
from glm_batch.jobs.sweep.sweep_config import SweepFile
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.engine.api.request import SamplingParams
from glm_batch.models.request_limits import RequestLimits
from glm_batch.pipelines.job import Job, TaskConfig
from glm_batch.pipelines.metrics.exporter import METRICS, PREFIX
from glm_batch.pipelines.report.page import ABOUT_CODES
from glm_batch.pipelines.tasks.kinds import output_schema

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "glm_actors", "pipelines", "jobs")
MARK = re.compile(r"<!-- generated: ([\w-]+) -->")
# Sections that are told on one page and linked from the others.
PAGES = {"job": "job-file.md", "serve": "serve-file.md", "sweep": "sweep-file.md"}
ABOUT_COLUMNS = {
    "row_key": "the key column, or file and row number",
    "status": "`ok` or `error` (`filtered` is kept for later)",
    "error_code": "null for good rows; see [Error codes](error-codes.md)",
    "error_message": "null for good rows",
    "attempts": "how often the row was tried",
    "label": "the likeliest label; classify: one label, several, or a number (regression)",
    "probability": "the label's share among the labels",
    "label_probs": "softmax over the labels, in the order of `labels`",
    "off_set_mass": "the probability that the model would have written none of the labels",
    "label_logprobs": "with `task.label_logprobs`: the labels' joint log-probabilities, also where "
    "they are too small for `off_set_mass` to tell",
    "text": "what was written; a list with `sampling.n` above 1, and so are the next three",
    "reasoning": "what came before it, with `task.thinking`",
    "finish_reason": "`stop` or `length`",
    "logprobs": "of each token, with `sampling.logprobs`",
    "gold_logprob": "with `task.gold_logprobs`: the log-probability (natural) of the gold answer's "
    "tokens after the row's prompt; null without a gold text",
    "gold_num_tokens": "how many these are",
    "json": "a text that obeys the schema",
    "scores": "one for each class",
    "tokens": "`text`, `start`, `end` (characters of the prompt), `label`, `score`",
    "vector": "from the hidden states after the final norm",
    "logprob": "the log-probability (natural) of the text, or of the completion",
    "num_tokens": "how many tokens were scored",
    "perplexity": "exp(-logprob / num_tokens)",
    "custom_id": "the request's",
    "line": "its number in the file",
    "url": "the request's",
    "status_code": "of the response",
    "response": "the response's body as JSON",
    "prompt_tokens": "tokens of the prompt",
    "cached_tokens": "those of them that were in the cache",
    "output_tokens": "tokens that were written",
    "media_tokens": "those of the prompt that stand for images and videos",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for each page. Raises KeyError for a table that is not there."""
    return MARK.sub(lambda found: TABLES[found[1]](), markdown)


def job() -> str:
    return "\n".join(_sections(Job, "", "job"))


def job_yaml() -> str:
    """A whole job file, to copy from: every key with its default, or a sample."""
    samples = {"model": "examples/tiny_glm", "input": ["examples/support/*.parquet"]}
    samples |= {"output": "out/route", "kind": "choose"}
    lines = list(_yaml_lines(Job, samples, ""))
    return "\n".join(["```yaml", *lines, "```"])


def sweep() -> str:
    return "\n".join(_sections(SweepFile, "", "sweep"))


def serve() -> str:
    return "\n".join(_sections(ServeSettings, "", "serve"))


def commands() -> str:
    """Each command with its arguments and options."""
    parts = []
    group = typer.main.get_command(command_line.app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        usage = " ".join(["glm-batch", name, *(each.metavar or "" for each in arguments)])
        rows = [
            (f"`{' '.join(filter(None, [*each.opts, _metavar(each)]))}`", each.help or "")
            for each in command.params
            if each.param_type_name == "option"
        ]
        rows = [(f"`{each.metavar}`", each.help or "") for each in arguments] + rows
        parts += [f"## `{usage}`", "", command.help or "", "", _table(("", ""), rows), ""]
    return "\n".join(parts)


def exit_codes() -> str:
    texts = _comments(command_line, ast.Assign)
    rows = [
        (str(getattr(command_line, name)), text)
        for name, text in texts.items()
        if name.startswith("EXIT_")
    ]
    rows += [("130", "stopped by Ctrl-C"), ("143", "stopped by SIGTERM")]
    return _table(("code", "meaning"), rows)


def columns() -> str:
    """The columns of each kind of task, by the schema of a job on the shipped checkpoint."""
    config = load_config(ROOT / "examples/tiny_glm")
    kinds = typing.get_args(typing.get_type_hints(TaskConfig)["kind"])
    schemas = {kind: list(output_schema(_job(kind), config, {})) for kind in kinds}
    shared = [
        field for field in schemas[kinds[0]] if all(field in each for each in schemas.values())
    ]
    parts = ["## All jobs", "", _columns(shared), ""]
    for kind, fields in schemas.items():
        title = "OpenAI batch files" if kind == "requests" else f"`{kind}`"
        parts += [f"## {title}", "", _columns(each for each in fields if each not in shared), ""]
    return "\n".join(parts)


def error_codes() -> str:
    """Every code that is raised anywhere; what no text explains is told by its messages."""
    rows = []
    raised = raised_codes()
    for code in sorted({*raised, *ABOUT_CODES}):
        text = ABOUT_CODES.get(code) or "; ".join(sorted(raised[code]))
        rows.append((f"`{code}`", text, str(STATUS_OF_CODE.get(code, 400))))
    return _table(("code", "what is wrong", "HTTP status"), rows)


def job_metrics() -> str:
    rows = [
        (
            f"`ray_{PREFIX}{each.name}_total`",
            ", ".join(f"`{tag}`" for tag in each.tags),
            each.description,
        )
        for each in METRICS
    ]
    return _table(("metric", "labels beside the job's fingerprint", "what it counts"), rows)


def serve_metrics() -> str:
    rows = re.findall(r"^# HELP (\w+) (.*)\n# TYPE \w+ (\w+)", Metrics().text({}).decode(), re.M)
    return _table(
        ("metric", "kind", "what it tells"),
        [(f"`{name}`", kind, text) for name, text, kind in rows if not name.endswith("_created")],
    )


def routes() -> str:
    """Each route with the fields of its body, from the interface's own OpenAPI document."""
    document = _openapi()
    schemas = document["components"]["schemas"]
    parts = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts += [f"## `{method.upper()} {path}`", "", operation.get("description", ""), ""]
            content = operation.get("requestBody", {}).get("content", {})
            body = _resolved(content.get("application/json", {}).get("schema", {}), schemas)
            required = body.get("required", ())
            rows = [
                (f"`{name}`", _takes(schema, schemas), "required" if name in required else "")
                for name, schema in body.get("properties", {}).items()
            ]
            parts += [_table(("field", "what it takes", ""), rows), ""] if rows else []
    return "\n".join(parts)


def rooms() -> str:
    """What each folder says of itself, in the order in which its parent names them."""
    parts = []
    for package in PACKAGES:
        parts += [f"### `{package}`", "", _docstring(ROOT / package), ""]
        parts += [_table(("room", "what belongs there"), list(_rooms(ROOT / package))), ""]
    return "\n".join(parts)


TABLES: Mapping[str, Callable[[], str]] = {
    "job": job,
    "job-yaml": job_yaml,
    "sweep": sweep,
    "serve": serve,
    "commands": commands,
    "exit-codes": exit_codes,
    "columns": columns,
    "error-codes": error_codes,
    "job-metrics": job_metrics,
    "serve-metrics": serve_metrics,
    "routes": routes,
    "rooms": rooms,
}


def _sections(owner: type, prefix: str, page: str) -> Iterator[str]:
    """A table of the owner's keys, then one of each section below it."""
    hints = typing.get_type_hints(owner)
    texts = field_texts(owner)
    rows, below = [], []
    for field in dataclasses.fields(owner):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        named = typing.get_origin(hint) is dict
        section = typing.get_args(hint)[1] if named else hint
        if not (isinstance(section, type) and dataclasses.is_dataclass(section)):
            rows.append((f"`{key}`", describe(hint), _default(field), texts.get(field.name, "")))
            continue
        inner = f"{key}.NAME" if named else key
        home = HOMES.get(section, page)
        anchor = HOME_KEYS.get(section, inner).lower().replace(".", "")
        link = f"{PAGES[home] if home != page else ''}#{anchor}"
        text = "; ".join(filter(None, [texts.get(field.name, ""), f"see [`{inner}`]({link})"]))
        rows.append((f"`{key}`", "sections by name" if named else "a section", "", text))
        if home == page:
            below.append((section, inner))
    yield _table(("key", "takes", "default", ""), rows)
    for section, inner in below:
        yield f"\n## {inner}\n\n{_about(section)}\n"
        yield from _sections(section, f"{inner}.", page)


def _yaml_lines(owner: type, samples: Mapping[str, Any], indent: str) -> Iterator[str]:
    hints, texts = typing.get_type_hints(owner), field_texts(owner)
    for field in dataclasses.fields(owner):
        section = hints[field.name]
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            yield f"{indent}{field.name}:"
            yield from _yaml_lines(section, samples, indent + "  ")
            continue
        value = _default_value(field)
        value = samples[field.name] if value is dataclasses.MISSING else value
        given = f"{indent}{field.name}: {json.dumps(value, ensure_ascii=False)}"
        text = texts.get(field.name, "")
        yield f"{given:<38}  # {text}" if text else given


# Where a section that several files have is told.
HOMES = {RequestLimits: "serve", SamplingParams: "job"} | {
    hint: "job"
    for hint in typing.get_type_hints(Job).values()
    if dataclasses.is_dataclass(hint) and hint is not RequestLimits
}
HOME_KEYS = {RequestLimits: "limits", SamplingParams: "sampling"} | {
    hint: name
    for name, hint in typing.get_type_hints(Job).items()
    if dataclasses.is_dataclass(hint) and hint is not RequestLimits
}


def field_texts(owner: type) -> dict[str, str]:
    """The comments of a dataclass's fields, inherited ones too: behind a field, and above it."""
    texts: dict[str, str] = {}
    for each in reversed(owner.__mro__):
        texts |= _comments(each, ast.AnnAssign) if dataclasses.is_dataclass(each) else {}
    return texts


def _comments(
    owner: type | types.ModuleType, kind: type[ast.AnnAssign] | type[ast.Assign]
) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(owner))
    comments = {
        token.start[0]: token.string.lstrip("#: ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    (top,) = ast.parse(source).body if inspect.isclass(owner) else (ast.parse(source),)
    found = {}
    for node in typing.cast(ast.ClassDef, top).body:
        if not isinstance(node, kind):
            continue
        above = node.lineno - 1
        while above in comments and lines[above - 1].lstrip().startswith("#"):
            above -= 1
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        places = range(above + 1, (node.end_lineno or node.lineno) + 1)
        found[ast.unparse(target)] = " ".join(comments[line] for line in places if line in comments)
    return found


def _about(owner: type) -> str:
    """A class's docstring, as the page's paragraphs."""
    return inspect.cleandoc(owner.__doc__ or "")


def _default(field: dataclasses.Field[Any]) -> str:
    value = _default_value(field)
    if value is dataclasses.MISSING:
        return "required"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _default_value(field: dataclasses.Field[Any]) -> Any:
    """MISSING where there is none."""
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _metavar(option: Any) -> str:
    return "" if option.is_flag else option.metavar or "N"


def _job(kind: str) -> Job:
    task = TaskConfig(
        kind=kind,  # type: ignore[arg-type]
        labels=["a", "b"],
        schema={},
        label_logprobs=kind == "choose",
        gold_logprobs=kind == "generate",
    )
    form = "openai_batch" if kind == "requests" else "rows"
    return Job(model="", input=[], input_format=form, output="", task=task)  # type: ignore[arg-type]


def _columns(fields: Iterable[Any]) -> str:
    rows = [
        (f"`{each.name}`", f"`{_type_name(str(each.type))}`", ABOUT_COLUMNS[each.name])
        for each in fields
    ]
    return _table(("column", "type", ""), rows)


def _type_name(name: str) -> str:
    """Arrow's names of types with the bits of numbers."""
    name = re.sub(r"\bdouble\b", "float64", re.sub(r"\bfloat\b", "float32", name))
    return re.sub(r"\[\d+\]$", "[hidden_size]", name.replace("item: ", ""))


def raised_codes() -> dict[str, set[str]]:
    """The messages of every RowError in the code by its code, as they stand there."""
    found: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or ast.unparse(node.func) != "RowError":
                    continue
                code, message = (*node.args, None, None)[:2]
                if isinstance(code, ast.Constant):
                    found.setdefault(str(code.value), set()).add(_message(message))
    return found


def _message(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            each.value if isinstance(each, ast.Constant) else "..."  # type: ignore[misc]
            for each in node.values
        )
    return "..."


def _openapi() -> dict[str, Any]:
    import httpx

    class Nothing:
        models: typing.ClassVar[list[str]] = []

    async def ask() -> Any:
        transport = httpx.ASGITransport(app=build_app(Nothing(), RequestLimits(), None))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://docs") as client:
            return (await client.get("/openapi.json")).json()

    return typing.cast(dict[str, Any], asyncio.run(ask()))


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    name = schema.get("$ref")
    return schemas[name.rpartition("/")[2]] if name else schema


def _takes(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    """What a JSON schema takes, in words."""
    schema = _resolved(schema, schemas)
    for each in ("anyOf", "oneOf"):
        if each in schema:
            return " or ".join(dict.fromkeys(_takes(one, schemas) for one in schema[each]))
    if "const" in schema:
        return f"`{schema['const']!r}`"
    if "enum" in schema:
        return ", ".join(f"`{value!r}`" for value in schema["enum"])
    name = str(schema.get("type", "anything"))
    if name == "array":
        return f"a list of ({_takes(schema.get('items', {}), schemas)})"
    low, high = (
        next((f"{word} {schema[key]:,}" for key, word in words.items() if key in schema), "")
        for words in (
            {"minimum": "from", "exclusiveMinimum": "above"},
            {"maximum": "to", "exclusiveMaximum": "below"},
        )
    )
    return " ".join(filter(None, [name, low, high]))


def _rooms(folder: Path) -> Iterator[tuple[str, str]]:
    named = re.findall(r"`([\w.]+)`", _docstring(folder))
    inner = [each.parent for each in folder.glob("*/__init__.py")]
    for each in sorted(inner, key=lambda each: [*named, each.name].index(each.name)):
        yield f"`{each.relative_to(ROOT)}`", " ".join(_docstring(each).split())
        yield from _rooms(each)


def _docstring(folder: Path) -> str:
    return ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [
        list(head),
        *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows),
    ]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
