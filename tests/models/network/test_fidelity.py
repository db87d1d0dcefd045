"""Our networks against transformers' on the same random weights, through the engine's own paged
path.

Gates: float32 logits and hidden states 5e-5 absolute plus 1e-4 relative; everything discrete
exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glm_batch import models
from tests.models.conftest import FAMILIES, SHAPES, MakeCheckpoint, load_oracle, random_ids

ATOL, RTOL = 5e-5, 1e-4


def assert_close(ours: Any, theirs: torch.Tensor) -> None:
    np.testing.assert_allclose(
        np.asarray(ours), theirs.detach().float().numpy(), atol=ATOL, rtol=RTOL
    )


def oracle_logits(path: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return load_oracle(path)(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(
    make_checkpoint: MakeCheckpoint, family: str, shape: str
) -> None:
    path = make_checkpoint(family, shape)
    ids = random_ids(1, 200)
    assert_close(models.load(path).logits(ids), oracle_logits(path, ids))


@pytest.mark.parametrize("max_step_tokens", [7, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_equals_transformers(
    make_checkpoint: MakeCheckpoint, family: str, max_step_tokens: int
) -> None:
    path = make_checkpoint(family)
    ids = random_ids(2, 150)
    assert_close(
        models.load(path, max_step_tokens=max_step_tokens).logits(ids), oracle_logits(path, ids)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_transformers(make_checkpoint: MakeCheckpoint, family: str) -> None:
    path = make_checkpoint(family)
    ids = random_ids(3, 90)
    with torch.no_grad():
        hidden = load_oracle(path).model(torch.tensor([ids])).last_hidden_state[0]
    assert_close(models.load(path).hidden_states(ids), hidden)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(
    make_checkpoint: MakeCheckpoint, family: str, shape: str
) -> None:
    path = make_checkpoint(family, shape)
    ids = random_ids(4, 60)
    theirs = load_oracle(path).generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, 60),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
    )[0, 60:]
    # Ids beyond the tokenizer's are never sampled by us; the oracle is only comparable while it
    # avoids them too.
    llm = models.load(path)
    llm.tokenizer.vocab_size = llm.config.vocab_size
    (ours,) = llm.generate(ids, max_tokens=40, ignore_eos=True)
    assert list(ours.token_ids) == theirs.tolist()


ROPE_CASES = {
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5,
             "original_max_position_embeddings": 128},
    "yarn_tuned": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 5e6, "partial_rotary_factor": 0.5,
                   "original_max_position_embeddings": 64, "beta_fast": 16, "beta_slow": 2, "truncate": False,
                   "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn_attention_factor": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                              "original_max_position_embeddings": 64, "attention_factor": 1.3},
}  # fmt: skip


@pytest.mark.parametrize("case", ROPE_CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rope_scaling_equals_transformers(
    make_checkpoint: MakeCheckpoint, family: str, case: str
) -> None:
    path = make_checkpoint(family, rope_parameters=ROPE_CASES[case])
    ids = random_ids(5, 300)
    assert_close(models.load(path).logits(ids), oracle_logits(path, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_within_rounding_of_float32(
    make_checkpoint: MakeCheckpoint, family: str
) -> None:
    """bfloat16 has 8 bits: 3 % relative RMS to the float32 oracle, and no worse than transformers
    in bfloat16.
    """
    path = make_checkpoint(family)
    ids = random_ids(6, 128)
    exact = oracle_logits(path, ids).numpy()
    ours = models.load(path, dtype="bfloat16").logits(ids)
    with torch.no_grad():
        theirs = load_oracle(path, torch.bfloat16)(torch.tensor([ids])).logits[0].float().numpy()

    def relative_rms(found: np.ndarray) -> float:
        return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))

    assert relative_rms(ours) < 0.03
    assert relative_rms(ours) < 1.25 * relative_rms(theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequence_classification_equals_transformers(
    make_checkpoint: MakeCheckpoint, family: str
) -> None:
    path = make_checkpoint(family, head="ForSequenceClassification", num_labels=5)
    llm, oracle = models.load(path), load_oracle(path)
    pad = 256
    # Padding right, a pad id in the middle, and nothing but padding: the last token that is no pad
    # is pooled.
    for ids in (
        random_ids(7, 50),
        [*random_ids(8, 20), pad, pad],
        [5, 6, pad, 7, pad, pad],
        [pad, pad, pad],
    ):
        with torch.no_grad():
            theirs = oracle(torch.tensor([ids])).logits[0]
        logits = np.log(list(llm.classify(ids).values()))
        assert_close(logits - logits.mean(), theirs - theirs.mean())


def test_classification_scores_by_problem_type(make_checkpoint: MakeCheckpoint) -> None:
    ids = random_ids(9, 30)
    for problem_type, num_labels in (("multi_label_classification", 3), ("regression", 1)):
        path = make_checkpoint(
            "glm4",
            head="ForSequenceClassification",
            num_labels=num_labels,
            problem_type=problem_type,
        )
        with torch.no_grad():
            theirs = load_oracle(path)(torch.tensor([ids])).logits[0]
        expected = theirs.sigmoid() if num_labels > 1 else theirs
        assert_close(list(models.load(path).classify(ids).values()), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_token_classification_equals_transformers(
    make_checkpoint: MakeCheckpoint, family: str, bias: bool
) -> None:
    path = make_checkpoint(
        family, head="ForTokenClassification", num_labels=4, token_classification_bias=bias
    )
    text = "Zürich 你好 ok"
    llm = models.load(path)
    ids = llm.tokenizer.encode_raw(text)
    with torch.no_grad():
        theirs = load_oracle(path)(torch.tensor([ids])).logits[0].softmax(-1)
    tags = llm.tag(text)
    assert [tag.label for tag in tags] == [f"LABEL_{i}" for i in theirs.argmax(-1).tolist()]
    assert_close([tag.score for tag in tags], theirs.max(-1).values)
    # ü is two bytes, one character
    assert [(tag.start, tag.end) for tag in tags[:3]] == [(0, 1), (1, 2), (1, 2)]
    assert all(tag.text == text[tag.start : tag.end] for tag in tags)


def test_embeddings_are_last_or_mean_hidden_states(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint("glm")
    llm = models.load(path, max_step_tokens=16)
    ids = random_ids(10, 70)
    hidden = llm.hidden_states(ids).astype(np.float64)
    np.testing.assert_allclose(llm.embed(ids), hidden[-1], atol=ATOL)
    np.testing.assert_allclose(llm.embed(ids, pooling="mean"), hidden.mean(0), atol=ATOL)
    mean = hidden.mean(0)
    np.testing.assert_allclose(
        llm.embed(ids, pooling="mean", normalize=True), mean / np.linalg.norm(mean), atol=ATOL
    )
