"""What is in a set of shards: a check of every byte, and a page of pictures with their captions."""

import base64
import html
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .images import decode_image, image_members
from .manifest import Manifest, file_sha256
from .order import permutation
from .samples import caption_of, read_json
from .shards import BadSample, Local, RawSample, ShardError, ShardFiles, index_tar, local_path


@dataclass
class Findings:
    """What `check` found; `problems` is empty for a sound set."""

    num_shards: int = 0
    num_samples: int = 0
    num_images: int = 0
    splits: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def check(manifest: Manifest, *, decode: bool = True, local: Local = local_path) -> Findings:
    """Reads every shard: size, hash, number and places of samples, and (`decode`) every image and JSON."""
    found = Findings()
    files = ShardFiles(manifest, local=local)
    for number, shard in enumerate(manifest.shards):
        url, first = manifest.url(number), int(manifest.starts[number])
        found.num_shards += 1
        try:
            path = local(url, shard)
            if file_sha256(path) != shard.sha256:
                found.problems.append(f"{url}: its SHA-256 is not the manifest's")
            index = index_tar(path)
            rows = range(first, first + shard.num_samples)
            places = [(int(manifest.offset_N[i]), int(manifest.nbytes_N[i])) for i in rows]
            if [(offset, nbytes) for _, offset, nbytes in index] != places:
                found.problems.append(
                    f"{url}: {len(index)} samples found, {shard.num_samples} expected, or at other places"
                )
        except (OSError, ShardError) as error:
            found.problems.append(f"{url}: {error}")
            continue
        for sample in rows:
            found.num_samples += 1
            found.splits[manifest.split_names[manifest.split_N[sample]]] += 1
            try:
                raw = files.read(sample)
                if decode:
                    found.num_images += _decode_all(raw)
            except BadSample as error:
                found.problems.append(f"{url}#{sample - first} {error}")
    return found


def _decode_all(raw: RawSample) -> int:
    key = str(raw["__key__"])
    read_json(raw, key)
    names = image_members(raw)
    for name in names:
        decode_image(raw[name], key)
    return len(names)


def contact_sheet(
    manifest: Manifest,
    *,
    split: str = "all",
    count: int = 96,
    seed: int = 0,
    pixels: int = 160,
    local: Local = local_path,
) -> str:
    """One self-contained HTML page of `count` samples drawn evenly from a split."""
    chosen = manifest.select(split)
    drawn = chosen[permutation(len(chosen), seed)[:count]]
    files = ShardFiles(manifest, local=local)
    cards = []
    for sample in drawn.tolist():
        try:
            cards.append(_card(files.read(sample), pixels))
        except BadSample as error:
            cards.append(
                f'<figure class="bad"><figcaption>{html.escape(str(error))}</figcaption></figure>'
            )
    info = manifest.info
    title = html.escape(
        f"{Path(manifest.base).name or 'shards'}: {split}, {len(drawn)} of {len(chosen)}"
    )
    credit = html.escape(" · ".join(str(info[k]) for k in ("attribution", "licence") if k in info))
    return PAGE.format(title=title, credit=credit, cards="\n".join(cards), pixels=pixels)


def _card(raw: RawSample, pixels: int) -> str:
    key = str(raw["__key__"])
    content = read_json(raw, key)
    pictures = []
    for name in image_members(raw):
        image = decode_image(raw[name], key)
        image.thumbnail((pixels * 2, pixels * 2))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=85)
        data = base64.b64encode(out.getvalue()).decode()
        pictures.append(f'<img src="data:image/jpeg;base64,{data}" alt="">')
    if "conversations" in content:
        turns = [t for t in content["conversations"] if isinstance(t, dict)]
        text = "<br>".join(
            f"<b>{html.escape(str(t.get('from', t.get('role'))))}</b> "
            f"{html.escape(str(t.get('value', t.get('content'))))[:400]}"
            for t in turns
        )
    elif pictures:
        text = html.escape(caption_of(raw, content, key))
    else:
        plain = content.get("text") or raw.get("txt", b"") or json.dumps(content)
        text = html.escape(
            (plain if isinstance(plain, str) else plain.decode(errors="replace"))[:400]
        )
    return f"<figure>{''.join(pictures)}<figcaption>{text}<small>{html.escape(key)}</small></figcaption></figure>"


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
:root {{ color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif }}
body {{ margin: 2rem; background: #f6f6f4; color: #222 }} h1 {{ font-size: 1.2rem; margin: 0 }}
p {{ color: #777; margin: .2rem 0 1.2rem }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({pixels}px, 1fr)); gap: 12px }}
figure {{ margin: 0; padding: 10px; background: #fff; border: 1px solid #ddd; border-radius: 8px }}
figure.bad {{ border-color: #c33 }} img {{ width: 100%; border-radius: 4px }}
figcaption {{ overflow-wrap: anywhere }} small {{ display: block; color: #999; font-size: 11px }}
@media (prefers-color-scheme: dark) {{ body {{ background: #1b1b1d; color: #ddd }}
figure {{ background: #26262a; border-color: #3a3a40 }} }}
</style><h1>{title}</h1><p>{credit}</p><main>
{cards}
</main></html>
"""
