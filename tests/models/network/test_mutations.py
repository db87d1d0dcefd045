"""Deliberate bugs in our networks, each of which must show against transformers: a gate that
nothing can fail is none.

The bugs are those that ports of GLM have had. Each must lie ten times above the gate of the
fidelity tests; only the wrong epsilon, small by nature, need no more than pass it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

import glm_batch.models.network.glm
from glm_batch import models
from glm_batch.models.engine.llm import LLM
from glm_batch.models.network.glm import Backbone, Glm4DecoderLayer
from glm_batch.models.network.layers.rope import RopeTable
from tests.models.conftest import MakeCheckpoint, load_oracle, random_ids

GATE = 5e-5
Mutation = Callable[[LLM, pytest.MonkeyPatch], None]


def backbone_of(llm: LLM) -> Backbone:
    return llm.engine._runner._model.backbone  # type: ignore[attr-defined]


def swap_gate_and_up(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    for layer in backbone_of(llm).layers:
        weight = layer.mlp.gate_up_proj.weight
        weight.copy_(weight.roll(len(weight) // 2, dims=0))


def turn_in_halves(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    """Pairs (j, j + half) instead of (2j, 2j + 1), as most other models turn."""
    rotate_ = glm_batch.models.network.glm.rotate_

    def rotate_halves_(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        order = torch.arange(2 * turns.shape[-1]).view(2, -1).T.flatten()
        x[..., order] = rotate_(x[..., order], turns)
        return x

    patch.setattr(glm_batch.models.network.glm, "rotate_", rotate_halves_)


def turn_all_dimensions(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    rope = replace(llm.config.rope, rotary_dim=llm.config.head_dim)
    backbone_of(llm).rope = RopeTable(rope, device=torch.device("cpu"))


def skip_post_mlp_norm(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Glm4DecoderLayer, "after_mlp", lambda self, x: x)


def swap_attention_norms(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    for layer in backbone_of(llm).layers:
        layer.post_self_attn_layernorm, layer.post_attention_layernorm = (
            layer.post_attention_layernorm,
            layer.post_self_attn_layernorm,
        )


def use_another_epsilon(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    for module in backbone_of(llm).modules():
        if hasattr(module, "eps"):
            assert module.eps == 1e-5
            module.eps = 1e-6


def deal_kv_heads_in_turn(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    """Query head i with kv head i % K instead of i // G."""
    for layer in backbone_of(llm).layers:
        order = (
            torch.arange(llm.config.num_attention_heads)
            .view(-1, llm.config.num_key_value_heads)
            .T.flatten()
        )

        def attend(q, *rest, right=layer.self_attn.attend, order=order):  # type: ignore[no-untyped-def]
            return right(q[:, order], *rest)[:, order.argsort()]

        layer.self_attn.attend = attend


def drop_bias(part: str) -> Mutation:
    def drop(llm: LLM, patch: pytest.MonkeyPatch) -> None:
        for name, view in backbone_of(llm).targets().items():
            if name.endswith(f"{part}_proj.bias"):
                view.zero_()

    return drop


MUTATIONS: dict[str, Mutation] = {
    "gate and up swapped": swap_gate_and_up,
    "half-split rope": turn_in_halves,
    "rope on all dimensions": turn_all_dimensions,
    "kv head i % K": deal_kv_heads_in_turn,
    "no query bias": drop_bias("q"),
    "no key bias": drop_bias("k"),
    "no value bias": drop_bias("v"),
    "epsilon 1e-6 for 1e-5": use_another_epsilon,
}
GLM4_MUTATIONS = {
    "no post_mlp norm": skip_post_mlp_norm,
    "post_self_attn and post_attention norms swapped": swap_attention_norms,
}


@pytest.mark.parametrize(
    ("family", "name"),
    [("glm", name) for name in MUTATIONS] + [("glm4", name) for name in MUTATIONS | GLM4_MUTATIONS],
)
def test_a_bug_shows(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, family: str, name: str
) -> None:
    path = make_checkpoint(family, rms_norm_eps=1e-5)
    ids = random_ids(11, 96)
    with torch.no_grad():
        expected = load_oracle(path)(torch.tensor([ids])).logits[0].numpy()
    llm = models.load(path, kv_cache_tokens=256)
    assert np.abs(llm.logits(ids) - expected).max() < GATE
    llm.engine.scheduler.blocks.forget_all()  # keys and values of the right network
    (MUTATIONS | GLM4_MUTATIONS)[name](llm, monkeypatch)
    delta = float(np.abs(llm.logits(ids) - expected).max())
    assert delta > (GATE if "epsilon" in name else 10 * GATE)
