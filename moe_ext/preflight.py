"""What can be told from the files at hand before any process group exists: one line, or nothing."""

from moe_ext.beside import check_beside
from moe_ext.config import FrozenFormat, TrainConfig
from moe_ext.config_check import check_paths
from moe_ext.model.fits import check_fits
from moe_ext.model.nf4 import check_installed
from moe_ext.planning.sizes import base_config


def check_files(config: TrainConfig) -> None:
    """Raise ValueError for files that are missing, a base without the layers, experts or widths that are
    named, and extensions that cannot stand beside the run's.

    A base that is to be upcycled is compared when it is there (`training.build.prepare`).
    """
    check_paths(config)
    if config.base.frozen_format is FrozenFormat.nf4:
        check_installed()
    if config.base.path:
        check_fits(config, base_config(config.base.path))
    if config.beside or config.beside_bias:
        check_beside(config)
