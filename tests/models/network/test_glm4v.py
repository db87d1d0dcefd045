"""GLM-4.1V against transformers on random tiny checkpoints: vision features, logits, positions,
folding, mutations.

Gates: logits 1e-4, vision features 2e-5 (absolute), both in float32 on the CPU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from glm_batch import models
from glm_batch.models.checkpoint.media_config import (
    ImageProcessorConfig,
    Normalization,
    VideoProcessorConfig,
)
from glm_batch.models.engine import Classify, Completion, Inspect, Request
from glm_batch.models.engine.llm import LLM
from glm_batch.models.errors import ConfigError
from glm_batch.models.network import vision as glm4v_vision
from glm_batch.models.network.layers.rope import axis_of_pair
from glm_batch.models.network.registry import build_model
from glm_batch.models.network.vision import VisionTower
from tests.models.conftest import random_ids
from tests.models.media_cases import (
    NORMALIZATION,
    MakeGlm4v,
    Part,
    Prompt,
    load_glm4v,
    make_glm4v,
    make_item,
    make_prompt,
    oracle_features,
    oracle_hidden,
    oracle_logits,
    pixel_values,
)

__all__ = ["make_glm4v"]  # a fixture

LOGITS, FEATURES = 1e-4, 2e-5
CPU = torch.device("cpu")
MIXED: list[Part] = [5, (1, 4, 6), 3, [(3, 4, 4)], 4, (1, 8, 2), 7]
PROMPTS: dict[str, list[Part]] = {
    "text": [60],
    "an image": [4, (1, 6, 4), 6],
    "images of several grids": [(1, 2, 2), 1, (1, 12, 2), (1, 4, 10), 5],
    "a video": [3, [(4, 6, 4)], 9],
    "images and videos": MIXED,
}


def tower_of(path: Path) -> VisionTower:
    vision = build_model(path, dtype=torch.float32, device=CPU).vision
    assert vision is not None
    return vision


def load(path: Path, **engine: Any) -> LLM:
    return models.load(path, **({"kv_cache_tokens": 1024} | engine))


def run(llm: LLM, prompt: Prompt, work: Any = None) -> Completion:
    request = Request(id="r", input_ids=prompt.ids, work=work or Inspect(), media=prompt.media)
    return llm.run([request])[0]


def logits_of(llm: LLM, prompt: Prompt) -> np.ndarray:
    array = run(llm, prompt).array
    assert array is not None
    return array


# Vision features

GRIDS = [(1, 6, 6), (1, 12, 6), (3, 6, 18), (1, 6, 12), (2, 6, 18)]


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize(
    "change", [{}, {"num_heads": 4, "attention_bias": True}, {"image_size": 90, "depth": 1}]
)
def test_features_equal_transformers(
    make_glm4v: MakeGlm4v, merge: int, change: dict[str, Any]
) -> None:
    path = make_glm4v(vision={"spatial_merge_size": merge} | change)
    tower, oracle = tower_of(path), load_glm4v(path)
    items = [
        make_item(i, grid, "video" if grid[0] > 1 else "image") for i, grid in enumerate(GRIDS)
    ]
    expected = torch.cat([oracle_features(oracle, item) for item in items])
    with torch.inference_mode():
        normalised = tower(torch.cat([pixel_values(item) for item in items]), GRIDS)
        folded = tower.forward_uint8([torch.from_numpy(item.patches) for item in items], GRIDS)
    torch.testing.assert_close(normalised, expected, atol=FEATURES, rtol=0)
    torch.testing.assert_close(folded, expected, atol=FEATURES, rtol=0)


def test_the_published_patch_size_equals_transformers(make_glm4v: MakeGlm4v) -> None:
    path = make_glm4v(vision={"patch_size": 14, "image_size": 336})
    item = make_item(0, (1, 34, 46), patch=14)
    with torch.inference_mode():
        found = tower_of(path).forward_uint8([torch.from_numpy(item.patches)], [item.grid_thw])
    torch.testing.assert_close(
        found, oracle_features(load_glm4v(path), item), atol=FEATURES, rtol=0
    )


def test_packed_equals_one_at_a_time_and_a_video_its_frames(make_glm4v: MakeGlm4v) -> None:
    tower = tower_of(make_glm4v())
    items = [make_item(i, grid, "video") for i, grid in enumerate(GRIDS)]
    with torch.inference_mode():
        packed = tower.forward_uint8([torch.from_numpy(item.patches) for item in items], GRIDS)
        frames = [
            tower.forward_uint8([torch.from_numpy(frame)], [(1, *item.grid_thw[1:])])
            for item in items
            for frame in item.patches.reshape(item.grid_thw[0], -1, item.patches.shape[1])
        ]
    torch.testing.assert_close(packed, torch.cat(frames), atol=5e-6, rtol=0)


def test_the_epsilon_of_the_vision_norms(make_glm4v: MakeGlm4v) -> None:
    """Faint pixels (a hundredth of the usual), where a wrong epsilon is no longer lost in the rest."""
    path = make_glm4v()
    tower, item = tower_of(path), make_item(1, (1, 6, 6))
    faint = pixel_values(item) * 1e-2
    with torch.no_grad():
        expected = (
            load_glm4v(path)
            .model.visual(faint, grid_thw=torch.tensor([item.grid_thw]))
            .pooler_output
        )
        assert (tower(faint, [item.grid_thw]) - expected).abs().max() < FEATURES
        for module in tower.modules():
            if isinstance(module, glm4v_vision.RMSNorm):
                assert module.eps == 1e-5
                module.eps = 1e-6
        delta = float((tower(faint, [item.grid_thw]) - expected).abs().max())
    assert delta > 2 * FEATURES


def test_bfloat16_features_stay_near_float32(make_glm4v: MakeGlm4v) -> None:
    path = make_glm4v()
    item = make_item(2, (1, 12, 12))
    exact = oracle_features(load_glm4v(path), item)
    vision = build_model(path, dtype=torch.bfloat16, device=CPU).vision
    assert vision is not None
    with torch.inference_mode():
        found = vision.forward_uint8([torch.from_numpy(item.patches)], [item.grid_thw]).float()
    assert ((found - exact).square().mean() / exact.square().mean()).sqrt() < 0.03


def test_patches_must_fill_their_grids(make_glm4v: MakeGlm4v) -> None:
    tower = tower_of(make_glm4v())
    with pytest.raises(ValueError, match=r"35 patches do not fill the grids \[\(1, 6, 6\)\]"):
        tower.encode(torch.zeros(35, 64), [(1, 6, 6)])


# The whole model


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("merge", [1, 2])
def test_logits_equal_transformers(make_glm4v: MakeGlm4v, prompt: str, merge: int) -> None:
    path = make_glm4v(vision={"spatial_merge_size": merge})
    case = make_prompt(PROMPTS[prompt], merge=merge)
    np.testing.assert_allclose(
        logits_of(load(path), case), oracle_logits(load_glm4v(path), case), atol=LOGITS, rtol=0
    )


@pytest.mark.parametrize("kind", ["image", "video"])
def test_positions_and_scatter_equal_transformers_own_forward(
    make_glm4v: MakeGlm4v, kind: str
) -> None:
    """Transformers' whole forward takes images or videos (not both), and makes the positions
    itself.
    """
    path = make_glm4v()
    case = make_prompt(PROMPTS["images of several grids" if kind == "image" else "a video"])
    names = (
        ("pixel_values", "image_grid_thw")
        if kind == "image"
        else ("pixel_values_videos", "video_grid_thw")
    )
    values = torch.cat([pixel_values(item) for item in case.items])
    grids = torch.tensor([item.grid_thw for item in case.items])
    with torch.no_grad():
        expected = load_glm4v(path)(
            input_ids=torch.tensor([case.ids]),
            attention_mask=torch.ones(1, len(case.ids), dtype=torch.int64),
            mm_token_type_ids=torch.tensor([case.types]),
            **dict(zip(names, (values, grids), strict=True)),
        ).logits[0]
    np.testing.assert_allclose(logits_of(load(path), case), expected.numpy(), atol=LOGITS, rtol=0)


def test_sequence_classification_is_the_score_of_the_last_hidden_state(
    make_glm4v: MakeGlm4v,
) -> None:
    path = make_glm4v(num_labels=5)
    score = load_file(path / "model.safetensors")["score.weight"]
    llm, oracle = load(path), load_glm4v(path)
    assert llm.config.num_labels == 5
    for parts, pooled in ((MIXED, -1), ([30], -1)):
        case = make_prompt(parts)
        expected = oracle_hidden(oracle, case)[pooled] @ score.T
        found = run(llm, case, Classify()).array
        assert found is not None
        np.testing.assert_allclose(found, expected.numpy(), atol=LOGITS, rtol=0)
    padded = make_prompt([12, (1, 4, 4), 6])
    followed = replace(padded, ids=[*padded.ids[:-2], 256, 256])
    expected = oracle_hidden(oracle, followed)[-3] @ score.T
    np.testing.assert_allclose(
        run(llm, followed, Classify()).array, expected.numpy(), atol=LOGITS, rtol=0
    )


# Mutations: each must show far above the gate


def swap_rope_axes(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    angles = glm4v_vision.axial_angles
    patch.setattr(
        glm4v_vision, "axial_angles", lambda h, w, *rest: angles(w, h, *rest).transpose(0, 1)
    )


def pad_positions_with_zeros(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    def sample(table: torch.Tensor, h: int, w: int) -> torch.Tensor:
        y, x = torch.meshgrid(
            (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij"
        )
        grid = torch.stack((x, y), dim=-1)[None] * 2 - 1
        planes = table.permute(2, 0, 1)[None]
        found = F.grid_sample(
            planes, grid, mode="bicubic", padding_mode="zeros", align_corners=False
        )
        return found[0].permute(1, 2, 0)

    patch.setattr(glm4v_vision, "interpolate", sample)


def interpolate_with(**options: Any) -> Callable[[LLM, pytest.MonkeyPatch], None]:
    def mutate(llm: LLM, patch: pytest.MonkeyPatch) -> None:
        def sample(table: torch.Tensor, h: int, w: int) -> torch.Tensor:
            return F.interpolate(table.permute(2, 0, 1)[None], size=(h, w), **options)[0].permute(
                1, 2, 0
            )

        patch.setattr(glm4v_vision, "interpolate", sample)

    return mutate


def use_tanh_gelu(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    gelu = F.gelu
    patch.setattr(F, "gelu", lambda x: gelu(x, approximate="tanh"))


def permute_sections(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    rope = llm.engine._runner._model.backbone.rope  # type: ignore[attr-defined]
    rope._axes = torch.tensor(axis_of_pair(tuple(reversed(llm.config.rope.mrope_section))))


def use_one_position_axis(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    rope = llm.engine._runner._model.backbone.rope  # type: ignore[attr-defined]
    lookup = rope.lookup
    rope.lookup = lambda positions, _: lookup(
        torch.arange(positions.shape[-1]), positions.shape[-1]
    )


def let_frames_see_each_other(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    attention = F.scaled_dot_product_attention

    def joined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> torch.Tensor:
        if rest:  # the text model's
            return attention(q, k, v, **rest)
        k, v = (x.transpose(0, 1).flatten(1, 2)[None].expand(len(q), -1, -1, -1) for x in (k, v))
        return attention(q, k, v)

    patch.setattr(F, "scaled_dot_product_attention", joined)


def skip(name: str) -> Callable[[LLM, pytest.MonkeyPatch], None]:
    def mutate(llm: LLM, patch: pytest.MonkeyPatch) -> None:
        setattr(llm.engine._runner._model.vision, name, torch.nn.Identity())  # type: ignore[attr-defined]

    return mutate


def swap_gate_and_up(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    weight = llm.engine._runner._model.vision.merger.mlp.gate_up.weight  # type: ignore[attr-defined]
    weight.copy_(weight.roll(len(weight) // 2, dims=0))


# and how many gates it must show
MUTATIONS: dict[str, tuple[Callable[[LLM, pytest.MonkeyPatch], None], float]] = {
    "vision rope h and w swapped": (swap_rope_axes, 100),
    "position table padded with zeros": (pad_positions_with_zeros, 100),
    "position table bilinear": (interpolate_with(mode="bilinear", align_corners=False), 100),
    "position table antialiased": (
        interpolate_with(mode="bicubic", align_corners=False, antialias=True),
        100,
    ),
    "position table corners aligned": (interpolate_with(mode="bicubic", align_corners=True), 100),
    "merger with tanh GELU": (use_tanh_gelu, 3),
    "M-RoPE sections permuted": (permute_sections, 100),
    "one position axis": (use_one_position_axis, 100),
    "frames see each other": (let_frames_see_each_other, 100),
    "no post_conv norm": (skip("post_conv_layernorm"), 100),
    "no post norm": (skip("post_layernorm"), 100),
    "merger's gate and up swapped": (swap_gate_and_up, 100),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_shows(make_glm4v: MakeGlm4v, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = make_glm4v()
    case = make_prompt([5, (1, 4, 6), 3, [(3, 4, 4)], 4, (1, 10, 2), 7])
    expected = oracle_logits(load_glm4v(path), case)
    mutate, gates = MUTATIONS[name]
    llm = load(path)
    mutate(llm, monkeypatch)
    delta = float(np.abs(logits_of(llm, case) - expected).max())
    assert delta > gates * LOGITS, delta


# Checkpoints


@pytest.mark.parametrize("style", ["old", "bare", "old visual"])
def test_other_names_for_the_same_tensors(
    make_glm4v: MakeGlm4v, tmp_path: Path, style: str
) -> None:
    renamed = {
        "old": lambda name: name.replace("model.language_model.", "model.").replace(
            "model.visual.", "visual."
        ),
        "bare": lambda name: name.removeprefix("model."),
        "old visual": lambda name: name.replace("model.visual.", "visual."),
    }[style]
    source = make_glm4v()
    path = shutil.copytree(source, tmp_path / "c", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(source / "model.safetensors")
    save_file(
        {renamed(name): tensor for name, tensor in tensors.items()}, path / "model.safetensors"
    )
    case = make_prompt(MIXED)
    np.testing.assert_array_equal(logits_of(load(path), case), logits_of(load(source), case))


def test_missing_vision_tensors_are_named(make_glm4v: MakeGlm4v, tmp_path: Path) -> None:
    source = make_glm4v()
    path = shutil.copytree(source, tmp_path / "c", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(source / "model.safetensors")
    del tensors["model.visual.downsample.bias"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"missing: model\.visual\.downsample\.bias"):
        build_model(path, dtype=torch.float32, device=CPU)


def test_tied_embeddings(make_glm4v: MakeGlm4v) -> None:
    path = make_glm4v(tie_word_embeddings=True)
    case = make_prompt(PROMPTS["an image"])
    np.testing.assert_allclose(
        logits_of(load(path), case), oracle_logits(load_glm4v(path), case), atol=LOGITS, rtol=0
    )


def test_a_flat_config_is_the_same_model(make_glm4v: MakeGlm4v, tmp_path: Path) -> None:
    source = make_glm4v()
    path = shutil.copytree(source, tmp_path / "c")
    config = json.loads((path / "config.json").read_text())
    text = config.pop("text_config")
    del text["model_type"]
    (path / "config.json").write_text(json.dumps(text | config))
    assert load(path).config == load(source).config
    case = make_prompt(MIXED)
    np.testing.assert_array_equal(logits_of(load(path), case), logits_of(load(source), case))


def test_text_needs_no_media_positions(make_glm4v: MakeGlm4v) -> None:
    """Three equal axes are one: the same text as media-less prompt and beside a prompt with an
    image.
    """
    path = make_glm4v()
    ids = random_ids(3, 40)
    alone = load(path).logits(ids)
    case = make_prompt(PROMPTS["an image"])
    requests = [
        Request(id="text", input_ids=ids, work=Inspect()),
        Request(id="image", input_ids=case.ids, work=Inspect(), media=case.media),
    ]
    beside = load(path).run(requests)[0].array
    np.testing.assert_allclose(beside, alone, atol=2e-5, rtol=0)


# Normalisation


def test_normalisation_is_read_from_where_transformers_reads_it(tmp_path: Path) -> None:
    def write(name: str, **keys: Any) -> None:
        (tmp_path / name).write_text(json.dumps(keys))

    def load(config: type[ImageProcessorConfig]) -> Normalization:
        return config.from_dir(tmp_path).normalization

    assert load(ImageProcessorConfig) == load(VideoProcessorConfig) == Normalization()
    write("preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], rescale_factor=0.5)
    assert load(VideoProcessorConfig).mean == (0.1, 0.2, 0.3)
    write("video_preprocessor_config.json", image_std=0.5, do_rescale=False)
    assert load(ImageProcessorConfig).rescale_factor == 0.5
    video = load(VideoProcessorConfig)
    assert (video.mean, video.std, video.rescale_factor) == (
        Normalization().mean,
        (0.5, 0.5, 0.5),
        1.0,
    )
    write("processor_config.json", image_processor={"do_normalize": False})
    image = load(ImageProcessorConfig)
    assert (image.mean, image.std, image.rescale_factor) == ((0.0,) * 3, (1.0,) * 3, 1 / 255)
    assert load(VideoProcessorConfig) == video


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_mean": [0.1, 0.2]}, r"image_mean: \(0\.1, 0\.2\); it must be three numbers"),
        ({"image_std": [0.1, 0.2, 0]}, r"rescale_factor and image_std must be above 0"),
        ({"rescale_factor": "1/255"}, r"rescale_factor and image_std must be above 0"),
    ],
)
def test_a_broken_normalisation_is_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(keys))
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: " + message):
        ImageProcessorConfig.from_dir(tmp_path)


def test_another_normalisation_of_videos_is_folded_apart(make_glm4v: MakeGlm4v) -> None:
    tower = tower_of(make_glm4v())
    tower.patch_embed.fold(NORMALIZATION, Normalization())
    item = make_item(4, (2, 4, 4), "video")
    raw = torch.from_numpy(item.patches).double().view(len(item.patches), 3, -1)
    mean, std = (
        torch.tensor(x).double().view(1, 3, 1) for x in (Normalization().mean, Normalization().std)
    )
    values = ((raw / 255 - mean) / std).flatten(1).float()
    with torch.inference_mode():
        found = tower.patch_embed.forward_uint8(torch.from_numpy(item.patches))
        torch.testing.assert_close(found, tower.patch_embed(values), atol=5e-6, rtol=0)
