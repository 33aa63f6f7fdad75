"""Put extensions into a pretrained model and take them out again."""

from moe_ext.model.files import base_sha256
from moe_ext.model.load import extended_layers, load_base

__all__ = ["base_sha256", "extended_layers", "load_base"]
