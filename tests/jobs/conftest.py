"""A small world for the command line: a checkpoint with a real tokenizer and empty weights, input
files, a job file.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import save_file

from glm_batch.models.checkpoint.config_reader import load_config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from tiny_tokenizer import save_tokenizer, train_tokenizer  # noqa: E402  an example script, not a package

MODEL_CONFIG = {
    "architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 320,
    "max_position_embeddings": 128, "eos_token_id": [0],
}  # fmt: skip
JOB: dict[str, Any] = {
    "model": "model",
    "input": ["data/*.parquet", "data/*.jsonl"],
    "output": "out",
    "key": "id",
    "carry": ["id"],
    "task": {
        "kind": "choose",
        "prompt": "Team? {text}",
        "labels": ["red", "green"],
        "gold": "team",
    },
    "engine": {"kind": "echo"},
}


@dataclass(frozen=True)
class Workplace:
    """A directory with everything a job needs, and ways to change the job and to run commands in
    it.
    """

    root: Path

    def write_job(self, change: Callable[[dict[str, Any]], object] = lambda job: None) -> Path:
        job = json.loads(json.dumps(JOB))
        change(job)
        path = self.root / "job.yaml"
        path.write_text(yaml.safe_dump(job, sort_keys=False))
        return path

    def write_config(self, **changes: Any) -> None:
        (self.root / "model" / "config.json").write_text(json.dumps(MODEL_CONFIG | changes))

    def run(self, *arguments: str) -> Done:
        """`glm-batch` with these arguments in a process of its own; `cpu_s` is what it cost,
        waiting apart.
        """
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-X", "importtime", "-m", "glm_batch.jobs", *arguments]
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "COLUMNS": "80"}
        done = subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=240
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = done.stderr.splitlines()
        return Done(
            code=done.returncode,
            out=done.stdout,
            err="\n".join(line for line in lines if not line.startswith("import time:")),
            imported={
                line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")
            },
            cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        )


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str
    imported: set[str]
    cpu_s: float


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    model = root / "model"
    model.mkdir()
    save_tokenizer(train_tokenizer(["a b c"], 260), model, 128)
    (model / "config.json").write_text(json.dumps(MODEL_CONFIG))
    shapes = load_config(model).tensor_shapes()
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, model / "model.safetensors")
    data = root / "data"
    data.mkdir()
    texts = ["hello", "world", None, "", "x" * 500]
    table = {
        "id": list(range(5)),
        "text": texts,
        "team": ["red", "green", "red", None, "red"],
        "score": [1.5] * 5,
    }
    pq.write_table(pa.table(table), data / "a.parquet")
    lines = [
        {"id": 5, "text": "more", "team": "green", "score": 2.5},
        {"id": 6, "text": "again", "team": "red"},
    ]
    (data / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "not json\n")
    return root


@pytest.fixture
def work(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A fresh copy of the small world, which is also the current directory."""
    for path in sorted(template.rglob("*")):
        target = tmp_path / path.relative_to(template)
        if path.is_dir():
            target.mkdir()
        else:
            target.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path)
