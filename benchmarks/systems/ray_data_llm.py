"""Runs ray.data.llm: chat messages in, vLLM inside, with Ray's own template, tokenizer and
detokenizer stages.

A processor starts its engine with every dataset it is given, so only the whole (process start to
last answer) is measured, never a steady state.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from benchmarks.systems.harness import Answer, FirstResult, Plan, run_system
from benchmarks.workload import OUTPUT_TOKENS, RowSet

LOGICAL_CPUS = 8  # the stages' actors need more logical CPUs than a small machine has cores
ENGINE_ARGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 4096,
    "enable_prefix_caching": True,
    "distributed_executor_backend": "mp",
}


class RayDataLlmSystem:
    first_result: FirstResult = "streamed"

    def __init__(self, plan: Plan, rows: RowSet) -> None:
        ray.init(
            num_cpus=LOGICAL_CPUS,
            include_dashboard=False,
            object_store_memory=300_000_000,
            log_to_driver=True,
        )
        self._batch_size = int(plan.options.get("batch_size", 64))
        self._rows = rows
        config = vLLMEngineProcessorConfig(
            model_source=plan.model_dir,
            engine_kwargs=_engine_args(rows),
            placement_group_config={"bundles": [{"CPU": 1}]},
            concurrency=1,
            batch_size=self._batch_size,
            max_concurrent_batches=8,
            # vLLM 0.32 does not find Ray's metrics classes and would not start
            log_engine_metrics=False,
            prepare_multimodal_stage=rows.work == "images",
        )
        self._processor = build_processor(
            config, preprocess=self._preprocess(), postprocess=_postprocess
        )

    def _preprocess(self) -> Any:
        sampling = _sampling_args(self._rows)
        instruction, images = self._rows.instruction, self._rows.work == "images"

        def preprocess(row: dict[str, Any]) -> dict[str, Any]:
            content = _with_image(row["text"], instruction) if images else instruction + row["text"]
            messages = [{"role": "user", "content": content}]
            return {"id": row["id"], "messages": messages, "sampling_params": sampling}

        return preprocess

    def run(self, rows: RowSet) -> Iterator[Answer]:
        table = ray.data.from_items([{"id": row.id, "text": row.text} for row in rows.rows])
        wanted = len(rows.rows[0].input_ids)
        for row in self._processor(table).iter_rows():
            if wanted and row["num_input_tokens"] != wanted:
                raise RuntimeError(
                    f"{row['id']}: Ray's stages made {row['num_input_tokens']} prompt "
                    f"tokens, not {wanted}"
                )
            if rows.work == "generate":
                yield Answer(
                    id=row["id"], token_ids=[int(token_id) for token_id in row["generated_tokens"]]
                )
            else:
                yield Answer(
                    id=row["id"], logprobs=_label_logprobs(row["logprobs"], rows.label_ids)
                )

    def settings(self) -> dict[str, Any]:
        import vllm

        return {
            "ray": ray.__version__,
            "vllm": vllm.__version__,
            "num_cpus": LOGICAL_CPUS,
            "batch_size": self._batch_size,
            "max_concurrent_batches": 8,
            **ENGINE_ARGS,
        }

    def close(self) -> None:
        ray.shutdown()


def _sampling_args(rows: RowSet) -> dict[str, Any]:
    if rows.work != "generate":
        return {"temperature": 0.0, "max_tokens": 1, "logprob_token_ids": rows.label_ids}
    return {"temperature": 0.0, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}


def _engine_args(rows: RowSet) -> dict[str, Any]:
    return ENGINE_ARGS | (
        {"limit_mm_per_prompt": {"image": 1, "video": 0}} if rows.work == "images" else {}
    )


def _with_image(path: str, question: str) -> list[dict[str, Any]]:
    data = base64.b64encode(Path(path).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
    return [image, {"type": "text", "text": question}]


def _postprocess(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: row.get(name) for name in ("id", "num_input_tokens", "generated_tokens", "logprobs")
    }


def _label_logprobs(positions: Any, label_ids: list[int]) -> list[float]:
    """Ray writes one mapping from token id to its values for each output position; Arrow makes the
    keys strings.
    """
    by_token = {
        int(token_id): values
        for token_id, values in dict(positions[0]).items()
        if values is not None
    }
    return [float(by_token[label_id]["logprob"]) for label_id in label_ids]


if __name__ == "__main__":
    run_system(RayDataLlmSystem)
