"""`python -m benchmarks.house`: how large the house is, and how much of it one row walks through.

Counts files, lines, modules a folder and arrows between folders; then runs the command line on one
row at a time with the shipped checkpoint and notes which product files are entered, and how often
the way leads from one file into another. Every process of a run traces itself: a `sitecustomize`
on PYTHONPATH loads this file there, which is why it imports the standard library alone.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

PACKAGES = ("models", "glm_actors", "pipelines", "jobs")
ROOT = Path(__file__).resolve().parents[1]
TRACES, AFTER = "HOUSE_TRACES", "HOUSE_TRACES_AFTER"  # a folder; a file that opens it
# What makes the things that a row meets later; its calls are counted apart.
SETUP = re.compile("__init__$|__post_init__$|from_|build_|load_|make_")
TOKEN = "a-token-for-counting"
START_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house", description=__doc__)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the tree to count; this one")
    parser.add_argument(
        "--optional", nargs="*", help="folders or files outside the core; the optional rooms'"
    )
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--list", action="store_true", help="name the files that a run enters")
    options = parser.parse_args()
    tree = options.tree.resolve()
    if (optional := options.optional) is None:
        from glm_batch.models.rooms import ROOMS

        optional = [folder for room in ROOMS.values() for folder in room.folders]
    for line in (*sizes(tree, optional), *folders(tree), *arrows(tree)):
        print(line)
    for name in options.runs:
        with tempfile.TemporaryDirectory() as work:
            steps = traced(tree, Path(work), RUNS[name])
        print(f"{name}: {summary(steps)}", flush=True)
        if options.list:
            met = {step.file for step in steps if not step.setup}
            for file in sorted({step.file for step in steps}):
                print(f"    {file}{'' if file in met else ' (made before)'}")


def sizes(tree: Path, optional: list[str]) -> Iterator[str]:
    """Files, raw lines and lines that are not blank: of all, of the packages and of the core."""
    product = [path for path, _ in modules(tree)]
    extra = [path for name in ("benchmarks", "examples") for path in (tree / name).rglob("*.py")]
    core = [path for path in product if not _is_below(path.relative_to(tree), optional)]
    for name, paths in (("all", product + extra), ("packages", product), ("core", core)):
        lines = [line for path in paths for line in path.read_text("utf-8").splitlines()]
        solid = sum(1 for line in lines if line.strip())
        yield f"{name}: {len(paths)} files, {len(lines):,} lines, {solid:,} not blank"
    yield f"README: {len((tree / 'README.md').read_text('utf-8').splitlines())} lines"


def _is_below(path: Path, places: list[str]) -> bool:
    return any(path == Path(place) or Path(place) in path.parents for place in places)


def folders(tree: Path) -> Iterator[str]:
    """How many modules lie in each folder, `__init__.py` apart."""
    counts = Counter(
        path.parent.relative_to(tree).as_posix()
        for path, _ in modules(tree)
        if path.name != "__init__.py"
    )
    yield (
        f"folders: {len(counts)}, modules a folder: median {statistics.median(counts.values()):g}, "
        + ", ".join(f"{folder} {count}" for folder, count in counts.most_common(6))
    )


def arrows(tree: Path) -> Iterator[str]:
    """Which folder imports from which, and how many of these arrows have one that goes back."""
    names = {name: path for path, name in modules(tree)}
    files, rooms = set(), set()
    for path, _ in modules(tree):
        for target in _imported(path, names):
            files.add((path, target))
            rooms.add((path.parent, target.parent))
    rooms = {(one, other) for one, other in rooms if one != other}
    back = sum((other, one) in rooms for one, other in rooms) // 2
    yield f"arrows: {len(rooms)} between folders ({back} pairs both ways), {len(files)} of modules"


def _imported(path: Path, names: dict[str, Path]) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (
                names[name]
                for name in {one if one in names else str(node.module) for one in whole}
                if name in names
            )
        elif isinstance(node, ast.Import):
            yield from (names[alias.name] for alias in node.names if alias.name in names)


def modules(tree: Path) -> list[tuple[Path, str]]:
    """The packages' files, each with the name under which it is imported."""
    prefix = ("glm_batch",) if (tree / "src" / "glm_batch").is_dir() else ()
    found = sorted(path for package in PACKAGES for path in (tree / package).rglob("*.py"))
    names = [".".join((*prefix, *path.relative_to(tree).with_suffix("").parts)) for path in found]
    return [(path, name.removesuffix(".__init__")) for path, name in zip(found, names, strict=True)]


# --- one row at a time: each run prepares what it needs, and `start` begins the tracing


class Work:
    """A folder to run commands of one tree in, traced once `start` was called."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.tree, self.folder = tree, folder
        self.traces, self.hook = folder / "traces", folder / "hook"
        for path in (self.traces, self.hook):
            path.mkdir()
        (self.hook / "sitecustomize.py").write_text(
            "import importlib.util\n"
            f"spec = importlib.util.spec_from_file_location('house_tracing', {__file__!r})\n"
            "module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            "module.trace()\n"
        )
        has_source = (tree / "src").is_dir()
        self.command = [sys.executable, "-m", "glm_batch.jobs" if has_source else "jobs"]
        self.environment = os.environ | {
            "PYTHONPATH": f"{self.hook}{os.pathsep}{tree / 'src' if has_source else tree}",
            "GLM_BATCH_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1",
            TRACES: str(self.traces),
            AFTER: str(folder / "started"),
        }

    def start(self) -> None:
        (self.folder / "started").touch()

    def run(self, *arguments: str, expected: int = 0) -> None:
        done = subprocess.run(
            [*self.command, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        if done.returncode != expected:
            raise SystemExit(f"{arguments}: exit code {done.returncode}\n{done.stderr}")

    def write(self, name: str, **keys: Any) -> str:
        """A job file; JSON is YAML."""
        model = str(self.tree / "examples" / "tiny_glm")
        job = {"model": model, "output": "out", "key": "id", "input": ["rows/*"], **keys}
        (self.folder / name).write_text(json.dumps(job))
        return name

    def rows(self, table: str, columns: list[str] | None = None) -> list[dict[str, Any]]:
        """The first row of one of the shipped tables, which also lies in `rows`."""
        import pyarrow.parquet as pq

        (self.folder / "rows").mkdir()
        first = pq.read_table(self.tree / "examples" / table, columns=columns).slice(0, 1)
        pq.write_table(first, self.folder / "rows" / "1.parquet")
        return first.to_pylist()  # type: ignore[no-any-return]


TICKET = {"kind": "choose", "prompt": "Which team? {text}", "labels": ["billing", "shipping"]}
SHAPE = {"kind": "choose", "image": "image", "prompt": "Which?", "labels": ["circle", "star"]}


def _text_row(work: Work) -> None:
    work.rows("support/tickets-1.parquet", ["id", "text"])
    work.start()
    work.run("label", work.write("job.yaml", task=TICKET))


def _image_row(work: Work) -> None:
    work.rows("shapes/shapes-1.parquet", ["id", "image"])
    work.start()
    work.run("label", work.write("job.yaml", task=SHAPE))


def _retry(work: Work) -> None:
    """A picture that was not there at first."""
    (row,) = work.rows("shapes/shapes-1.parquet", ["id", "image"])
    image = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
    (work.folder / "rows" / "1.parquet").unlink()
    (work.folder / "rows" / "1.jsonl").write_text(json.dumps({"id": "1", "image": "1.png"}))
    media = {"root": str(work.folder)}
    job = work.write("job.yaml", task=SHAPE, media=media, max_error_rate=1.0)
    work.run("label", job)
    (work.folder / "1.png").write_bytes(image)
    work.start()
    work.run("retry", "out")


def _cron(work: Work) -> None:
    """A night that finds one new file beside one that was done the night before."""
    (row,) = work.rows("support/tickets-1.parquet", ["id", "text"])
    job = work.write("job.yaml", task=TICKET)
    work.run("cron", job)
    (work.folder / "rows" / "2.jsonl").write_text(json.dumps(row | {"id": "new"}))
    work.start()
    work.run("cron", job)


def _chat(work: Work) -> None:
    """One request over HTTP to a running server, whose own clocks tick meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = {"model": str(work.tree / "examples" / "tiny_glm")}
    config = {"models": {"tiny": model}, "port": port, "token_env": "GLM_BATCH_TOKEN"}
    (work.folder / "serve.yaml").write_text(json.dumps(config))
    log = work.folder / "log"
    with log.open("w") as output:
        command = [*work.command, "serve", "serve.yaml"]
        server = subprocess.Popen(
            command, cwd=work.folder, env=work.environment, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + START_S
        while "serving" not in log.read_text():
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"serve: it did not start\n{log.read_text()}")
            time.sleep(0.2)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        work.start()
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
        (work.folder / "started").unlink()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


RUNS: dict[str, Callable[[Work], None]] = {
    "text row": _text_row,
    "image row": _image_row,
    "chat": _chat,
    "retry": _retry,
    "cron night": _cron,
}


class Step(NamedTuple):
    """A function of ours that calls one in another file, itself or through a library."""

    caller_file: str  # empty for what no function of ours has called
    caller: str
    file: str
    function: str
    setup: str  # not empty where something is made for later


def traced(tree: Path, folder: Path, run: Callable[[Work], None]) -> set[Step]:
    """The different steps from file to file in all processes of a run, once it has started."""
    work = Work(tree, folder)
    run(work)
    lines = (line for file in work.traces.iterdir() for line in file.read_text().splitlines())
    return {Step(*line.split("\t")) for line in lines}


def summary(steps: set[Step]) -> str:
    parts = []
    for what, some in (
        ("in all", steps),
        ("without what is made before", {step for step in steps if not step.setup}),
    ):
        files = {step.file for step in some}
        shares = Counter(file.partition("/")[0] for file in files)
        hops = {(step.caller_file, step.caller, step.file, step.function) for step in some}
        names = ", ".join(f"{package} {shares[package]}" for package in PACKAGES)
        parts.append(f"{len(files)} files ({names}) and {len(hops)} hops {what}")
    return "; ".join(parts)


# --- in each process of a run


def trace() -> None:
    """From here on our functions are compiled so that they tell where they are called from."""
    if TRACES not in os.environ:
        return
    builtins.__house__ = enter = _Tracer(Path(os.environ[TRACES]), os.environ[AFTER])  # type: ignore[attr-defined]
    plain = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, name: str) -> CodeType | None:
        parts = name.removeprefix("glm_batch.").split(".")
        if parts[0] not in PACKAGES:
            return plain(loader, name)
        path = Path(loader.path)
        folder = parts if path.name == "__init__.py" else parts[:-1]
        enter.files[loader.path] = "/".join((*folder, path.name))
        tree = ast.parse(loader.get_data(loader.path))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                after = 0 if ast.get_docstring(node) is None else 1
                node.body[after:after] = ast.parse("__house__()").body
        return compile(ast.fix_missing_locations(tree), loader.path, "exec", dont_inherit=True)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]


class _Tracer:
    """Writes down each call that leads into another file of ours, the first time it is made."""

    def __init__(self, folder: Path, opens: str) -> None:
        self.files: dict[str, str] = {}  # by the path that code objects name
        self._folder, self._opens = folder, opens
        self._known: set[tuple[CodeType | None, CodeType, bool]] = set()

    def __call__(self) -> None:
        called = frame = sys._getframe(1)
        caller, is_setup = None, False
        while above := frame.f_back:
            frame, code = above, above.f_code
            if code.co_filename.startswith("<frozen importlib"):
                return
            if code.co_filename in self.files:
                caller = caller or code
                is_setup = is_setup or bool(SETUP.match(code.co_name))
        key = (caller, called.f_code, is_setup)
        if key in self._known or not os.path.exists(self._opens):
            return
        self._known.add(key)
        file = self.files[called.f_code.co_filename]
        by = ("", "") if caller is None else (self.files[caller.co_filename], caller.co_qualname)
        if by[0] != file:
            line = "\t".join((*by, file, called.f_code.co_qualname, "setup" * is_setup))
            with open(self._folder / str(os.getpid()), "a", encoding="utf-8") as stream:
                stream.write(line + "\n")


if __name__ == "__main__":
    main()
