"""Runs glm-batch's own TorchEngine."""

from __future__ import annotations

from typing import Any

from benchmarks.systems.harness import Answer, FirstResult, Plan, run_system
from benchmarks.workload import OUTPUT_TOKENS, RowSet
from glm_batch.models.engine import (
    Choose,
    Completion,
    EngineConfig,
    Generate,
    Request,
    SamplingParams,
    Work,
    build_engine,
)


class TorchSystem:
    first_result: FirstResult = "ask_alone"

    def __init__(self, plan: Plan) -> None:
        self._config = EngineConfig(
            **{"model": plan.model_dir, "kind": "torch", "dtype": "bfloat16", **plan.options}
        )
        self._engine = build_engine(self._config)

    def run(self, rows: RowSet) -> list[Answer]:
        work = _work(rows)
        self._engine.submit(
            [Request(id=row.id, input_ids=row.input_ids, work=work) for row in rows.rows]
        )
        answers = []
        while self._engine.has_work():
            answers += [_answer(completion) for completion in self._engine.step()]
        return answers

    def settings(self) -> dict[str, Any]:
        import torch

        return {
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "dtype": "bfloat16",
            "max_step_tokens": self._config.max_step_tokens,
            "max_num_seqs": self._config.max_num_seqs,
        }

    def close(self) -> None:
        self._engine.close()


def _work(rows: RowSet) -> Work:
    if rows.work == "choose":
        return Choose(choices=tuple((label_id,) for label_id in rows.label_ids), count_end=False)
    return Generate(sampling=SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True))


def _answer(completion: Completion) -> Answer:
    if completion.error is not None:
        raise completion.error
    return Answer(
        id=completion.id,
        logprobs=list(completion.choice_logprobs or ()),
        token_ids=list(completion.outputs[0].token_ids) if completion.outputs else [],
        cached_tokens=completion.cached_tokens,
    )


if __name__ == "__main__":
    run_system(lambda plan, rows: TorchSystem(plan))
