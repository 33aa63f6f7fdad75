"""moe_ext gives a pretrained sparse mixture-of-experts language model a new modality by adding experts."""

__version__ = "0.1.0"
