"""A raw sample becomes token ids, labels and pixels: one run of placeholder ids for every image.

Three kinds of raw samples are known by their members: an image with a caption (`png`/`jpg`/... and
`json` with "caption", or `txt`), a conversation (`json` with "conversations", LLaVA's form, any
number of turns and images), and text (`txt`, or `json` with "text"). The loss falls on captions,
answers and text; never on images, prompts and questions.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..batch import IGNORED_LABEL, TEXT
from .chat import Piece, render
from .images import MAX_PIXELS, decode_features, decode_image, image_members
from .shards import BadSample, RawSample

UNUSABLE = "moe_ext.unusable"
"""Key of a `json` member that stands for a sample known to be bad (in cached features): the reason."""


@dataclass
class Sample:
    """One sequence of S positions, ready to be packed or padded."""

    input_ids: Tensor
    """(S,) int64."""
    labels: Tensor
    """(S,) int64: the token that follows, where it is a target; else IGNORED_LABEL."""
    modality_ids: Tensor
    """(S,) int64."""
    media: list[tuple[int, Tensor]]
    """(modality id, encoder input) of each run of placeholders, in order."""
    key: str = ""
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


class SampleBuilder:
    """Raw sample -> Sample, with a tokenizer and the encoder's preprocessing. Picklable if they are."""

    def __init__(
        self,
        tokenizer: Any,
        preprocess: Callable[[Image.Image], Tensor] | None = None,
        tokens_per_item: int = 0,
        modality_id: int = 1,
        *,
        prompt: str = "A picture of",
        max_length: int = 128,
        chat_template: bool = True,
        max_pixels: int = MAX_PIXELS,
    ):
        """`preprocess`: PIL RGB image -> encoder input of one item; None for text alone.

        Raises:
            ValueError: an image and its prompt leave no room for a caption within `max_length`.
        """
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.tokens_per_item, self.modality_id = tokens_per_item, modality_id
        self.prompt, self.max_length, self.max_pixels = prompt, max_length, max_pixels
        self.use_template = chat_template and bool(getattr(tokenizer, "chat_template", None))
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        with_special = tokenizer("a").input_ids
        self.bos = [int(with_special[0])] if with_special[0] == tokenizer.bos_token_id else []
        self.prompt_ids = self.encode(prompt)
        shortest = len(self.bos) + tokens_per_item + len(self.prompt_ids) + 2
        if max_length < shortest:
            raise ValueError(
                f"data.max_length={max_length} cannot hold an image of {tokens_per_item} tokens, the "
                f"prompt {prompt!r} and a caption; set at least {shortest}"
            )

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides a sample's number of tokens."""
        parts = [
            type(self.tokenizer).__name__,
            len(self.tokenizer),
            self.encode("The quick brown fox, 12345 \u00e9\u4e2d"),
            self.tokenizer.chat_template if self.use_template else None,
            self.tokens_per_item,
            self.prompt,
            self.max_length,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of text alone, without the tokenizer's special additions."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def __call__(self, raw: RawSample) -> Sample:
        """The sample of a raw one.

        Raises:
            BadSample: it is damaged, of no known kind, or cannot be made to fit.
        """
        pieces, images = self.pieces(raw)
        key = str(raw.get("__key__", "?"))
        media = [(self.modality_id, self.encoder_input(image, key)) for image in images]
        return self.assemble(pieces, media, key)

    def count_tokens(self, raw: RawSample) -> int:
        """Tokens that `self(raw)` will have; images are not decoded. For the index."""
        pieces, images = self.pieces(raw)
        return len(self.assemble(pieces, [(self.modality_id, torch.empty(0))] * len(images), ""))

    # ---- kinds of raw samples

    def pieces(self, raw: RawSample) -> tuple[list[Piece], list[bytes]]:
        """The sample as pieces (text or image, target or not) and the bytes of its images."""
        key = str(raw.get("__key__", "?"))
        content = read_json(raw, key)
        if UNUSABLE in content:
            raise BadSample(key, str(content[UNUSABLE]))
        images = [raw[name] for name in image_members(raw)]
        if "conversations" in content:
            pieces = render(
                content["conversations"],
                num_images=len(images),
                tokenizer=self.tokenizer if self.use_template else None,
                key=key,
            )
            return pieces, images
        if images:
            return self.captioned(caption_of(raw, content, key)), images[:1]
        text = content.get("text") or _utf8(raw.get("txt", b""), key)
        if not isinstance(text, str) or not text.strip():
            raise BadSample(key, "has neither an image with a caption, nor conversations, nor text")
        return [Piece(text, target=True), Piece("", target=True, end=True)], []

    def captioned(self, caption: str) -> list[Piece]:
        """Image, prompt, then " caption" and the end token, which alone are targets."""
        return [
            Piece("", image=True),
            Piece(self.prompt),
            Piece(" " + caption, target=True),
            Piece("", target=True, end=True),
        ]

    def build(self, raw: RawSample, caption: str | None = None) -> Sample:
        """The sample of an image under another caption (for retrieval), or under its own."""
        if caption is None:
            return self(raw)
        key = str(raw.get("__key__", "?"))
        image = next((raw[name] for name in image_members(raw)), None)
        if image is None:
            raise BadSample(key, "has no image to put a caption to")
        return self.assemble(
            self.captioned(caption), [(self.modality_id, self.encoder_input(image, key))], key
        )

    def image(self, raw: RawSample) -> Tensor:
        """Encoder input of a sample's first image."""
        key = str(raw.get("__key__", "?"))
        for name in image_members(raw):
            return self.encoder_input(raw[name], key)
        raise BadSample(key, "has no image")

    # ---- assembly

    def assemble(self, pieces: list[Piece], media: list[tuple[int, Tensor]], key: str) -> Sample:
        """Token ids, shifted labels and modality ids of pieces, cut to `max_length` by rule.

        Too long: whole turns are dropped from the end; if the first turn alone is too long its
        answer is cut. An image run is kept whole or dropped with its turn, never cut.
        """
        turns = list(self._turns(pieces))
        ids, target, modality = list(self.bos), [False] * len(self.bos), [TEXT] * len(self.bos)
        num_media, truncated = 0, False
        for turn in turns:
            t_ids, t_target, t_modality, t_media = turn
            room = self.max_length - len(ids)
            if len(t_ids) > room:
                truncated = True
                first_target = t_target.index(True) if True in t_target else len(t_ids)
                last_image = max((i for i, m in enumerate(t_modality) if m != TEXT), default=-1)
                if num_media or any(target) or max(first_target, last_image) + 1 > room:
                    break
                t_ids, t_target, t_modality = t_ids[:room], t_target[:room], t_modality[:room]
            ids += t_ids
            target += t_target
            modality += t_modality
            num_media += t_media
            if truncated:
                break
        if not any(target[1:]):
            rule = (
                f"nothing to learn fits in data.max_length={self.max_length}"
                if truncated
                else "no target"
            )
            raise BadSample(key, rule)
        labels = [n if t else IGNORED_LABEL for n, t in zip(ids[1:], target[1:], strict=True)]
        return Sample(
            input_ids=torch.tensor(ids),
            labels=torch.tensor([*labels, IGNORED_LABEL]),
            modality_ids=torch.tensor(modality),
            media=media[:num_media],
            key=key,
            truncated=truncated,
        )

    def _turns(self, pieces: list[Piece]) -> Iterator[tuple[list[int], list[bool], list[int], int]]:
        """Question and answer together, as (ids, target, modality, images): the units of cutting."""
        ids: list[int] = []
        target: list[bool] = []
        modality: list[int] = []
        num_media, answered = 0, False
        for piece in pieces:
            if answered and not piece.target:
                yield ids, target, modality, num_media
                ids, target, modality, num_media, answered = [], [], [], 0, False
            if piece.image:
                new, kind = [self.pad_id] * self.tokens_per_item, self.modality_id
                num_media += 1
            else:
                new, kind = ([self.eos_id] if piece.end else self.encode(piece.text)), TEXT
            ids += new
            target += [piece.target] * len(new)
            modality += [kind] * len(new)
            answered = answered or piece.target
        yield ids, target, modality, num_media

    def encoder_input(self, data: bytes, key: str) -> Tensor:
        """What the encoder is given for an image's bytes; cached features as they are."""
        if data[:6] == b"\x93NUMPY":
            return decode_features(data, key, self.tokens_per_item)
        if self.preprocess is None:
            raise BadSample(key, "holds an image, but the stream has no encoder")
        return self.preprocess(decode_image(data, key, self.max_pixels))

    def blank(self, key: str) -> Sample:
        """What stands in for a bad sample: one token, no target, so its weight in every loss is zero."""
        return Sample(
            torch.tensor([self.pad_id]),
            torch.tensor([IGNORED_LABEL]),
            torch.tensor([TEXT]),
            [],
            key,
        )


def read_json(raw: RawSample, key: str) -> dict:
    """The `json` member as a dict, {} without one."""
    if "json" not in raw:
        return {}
    try:
        content = json.loads(raw["json"])
    except ValueError as error:
        raise BadSample(key, f"json member cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise BadSample(key, f"json member is a {type(content).__name__}, not an object")
    return content


def caption_of(raw: RawSample, content: dict, key: str) -> str:
    """The caption of an image: json's "caption", else the `txt` member."""
    caption = content.get("caption")
    if caption is None:
        caption = _utf8(raw.get("txt", b""), key)
    if not isinstance(caption, str) or not caption.strip():
        raise BadSample(key, "image without a caption (json `caption` or a txt member)")
    return " ".join(caption.split())


def _utf8(data: bytes, key: str) -> str:
    try:
        return data if isinstance(data, str) else data.decode()
    except UnicodeDecodeError:
        raise BadSample(key, "text is not UTF-8") from None


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a Hugging Face folder; nothing is fetched.

    Raises:
        ValueError: the folder holds none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except OSError as error:
        raise ValueError(f"base.path={path} holds no tokenizer: {error}") from error
