"""The Python door, from text to text, on tiny checkpoints: each answer against transformers' own
forward passes.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

from glm_batch import models
from glm_batch.models.checkpoint.media_config import VideoProcessorConfig
from glm_batch.models.engine import Embed, Generate, Inspect, Request, SamplingParams
from glm_batch.models.engine.llm import LLM
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.patches import pixel_values
from glm_batch.models.processing.video import VideoProcessor
from tests.models.conftest import MakeCheckpoint, byte_tokenizer, load_oracle, random_ids
from tests.models.media_cases import PATCH, MakeGlm4v, load_glm4v, make_glm4v

__all__ = ["make_glm4v"]  # a fixture

ATOL = 5e-5
TEXT = "Zürich 你好 ok"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Wo ist "}, {"type": "text", "text": TEXT}],
    },
]
CHAT_AS_TEXT = f"[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>\nYes?<|user|>\nWo ist {TEXT}<|assistant|>"


def load(path: Path, **engine: Any) -> LLM:
    return models.load(path, **({"kv_cache_tokens": 2048} | engine))


@pytest.fixture(scope="module")
def path(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("glm4")


@pytest.fixture
def llm(path: Path) -> LLM:
    return load(path)


def generated_by_oracle(path: Path, llm: LLM, ids: list[int], count: int) -> list[int]:
    """Greedy ids; those that the tokenizer has no token for are not said by either."""
    unknown = list(range(llm.tokenizer.vocab_size, llm.config.vocab_size))
    tokens = load_oracle(path).generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=count,
        do_sample=False,
        suppress_tokens=unknown,
    )
    return tokens[0, len(ids) :].tolist()


def said(llm: LLM, ids: list[int]) -> str:
    ends = [i for i, token in enumerate(ids) if token in llm.tokenizer.eos_token_ids]
    return b"".join(map(llm.tokenizer.token_bytes, ids[: ends[0] if ends else None])).decode(
        errors="replace"
    )


# chat and generate


@pytest.mark.parametrize(
    ("messages", "text"), [("Hi", "[gMASK]<sop><|user|>\nHi<|assistant|>"), (CHAT, CHAT_AS_TEXT)]
)
def test_chat_says_what_transformers_says(path: Path, llm: LLM, messages: Any, text: str) -> None:
    expected = generated_by_oracle(path, llm, llm.tokenizer.encode_control(text), 30)
    assert llm.chat(messages, max_tokens=30) == said(llm, expected)


def test_control_tokens_in_a_message_are_text(llm: LLM) -> None:
    """A user cannot open another turn: the prompt holds one user turn, and the characters of the
    other.
    """
    (prompt_tokens,) = {
        completion.prompt_tokens
        for completion in llm.run(
            [Request(id="r", input_ids=chat_ids(llm, "a<|user|>b"), work=Embed())]
        )
    }
    assert prompt_tokens == 2 + 1 + 1 + len("a<|user|>b") + 1
    assert llm.chat("a<|user|>b", max_tokens=5) != llm.chat("ab", max_tokens=5)


def chat_ids(llm: LLM, text: str) -> list[int]:
    return llm.prompter.chat.prompt_ids([{"role": "user", "content": text}])


def test_generate_continues_text_or_ids(path: Path, llm: LLM) -> None:
    ids = llm.tokenizer.encode_raw(TEXT)
    assert len(ids) == len(TEXT.encode())
    (output,) = llm.generate(TEXT, max_tokens=20)
    expected = generated_by_oracle(path, llm, ids, 20)
    assert (list(output.token_ids), output.text) == (expected, said(llm, expected))
    assert llm.generate(ids, max_tokens=20) == (output,)
    assert llm.generate(tuple(ids), max_tokens=20) == (output,)


def test_generate_takes_parameters_in_both_forms(llm: LLM) -> None:
    sampling = SamplingParams(temperature=1.0, seed=4, n=3, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(TEXT, sampling=sampling)
    assert len({output.token_ids for output in outputs}) == 3
    assert (
        llm.generate(TEXT, temperature=1.0, seed=4, n=3, max_tokens=12, ignore_eos=True) == outputs
    )
    shorter = llm.generate(TEXT, sampling=sampling, max_tokens=5)
    assert [output.token_ids for output in shorter] == [output.token_ids[:5] for output in outputs]
    with pytest.raises(ValueError, match=r"sampling\.top_p=0"):
        llm.generate(TEXT, top_p=0)


def test_constrained_text(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, "two"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    (output,) = llm.generate(TEXT, schema=json.dumps(schema), max_tokens=200, temperature=1.0)
    jsonschema.validate(json.loads(output.text), schema)
    assert llm.generate(TEXT, regex="sure|sure", max_tokens=20)[0].text == "sure"
    assert llm.chat(CHAT, regex="[a-c]{3}", max_tokens=20) in {
        a + b + c for a in "abc" for b in "abc" for c in "abc"
    }


# choose


@pytest.mark.parametrize(
    ("labels", "end_of_label", "count_end"),
    [
        (["yes", "no"], "auto", False),
        (["a", "c", "你好", "billing"], "auto", False),
        (["yes", "yes please", "no"], "auto", True),  # one label begins another
        (["yes", "yes please", "no"], "never", False),
        (["yes", "no"], "always", True),
        (["only"], "auto", False),
    ],
)
@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_choose_equals_separate_full_forwards(
    make_checkpoint: MakeCheckpoint,
    family: str,
    labels: list[str],
    end_of_label: str,
    count_end: bool,
) -> None:
    """The oracle runs prompt + label once for each label and multiplies what a whole softmax says
    of its tokens.
    """
    path = make_checkpoint(family)
    llm, oracle = load(path), load_oracle(path)
    prompt = llm.tokenizer.encode_control(CHAT_AS_TEXT)
    joint = []
    for label in labels:
        # the template begins every answer with a line break
        tokens = llm.tokenizer.encode("\n" + label)
        with torch.no_grad():
            logprobs = oracle(torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
        total = sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens))
        joint.append(total + (float(logprobs[-1, [256, 260]].logsumexp(0)) if count_end else 0.0))
    mass = [math.exp(value) for value in joint]

    choice = llm.choose(CHAT, labels, end_of_label=end_of_label)
    assert list(choice.label_probs) == labels
    np.testing.assert_allclose(
        list(choice.label_probs.values()), np.array(mass) / sum(mass), atol=ATOL
    )
    assert choice.label == labels[int(np.argmax(mass))]
    assert choice.probability == choice.label_probs[choice.label]
    assert choice.off_set_mass == pytest.approx(1 - sum(mass), abs=ATOL)


def test_labels_that_cannot_be_told_apart_are_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="yes"):
        llm.choose("Hi", ["yes", "no", "yes"])


# classify, tag, embed


def test_classify_names_the_labels(make_checkpoint: MakeCheckpoint) -> None:
    names = {0: "billing", 1: "shipping", 2: "other"}
    path = make_checkpoint("glm4", head="ForSequenceClassification", id2label=names)
    llm = load(path)
    with torch.no_grad():
        expected = (
            load_oracle(path)(torch.tensor([llm.tokenizer.encode_raw(TEXT)])).logits[0].softmax(-1)
        )
    scores = llm.classify(TEXT)
    assert list(scores) == list(names.values())
    np.testing.assert_allclose(list(scores.values()), expected, atol=ATOL)
    assert llm.classify(llm.tokenizer.encode_raw(TEXT)) == pytest.approx(scores, abs=ATOL)


def test_tag_covers_the_text(make_checkpoint: MakeCheckpoint) -> None:
    names = {0: "O", 1: "B-CITY", 2: "I-CITY"}
    path = make_checkpoint("glm", head="ForTokenClassification", id2label=names)
    llm = load(path)
    with torch.no_grad():
        expected = (
            load_oracle(path)(torch.tensor([llm.tokenizer.encode_raw(TEXT)])).logits[0].softmax(-1)
        )
    tags = llm.tag(TEXT)
    assert [tag.label for tag in tags] == [names[i] for i in expected.argmax(-1).tolist()]
    np.testing.assert_allclose([tag.score for tag in tags], expected.max(-1).values, atol=ATOL)
    assert {i for tag in tags for i in range(tag.start, tag.end)} == set(range(len(TEXT)))
    assert all(tag.text == TEXT[tag.start : tag.end] for tag in tags)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embed_pools_the_oracles_hidden_states(
    path: Path, llm: LLM, pooling: str, normalize: bool
) -> None:
    with torch.no_grad():
        hidden = (
            load_oracle(path)
            .model(torch.tensor([llm.tokenizer.encode_raw(TEXT)]))
            .last_hidden_state[0]
        )
    expected = (hidden[-1] if pooling == "last" else hidden.mean(0)).numpy()
    vector = llm.embed(TEXT, pooling=pooling, normalize=normalize)
    np.testing.assert_allclose(
        vector, expected / (np.linalg.norm(expected) if normalize else 1), atol=ATOL
    )


# The door itself


def test_errors_are_raised_and_leave_the_door_open(llm: LLM) -> None:
    before = llm.generate(TEXT)
    for wrong, code in (
        (lambda: llm.generate(""), "empty_prompt"),
        (lambda: llm.generate([1] * 5000), "prompt_too_long"),
        (lambda: llm.generate([512]), "invalid_token"),
        (lambda: llm.generate(TEXT, regex="("), "invalid_constraint"),
        (lambda: llm.classify(TEXT), "unsupported_work"),
        (lambda: llm.tag(TEXT), "unsupported_work"),
        (lambda: llm.chat([{"role": "narrator", "content": "x"}]), "bad_messages"),
    ):
        with pytest.raises(RowError) as caught:
            wrong()
        assert caught.value.code == code
    assert llm.generate(TEXT) == before


def test_one_failure_does_not_keep_others_from_finishing(llm: LLM) -> None:
    work = Generate(sampling=SamplingParams(max_tokens=3))
    with pytest.raises(RowError):
        llm.run(
            [
                Request(id="good", input_ids=[1, 2], work=work),
                Request(id="bad", input_ids=[], work=work),
            ]
        )
    assert not llm.engine.has_work()


def test_an_interrupted_call_does_not_disturb_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load(path, max_step_tokens=16)
    expected = llm.embed([9, 9])

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.embed([7] * 16)
    np.testing.assert_allclose(llm.embed([9, 9]), expected, atol=ATOL)


def test_run_keeps_the_order_of_its_requests(llm: LLM) -> None:
    lengths = [9, 2, 30, 1, 17]
    requests = [Request(id=f"r{n}", input_ids=[7] * n, work=Embed()) for n in lengths]
    assert [completion.prompt_tokens for completion in llm.run(requests)] == lengths


def test_load_takes_engine_options_by_name(path: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        models.load(path, max_tokens=3)
    with pytest.raises(ConfigError, match="takes at most 1024 tokens"):
        models.load(path, max_model_len=2000)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        models.load(tmp_path)


# Images and videos

PLACEHOLDERS = (
    "image",
    "video",
    "begin_of_image",
    "end_of_image",
    "begin_of_video",
    "end_of_video",
)
SIZE = {"shortest_edge": 12 * 12, "longest_edge": 60 * 60 * 2}
PARTS_TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}"
    "{% else %}<|begin_of_{{ p['type'] }}|><|{{ p['type'] }}|><|end_of_{{ p['type'] }}|>{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def media_path(make_glm4v: MakeGlm4v, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GLM-4.1V with a tokenizer that knows its placeholders and a template that writes them."""
    tokenizer = byte_tokenizer()
    names = [f"<|{name}|>" for name in PLACEHOLDERS]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
    )
    keys = ("image", "video", "image_start", "image_end", "video_start", "video_end")
    ids = {
        f"{key}_token_id": tokenizer.token_to_id(name)
        for key, name in zip(keys, names, strict=True)
    }
    path = tmp_path_factory.mktemp("media") / "checkpoint"
    shutil.copytree(make_glm4v(**ids), path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(PARTS_TEMPLATE)
    (path / "preprocessor_config.json").write_text(json.dumps({"patch_size": PATCH, "size": SIZE}))
    return path


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def user(*parts: Any) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts],
        }
    ]


def oracle_next(
    path: Path, text: str, media: dict[str, Any]
) -> Callable[[list[int]], torch.Tensor]:
    """next(answer) -> logits at every position, by transformers' own forward of the prompt and the
    answer so far.
    """
    model = load_glm4v(path)
    ids = (
        tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        .encode(text, add_special_tokens=False)
        .ids
    )
    image, start, end = (
        getattr(model.config, f"{name}_token_id") for name in ("image", "video_start", "video_end")
    )
    first = ids.index(start) if start in ids else len(ids)
    last = ids.index(end) if end in ids else len(ids)
    types = [(2 if first < i < last else 1) if id == image else 0 for i, id in enumerate(ids)]

    def logits(answer: list[int]) -> torch.Tensor:
        model.model.rope_deltas = None
        with torch.no_grad():
            return model(
                input_ids=torch.tensor([ids + answer]),
                attention_mask=torch.ones(1, len(ids + answer), dtype=torch.int64),
                mm_token_type_ids=torch.tensor([types + [0] * len(answer)]),
                **media,
            ).logits[0]

    return logits


def greedy(logits: Callable[[list[int]], torch.Tensor], llm: LLM, count: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < count and not set(answer) & set(llm.tokenizer.eos_token_ids):
        answer.append(int(logits(answer)[-1, : llm.tokenizer.vocab_size].argmax()))
    return answer


def image_logits(
    path: Path, images: list[np.ndarray], text: str
) -> Callable[[list[int]], torch.Tensor]:
    """What transformers makes of images that need no resizing; `text` holds one <|image|> for each."""
    processor = Glm4vImageProcessorPil(patch_size=PATCH, size=SIZE)
    made = processor([Image.fromarray(image) for image in images], return_tensors="pt")
    counts = iter(made["image_grid_thw"].prod(-1) // 4)
    pieces = text.split("<|image|>")
    text = pieces[0] + "".join("<|image|>" * int(next(counts)) + piece for piece in pieces[1:])
    return oracle_next(path, text, dict(made))


IMAGE_TAGS = "<|begin_of_image|><|image|><|end_of_image|>"


def test_a_chat_about_images_says_what_transformers_says(media_path: Path, tmp_path: Path) -> None:
    llm, images = load(media_path), [picture(24, 48), picture(36, 12, seed=1)]
    (tmp_path / "b.png").write_bytes(as_png(images[1]))
    first = {"type": "image_url", "image_url": {"url": str(tmp_path / "b.png")}}
    messages = user({"type": "image", "bytes": as_png(images[0])}, "and ", first, "Which?")
    text = f"[gMASK]<sop><|user|>\n{IMAGE_TAGS}and {IMAGE_TAGS}Which?<|assistant|>"
    expected = image_logits(media_path, images, text)
    found = llm.run([llm._conversation(messages, Inspect())])[0].array
    np.testing.assert_allclose(found, expected([]), atol=1e-4)
    answer = greedy(expected, llm, 20)
    assert llm.chat(messages, max_tokens=20) == said(llm, answer)
    assert llm.chat(user("and ", "Which?"), max_tokens=20) != said(llm, answer)


def test_a_chat_about_a_video_says_what_transformers_says(media_path: Path) -> None:
    llm = load(media_path)
    frames = [picture(24, 36, seed) for seed in range(5)]
    config = VideoProcessorConfig.from_dir(media_path)
    clip = VideoProcessor(config).from_frames(frames, 2.0, duration_s=2.5)
    assert clip.grid == (3, 4, 6)
    seconds = "".join(
        "<|begin_of_image|>" + "<|image|>" * 6 + f"<|end_of_image|>{s}" for s in (0, 1, 2)
    )
    text = (
        f"[gMASK]<sop><|user|>\n<|begin_of_video|>{seconds}<|end_of_video|>Where to?<|assistant|>"
    )
    values = pixel_values(torch.from_numpy(clip.patches), config)
    expected = oracle_next(
        media_path,
        text,
        {"pixel_values_videos": values, "video_grid_thw": torch.tensor([clip.grid])},
    )
    messages = user({"type": "video", "video": clip}, "Where to?")
    found = llm.run([llm._conversation(messages, Inspect())])[0].array
    np.testing.assert_allclose(found, expected([]), atol=1e-4)
    assert llm.chat(messages, max_tokens=12) == said(llm, greedy(expected, llm, 12))


def test_choosing_about_an_image_equals_separate_full_forwards(media_path: Path) -> None:
    llm, image = load(media_path), picture(24, 24)
    labels = ["circle", "square", "a star"]
    logits = image_logits(
        media_path, [image], f"[gMASK]<sop><|user|>\n{IMAGE_TAGS}Which?<|assistant|>"
    )
    joint = []
    for label in labels:
        tokens = llm.tokenizer.encode("\n" + label)
        logprobs = logits(tokens).double().log_softmax(-1)[-len(tokens) - 1 : -1]
        joint.append(float(logprobs.gather(1, torch.tensor(tokens)[:, None]).sum()))
    choice = llm.choose(user({"type": "image", "image": image}, "Which?"), labels)
    mass = np.exp(joint)
    np.testing.assert_allclose(list(choice.label_probs.values()), mass / mass.sum(), atol=1e-4)


def test_one_image_in_every_form_is_one_answer(media_path: Path, tmp_path: Path) -> None:
    llm, image = load(media_path), picture(24, 24)
    data = as_png(image)
    (tmp_path / "a.png").write_bytes(data)
    path = tmp_path / "a.png"
    sources: list[Any] = [data, bytearray(data), memoryview(data), str(path), path, image]
    sources += [{"bytes": data, "path": "gone.png"}, {"bytes": None, "path": str(path)}]
    assert (
        len(
            {llm.chat(user({"type": "image", "image": source}), max_tokens=8) for source in sources}
        )
        == 1
    )


def test_media_that_cannot_be_read_are_row_errors(
    media_path: Path, llm: LLM, tmp_path: Path
) -> None:
    seeing = load(media_path)
    for source, code, kind in (
        (tmp_path / "none.png", "media_not_found", "image"),
        ("https://example.org/a.png", "media_not_found", "image"),
        ("a\0b", "media_not_found", "image"),
        (b"no image", "bad_image", "image"),
        (b"no video", "bad_video", "video"),
        (5, "wrong_type", "image"),
        (picture(8, 8), "wrong_type", "video"),
        (picture(8, 8)[..., 0], "bad_image", "image"),
    ):
        with pytest.raises(RowError) as caught:
            seeing.chat(user({"type": kind, kind: source}))
        assert caught.value.code == code
    with pytest.raises(RowError, match="reads text only"):
        llm.chat(user({"type": "image", "image": picture(24, 24)}))


def test_an_engine_that_is_not_known_is_refused_with_those_that_are(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^kind='nonsense': .* auto, torch, vllm, echo"):
        load(path, kind="nonsense")
    with pytest.raises(ConfigError, match=r"^max_step_tokens=0"):
        load(path, max_step_tokens=0)


def test_the_engine_is_the_one_that_is_asked_for(path: Path) -> None:
    assert type(load(path).engine).__name__ == "TorchEngine"
    echo = load(path, kind="echo")
    assert echo.generate("abc")[0].text == "abc"
    assert echo.embed("abc").shape == (echo.config.hidden_size,)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_vector_of_a_generating_model_reads_memory_that_nobody_wrote(
    path: Path, dtype: str
) -> None:
    torch.use_deterministic_algorithms(True)  # which fills what nobody wrote with NaN
    try:
        llm = load(path, dtype=dtype)
        for length in (1, 2, 17, 90):
            for pooling in ("last", "mean"):
                ids = random_ids(length, length)
                assert np.isfinite(llm.embed(ids, pooling=pooling)).all()
                assert np.isfinite(llm.embed([*ids[:-1], 3], pooling=pooling)).all()
    finally:
        torch.use_deterministic_algorithms(False)
