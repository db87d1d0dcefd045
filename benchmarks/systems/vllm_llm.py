"""Runs vLLM's offline `LLM` on token ids."""

from __future__ import annotations

from typing import Any

import vllm

from benchmarks.systems.harness import Answer, FirstResult, Plan, run_system
from benchmarks.workload import OUTPUT_TOKENS, RowSet

ENGINE_ARGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 4096,
    "enable_prefix_caching": True,
    "disable_log_stats": True,
}


def sampling_args(rows: RowSet) -> dict[str, Any]:
    """SamplingParams' arguments: one token and its labels' log-probabilities, or a fixed number of
    tokens.
    """
    if rows.work == "choose":
        return {
            "temperature": 0.0,
            "max_tokens": 1,
            "logprob_token_ids": rows.label_ids,
            "detokenize": False,
        }
    return {"temperature": 0.0, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}


class VllmSystem:
    first_result: FirstResult = "ask_alone"

    def __init__(self, plan: Plan) -> None:
        self._engine_args = {**ENGINE_ARGS, **plan.options}
        self._llm = vllm.LLM(model=plan.model_dir, **self._engine_args)

    def run(self, rows: RowSet) -> list[Answer]:
        params = vllm.SamplingParams(**sampling_args(rows))
        prompts = [vllm.TokensPrompt(prompt_token_ids=row.input_ids) for row in rows.rows]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            _answer(row.id, output, rows) for row, output in zip(rows.rows, outputs, strict=True)
        ]

    def settings(self) -> dict[str, Any]:
        import torch

        return {"vllm": vllm.__version__, "torch": torch.__version__, **self._engine_args}

    def close(self) -> None:
        shutdown = getattr(self._llm.llm_engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()


def _answer(row_id: str, output: vllm.RequestOutput, rows: RowSet) -> Answer:
    completion = output.outputs[0]
    cached_tokens = output.num_cached_tokens or 0
    if rows.work == "generate":
        return Answer(id=row_id, token_ids=list(completion.token_ids), cached_tokens=cached_tokens)
    assert completion.logprobs is not None
    by_token = completion.logprobs[0]
    return Answer(
        id=row_id,
        logprobs=[by_token[label_id].logprob for label_id in rows.label_ids],
        cached_tokens=cached_tokens,
    )


if __name__ == "__main__":
    run_system(lambda plan, rows: VllmSystem(plan))
