"""Conversations, in LLaVA's form, as pieces of text and images with the answers marked.

Every turn and every image is kept: {"conversations": [{"from": "human", "value": "<image>\\nWhat?"},
{"from": "gpt", "value": "..."}, ...]}. The tokenizer's own chat template renders them when it has
one; where answers begin and end is found by rendering ever longer prefixes, so any template works.
"""

from dataclasses import dataclass
from typing import Any

from .shards import BadSample

MARK = "<image>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Piece:
    """A stretch of a sequence: text, an image, or the end token."""

    text: str
    target: bool = False
    image: bool = False
    end: bool = False


def render(turns: list, *, num_images: int, tokenizer: Any, key: str) -> list[Piece]:
    """Pieces of a conversation; `tokenizer` None: plain "question answer" text without a template.

    Raises:
        BadSample: turns are malformed, end without an answer, or marks and images differ in number.
    """
    messages = _messages(turns, key)
    marks = sum(m["content"].count(MARK) for m in messages)
    if marks == 0 and num_images:  # LLaVA's pretraining files leave the mark out at times
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = (MARK + "\n") * num_images + first["content"]
        marks = num_images
    if marks != num_images:
        raise BadSample(key, f"{marks} {MARK} marks for {num_images} images")
    if any(MARK in m["content"] for m in messages if m["role"] == "assistant"):
        raise BadSample(key, f"an answer holds an {MARK} mark")
    spans = _plain(messages) if tokenizer is None else _templated(messages, tokenizer, key)
    pieces = []
    for text, target in spans:
        for i, part in enumerate(text.split(MARK)):
            if i:
                pieces.append(Piece("", image=True))
            if part:
                pieces.append(Piece(part, target=target))
        if target and tokenizer is None:
            pieces.append(Piece("", target=True, end=True))
    return pieces


def _messages(turns: list, key: str) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for turn in turns if isinstance(turns, list) else []:
        role = (
            ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, dict) else None
        )
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if role is None or not isinstance(text, str):
            raise BadSample(
                key, f"turn {len(messages)} of the conversation has no known role and text"
            )
        messages.append({"role": role, "content": text})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # a question that nobody answered teaches nothing
    spoken = [m["role"] for m in messages if m["role"] != "system"]
    if spoken[:1] != ["user"]:
        raise BadSample(key, "conversation holds no question followed by an answer")
    return messages


def _plain(messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
    return [
        (" " + m["content"].strip(), True)
        if m["role"] == "assistant"
        else (m["content"] + "\n", False)
        for m in messages
    ]


def _templated(messages: list[dict[str, str]], tokenizer: Any, key: str) -> list[tuple[str, bool]]:
    """(text, is an answer) spans of the rendered conversation; an answer includes its end mark."""

    def text(upto: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:upto], tokenize=False, add_generation_prompt=prompt
        )

    whole = text(len(messages), False)
    spans, at = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = text(i, True), text(i + 1, False)
        after = after.rstrip()  # the line break behind the end mark is not the model's to say
        if not (
            whole.startswith(before) and whole.startswith(after) and at <= len(before) < len(after)
        ):
            raise BadSample(
                key, "the chat template rewrites earlier turns; set base.chat_template=false"
            )
        spans += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
        at = len(after)
    return spans
