"""Text that Python itself carries: documentation, docstrings and code, in two disjoint parts."""

import ast
import functools
import hashlib
import inspect
import sysconfig
from pathlib import Path

KINDS = ("topics", "docstrings", "code")
HELDOUT_SHARE = 0.2


def python_docs(split: str, kind: str = "topics", *, limit: int = 0) -> list[str]:
    """Texts of one kind: `topics` (language reference), `docstrings` or `code` (standard library).

    Train or held-out by a hash of the topic's or module's name. The reference repeats itself across
    topics, so paragraphs of held-out topics are taken out of every training text.

    Args:
        split: `train` or `heldout`.
        limit: texts at most; 0 gives all.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} of the Python documentation must be train or heldout")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} of the Python documentation must be one of {KINDS}")
    texts = _named(kind)
    ordered = sorted(texts, key=_share)
    if split == "heldout":
        return [texts[name] for name in ordered if _is_heldout(name)][: limit or None]
    seen = set()
    for source in ("topics", kind):
        for name, text in _named(source).items():
            if _is_heldout(name):
                seen.update(_paragraphs(text))
    kept = []
    for name in ordered:
        if _is_heldout(name):
            continue
        paragraphs = [p for p in _split(texts[name]) if _bare(p) not in seen]
        seen.update(_paragraphs(texts[name]))  # topics repeat each other: once is enough
        if sum(map(len, paragraphs)) >= 200:
            kept.append("\n\n".join(paragraphs))
        if limit and len(kept) == limit:
            break
    return kept


@functools.cache
def _named(kind: str) -> dict[str, str]:
    if kind == "topics":
        from pydoc_data.topics import topics

        return {name: text.strip() for name, text in topics.items()}
    found = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        if kind == "code":
            found[path.stem] = source
        else:
            tree = ast.walk(ast.parse(source))
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            docs = [
                ast.get_docstring(node, clean=False) for node in tree if isinstance(node, kinds)
            ]
            found[path.stem] = "\n\n".join(inspect.cleandoc(d) for d in docs if d and len(d) > 80)
    return {name: text for name, text in found.items() if len(text) >= 200}


def _is_heldout(name: str) -> bool:
    return _share(name) < HELDOUT_SHARE


def _share(name: str) -> float:
    """In [0, 1), by a hash of the name."""
    return int.from_bytes(hashlib.sha256(f"text {name}".encode()).digest()[:4], "big") / 2**32


def _split(text: str) -> list[str]:
    return [p for p in text.split("\n\n") if p.strip()]


def _bare(paragraph: str) -> str:
    """A paragraph without its line breaks and indentation."""
    return " ".join(paragraph.split())


def _paragraphs(text: str) -> list[str]:
    return [bare for bare in map(_bare, _split(text)) if len(bare) >= 24]
