"""The output's columns, frozen: names, order and Arrow types for every task kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from glm_batch.models.checkpoint.model_config import ModelConfig, RopeConfig
from glm_batch.models.engine.api.request import SamplingParams
from glm_batch.pipelines.job import Job, TaskConfig
from glm_batch.pipelines.tasks.kinds import output_schema

CONFIG = ModelConfig(
    architecture="Glm4ForCausalLM", family="glm4", head="causal_lm", vocab_size=320, hidden_size=8,
    intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    rms_norm_eps=1e-5, max_position_embeddings=128, attention_bias=True, tie_word_embeddings=False,
    rope=RopeConfig(rope_type="default", rope_theta=1e4, rotary_dim=2), dtype="float32", pad_token_id=0,
    eos_token_ids=(0,), num_labels=3, id2label=("a", "b", "c"), problem_type=None, token_classification_bias=True,
)  # fmt: skip
BEFORE = [
    ("row_key", "string"), ("status", "string"), ("error_code", "string"), ("error_message", "string"),
    ("attempts", "int32"),
]  # fmt: skip
AFTER = [
    ("prompt_tokens", "int32"),
    ("cached_tokens", "int32"),
    ("output_tokens", "int32"),
    ("media_tokens", "int32"),
]
TOKEN = "struct<text: string, start: int32, end: int32, label: string, score: double>"
TASK = {
    "choose": [
        ("label", "string"), ("probability", "double"), ("label_probs", "list<item: double>"),
        ("off_set_mass", "double"),
    ],
    "generate": [
        ("text", "string"), ("reasoning", "string"), ("finish_reason", "string"), ("logprobs", "list<item: float>"),
    ],
    "extract": [("json", "string")],
    "classify": [("scores", "list<item: double>"), ("label", "string")],
    "tag": [("tokens", f"list<item: {TOKEN}>")],
    "embed": [("vector", "fixed_size_list<item: float>[8]")],
    "loglikelihood": [("logprob", "double"), ("num_tokens", "int32"), ("perplexity", "double")],
}  # fmt: skip


def job(kind: Any, **changes: Any) -> Job:
    return Job(
        model="m", input=["i"], output="o", task=TaskConfig(kind=kind, prompt="{x}"), **changes
    )


def columns(
    a_job: Job, config: ModelConfig = CONFIG, **carried: pa.DataType
) -> list[tuple[str, str]]:
    return [(field.name, str(field.type)) for field in output_schema(a_job, config, carried)]


@pytest.mark.parametrize("kind", TASK)
def test_columns_of_each_kind(kind: str) -> None:
    assert columns(job(kind)) == BEFORE + TASK[kind] + AFTER


def test_log_probabilities_of_labels_come_on_demand() -> None:
    asked = replace(
        job("choose"), task=TaskConfig(kind="choose", prompt="{x}", label_logprobs=True)
    )
    assert (
        columns(asked)
        == BEFORE + TASK["choose"] + [("label_logprobs", "list<item: double>")] + AFTER
    )


@pytest.mark.parametrize("n", [1, 2])
def test_scores_of_gold_answers_come_on_demand_and_are_never_lists(n: int) -> None:
    task = TaskConfig(kind="generate", prompt="{x}", gold="y", gold_logprobs=True)
    asked = columns(replace(job("generate", sampling=SamplingParams(n=n)), task=task))
    own = columns(job("generate", sampling=SamplingParams(n=n)))[: -len(AFTER)]
    assert asked == [*own, ("gold_logprob", "double"), ("gold_num_tokens", "int32"), *AFTER]


def test_several_outputs_make_lists() -> None:
    lists = [(name, f"list<item: {dtype}>") for name, dtype in TASK["generate"]]
    assert columns(job("generate", sampling=SamplingParams(n=2))) == BEFORE + lists + AFTER


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "dtype"),
    [
        ("single_label_classification", 3, "string"),
        ("multi_label_classification", 3, "list<item: string>"),
        ("regression", 1, "double"),
        (None, 1, "double"),
        (None, 2, "string"),
    ],
)
def test_the_label_of_classify_goes_by_problem_type(
    problem_type: Any, num_labels: int, dtype: str
) -> None:
    config = replace(CONFIG, problem_type=problem_type, num_labels=num_labels)
    assert ("label", dtype) in columns(job("classify"), config)


def test_carried_columns_come_last_with_the_inputs_types() -> None:
    a_job = job("extract", carry=["day", "id"])
    assert columns(a_job, id=pa.int64(), day=pa.date32())[-2:] == [
        ("day", "date32[day]"),
        ("id", "int64"),
    ]
