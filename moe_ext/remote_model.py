"""The class that an exported folder brings along: base and extension as one Hugging Face model.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer("Once", return_tensors="pt"))
    model.generate(**model.inputs_for(tokenizer, "A picture of", [image]), max_new_tokens=20)

In the folder this file is `modeling_moe_ext.py`; beside it lie the modules that it imports.

Shape letters: B sequences, S positions of this pass, L positions so far, M images.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moe_ext.batch import Batch
from moe_ext.export import TENSORS, load_extension, read_manifest
from moe_ext.model.connectors import Connector
from moe_ext.model.context import RoutingContext
from moe_ext.model.encoders import build_encoder
from moe_ext.model.load import load_base
from moe_ext.model.multimodal import MultimodalMoE


class MoeExtForCausalLM:
    """`from_pretrained` gives an instance of the base's own class, extended."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """What transformers calls before it loads; there is nothing to register."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *_: Any,
        config: Any = None,
        dtype: Any = None,
        device_map: Any = None,
        check_base: bool = True,
        revision: str | None = None,
        **__: Any,
    ) -> Any:
        """The extended model, frozen, in evaluation mode.

        Args:
            folder: an exported folder, or its name on the Hugging Face Hub.
            dtype: of the weights; None or "auto" is what the folder says.
            device_map: one device ("cuda", "cpu", 0); None is the CPU.
            check_base: hash the base's files and compare; False trusts the folder.

        Raises:
            ValueError: a damaged folder, or a `device_map` of several devices.
        """
        path = Path(folder)
        if not path.is_dir():
            from huggingface_hub import snapshot_download

            path = Path(
                snapshot_download(str(folder), revision=getattr(revision, "initial", revision))
            )
        settings = config.moe_ext
        if dtype in (None, "auto"):
            dtype = settings["dtype"]
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if isinstance(device_map, dict) or device_map in ("balanced", "sequential"):
            raise ValueError(
                f"device_map={device_map!r}: this model lies on one device; name it, for example "
                'device_map="cuda"'
            )
        if device_map == "auto":
            device_map = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device("cpu" if device_map is None else device_map)
        lm: Any = load_base(path / "base", dtype=dtype, device=device)
        encoders, connectors = _modalities(path, settings["encoders"], lm, dtype)
        load_extension(
            lm,
            path / "extension",
            connectors=connectors if connectors else None,
            check_base=check_base,
        )
        lm.encoders = nn.ModuleDict({str(m): encoder for m, encoder in encoders.items()}).to(device)
        lm.connectors = connectors.to(device)
        # not as a submodule: it holds the model, which would hold itself
        object.__setattr__(lm, "multimodal", MultimodalMoE(lm, encoders, connectors))
        lm.__class__ = type(f"MoeExt{type(lm).__name__}", (WithModalities, type(lm)), {})
        return lm.requires_grad_(False).eval()


def _modalities(
    path: Path, settings: dict[str, Any], lm: Any, dtype: torch.dtype
) -> tuple[dict[int, nn.Module], nn.ModuleDict]:
    """Modality id -> encoder, and the connectors, still without their weights."""
    encoders: dict[int, nn.Module] = {}
    connectors = nn.ModuleDict()
    names = read_manifest(path / "extension")["connectors"]
    if not settings:  # exported without encoders: the connectors' weights stay in the file
        return encoders, connectors
    with safe_open(path / "extension" / TENSORS, framework="pt") as tensors:
        for modality, name in enumerate(names, start=1):
            known = {k: v for k, v in settings[name].items() if k != "path"}
            place = str(path / settings[name]["path"])
            encoder: Any = build_encoder(path=place, **known, dtype=dtype)
            encoders[modality] = encoder
            (hidden_dim,) = tensors.get_slice(f"connectors.{name}.hidden_bias").get_shape()
            sizes = (encoder.feature_dim, hidden_dim, lm.config.hidden_size)
            connectors[name] = Connector(*sizes, dtype=dtype)
    return encoders, connectors


class WithModalities:
    """Over a Hugging Face causal language model: which token is an image's, and its features."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        modality_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the base's, with two inputs more.

        Args:
            attention_mask: (B, L), 0 on padding; padding is routed nowhere.
            modality_ids: (B, L or less) int64: 0 on text, 1, 2, ... on placeholders of a modality;
                positions that it lacks at the end are text. None: all is text.
            pixel_values: (M, 3, H, W), one a run of placeholders of modality 1, in row-major order.
        """
        given: Any = inputs_embeds if input_ids is None else input_ids
        batch, length = given.shape[:2]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        kinds_BL = given.new_zeros(batch, past + length, dtype=torch.int64)
        if modality_ids is not None:
            kinds_BL[:, : modality_ids.shape[1]] = modality_ids
        real_BS = given.new_ones(batch, length, dtype=torch.int64)
        if attention_mask is not None and attention_mask.dim() == 2:
            real_BS = attention_mask[:, -length:].long()
        kinds_BS, before = kinds_BL[:, past:], kinds_BL[:, :past]
        seen_B = {m: (before == m).any(1) for m in self.multimodal.modality_of.values()}  # type: ignore[attr-defined]
        context = RoutingContext(kinds_BS * real_BS, real_BS, seen_B=seen_B)
        if pixel_values is not None:
            # padded rows are no placeholders: a batch's own ids say which positions are images'
            media = Batch(given, given, kinds_BS * real_BS, real_BS, given, {1: pixel_values})
            inputs_embeds, input_ids = self.multimodal.embed(media), None  # type: ignore[attr-defined]
        with self.context_holder.during(context):  # type: ignore[attr-defined]
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        modality_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Images go in once, with the prompt; what kind the prompt's tokens are is told every time."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        inputs["modality_ids"] = modality_ids
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs

    def inputs_for(self, tokenizer: Any, text: str, images: list[Any]) -> dict[str, Tensor]:
        """Inputs of one sequence: the PIL images' placeholders, then the text, as in training."""
        encoder: Any = self.encoders["1"]  # type: ignore[attr-defined]
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        start = tokenizer("a").input_ids[:1]
        start = start if start == [tokenizer.bos_token_id] else []
        words = tokenizer(text, add_special_tokens=False).input_ids
        run = len(images) * encoder.tokens_per_item
        ids = torch.tensor([[*start, *[pad] * run, *words]], device=self.device)  # type: ignore[attr-defined]
        kinds = torch.zeros_like(ids)
        kinds[:, len(start) : len(start) + run] = 1
        pixels = torch.stack([encoder.preprocess(image) for image in images]).to(ids.device)
        mask = torch.ones_like(ids)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "modality_ids": kinds,
            "pixel_values": pixels,
        }

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: the folder it came from is the saved form.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "an exported model is saved by copying its folder: base/ and extension/ stay apart, so that "
            "the extension can be taken out again"
        )
