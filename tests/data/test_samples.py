"""Samples: what is a target is checked by decoding it; images stay whole; bad input is named."""

import io
import json

import pytest
import torch
from PIL import Image

from moe_ext.batch import IGNORED_LABEL
from moe_ext.data import BadSample, SampleBuilder
from tests.data.inputs import pair, png, to_pixels


@pytest.fixture
def build(tokenizer):
    return SampleBuilder(tokenizer, to_pixels, 9, 1, prompt="A picture of", max_length=256)


def targets(sample, tokenizer) -> str:
    return tokenizer.decode([t for t in sample.labels.tolist() if t != IGNORED_LABEL])


def check_shift(sample):
    """A label is the next token of the same sequence, and never an image's placeholder."""
    for s, label in enumerate(sample.labels.tolist()):
        if label != IGNORED_LABEL:
            assert label == sample.input_ids[s + 1] and sample.modality_ids[s + 1] == 0


def test_caption(build, tokenizer):
    sample = build(pair(300))
    text = tokenizer.decode(sample.input_ids[9:])
    assert text == "A picture of thing number 300<|im_end|>"
    assert sample.modality_ids.tolist() == [1] * 9 + [0] * (len(sample) - 9)
    assert targets(sample, tokenizer) == " thing number 300<|im_end|>"
    check_shift(sample)
    ((modality, pixels),) = sample.media
    assert modality == 1 and torch.allclose(pixels[:, 0, 0] * 255, torch.tensor([44.0, 1.0, 77.0]))


def test_another_caption_for_retrieval(build, tokenizer):
    sample = build.build(pair(3), "a red dog")
    assert targets(sample, tokenizer) == " a red dog<|im_end|>"
    assert torch.equal(sample.media[0][1], build(pair(3)).media[0][1])


def test_text(build, tokenizer):
    sample = build({"__key__": "t", "txt": b"To be or not"})
    assert targets(sample, tokenizer) == "o be or not<|im_end|>" and not sample.media
    check_shift(sample)
    long = build({"__key__": "t", "json": json.dumps({"text": "x" * 999}).encode()})
    assert len(long) == 256 and long.truncated


def chat(turns, num_images=0):
    images = {f"{i}.png": png(i) for i in range(num_images)}
    content = {"conversations": [{"from": f, "value": v} for f, v in turns]}
    return {"__key__": "c", "json": json.dumps(content).encode(), **images}


TURNS = [
    ("human", "<image>\nWhat is it?"),
    ("gpt", "A cat."),
    ("human", "And <image> this?"),
    ("gpt", "A dog,\nand a bone."),
]


def test_chat_keeps_all_turns_and_images(build, tokenizer):
    sample = build(chat(TURNS, 2))
    assert targets(sample, tokenizer) == "A cat.<|im_end|>A dog,\nand a bone.<|im_end|>"
    check_shift(sample)
    assert [int(pixels[0, 0, 0] * 255) for _, pixels in sample.media] == [0, 1]
    runs = sample.modality_ids.tolist()
    assert sum(runs) == 18 and runs[runs.index(1) : runs.index(1) + 10] == [1] * 9 + [0]
    shown = tokenizer.decode([t for t, m in zip(sample.input_ids, runs, strict=True) if m == 0])
    assert shown == (
        "<|im_start|>user\n\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nAnd  this?<|im_end|>\n<|im_start|>assistant\nA dog,\nand a bone.<|im_end|>"
    )


def test_chat_without_a_template(tokenizer):
    build = SampleBuilder(tokenizer, to_pixels, 9, max_length=256, chat_template=False)
    sample = build(chat([*TURNS, ("human", "unanswered")], 2))
    assert targets(sample, tokenizer) == " A cat.<|im_end|> A dog,\nand a bone.<|im_end|>"


@pytest.mark.parametrize("max_length", range(45, 140))
def test_truncation_drops_turns_and_never_cuts_an_image(tokenizer, max_length):
    build = SampleBuilder(tokenizer, to_pixels, 9, max_length=max_length)
    try:
        sample = build(chat(TURNS, 2))
    except BadSample as error:
        reason = error.reason
    else:
        reason = ""
    if reason:
        assert "fits" in reason and max_length < 57
        return
    runs = sample.modality_ids.tolist()
    assert sum(runs) == 9 * len(sample.media) and len(sample) <= max_length
    assert targets(sample, tokenizer).startswith("A"), (
        "the first answer has a part, or all was refused"
    )
    if len(sample.media) == 1:
        assert targets(sample, tokenizer) in "A cat.<|im_end|>" and sample.truncated
    check_shift(sample)


def test_count_tokens_is_the_built_length(build):
    for raw in (pair(5), chat(TURNS, 2), {"__key__": "t", "txt": b"abc"}):
        assert build.count_tokens(raw) == len(build(raw))


def bomb() -> bytes:
    out = io.BytesIO()
    Image.new("1", (30000, 30000)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({**pair(1), "png": b""}, "zero bytes"),
        ({**pair(1), "png": png(1, 64)[:70]}, "cannot be decoded"),
        ({**pair(1), "png": b"not an image"}, "cannot be decoded"),
        ({**pair(1), "json": b"{"}, "json member cannot be read"),
        ({**pair(1), "json": b"[1]"}, "not an object"),
        ({**pair(1), "json": b'{"caption": ""}'}, "without a caption"),
        ({**pair(1), "json": b'{"caption": 5}'}, "without a caption"),
        ({"__key__": "k", "cls": b"3"}, "neither an image"),
        ({"__key__": "k", "txt": b"\xff\xfe"}, "UTF-8"),
        (chat(TURNS, 1), "2 <image> marks for 1 images"),
        (chat([("gpt", "hello")]), "no question"),
        (chat([("robot", "hello")]), "no known role"),
        (chat([("human", "only a question")]), "no question"),
    ],
)
def test_bad_samples_are_named(build, raw, reason):
    with pytest.raises(BadSample, match=reason):
        build(raw)


def test_a_decompression_bomb_is_refused_unread(build):
    data = bomb()
    assert len(data) < 200_000
    with pytest.raises(BadSample, match="30000x30000|decompression bomb"):
        build({**pair(1), "png": data})


def test_transparency_becomes_white(build):
    out = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(out, "PNG")
    assert build.image({**pair(1), "png": out.getvalue()}).min() == 1.0


def test_no_room_for_a_caption_is_refused_at_once(tokenizer):
    with pytest.raises(ValueError, match="data.max_length=20"):
        SampleBuilder(tokenizer, to_pixels, 9, max_length=20)


def test_a_bos_of_the_tokenizer_comes_first(tokenizer):
    class WithBos:
        bos_token_id = 1

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __len__(self):
            return len(tokenizer)

        def __call__(self, text, add_special_tokens=True):
            plain = tokenizer(text, add_special_tokens=False)
            if add_special_tokens:
                plain["input_ids"] = [1, *plain["input_ids"]]
            return plain

    sample = SampleBuilder(WithBos(), to_pixels, 9, max_length=99)(pair(1))
    assert sample.input_ids[0] == 1 and sample.modality_ids[:11].tolist() == [0] + [1] * 9 + [0]
