"""Rendered images and videos in vLLM: against TorchEngine, and against what vLLM makes of the same
pictures itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glm_batch.models.engine import (
    Choose,
    Completion,
    Embed,
    EngineConfig,
    Generate,
    Inspect,
    Request,
    SamplingParams,
)
from glm_batch.models.engine.api.request import ONLINE
from glm_batch.models.engine.vllm import vllm_engine
from glm_batch.models.engine.vllm.vllm_engine import VllmEngine
from glm_batch.models.engine.vllm.vllm_forks import RequestForks, Vocabulary
from glm_batch.models.processing.images import ImageProcessor
from glm_batch.models.processing.patches import MediaPatches
from glm_batch.models.processing.prompt import MediaPrompts
from tests.models.engine.vllm.test_vllm_engine import assert_equal, both, run
from tests.models.media_cases import MakeGlm4v, Prompt, make_glm4v, make_item, make_prompt

__all__ = ["make_glm4v"]  # a fixture

TINY_GLM = str(Path(__file__).parents[4] / "examples" / "tiny_glm")
PROMPTS: dict[str, Prompt] = {
    "text": make_prompt([30]),
    "image": make_prompt([5, (1, 4, 6), 3], seed=1),
    "the same image": make_prompt([5, (1, 4, 6), 3], seed=1),
    "video": make_prompt([5, [(3, 2, 4)], 4], seed=2),
    "all": make_prompt([5, (1, 4, 6), 3, [(3, 2, 4)], 4, (1, 8, 4), 2], seed=3),
    "two videos": make_prompt([5, [(2, 4, 6)], 3, [(3, 2, 4)], 4], seed=4),
}
WORKS = {
    "generate": Generate(sampling=SamplingParams(max_tokens=12, logprobs=2, ignore_eos=True)),
    "choose": Choose(choices=((5,), (5, 6), (7, 8, 9)), count_end=True),
    "embed": Embed(),
    "hidden": Inspect(what="hidden_states"),
}


@pytest.mark.parametrize(
    "video", [{}, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1]}]
)
def test_media_give_what_they_give_with_torch(
    make_glm4v: MakeGlm4v, tmp_path: Path, video: dict[str, Any]
) -> None:
    """This also holds the biases of GLM-4.1V, which vLLM leaves out of files like these, saved by
    transformers.

    Where videos are normalised otherwise than images, vLLM's own normalisation is not used.
    """
    path = make_glm4v()
    if video:
        path = Path(shutil.copytree(path, tmp_path / "checkpoint"))
        (path / "video_preprocessor_config.json").write_text(json.dumps(video))
    requests = [
        Request(id=f"{name}: {shown}", input_ids=prompt.ids, work=work, media=prompt.media)
        for name, work in WORKS.items()
        for shown, prompt in PROMPTS.items()
    ]
    for asked, expected, got in both(path, requests):
        assert_equal(asked, expected, got)
        assert got.media_tokens == expected.media_tokens


@pytest.fixture(scope="module")
def tiny_glm() -> Iterator[VllmEngine]:
    config = EngineConfig(model=TINY_GLM, dtype="float32", max_model_len=512, kv_cache_tokens=4096)
    engine = VllmEngine.from_checkpoint(config)
    yield engine
    engine.close()


@pytest.mark.parametrize("size", [(112, 112), (200, 130)])
def test_patches_give_what_vllm_makes_of_the_picture(
    tiny_glm: VllmEngine, size: tuple[int, int]
) -> None:
    """The very same tokens and log-probabilities, through vLLM's renderer and processor and past
    them.
    """
    picture = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    prompts = MediaPrompts.from_dir(TINY_GLM, tiny_glm.tokenizer)
    encode = tiny_glm.tokenizer.encode_control
    ids = encode(
        "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>Which shape is it?<|assistant|>\n"
    )
    expanded, media = prompts.place(ids, [ImageProcessor(prompts.image).from_array(picture)])
    work = Generate(sampling=SamplingParams(max_tokens=8, logprobs=3, ignore_eos=True))
    ours = run(tiny_glm, [Request(id="ours", input_ids=expanded, work=work, media=media)])[
        "ours"
    ].outputs[0]
    theirs = _past_the_seam(tiny_glm, ids, Image.fromarray(picture), work)
    assert ours.token_ids == tuple(theirs.token_ids)
    own = [entry[id].logprob for entry, id in zip(theirs.logprobs, theirs.token_ids, strict=True)]
    np.testing.assert_allclose(ours.logprobs, own, atol=1e-5)


def test_rendered_media_are_bounded(tiny_glm: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests wait, only a bounded number of bytes is rendered for them; each still
    comes back.
    """
    item = make_item(1, (1, 8, 8), patch=14)
    prompts = MediaPrompts.from_dir(TINY_GLM, tiny_glm.tokenizer)
    ids = tiny_glm.tokenizer.encode_control(
        "<|begin_of_image|><|image|><|end_of_image|>Which shape is it?"
    )
    patches = MediaPatches(
        kind="image", patches=item.patches, grid=item.grid_thw, digest="00" * 32, source=(1, 1, 1)
    )
    expanded, media = prompts.place(ids, [patches])
    # two images, whose frame stands twice
    monkeypatch.setattr(vllm_engine, "MEDIA_BYTES", 5 * item.patches.nbytes)
    work = Choose(choices=((5,), (6,)))
    tiny_glm.submit(
        [Request(id=str(i), input_ids=expanded, work=work, media=media) for i in range(7)]
    )
    assert len(tiny_glm._held) == 5
    done: list[Completion] = []
    while tiny_glm.has_work():
        assert tiny_glm._media_bytes <= 4 * item.patches.nbytes
        done += tiny_glm.step()
    assert {completion.id for completion in done} == {str(i) for i in range(7)}
    assert all(completion.error is None for completion in done)
    assert tiny_glm._media_bytes == 0


def _past_the_seam(engine: VllmEngine, ids: list[int], picture: Image.Image, work: Generate) -> Any:
    core = engine._core("generate")
    vocabulary = Vocabulary.of(engine.tokenizer, engine.settings.model.vocab_size)
    maker = RequestForks(vocabulary=vocabulary, num_prompt=len(ids), max_scored=1000)
    fork = maker.sample(work, 0, 8, stream=False)
    core.add(
        "theirs",
        {"prompt_token_ids": ids, "multi_modal_data": {"image": picture}},
        fork.params,
        ONLINE,
    )
    found: list[Any] = []
    while not found:
        found = core.step()
    return found[0].outputs[0]
