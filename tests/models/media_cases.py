"""Random tiny GLM-4.1V checkpoints and prompts with images and videos, and what transformers makes
of them.

Positions come from a plain walk over the prompt, token by token, written for these tests alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from glm_batch.models.checkpoint.media_config import Normalization
from glm_batch.models.processing.patches import Media, MediaItem
from tests.models.conftest import VOCAB_SIZE, save_checkpoint

IMAGE, VIDEO, IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END = range(300, 306)
NORMALIZATION = Normalization(mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
PATCH = 6
CHANNELS, TEMPORAL = 3, 2
TEXT = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 256,
    "eos_token_id": [256, 260],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                        "mrope_section": [2, 3, 3]},
}  # fmt: skip
VISION = {
    "depth": 3, "hidden_size": 64, "num_heads": 2, "image_size": 32, "patch_size": PATCH, "out_hidden_size": 128,
    "intermediate_size": 96,
}  # fmt: skip
IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": IMAGE_START,
    "image_end_token_id": IMAGE_END, "video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END,
}  # fmt: skip

Part = int | tuple[int, int, int] | list[tuple[int, int, int]]
MakeGlm4v = Callable[..., Path]


def randomize_glm4v(model: torch.nn.Module, seed: int) -> None:
    """As conftest.randomize, with the fan-in of convolutions and a position table that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and not name.endswith("bias"):
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif "position_embedding" in name:
                parameter.copy_(0.5 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


@pytest.fixture(scope="session")
def make_glm4v(tmp_path_factory: pytest.TempPathFactory) -> MakeGlm4v:
    """make_glm4v(text={...}, vision={...}, num_labels=3) -> directory; with num_labels a
    classifier.
    """
    made: dict[str, Path] = {}

    def make(
        text: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        num_labels: int = 0,
        **config: Any,
    ) -> Path:
        key = repr((text, vision, num_labels, config))
        if key not in made:
            made[key] = _make(
                tmp_path_factory.mktemp("glm4v"), text or {}, vision or {}, num_labels, config
            )
        return made[key]

    return make


def _make(
    folder: Path,
    text: dict[str, Any],
    vision: dict[str, Any],
    num_labels: int,
    config: dict[str, Any],
) -> Path:
    hf_config = transformers.Glm4vConfig(
        text_config=TEXT | text, vision_config=VISION | vision, **(IDS | config)
    )
    torch.manual_seed(0)
    model = transformers.Glm4vForConditionalGeneration(hf_config)
    randomize_glm4v(model, seed=3)
    save_checkpoint(model, folder)
    processor = {"image_mean": list(NORMALIZATION.mean), "image_std": list(NORMALIZATION.std)}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    if num_labels:
        _make_classifier(model, folder, num_labels)
    return folder


def _make_classifier(model: Any, folder: Path, num_labels: int) -> None:
    """No such class exists in transformers: the body's tensors and a score."""
    tensors = {f"model.{name}": tensor for name, tensor in model.model.state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    tensors["score.weight"] = torch.randn(num_labels, TEXT["hidden_size"], generator=generator) / 10  # type: ignore[call-overload]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Glm4vForSequenceClassification"], "num_labels": num_labels}
    (folder / "config.json").write_text(json.dumps(config))


def make_item(
    seed: int, grid: tuple[int, int, int], kind: str = "image", *, patch: int = PATCH
) -> MediaItem:
    """Random patches; equal seeds and grids are equal items."""
    copies = 1 if kind == "image" else TEMPORAL
    t, h, w = grid
    patches = np.random.default_rng(seed).integers(
        0, 256, (t * h * w, CHANNELS * copies * patch**2), dtype=np.uint8
    )
    digest = hashlib.blake2b(patches.tobytes(), digest_size=16).digest()
    return MediaItem(kind=kind, patches=patches, grid_thw=grid, digest=digest)  # type: ignore[arg-type]


def pixel_values(item: MediaItem) -> torch.Tensor:
    """What transformers' processors would hand over: normalised float32, an image's frame twice."""
    copies = 1 if item.kind == "image" else TEMPORAL
    values = torch.from_numpy(item.patches).double().view(len(item.patches), CHANNELS, copies, -1)
    mean, std = (
        torch.tensor(x).double().view(1, -1, 1, 1) for x in (NORMALIZATION.mean, NORMALIZATION.std)
    )
    values = (values * NORMALIZATION.rescale_factor - mean) / std
    return values.expand(-1, -1, TEMPORAL, -1).reshape(len(values), -1).float()


@dataclass(frozen=True)
class Prompt:
    """input_ids, the kind of each token (0 text, 1 image, 2 video), media in the prompt's order."""

    ids: list[int]
    types: list[int]
    items: list[MediaItem]
    positions: np.ndarray

    @property
    def media(self) -> Media | None:
        return Media(items=tuple(self.items), positions=self.positions) if self.items else None

    def of_kind(self, kind: str) -> list[MediaItem]:
        return [item for item in self.items if item.kind == kind]


def make_prompt(parts: list[Part], *, seed: int = 0, merge: int = 2, patch: int = PATCH) -> Prompt:
    """A number is that many text tokens, a triple an image of that grid, a list with one triple a
    video.
    """
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    types: list[int] = []
    items: list[MediaItem] = []

    def add(tokens: list[int], kind: int = 0) -> None:
        ids.extend(tokens)
        types.extend([kind] * len(tokens))

    for number, part in enumerate(parts):
        if isinstance(part, int):
            add(rng.integers(0, 256, part).tolist())
        elif isinstance(part, tuple):
            items.append(make_item(1000 * seed + number, part, patch=patch))
            add([IMAGE_START])
            add([IMAGE] * (part[1] * part[2] // merge**2), 1)
            add([IMAGE_END])
        else:
            t, h, w = part[0]
            items.append(make_item(1000 * seed + number, part[0], "video", patch=patch))
            add([VIDEO_START])
            for second in range(t):
                add([IMAGE_START])
                add([IMAGE] * (h * w // merge**2), 2)
                add([IMAGE_END, 48 + second])
            add([VIDEO_END])
    return Prompt(ids, types, items, rope_index(types, items, merge))


def rope_index(types: list[int], items: list[MediaItem], merge: int) -> np.ndarray:
    """[3, tokens]: text moves on by one, a frame by the larger of its sides."""
    frames = {
        kind: [(h // merge, w // merge) for item in items if item.kind == name for t, h, w in [item.grid_thw]
               for _ in range(t)]
        for kind, name in ((1, "image"), (2, "video"))
    }  # fmt: skip
    rows: list[tuple[int, int, int]] = []
    position = 0
    while len(rows) < len(types):
        kind = types[len(rows)]
        if kind == 0:
            rows.append((position, position, position))
            position += 1
        else:
            h, w = frames[kind].pop(0)
            rows += [(position, position + y, position + x) for y in range(h) for x in range(w)]
            position += max(h, w)
    return np.array(rows, dtype=np.int64).T


def load_glm4v(path: Path) -> Any:
    """The checkpoint in transformers; a classifier's body as Glm4vModel."""
    name = json.loads((path / "config.json").read_text())["architectures"][0]
    if name == "Glm4vForSequenceClassification":
        config = transformers.Glm4vConfig.from_pretrained(path)
        model = transformers.Glm4vModel.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation="eager"
        )
    else:
        model = getattr(transformers, name).from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval()


def oracle_features(oracle: Any, item: MediaItem) -> torch.Tensor:
    """One item's features, frame by frame as the model's own get_video_features does."""
    t, h, w = item.grid_thw
    body = getattr(oracle, "model", oracle)
    with torch.no_grad():
        return body.visual(pixel_values(item), grid_thw=torch.tensor([[1, h, w]] * t)).pooler_output


def oracle_hidden(oracle: Any, prompt: Prompt) -> torch.Tensor:
    """Hidden states after the final norm, from embeddings and positions put together by hand."""
    body = getattr(oracle, "model", oracle)
    types = torch.tensor(prompt.types)
    with torch.no_grad():
        embeds = body.language_model.embed_tokens(torch.tensor(prompt.ids))
        for kind, name in ((1, "image"), (2, "video")):
            features = [oracle_features(oracle, item) for item in prompt.of_kind(name)]
            if features:
                embeds[types == kind] = torch.cat(features)
        return body.language_model(
            inputs_embeds=embeds[None], position_ids=torch.from_numpy(prompt.positions)[:, None]
        ).last_hidden_state[0]


def oracle_logits(oracle: Any, prompt: Prompt) -> np.ndarray:
    with torch.no_grad():
        return oracle.lm_head(oracle_hidden(oracle, prompt)).numpy()
