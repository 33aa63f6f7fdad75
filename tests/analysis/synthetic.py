"""A run folder with realistic shapes and invented numbers, for the report's tests.

`python -m tests.analysis.synthetic FOLDER` writes one to look at.
"""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

NAMES = ["red heart", "snowman", "green apple", "man with white cane", "flag: Peru", "violin", "woman surfing",
         "teddy bear", "four leaf clover", "night with stars", "high-speed train", "hot pepper", "owl", "lemon",
         "open book", "sailboat"]  # fmt: skip
LAYERS = list(range(1, 30, 3))
CHOSEN = [1, 7, 16, 22, 28]


def write_run(folder: Path, seed: int = 0, num_experts: int = 4) -> Path:
    """Writes config.json, metrics.jsonl, probe.json and evaluation.json."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "name": "demo",
        "seed": seed,
        "extension": {"name": "vision"},
        "data": {"builtin": "openmoji"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for stage, steps, start, end in (
        ("align", 120, 4.2, 2.2),
        ("probe", 40, 2.3, 2.0),
        ("tune", 250, 2.3, 0.8),
    ):
        for step in range(1, steps + 1):
            loss = end + (start - end) * np.exp(-4 * step / steps) + rng.normal(0, 0.12)
            record = {"stage": stage, "step": step, "time_s": 1.1 * step, "grad_norm": 1.0, "learning_rate": 1e-3,
                      "tokens_per_s": 410.0, "data_wait_s": 0.01, "loss": {"nll": float(loss)}}  # fmt: skip
            if stage != "align":
                record["loss"]["balance"] = float(
                    1.02 + 0.3 * np.exp(-step / 30) + rng.normal(0, 0.01)
                )
            if stage == "tune":
                share = 0.33 - 0.2 * np.exp(-step / 60) + rng.normal(0, 0.01)
                record["new_share"] = {"image": float(share), "text": float(0.8 * share)}
            lines.append(record)
    trainable = {"align": 2_886_208, "probe": 23_040, "tune": 16_161_889}
    for stage, kind, steps, minutes, speed in (
        ("upcycle", "prepare", 0, 0.8, None), ("align", "train", 120, 2.1, 412.0), ("probe", "probe", 40, 0.9, 388.0),
        ("extend", "extend", 0, 0.1, None), ("tune", "train", 250, 4.6, 396.0), ("evaluate", "evaluate", 0, 1.2, None),
    ):  # fmt: skip
        lines.append({"event": "stage", "stage": stage, "kind": kind, "steps": steps, "minutes": minutes,
                      "tokens_per_s": speed, "trainable_parameters": trainable.get(stage),
                      "total_parameters": 232_411_488 if stage in trainable else None,
                      "peak_memory_bytes": [int(2.1 * 2**30), int(2.0 * 2**30)]})  # fmt: skip
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"half'
    )
    (folder / "probe.json").write_text(json.dumps(_probe(rng, num_experts)))
    (folder / "evaluation.json").write_text(json.dumps(_evaluation(rng, num_experts)))
    return folder


def _counts(rng, num: int) -> list[int]:
    return [int(c) for c in rng.dirichlet(np.full(num, 2.5)) * 4608]


def _probe(rng, num_experts: int) -> dict:
    layers = [{"layer": layer, "num_experts": num_experts, "chosen": layer in CHOSEN,
               "shift": float(rng.uniform(0.05, 0.11) if layer in CHOSEN else rng.uniform(0.004, 0.045)),
               "count_before": {"1": _counts(rng, num_experts)}, "count_after": {"1": _counts(rng, num_experts)},
               "source_before": 1, "source_after": int(rng.integers(num_experts))} for layer in LAYERS]  # fmt: skip
    plans = [{"layer": x["layer"], "num_new": 1, "sources": [x["source_after"]], "bias": [float(rng.normal(-0.4, 0.2))],
              "step0": {"affected_share": 0.25, "evicted_share": 0.04, "new_share": 0.125}}
             for x in layers if x["chosen"]]  # fmt: skip
    return {
        "base_sha256": "b7" * 32,
        "samples": 256,
        "layer_share": 0.5,
        "layers": layers,
        "plans": plans,
    }


def _evaluation(rng, num_experts: int) -> dict:
    digest = "5f3a9c17" * 8
    layers = []
    for layer in LAYERS:
        new = 1 if layer in CHOSEN else 0
        layers.append({"layer": layer, "num_frozen": num_experts, "num_new": new, "count": {
            "image tokens": _counts(rng, num_experts + new), "caption tokens": _counts(rng, num_experts + new),
            "text alone": _counts(rng, num_experts) + [0] * new}})  # fmt: skip
    parts = {
        "text_before": {"nll": 3.10421, "tokens": 8192, "logits_sha256": digest},
        "text_after": {"nll": 3.10421, "tokens": 8192, "logits_sha256": digest},
        "text_joint": {"nll": 3.11874, "tokens": 8192, "logits_sha256": "c0ffee12" * 8},
        "experts": {"trained": {"layers": layers}},
        "gallery": [_shot(rng, i, name) for i, name in enumerate(NAMES)],
    }
    for split, quality in (("heldout", 6.5), ("heldout_concept", 3.2)):
        score = rng.normal(0, 2.2, (60, 60)) + quality * np.eye(60)
        right = score.argmax(1) == np.arange(60)
        top5 = (score >= np.sort(score, 1)[:, -5:-4])[np.arange(60), np.arange(60)]
        result = {
            "at_1": float(right.mean()),
            "at_1_error": 0.058,
            "at_5": float(top5.mean()),
            "at_5_error": 0.032,
        }
        parts[split] = {"candidates": 60, "score": "log p(caption | image) - log p(caption)",
                        "image_to_caption": result, "caption_to_image": result, "nll_right": 6.7, "nll_wrong": 21.9,
                        "exact_captions": 19, "captions_written": 60,
                        "nearest_neighbour": {"neighbours": 8, "train_images": 3583, "at_1": 0.28, "at_5": 0.45}, "score_IC": score.round(2).tolist()}  # fmt: skip
    return parts


def _shot(rng, i: int, name: str) -> dict:
    image = Image.new("RGB", (144, 144), "white")
    color = tuple(int(c) for c in rng.integers(60, 240, 3))
    ImageDraw.Draw(image).ellipse((24, 24, 120, 120), fill=color, outline="black", width=4)
    file = io.BytesIO()
    image.save(file, "PNG")
    written = name if i % 3 == 0 else NAMES[(i + 5) % len(NAMES)]
    return {"key": str(i), "split": "heldout" if i < 10 else "heldout_concept", "truth": name, "written": written, "exact": written == name,
            "rank": 1 + i % 4, "image": base64.b64encode(file.getvalue()).decode()}  # fmt: skip


if __name__ == "__main__":
    print(write_run(Path(sys.argv[1])))
