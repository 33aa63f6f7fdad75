"""An offline W&B run, read back by W&B's own reader."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Every record of one `offline-run-*` folder, in order; `type` names what each holds."""
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def history_of(folder: Path) -> list[dict[str, Any]]:
    """The rows that were logged."""
    return [r["history"]["item"] for r in records_of(folder) if r["type"] == "history"]
