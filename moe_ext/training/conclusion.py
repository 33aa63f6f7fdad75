"""Around the chain: text before it, and after it held-out data, text and who does the work.

Each part is written to evaluation.json when it is known; a part that is there is not measured again.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError

from moe_ext.analysis.evaluate import evaluate, expert_use
from moe_ext.analysis.heldout import load_items
from moe_ext.analysis.lookup import load_lookup
from moe_ext.analysis.run_folder import load_run, record_evaluation
from moe_ext.analysis.text import text_loss, text_rows
from moe_ext.data import Manifest, python_docs
from moe_ext.model.extend import extension_state
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.training.build import heldout_manifest
from moe_ext.training.checkpoint import Published
from moe_ext.training.closed_form import FEATURES_FILE
from moe_ext.training.run import Run, peak_memory
from moe_ext.training.stages import stage_model

STEP0_ITEMS = 48
"""Held-out pairs on which the use of experts at step 0 is counted."""


def known_parts(run: Run) -> dict[str, Any]:
    return load_run(run.folder).evaluation


def record(run: Run, **parts: Any) -> None:
    """Write parts of evaluation.json on rank 0, the kinds of `experts` side by side."""
    run.check_owner()
    if run.topology.rank != 0:
        return
    if "experts" in parts:
        parts["experts"] = known_parts(run).get("experts", {}) | parts["experts"]
    record_evaluation(run.folder, **parts)


def text_ids(run: Run) -> torch.Tensor:
    """Rows of held-out text: Python's documentation."""
    texts = python_docs("heldout")
    return text_rows(texts, run.prepared.build.encode, run.config.evaluation.text_tokens)


def measure_text_before(run: Run, again: bool = False) -> None:
    """Loss and hash of the base's logits on held-out text, without any extension; once, unless `again`.

    Another number of ranks rounds otherwise: a hash is the base's of the same placement.
    """
    if "text_before" in agreed_parts(run) and not again:
        return
    began = time.perf_counter()
    run.tracker.say("held-out text on the base")
    model = stage_model(run, None)
    result = text_loss(model, text_ids(run), run.ranks, progress=leave_if_asked(run))
    record(run, text_before=result)
    took(run, "text before", began)


def measure_step0(run: Run, model: MultimodalMoE) -> None:
    """Who does the work in the extended model before its first step."""
    path = heldout_manifest(run.config)
    if path is None:
        return
    manifest = Manifest.load(path)
    items = load_items(manifest, "heldout", STEP0_ITEMS)
    use = expert_use(
        model,
        run.prepared.build,
        items,
        text_ids(run)[:8],
        run.ranks,
        progress=leave_if_asked(run),
    )
    record(run, experts={"step0": use})


def leave_if_asked(run: Run) -> Callable[[int, int], None]:
    """A `progress` of analysis, called after every pass on all ranks: there a request to stop is heard."""
    return lambda done, total: run.leave_if_asked()


def last_model(run: Run) -> MultimodalMoE:
    """The model with the result of the chain's last stage."""
    last = run.result(run.config.chain[-1])
    assert last is not None
    return stage_model(run, Published(last))


def evaluate_run(run: Run, model: MultimodalMoE, again: bool = False) -> None:
    """Evaluate the chain's last model on held-out data and text; once, unless `again`."""
    if "text_after" in agreed_parts(run) and not again:
        return
    began = time.perf_counter()
    path = heldout_manifest(run.config)
    if path is None:
        run.tracker.say("no held-out stream (data.streams.heldout): nothing is evaluated")
        return
    lookup = None
    try:
        lookup = load_lookup(run.folder / FEATURES_FILE, run.prepared.build.tokenizer.decode)
    except (OSError, SafetensorError):
        run.tracker.say("no features of a closed-form start: the look-up reference is left out")

    with run.tracker.progress("evaluate", 1) as show:

        def progress(what: str, done: int, total: int) -> None:
            show(done, what, total=total)
            run.leave_if_asked()

        parts = evaluate(
            model,
            run.prepared.build,
            Manifest.load(path),
            text_ids(run),
            candidates=run.config.evaluation.candidates,
            captions=run.config.evaluation.captions,
            splits=run.config.evaluation.splits,
            lookup=lookup,
            extension=run.config.extension.name,
            ranks=run.ranks,
            progress=progress,
        )
    record(run, **parts)
    took(run, "evaluate", began)


def agreed_parts(run: Run) -> dict[str, Any]:
    """What evaluation.json holds, as rank 0 sees it."""
    found: list[Any] = [known_parts(run) if run.topology.rank == 0 else None]
    if run.topology.world_size > 1:
        torch.distributed.broadcast_object_list(found, 0)
    return found[0]


def took(run: Run, what: str, began: float) -> None:
    run.tracker.stage(
        {
            "stage": what,
            "kind": "evaluate",
            "steps": 0,
            "minutes": (time.perf_counter() - began) / 60,
            "peak_memory_bytes": peak_memory(run.topology),
        }
    )


def gather_extension(run: Run, model: MultimodalMoE) -> dict[str, torch.Tensor]:
    """New experts, rows and calibrations of the last result, whole, from all ranks' files, each in the
    precision that `model` has it in (rows beside fp32 routers are fp32)."""
    last = run.result(run.config.chain[-1])
    assert last is not None
    source, held = Published(last), extension_state(model.lm)
    names = [name for name in source.tensors if name.startswith("layers.")]
    dtypes = {name: held[name].dtype if name in held else run.prepared.dtype for name in names}
    return {name: source.tensor(name).to(dtypes[name]) for name in names}
