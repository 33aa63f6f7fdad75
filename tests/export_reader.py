"""What a reader of an exported folder does, in a process of its own that has nothing of ours.

python -I tests/export_reader.py FOLDER ASKED.pt ANSWERS.pt
"""

import importlib.abc
import sys

OURS = ("moe_ext", "tests", "deepspeed", "hydra", "omegaconf", "webdataset")


class Blocker(importlib.abc.MetaPathFinder):
    """Refuses our package and what only training needs, installed or not."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            raise ImportError(f"{name} must not be needed")
        return None


def main(folder: str, asked: str, answers: str) -> None:
    sys.meta_path.insert(0, Blocker())
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    given = torch.load(asked)
    answer = {
        "class": type(model).__name__,
        "trains": any(p.requires_grad for p in model.parameters()),
    }
    with torch.no_grad():
        answer["logits"] = {
            name: model(**inputs).logits for name, inputs in given["passes"].items()
        }
        for cached in (True, False):
            answer["written", cached] = {
                name: model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=cached)
                for name, inputs in given["prompts"].items()
            }
    from PIL import Image

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = model.inputs_for(tokenizer, given["text"], [Image.new("RGB", (9, 5), "red")])
    answer["from an image"] = model(**inputs).logits.detach()
    answer["inputs"] = inputs
    answer["ours"] = sorted(name for name in sys.modules if name.partition(".")[0] in OURS)
    torch.save(answer, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
