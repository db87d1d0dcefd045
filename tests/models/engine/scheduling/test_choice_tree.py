"""ChoiceTree against a walk over every label by itself, with a made-up language model."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from glm_batch.models.engine.scheduling.sequence import PROMPT, ChoiceTree

Label = tuple[int, ...]
labels = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple),
    min_size=1,
    max_size=8,
    unique=True,
)


def logprob(before: Label, token: int) -> float:
    """Some number that depends on all of the past."""
    return math.sin(hash((before, token)) % 1000)


def text_at(tree: ChoiceTree, node: int) -> Label:
    return () if node == PROMPT else (*text_at(tree, tree.parents[node]), tree.tokens[node])


@given(labels, st.booleans())
def test_joint_logprobs_equal_label_by_label(choices: list[Label], count_end: bool) -> None:
    tree = ChoiceTree.build(tuple(choices), count_end=count_end)
    edges = {i: logprob(text_at(tree, node), token) for i, (node, token) in enumerate(tree.edges)}
    ends = {node: logprob(text_at(tree, node), -1) for node in tree.ends}
    expected = [
        sum(logprob(choice[:i], token) for i, token in enumerate(choice))
        + (logprob(choice, -1) if count_end else 0)
        for choice in choices
    ]
    np.testing.assert_allclose(tree.label_logprobs(edges, ends), expected)


@given(labels, st.booleans())
def test_every_node_is_computed_once_and_for_a_reason(
    choices: list[Label], count_end: bool
) -> None:
    tree = ChoiceTree.build(tuple(choices), count_end=count_end)
    texts = [text_at(tree, node) for node in range(len(tree.tokens))]
    assert len(set(texts)) == len(texts)
    used = {node for node, _ in tree.edges} | set(tree.ends)
    assert used == {PROMPT, *range(len(tree.tokens))}
    assert [len(text) for text in texts] == list(tree.depths)
    for node, text in enumerate(texts):
        seen = {texts[other] for other in np.flatnonzero(tree.ancestors[node])}
        assert seen == {text[: i + 1] for i in range(len(text))}


def test_single_token_labels_need_no_node() -> None:
    tree = ChoiceTree.build(((5,), (6,)), count_end=False)
    assert tree.tokens == ()
    assert tree.edges == ((PROMPT, 5), (PROMPT, 6))
