"""Runner: one rank's forward pass. Arrays of a Batch in, the numbers that somebody wants out."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.request import PromptScores
from glm_batch.models.engine.execution.batch import Batch, Group
from glm_batch.models.engine.execution.media_encoder import MediaEncoder
from glm_batch.models.engine.execution.settings import KVCache
from glm_batch.models.engine.works.readout import (
    NOTHING,
    Floats,
    Ints,
    Ranking,
    Readout,
    StepOutput,
)
from glm_batch.models.network.glm import MediaRows
from glm_batch.models.network.heads import CausalLMHead
from glm_batch.models.network.layers.attention import AttentionBatch, AttentionGroup, AttentionPart
from glm_batch.models.network.registry import Model

# vocabulary logits of this many rows at a time, so that they never fill the memory
LOGIT_ROWS = 256


class Runner(Protocol):
    """Runs steps, on one rank or on several."""

    config: ModelConfig

    def run(self, batch: Batch) -> StepOutput:
        """One forward pass. What it raises for want of memory leaves it able to run a smaller
        batch.

        Raises EngineError when the device cannot go on.
        """
        ...

    def free_memory(self) -> None:
        """Lets go of what can be computed again."""
        ...

    def close(self) -> None:
        """Ends what other processes do for it."""
        ...


class TorchRunner:
    """The runner of one process, which has the whole model or is one rank of several: see
    models.engine.execution.ranks.

    `encoder` is None where the model reads nothing but text.
    """

    def __init__(
        self, model: Model, *, num_slots: int, encoder: MediaEncoder | None = None
    ) -> None:
        self.config = model.config
        self.encoder = encoder
        self._model = model
        self._cache = KVCache(
            model.config, model.num_kv_heads, num_slots, dtype=model.dtype, device=model.device
        )

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepOutput:
        hidden, readout = self._hidden(batch), batch.readout
        return StepOutput(
            sample_logits=self._head(hidden, readout.sample),
            pair_logprobs=self._pair_logprobs(hidden, readout),
            head=self._head_rows(hidden, readout.head),
            hidden=self._hidden_rows(hidden, readout.hidden),
            scores=self._scores(hidden, readout.ranking) if readout.ranking else None,
        )

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """Hidden states of the wanted rows [W, hidden_size]."""
        hidden: torch.Tensor = self._model.backbone(
            self._tensor(batch.input_ids),
            self._tensor(batch.positions),
            int(batch.positions.max()),
            self._cache.pages,
            self._attention(batch),
            self._media(batch),
        )
        return hidden

    def free_memory(self) -> None:
        if self.encoder:
            self.encoder.forget()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Nothing: it is alone."""

    def _media(self, batch: Batch) -> MediaRows | None:
        """Every item of the step encoded or found, and the features that its rows take."""
        if not batch.media:
            return None
        assert self.encoder is not None, "media are refused where there is no vision tower"
        features = self.encoder.features(span.item for span in batch.media)
        taken = [
            features[span.item.key][span.first : span.first + span.end - span.start]
            for span in batch.media
        ]
        rows = np.concatenate(
            [np.arange(span.start, span.end, dtype=np.int64) for span in batch.media]
        )
        return MediaRows(rows=self._tensor(rows), features=torch.cat(taken))

    def _head(self, hidden: torch.Tensor, rows: Ints) -> torch.Tensor:
        if not len(rows):
            return hidden.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        return self._model.head(hidden[self._tensor(rows)])  # type: ignore[no-any-return]

    def _pair_logprobs(self, hidden: torch.Tensor, readout: Readout) -> list[float]:
        """log P(token) of each pair; a few numbers leave the device, not the logits."""
        found = np.empty(len(readout.pair_rows), dtype=np.float32)
        scored, number = np.unique(readout.pair_rows, return_inverse=True)
        for start in range(0, len(scored), LOGIT_ROWS):
            assert isinstance(self._model.head, CausalLMHead), (
                "choices are refused where there is another head"
            )
            here = (number >= start) & (number < start + LOGIT_ROWS)
            found[here] = (
                self._model.head.pair_logprobs(
                    hidden[self._tensor(scored[start : start + LOGIT_ROWS])],
                    self._tensor(number[here] - start),
                    self._tensor(readout.pair_tokens[here]),
                )
                .cpu()
                .numpy()
            )
        return found.tolist()

    def _scores(self, hidden: torch.Tensor, ranking: Ranking) -> PromptScores:
        """Of whole prompts, slice by slice; of ranks that share a vocabulary, rank 0 has them."""
        slices = [
            self._scored(hidden, ranking, slice(start, start + LOGIT_ROWS))
            for start in range(0, len(ranking.rows), LOGIT_ROWS)
        ]
        return PromptScores(
            logprobs=np.concatenate([found.logprobs for found in slices]),
            top_ids=np.concatenate([found.top_ids for found in slices]),
            top_logprobs=np.concatenate([found.top_logprobs for found in slices]),
        )

    def _scored(self, hidden: torch.Tensor, ranking: Ranking, part: slice) -> PromptScores:
        logits = self._head(hidden, ranking.rows[part])
        top = min(ranking.top, ranking.num_ids) if logits.shape[1] else 0
        values, ids = logits[:, : ranking.num_ids].topk(top)
        if logits.shape[1]:
            # over the padding too: the model gives it probability
            total = logits.logsumexp(-1, keepdim=True)
            own = logits.gather(1, self._tensor(ranking.tokens[part])[:, None]) - total
            values = values - total  # as `own`: the likeliest token's two numbers are the same
        else:
            own = logits
        return PromptScores(
            logprobs=own.flatten().cpu().numpy(),
            top_ids=ids.cpu().numpy(),
            top_logprobs=values.cpu().numpy(),
        )

    def _head_rows(self, hidden: torch.Tensor, rows: Ints) -> Floats:
        """Vocabulary logits piece by piece, class logits at once."""
        is_wide = isinstance(self._model.head, CausalLMHead)
        step = LOGIT_ROWS if is_wide else max(len(rows), 1)
        pieces = [
            self._head(hidden, rows[start : start + step]).cpu()
            for start in range(0, len(rows), step)
        ]
        return torch.cat(pieces).numpy() if pieces else NOTHING

    def _hidden_rows(self, hidden: torch.Tensor, rows: Ints) -> Floats:
        return hidden[self._tensor(rows)].float().cpu().numpy() if len(rows) else NOTHING

    def _attention(self, batch: Batch) -> AttentionBatch:
        groups = tuple(map(self._group, batch.groups))
        same = batch.out_groups is batch.groups
        return AttentionBatch(
            slots=self._tensor(batch.slots),
            groups=groups,
            out_rows=self._tensor(batch.out_rows),
            out_groups=groups if same else tuple(map(self._group, batch.out_groups)),
        )

    def _group(self, group: Group) -> AttentionGroup:
        parts = tuple(
            AttentionPart(
                rows=self._tensor(part.rows),
                keep=None if part.keep is None else self._tensor(part.keep),
                own_slots=self._tensor(part.own_slots),
                bias=self._bias(part.masked),
                span=_span(part.rows),
            )
            for part in group.parts
        )
        return AttentionGroup(prefix_slots=self._tensor(group.prefix_slots), parts=parts)

    def _bias(self, masked: NDArray[np.bool_]) -> torch.Tensor:
        """masked [R, n, L] -> [R, n * G, B]: the last columns, from the first that is masked on."""
        columns = np.flatnonzero(masked.any(axis=(0, 1)))
        first = int(columns[0]) if len(columns) else masked.shape[2]
        tail = self._tensor(masked[:, :, first:])
        bias = torch.zeros(tail.shape, device=tail.device).masked_fill_(tail, float("-inf"))
        return bias.repeat_interleave(self._model.num_heads // self._model.num_kv_heads, dim=1)

    def _tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._model.device)


def _span(rows: Ints) -> slice | None:
    """The rows of a single sequence as a slice, where they are neighbours."""
    first, last = int(rows[0, 0]), int(rows[0, -1])
    return slice(first, last + 1) if len(rows) == 1 and last - first == rows.shape[1] - 1 else None
