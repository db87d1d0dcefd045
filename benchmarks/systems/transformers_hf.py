"""Runs transformers: one padded-free batch after another (all prompts have one length), no prefix
cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers

from benchmarks.systems.harness import Answer, FirstResult, Plan, run_system
from benchmarks.workload import OUTPUT_TOKENS, Row, RowSet

BATCH_SIZES = {"choose": 16, "generate": 64}


class TransformersSystem:
    first_result: FirstResult = "ask_alone"

    def __init__(self, plan: Plan) -> None:
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        self._model: Any = load(
            plan.model_dir, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._batch_size = int(plan.options.get("batch_size", BATCH_SIZES[plan.work]))

    @torch.inference_mode()
    def run(self, rows: RowSet) -> list[Answer]:
        answers = []
        for batch in _batches(rows.rows, self._batch_size):
            input_ids = torch.tensor([row.input_ids for row in batch])  # [batch, prompt tokens]
            answers += (
                self._choose(batch, input_ids, rows)
                if rows.work == "choose"
                else self._generate(batch, input_ids)
            )
        return answers

    def _choose(self, batch: list[Row], input_ids: torch.Tensor, rows: RowSet) -> list[Answer]:
        logits = self._model(input_ids=input_ids, logits_to_keep=1, use_cache=False).logits[:, -1]
        logprobs = torch.log_softmax(logits.float(), dim=-1)[:, rows.label_ids]  # [batch, labels]
        return [
            Answer(id=row.id, logprobs=scores)
            for row, scores in zip(batch, logprobs.tolist(), strict=True)
        ]

    def _generate(self, batch: list[Row], input_ids: torch.Tensor) -> list[Answer]:
        output_ids = self._model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            min_new_tokens=OUTPUT_TOKENS,
            max_new_tokens=OUTPUT_TOKENS,
            eos_token_id=None,
        )[:, input_ids.shape[1] :]
        return [
            Answer(id=row.id, token_ids=ids)
            for row, ids in zip(batch, output_ids.tolist(), strict=True)
        ]

    def settings(self) -> dict[str, Any]:
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "batch_size": self._batch_size,
            "attn_implementation": "sdpa",
        }

    def close(self) -> None:
        del self._model


def _batches(rows: list[Row], size: int) -> Iterator[list[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


if __name__ == "__main__":
    run_system(lambda plan, rows: TransformersSystem(plan))
