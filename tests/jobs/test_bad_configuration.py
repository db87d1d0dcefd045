"""Every bad configuration is refused before anything starts, with its place and its remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm_batch.jobs.checks.checks import check_job
from glm_batch.jobs.files.sections import load_job
from glm_batch.models.errors import ConfigError

Change = Callable[[dict[str, Any]], object]


def task(**changes: Any) -> Change:
    return lambda job: job["task"].update(changes)


def top(**changes: Any) -> Change:
    return lambda job: job.update(changes)


def refusal(work: Any, change: Change = lambda job: None, *overrides: str) -> str:
    path = work.write_job(change)
    with pytest.raises(ConfigError) as caught:
        check_job(*load_job(path.name, overrides))
    return str(caught.value)


def generate(**sampling: Any) -> Change:
    def change(job: dict[str, Any]) -> None:
        job["task"] = {"kind": "generate", "prompt": "{text}"}
        job["sampling"] = sampling

    return change


def with_vllm(**sampling: Any) -> Change:
    def change(job: dict[str, Any]) -> None:
        generate(**sampling)(job)
        job["engine"] = {"kind": "vllm"}

    return change


def batch_file(**changes: Any) -> Change:
    def change(job: dict[str, Any]) -> None:
        for key in ("task", "key", "carry"):
            job.pop(key)
        job.update(input_format="openai_batch", **changes)

    return change


# (name, change of the good job, what the message must say: its place and its remedy)
BAD: list[tuple[str, Change, list[str]]] = [
    ("unknown key", top(modle="x"), ["job.yaml:18: modle: unknown key", "did you mean model?"]),
    ("unknown nested key", task(promt="x"), ["job.yaml:16: task.promt", "did you mean task.prompt?"]),
    ("key of another section", top(temperature=1), ["did you mean sampling.temperature?"]),
    ("nothing like a key", top(zzz=1), ["zzz: unknown key; known here: model, input, output"]),
    ("missing task", lambda job: job.pop("task"), ["job.yaml: task: missing", "but for one with input_format"]),
    ("requests of rows", lambda job: job.update(requests={"models": ["x"]}), ["requests.models", "only input_format"]),
    ("task of a batch file", lambda job: job.update(input_format="openai_batch"), [
        "job.yaml:9: task", "each line says what is asked", "key", "is its custom_id", "carry", "join by custom_id",
    ]),
    ("keys of a batch file", batch_file(
        sampling={"max_tokens": 5, "seed": 1}, media={"hosts": ["a.com"]}, preprocess={"fps": 1.0, "workers": 1},
        engine={"kind": "vllm"}, requests={"limits": {"max_queue": 5, "max_n": 0}},
    ), [
        "sampling.max_tokens", "each request says how it is answered", "media.hosts", "preprocess.fps",
        "engine.kind", "use torch or auto", "requests.limits.max_queue", "a server's alone",
        "requests.limits.max_n: it is 0",
    ]),
    ("Parquet as a batch file", batch_file(), ["job.yaml:", "input", "a.parquet is no JSONL"]),
    ("missing key", lambda job: job.pop("output"), ["job.yaml: output: the key is missing"]),
    ("wrong type", top(max_error_rate="2%"), ["max_error_rate", '"2%"', "must be a number"]),
    ("boolean label", task(labels=["red", True]), ["task.labels: item 2", "put the word in quotes"]),
    ("number label", task(labels=["red", 3]), ["task.labels: item 2", "in quotes"]),
    ("one string for a list", top(input="data"), ["input", "must be a list of text"]),
    ("empty section", top(sampling=None), ["sampling", "it is null", "remove the line"]),
    ("unknown kind", task(kind="route"), ["job.yaml:10: task.kind", '"choose", "generate"']),
    ("bad sampling", generate(top_p=2.0), ["sampling.top_p", "it must be in (0, 1]"]),
    ("error rate above one", top(max_error_rate=2), ["max_error_rate", "0 to 1"]),
    ("error rate nan", top(max_error_rate=float("nan")), ["max_error_rate", "0 to 1"]),
    ("no labels", task(labels=[]), ["job.yaml:12: task.labels", "at least one label"]),
    ("labels absent", lambda job: job["task"].pop("labels"), ["task.labels", "at least one label"]),
    ("label twice", task(labels=["red", "red"]), ["task.labels", "'red' stands there 2 times"]),
    ("empty label", task(labels=["red", " "]), ["task.labels", "a label is empty"]),
    ("labels with generate", task(kind="generate"), ["task.labels", "only choose takes it", "remove it"]),
    ("gold scores of choose", task(gold_logprobs=True), ["task.gold_logprobs", "only generate takes it"]),
    (
        "gold scores without gold",
        task(kind="generate", labels=None, gold=None, gold_logprobs=True),
        ["task.gold_logprobs", "nothing to score"],
    ),
    ("sampling with choose", top(sampling={"temperature": 1.0}), ["sampling.temperature", "remove it"]),
    ("logprobs with alternatives", generate(logprobs=5), ["sampling.logprobs", "use 1 or 0"]),
    ("extract without schema", task(kind="extract", labels=None), ["task.schema", "needs a JSON schema"]),
    ("schema that is none", task(kind="extract", labels=None, schema={"type": "objet"}), ["task.schema", "objet"]),
    ("extract n", lambda job: (task(kind="extract", labels=None, schema={"type": "object"})(job),
                               top(sampling={"n": 2})(job)), ["sampling.n", "remove it"]),
    ("neither prompt nor messages", lambda job: job["task"].pop("prompt"), ["task.prompt", "missing"]),
    ("both", task(messages="text"), ["task.messages", "keep one of them"]),
    ("prompt without columns", task(prompt="Hi"), ["task.prompt", "names no column"]),
    ("prompt with stray brace", task(prompt="{text} {"), ["job.yaml:11: task.prompt", "{{ and }}"]),
    ("prompt with attribute", task(prompt="{text.x}"), ["task.prompt", "plain column name"]),
    ("template column absent", task(prompt="{texd}"), ["job.yaml:11: task.prompt", "no column 'texd'", "'text'"]),
    ("key column absent", top(key="idd"), ["job.yaml:6: key", "no column 'idd'", "did you mean 'id'?"]),
    ("carried column absent", top(carry=["day"]), ["job.yaml:7: carry", "no column 'day'", "it has"]),
    ("gold column absent", task(gold="queue"), ["job.yaml:15: task.gold", "no column 'queue'"]),
    ("carried twice", top(carry=["id", "id"]), ["carry", "keep one"]),
    ("carried name taken", lambda job: (generate()(job), top(carry=["text"])(job)), ["carry", "'text'", "leave it"]),
    ("no input", top(input=[]), ["input", "no file is named"]),
    ("input matches nothing", top(input=["nope/*.parquet"]), ["job.yaml:2: input", "nope/*.parquet", "check the path"]),
    ("input of another format", top(input=["job.yaml"]), ["input", "job.yaml", "Parquet nor JSONL"]),
    ("image column", task(image="photo"), ["task.image", "no column 'photo'"]),
    ("image to a text model", task(image="text"), ["model", "Glm4ForCausalLM", "need a GLM-4.1V"]),
    ("image of numbers", task(image="score"), ["task.image", "'score' has type double", "bytes, text"]),
    ("image for tag", task(kind="tag", labels=None, gold=None, image="text"), ["task.image", "this tag task"]),
    ("image and messages", task(prompt=None, messages="text", image="text"), ["task.image", "in the messages"]),
    ("image twice", task(image="text", video="text"), ["task.image", "'text' is named twice"]),
    ("pixels", top(preprocess={"max_pixels": 5000}), ["preprocess.max_pixels", "names no task.image"]),
    ("fps", top(preprocess={"fps": 0.0}), ["preprocess.fps", "above 0"]),
    ("media root", top(media={"root": "nowhere"}), ["media.root", "nowhere: no such directory"]),
    ("media host", top(media={"hosts": ["https://a.org/x"]}), ["media.hosts", "no host name", "images.example.com"]),
    ("vllm", top(engine={"kind": "vllm"}), ["job.yaml:17: engine.kind", "use torch"]),
    ("vllm temperature", with_vllm(temperature=3.0), ["sampling.temperature", "0.01 to 2.0", "engine.kind torch"]),
    ("tensor parallel", top(engine={"tensor_parallel_size": 3}), ["engine.tensor_parallel_size", "2 attention heads",
                                                                  "3 ranks; use 1, 2"]),
    ("no ranks", top(engine={"tensor_parallel_size": 0}), ["engine.tensor_parallel_size", "at least 1"]),
    ("one GPU", top(engine={"tensor_parallel_size": 2, "device": "cuda:1"}), ["engine.device", "2 ranks", "use cuda"]),
    ("device", top(engine={"device": "gpu"}), ["engine.device", "auto, cpu or cuda"]),
    ("context", top(engine={"max_model_len": 129}), ["engine.max_model_len", "at most 128 tokens", "lower it"]),
    ("float16", top(engine={"dtype": "float16"}), ["engine.dtype", "use bfloat16 or float32"]),
    ("input remote", top(input=["gs://bucket/x"]), ["input", "gs://bucket/x", "disks and s3://"]),
    ("storage", top(storage={"anon": True}), ["storage.anon", "no input or output is an s3:// path"]),
    ("replicas", top(engine={"replicas": 0}), ["engine.replicas", "at least 1"]),
    ("no replicas", top(engine={"replicas": [0, 4]}), ["engine.replicas", "it is 0", "at least 1"]),
    ("replicas turned", top(engine={"replicas": [4, 2]}), ["engine.replicas", "[fewest, most]"]),
    ("half a range", top(engine={"replicas": [4]}), ["engine.replicas", "it is [4]", "list of 2 whole numbers"]),
    ("nodes", top(cluster={"nodes": 0}), ["cluster.nodes", "at least 1"]),
    ("GPUs", top(cluster={"gpus": -1}), ["cluster.gpus", "at least 0"]),
    ("unit rows", top(commit={"unit_rows": 0}), ["commit.unit_rows", "at least 1"]),
    ("every seconds", top(commit={"every_seconds": 0}), ["commit.every_seconds", "above 0"]),
    ("thinking with choose", task(thinking=True), ["task.thinking", "only generate takes it"]),
    ("tag through chat", task(kind="tag", labels=None, gold=None, system="S"), ["task.system", "use task.prompt"]),
    ("head cannot", task(kind="classify", labels=None), ["model", "Glm4ForCausalLM", "not classify"]),
    ("output is a file", top(output="job.yaml"), ["job.yaml:5: output", "is a file", "name a directory"]),
    ("output remote", top(output="gs://bucket/x"), ["output", "directories or s3:// prefixes"]),
    ("output is a bucket", top(output="s3://bucket/"), ["output", "s3://bucket/name"]),
    ("model absent", top(model="mdl"), ["job.yaml:1: model: mdl: no such directory", "Hugging Face layout"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_a_bad_job_is_refused_with_place_and_remedy(
    work: Any, change: Change, said: list[str]
) -> None:
    message = refusal(work, change)
    for text in said:
        assert text in message, message


def test_the_good_job_is_good(work: Any) -> None:
    job, place = load_job(work.write_job().name)
    checked = check_job(job, place)
    assert [file.name for file in checked.survey.files] == ["data/a.parquet", "data/b.jsonl"]
    assert checked.schema.field("id").type == pa.int64()


def test_all_problems_are_told_at_once(work: Any) -> None:
    message = refusal(
        work, lambda job: (task(prompt="{texd}")(job), top(carry=["day"], model="mdl")(job))
    )
    assert [line.split(": ")[1] for line in message.splitlines()] == [
        "model",
        "task.prompt",
        "carry",
    ]


# ---- the job file itself


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a job file is a mapping"),
        ("model: [a\nb: c", "job.yaml:2: not valid YAML"),
        ("model: a\nmodel: b\n", "job.yaml:2: model: the key stands twice (first in line 1)"),
        ("task: {kind: choose, kind: tag}\n", "task.kind: the key stands twice"),
        ("model: 2024-01-01\n", "YAML reads 2024-01-01 as a date: put it in quotes"),
    ],
)
def test_a_broken_file_names_the_line(work: Any, text: str, said: str) -> None:
    Path("job.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_job("job.yaml")
    assert said in str(caught.value)


def test_a_missing_or_binary_job_file(work: Any) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: the file cannot be read: No such file"):
        load_job("none.yaml")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_job("binary.yaml")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.knd=echo", "--set engine.knd: unknown key; did you mean engine.kind?"),
        (
            "sampling.max_tokens=many",
            '--set sampling.max_tokens: it is "many", but it must be a whole number',
        ),
        ("sampling.max_tokens", "write it as key=value"),
        ("model.x=1", "model is not a section"),
        ("task.labels=[a", "not valid YAML"),
        ("task.labels=[]", "--set task.labels: choose needs at least one label"),
    ],
)
def test_a_bad_override_is_named(work: Any, override: str, said: str) -> None:
    assert said in refusal(work, lambda job: None, override)


def test_overrides_replace_and_add_keys(work: Any) -> None:
    path = work.write_job()
    job, _ = load_job(
        path.name, ["sampling.seed=7", "task.labels=[a, b]", "key=null", "engine.device=cpu"]
    )
    assert (job.sampling.seed, job.task.labels, job.key) == (7, ["a", "b"], None)
    assert (job.engine.kind, job.engine.device) == ("echo", "cpu")


@pytest.mark.parametrize(
    ("override", "prompt"),
    [
        ("task.prompt={text}?", "{text}?"),
        ("task.prompt={text}", "{text}"),
        ("task.prompt=3 {text}: a=b", "3 {text}: a=b"),
        ('task.prompt="two\\n{text}"', "two\n{text}"),
        ("task.prompt=2024", "2024"),
        ("task.prompt=null", None),
    ],
)
def test_an_override_of_a_text_needs_no_quotes(
    work: Any, override: str, prompt: str | None
) -> None:
    """A prompt's braces once were read as a YAML mapping."""
    job, _ = load_job(work.write_job().name, [override])
    assert job.task.prompt == prompt


# ---- the checkpoint


def test_weights_only_as_pickle_are_refused_with_the_reason(work: Any) -> None:
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    message = refusal(work, top(engine={"kind": "torch"}))
    assert "model: pickled weights (pytorch_model.bin), which are refused" in message
    assert "convert the checkpoint to safetensors" in message


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (lambda data: data[:-3], "not a readable safetensors file"),
        (lambda data: data[:20], "not a readable safetensors file"),
        (lambda data: b"", "not a readable safetensors file"),
        (lambda data: b"\xff" * 64, "not a readable safetensors file"),
    ],
)
def test_broken_weights_are_noticed_by_their_headers(
    work: Any, cut: Callable[[bytes], bytes], said: str
) -> None:
    path = Path("model/model.safetensors")
    path.write_bytes(cut(path.read_bytes()))
    message = refusal(work, top(engine={"kind": "torch"}))
    assert "model/model.safetensors" in message
    assert said in message


def test_a_missing_shard_is_named(work: Any) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    Path("model/model.safetensors").rename("model/model-1.safetensors")
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(work, top(engine={"kind": "torch"}))
    assert "names the shard 'model-2.safetensors', which is not in model; copy it there" in message


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", None, "config.json: no such file"),
        ("config.json", "{", "cannot be read as JSON"),
        ("config.json", '{"architectures": ["LlamaForCausalLM"]}', "'LlamaForCausalLM'"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("chat_template.jinja", None, "no chat template"),
        ("chat_template.jinja", "{% if %}", "chat_template.jinja, line 1"),
    ],
)
def test_an_unreadable_checkpoint_names_the_file(
    work: Any, file: str, content: str | None, said: str
) -> None:
    path = Path("model") / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    message = refusal(work)
    assert message.startswith("job.yaml:1: model: ")
    assert said in message


def test_cuda_is_refused_where_there_is_no_such_device(
    work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("glm_batch.jobs.checks.engine_checks.num_gpus", lambda: 0)
    message = refusal(work, top(engine={"device": "cuda"}))
    assert "engine.device: this machine has no NVIDIA device; use auto or cpu" in message


def test_extract_needs_to_know_how_an_answer_ends(work: Any) -> None:
    work.write_config(eos_token_id=None)
    tokenizer_config = json.loads(Path("model/tokenizer_config.json").read_text())
    Path("model/tokenizer_config.json").write_text(
        json.dumps(tokenizer_config | {"eos_token": None})
    )
    message = refusal(work, task(kind="extract", labels=None, schema={"type": "object"}))
    assert "eos_token_id" in message


def test_labels_that_the_prompt_would_swallow_are_refused(work: Any) -> None:
    """Two labels that differ in nothing the template writes are the same to the model."""
    Path("model/chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    message = refusal(work, task(labels=["red", "red "]))
    assert message.startswith("job.yaml:12: task.labels: ")


# ---- the input


def test_a_truncated_parquet_file_is_named(work: Any) -> None:
    path = Path("data/a.parquet")
    path.write_bytes(path.read_bytes()[:-10])
    message = refusal(work)
    assert message.startswith("job.yaml:2: input: ")
    assert "data/a.parquet" in message


def test_column_types_that_do_not_go_together_are_named(work: Any) -> None:
    table = {"id": [9], "text": [{"a": 1}], "team": ["red"], "score": [0.5]}
    pq.write_table(pa.table(table), "data/c.parquet")
    assert "data/c.parquet" in refusal(work, top(input=["data/*.parquet"]))


# ---- as a process: exit code, time, and what is never loaded

PROCESS_CASES = [
    "unknown key",
    "labels absent",
    "template column absent",
    "model absent",
    "input matches nothing",
]


@pytest.mark.parametrize("name", PROCESS_CASES)
def test_the_command_exits_with_2_at_once_and_loads_nothing_heavy(work: Any, name: str) -> None:
    _, change, said = next(case for case in BAD if case[0] == name)
    path = work.write_job(change)
    done = work.run("label", path.name)
    assert done.code == 2
    assert all(text in done.err for text in said), done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert done.cpu_s < 3.0
    assert "pydantic" in done.imported
    assert not done.imported & {"ray", "torch", "vllm", "transformers"}


def test_plan_refuses_as_label_does(work: Any) -> None:
    done = work.run("plan", work.write_job(top(modle="x")).name)
    assert done.code == 2
    assert "job.yaml:18: modle" in done.err


def test_debug_shows_the_traceback(work: Any) -> None:
    done = work.run("label", work.write_job(top(modle="x")).name, "--debug")
    assert done.code == 2
    assert "Traceback" in done.err
