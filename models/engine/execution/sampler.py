"""Chooses the next token of every row: penalties, masks, filters, seeded draws, log-probabilities.

The random numbers depend on nothing but a request's seed, the index of the sample and the position
in it. Shapes: R rows, V ids of the tokenizer (the logits may be wider: the embedding is padded), W
candidates of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_batch.models.engine.api.request import SamplingParams, TopLogprob
from glm_batch.models.errors import RowError

# candidates looked at first by top-k, top-p and min-p; rows that need more are sorted whole
WINDOW = 1024
# Bounds of the 64-bit temporaries while rows sample from the whole vocabulary: a CPU's cache (3
# times faster than all rows at once, measured at V = 151,552), a quarter of a GB elsewhere.
_NOISE_ELEMENTS_CPU, _NOISE_ELEMENTS = 1 << 18, 1 << 25
_UINT64 = (1 << 64) - 1
_WEYL = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One row of logits and what its request asks of it. The position in the sample is
    len(output_ids).

    `end_ids` (EOS and stop ids) are forbidden until min_tokens are out; `bitmask` (int32, bit i %
    32 of word i // 32 allows id i) comes from a constraint. `sample_index` tells the n samples of
    one request apart.
    """

    params: SamplingParams
    prompt_ids: Sequence[int] | NDArray[np.integer]
    output_ids: Sequence[int] | NDArray[np.integer]
    sample_index: int = 0
    end_ids: tuple[int, ...] = ()
    bitmask: NDArray[np.int32] | None = None

    @property
    def has_penalties(self) -> bool:
        params = self.params
        return (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """The end ids while the output is too short, unless the constraint allows nothing else."""
        if len(self.output_ids) >= self.params.min_tokens or not self.end_ids:
            return ()
        if self.bitmask is not None and not _without(self.bitmask, self.end_ids).any():
            return ()
        return self.end_ids

    @property
    def is_plain(self) -> bool:
        """True when the answer is the argmax of the logits as they are."""
        return (
            self.params.is_greedy
            and not self.has_penalties
            and self.bitmask is None
            and not self.forbidden_ids
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One entry a row. `logprobs` and `top_logprobs` are natural logarithms of the model's own
    distribution, before any penalty, mask or filter, and None where the request wants none. A row
    in `errors` has no valid token."""

    token_ids: list[int]
    logprobs: list[float | None]
    top_logprobs: list[tuple[TopLogprob, ...] | None]
    errors: dict[int, RowError]


def sample(logits: Tensor, rows: Sequence[SampleRow], *, vocab_size: int) -> Sampled:
    """Chooses a token for each row of logits [R, >= vocab_size]; ids from vocab_size on are never
    chosen.

    The order: penalties, end ids, constraint, temperature, min-p, top-k, top-p, then the Gumbel-max
    draw.
    """
    assert logits.shape[0] == len(rows), (
        f"{logits.shape[0]} rows of logits for {len(rows)} requests"
    )
    logits = logits.float()
    known = logits[:, :vocab_size]  # [R, V]
    chosen = known.argmax(-1)
    best = known.gather(1, chosen[:, None])[:, 0]
    other = [i for i, row in enumerate(rows) if not row.is_plain]
    if other:
        index = torch.tensor(other, device=logits.device)
        chosen[index], best[index] = _choose(known[index], [rows[i] for i in other])
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs]
    logprobs, top_logprobs = _logprobs(logits, chosen, rows, wanted, vocab_size)
    # One transfer for both: a device waits for each. float64 holds every id exactly.
    token_ids, scores = torch.stack((chosen.double(), best.double())).cpu().numpy()
    return Sampled(
        token_ids=token_ids.astype(np.int64).tolist(),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        errors={int(i): _row_error(float(scores[i])) for i in np.flatnonzero(~np.isfinite(scores))},
    )


def noise_key(seed: int, sample_index: int, position: int) -> int:
    """A 64-bit key (as a signed integer) of the random numbers of one output position."""
    key = 0
    for value in (seed, sample_index, position):
        key = _mix_int((key + value * _WEYL + _WEYL) & _UINT64)
    return key - (1 << 64) if key >> 63 else key


def exponential_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard exponential numbers, float64 [R, W], for keys int64 [R] and token ids int64 [R, W]
    or [W].

    A counter-based generator (SplitMix64: Steele, Lea, Flood 2014): the same on every device and in
    every batch.
    """
    bits = ids * _signed(_WEYL) + keys[:, None]
    bits = (bits ^ _shift(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift(bits, 27)) * _signed(0x94D049BB133111EB)
    bits = bits ^ _shift(bits, 31)
    uniform = (_shift(bits, 12).double() + 0.5) * 2.0**-52  # in (0, 1), both ends excluded, exact
    return -torch.log1p(-uniform)


def _choose(logits: Tensor, rows: list[SampleRow]) -> tuple[Tensor, Tensor]:
    """(token ids [R], their changed logits [R]) for logits [R, V], which it may change."""
    _apply_penalties(logits, rows)
    _forbid(logits, rows)
    _apply_bitmasks(logits, rows)
    chosen = logits.argmax(-1)
    filtered = [
        i
        for i, row in enumerate(rows)
        if not row.params.is_greedy and _filters(row.params, logits.shape[1])
    ]
    unfiltered = [
        i
        for i, row in enumerate(rows)
        if not row.params.is_greedy and not _filters(row.params, logits.shape[1])
    ]
    if filtered:
        chosen[filtered] = _sample_filtered(logits, rows, filtered)
    step = max(
        1,
        (_NOISE_ELEMENTS_CPU if logits.device.type == "cpu" else _NOISE_ELEMENTS)
        // logits.shape[1],
    )
    for start in range(0, len(unfiltered), step):
        part = unfiltered[start : start + step]
        chosen[part] = _sample_all(logits[part], [rows[i] for i in part])
    return chosen, logits.gather(1, chosen[:, None])[:, 0]


def _apply_penalties(logits: Tensor, rows: list[SampleRow]) -> None:
    """Repetition (Keskar et al. 2019) over prompt and output, the others over the output."""
    row_of, id_of, divide, subtract = [], [], [], []
    for index, row in enumerate(rows):
        if row.has_penalties:
            params = row.params
            output, counts = np.unique(_ids(row.output_ids, logits.shape[1]), return_counts=True)
            seen = np.union1d(_ids(row.prompt_ids, logits.shape[1]), output)
            less = np.zeros(len(seen), np.float32)
            less[np.searchsorted(seen, output)] = (
                params.presence_penalty + params.frequency_penalty * counts
            )
            row_of.append(np.full(len(seen), index))
            id_of.append(seen)
            divide.append(np.full(len(seen), params.repetition_penalty, np.float32))
            subtract.append(less)
    if row_of:
        where = (_tensor(row_of, logits), _tensor(id_of, logits))
        by = _tensor(divide, logits)
        value = logits[where]
        logits[where] = torch.where(value > 0, value / by, value * by) - _tensor(subtract, logits)


def _forbid(logits: Tensor, rows: list[SampleRow]) -> None:
    pairs = [
        (index, id)
        for index, row in enumerate(rows)
        for id in row.forbidden_ids
        if id < logits.shape[1]
    ]
    if pairs:
        where = torch.tensor(pairs, device=logits.device)
        logits[where[:, 0], where[:, 1]] = -math.inf


def _apply_bitmasks(logits: Tensor, rows: list[SampleRow]) -> None:
    masks = [(index, row.bitmask) for index, row in enumerate(rows) if row.bitmask is not None]
    if not masks:
        return
    # [masks, words]
    words = torch.from_numpy(np.stack([mask for _, mask in masks])).to(logits.device)
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
    allowed = bits.flatten(1)[:, : logits.shape[1]].bool()
    assert allowed.shape[1] == logits.shape[1], "a bitmask is narrower than the vocabulary"
    index = torch.tensor([index for index, _ in masks], device=logits.device)
    logits[index] = logits[index].masked_fill(~allowed, -math.inf)


def _sample_all(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """Draws from softmax(logits / temperature) over all V ids."""
    scaled = logits.double() / _column([row.params.temperature for row in rows], logits)
    ids = torch.arange(logits.shape[1], device=logits.device)
    return _gumbel_argmax(scaled, ids, rows)


def _sample_filtered(logits: Tensor, rows: list[SampleRow], which: list[int]) -> Tensor:
    """Draws from what the filters leave of each row in `which`.

    The window decides for a row when all that the filters leave lies inside it; whether it does
    depends on that row alone, so that a draw never depends on the rest of the batch.
    """
    chosen, complete = _sample_window(logits[which], [rows[i] for i in which], WINDOW)
    rest = (~complete).nonzero()[:, 0].tolist()
    if rest:
        again = [which[i] for i in rest]
        chosen[rest] = _sample_window(logits[again], [rows[i] for i in again], logits.shape[1])[0]
    return chosen


def _sample_window(logits: Tensor, rows: list[SampleRow], width: int) -> tuple[Tensor, Tensor]:
    """(ids [R], complete [R]) from the `width` largest logits of each row."""
    vocab_size = logits.shape[1]
    values, ids = logits.topk(min(width, vocab_size))  # [R, W] descending
    temperature = _column([row.params.temperature for row in rows], logits)
    scaled = values.double() / temperature
    kept, hidden = _keep_top(scaled, [row.params for row in rows], vocab_size)
    limited = torch.tensor(
        [_limits_count(row.params, vocab_size) for row in rows], device=logits.device
    )
    mass = scaled.masked_fill(~kept, -math.inf).logsumexp(-1, keepdim=True)
    if width < vocab_size and not all(_limits_count(row.params, vocab_size) for row in rows):
        mass = torch.where(hidden[:, None], _log_sum_exp(logits, values[:, :1], temperature), mass)
    probabilities = (scaled - mass).exp()
    before = probabilities.cumsum(-1) - probabilities  # the mass of all that are likelier
    top_p = _column(
        [row.params.top_p if row.params.top_p < 1.0 else math.inf for row in rows], logits
    )
    kept &= before < top_p
    complete = ~(hidden & (limited | kept[:, -1]))
    choice = _gumbel_argmax(scaled.masked_fill(~kept, -math.inf), ids, rows)
    return ids.gather(1, choice[:, None])[:, 0], complete


def _keep_top(
    scaled: Tensor, params: list[SamplingParams], vocab_size: int
) -> tuple[Tensor, Tensor]:
    """What min-p and top-k keep of descending scores [R, W], and the rows of which ids beyond W
    might be kept too.

    Ties with the last one kept are kept. Min-p: Nguyen et al. 2024.
    """
    device, width = scaled.device, scaled.shape[1]
    distance = [math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params]
    threshold = scaled[:, :1] + torch.tensor(distance, dtype=torch.float64, device=device)[:, None]
    last = torch.tensor([min(p.top_k or width, width) - 1 for p in params], device=device)[:, None]
    kept = (scaled >= threshold) & (scaled >= scaled.gather(1, last))
    return kept, kept[:, -1] & (width < vocab_size)


def _log_sum_exp(logits: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    """log sum exp(logits / temperature) over all V ids, float64 [R, 1], summed in float32."""
    sums = ((logits - largest) / temperature.float()).exp().sum(-1, keepdim=True)
    return largest.double() / temperature + sums.double().log()


def _gumbel_argmax(scaled: Tensor, ids: Tensor, rows: list[SampleRow]) -> Tensor:
    """Indices [R] into scaled [R, W], drawn from its softmax (Gumbel-max)."""
    keys = [noise_key(row.params.seed, row.sample_index, len(row.output_ids)) for row in rows]
    noise = exponential_noise(torch.tensor(keys, dtype=torch.int64, device=scaled.device), ids)
    return (scaled - noise.log()).argmax(-1)


def _logprobs(
    logits: Tensor, chosen: Tensor, rows: Sequence[SampleRow], wanted: list[int], vocab_size: int
) -> tuple[list[float | None], list[tuple[TopLogprob, ...] | None]]:
    logprobs: list[float | None] = [None] * len(rows)
    top_logprobs: list[tuple[TopLogprob, ...] | None] = [None] * len(rows)
    if wanted:
        raw = logits[wanted]
        # over the padding too: the model gives it probability
        total = raw.logsumexp(-1, keepdim=True)
        width = min(max(rows[i].params.logprobs for i in wanted), vocab_size)
        values, ids = raw[:, :vocab_size].topk(width)
        own = (raw.gather(1, chosen[wanted][:, None]) - total)[:, 0].tolist()
        for i, logprob, some, those in zip(
            wanted, own, (values - total).tolist(), ids.tolist(), strict=True
        ):
            logprobs[i] = logprob
            pairs = list(zip(those, some, strict=True))[: rows[i].params.logprobs]
            top_logprobs[i] = tuple(TopLogprob(token_id=id, logprob=value) for id, value in pairs)
    return logprobs, top_logprobs


def _row_error(logit: float) -> RowError:
    if logit == -math.inf:
        return RowError(
            "no_token",
            "the constraint and the other settings of this request leave no token to choose",
        )
    return RowError(
        "not_finite", f"the model's logits hold {logit}; use a wider dtype, such as float32"
    )


def _limits_count(params: SamplingParams, vocab_size: int) -> bool:
    return params.min_p > 0.0 or 0 < params.top_k < vocab_size


def _filters(params: SamplingParams, vocab_size: int) -> bool:
    return params.top_p < 1.0 or _limits_count(params, vocab_size)


def _ids(ids: Sequence[int] | NDArray[np.integer], vocab_size: int) -> NDArray[np.int64]:
    array = np.asarray(ids, np.int64)
    return array[array < vocab_size]


def _tensor(parts: Sequence[NDArray[np.generic]], like: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(like.device)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _without(bitmask: NDArray[np.int32], ids: tuple[int, ...]) -> NDArray[np.uint32]:
    rest = bitmask.view(np.uint32).copy()
    for id in ids:
        if id // 32 < len(rest):
            rest[id // 32] &= ~np.uint32(1 << id % 32)
    return rest


def _mix_int(bits: int) -> int:
    bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & _UINT64
    bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & _UINT64
    return bits ^ bits >> 31


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical right shift: torch's own repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
