"""The job file, frozen: every key, its type and its default. A change here is a change for every
user.
"""

from __future__ import annotations

from dataclasses import fields

from glm_batch.jobs.files.sections import describe, job_keys
from glm_batch.models.request_limits import RequestLimits

TEXT, TEXT_OR_NULL, TEXTS = "text", "text or null", "a list of text"
WHOLE, NUMBER, SWITCH = "a whole number", "a number", "true or false"
WHOLE_OR_AUTO, WHOLE_OR_NULL = 'a whole number or "auto"', "a whole number or null"
COLUMNS = "text or a list of text or null"
KINDS = 'one of "choose", "generate", "extract", "classify", "tag", "embed", "loglikelihood", "requests"'

KEYS = {
    "model": (TEXT, "required"),
    "input": (TEXTS, "required"),
    "output": (TEXT, "required"),
    "input_format": ('one of "rows", "openai_batch"', "rows"),
    "requests.models": (TEXTS, []),
    "requests.thinking": (SWITCH, False),
    "task.kind": (KINDS, "required"),
    "task.system": (TEXT_OR_NULL, None),
    "task.prompt": (TEXT_OR_NULL, None),
    "task.messages": (TEXT_OR_NULL, None),
    "task.image": (COLUMNS, None),
    "task.video": (COLUMNS, None),
    "task.labels": ("a list of text or null", None),
    "task.end_of_label": ('one of "auto", "always", "never"', "auto"),
    "task.label_logprobs": (SWITCH, False),
    "task.gold_logprobs": (SWITCH, False),
    "task.calibration": (TEXT_OR_NULL, None),
    "task.schema": ("a section of keys or null", None),
    "task.thinking": (SWITCH, False),
    "task.pooling": ('one of "last", "mean"', "last"),
    "task.normalize": (SWITCH, False),
    "task.completion": (TEXT_OR_NULL, None),
    "task.gold": (TEXT_OR_NULL, None),
    "key": (TEXT_OR_NULL, None),
    "carry": (TEXTS, []),
    "sampling.temperature": (NUMBER, 0.0),
    "sampling.top_p": (NUMBER, 1.0),
    "sampling.top_k": (WHOLE, 0),
    "sampling.min_p": (NUMBER, 0.0),
    "sampling.repetition_penalty": (NUMBER, 1.0),
    "sampling.presence_penalty": (NUMBER, 0.0),
    "sampling.frequency_penalty": (NUMBER, 0.0),
    "sampling.max_tokens": (WHOLE, 64),
    "sampling.min_tokens": (WHOLE, 0),
    "sampling.seed": (WHOLE, 0),
    "sampling.n": (WHOLE, 1),
    "sampling.stop": (TEXTS, ()),
    "sampling.stop_token_ids": ("a list of whole numbers", ()),
    "sampling.ignore_eos": (SWITCH, False),
    "sampling.logprobs": (WHOLE, 0),
    "engine.kind": ('one of "auto", "torch", "vllm", "echo"', "auto"),
    "engine.dtype": ('one of "auto", "float32", "bfloat16", "float16"', "auto"),
    "engine.device": (TEXT, "auto"),
    "engine.tensor_parallel_size": (WHOLE, 1),
    "engine.replicas": ("a whole number or a list of 2 whole numbers", 1),
    "engine.max_step_tokens": (WHOLE_OR_AUTO, "auto"),
    "engine.batch_step_tokens": (WHOLE_OR_AUTO, "auto"),
    "engine.max_num_seqs": (WHOLE_OR_AUTO, "auto"),
    "engine.max_model_len": (WHOLE_OR_AUTO, "auto"),
    "engine.kv_cache_tokens": (WHOLE_OR_AUTO, "auto"),
    "engine.block_size": (WHOLE_OR_AUTO, "auto"),
    "engine.media_cache_bytes": (WHOLE_OR_AUTO, "auto"),
    "engine.prefix_caching": (SWITCH, True),
    "engine.cuda_kernels": (SWITCH, False),
    "cluster.nodes": (WHOLE_OR_AUTO, "auto"),
    "cluster.cpus": (WHOLE_OR_AUTO, "auto"),
    "cluster.gpus": (WHOLE_OR_AUTO, "auto"),
    "preprocess.workers": (WHOLE_OR_AUTO, "auto"),
    "preprocess.min_pixels": (WHOLE_OR_NULL, None),
    "preprocess.max_pixels": (WHOLE_OR_NULL, None),
    "preprocess.fps": ("a number or null", None),
    "media.root": (TEXT_OR_NULL, None),
    "media.hosts": (TEXTS, []),
    "media.private_hosts": (TEXTS, []),
    "media.max_bytes": (WHOLE, 1 << 30),
    "media.fetch_timeout_s": (NUMBER, 30.0),
    "media.decode_timeout_s": (NUMBER, 600.0),
    "media.decode_bytes": (WHOLE, 1 << 30),
    "commit.unit_rows": (WHOLE_OR_AUTO, "auto"),
    "commit.every_seconds": (NUMBER, 30.0),
    "max_error_rate": (NUMBER, 0.0),
    "fail_fast": (SWITCH, False),
    "cron.keep": (WHOLE, 7),
    "cron.webhook": (TEXT_OR_NULL, None),
    "storage.endpoint_url": (TEXT_OR_NULL, None),
    "storage.anon": (SWITCH, False),
}
SECTIONS = {
    "task",
    "requests",
    "requests.limits",
    "sampling",
    "engine",
    "cluster",
    "preprocess",
    "media",
    "commit",
    "cron",
    "storage",
}  # their defaults are those of their keys


def test_keys_types_and_defaults() -> None:
    known = {
        name: (describe(key.type), key.default)
        for name, key in job_keys().items()
        if name not in SECTIONS
    }
    limits = {name for name in known if name.startswith("requests.limits.")}
    # as in a server's configuration
    assert limits == {f"requests.limits.{field.name}" for field in fields(RequestLimits)}
    assert {name: known[name] for name in known.keys() - limits} == KEYS


def test_sections_may_be_left_out() -> None:
    assert {
        name for name, key in job_keys().items() if name in SECTIONS and key.default != "required"
    } == SECTIONS
