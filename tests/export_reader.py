"""What a reader of an exported folder does, in a process of its own that has nothing of ours.

python -I tests/export_reader.py FOLDER...: each holds the folder `folder` and `asked.pt`, and gets
`answers.pt`.
"""

import importlib.abc
import os
import sys

OURS = ("moe_ext", "tests", "deepspeed", "hydra", "omegaconf", "webdataset")


class Blocker(importlib.abc.MetaPathFinder):
    """Refuses our package and what only training needs, installed or not."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            raise ImportError(f"{name} must not be needed")
        return None


def main(folders: list[str]) -> None:
    sys.meta_path.insert(0, Blocker())
    for folder in folders:
        read(folder)


def read(folder: str) -> None:
    import torch
    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(f"{folder}/folder", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/folder")
    given = torch.load(f"{folder}/asked.pt")
    answer = {
        "class": type(model).__name__,
        "trains": any(p.requires_grad for p in model.parameters()),
    }
    inputs = model.inputs_for(tokenizer, given["text"], [Image.new("RGB", (9, 5), "red")])
    with torch.no_grad():
        answer["logits"] = {name: model(**asked).logits for name, asked in given["passes"].items()}
        for cached in (True, False):
            answer["written", cached] = {
                name: model.generate(**asked, max_new_tokens=8, do_sample=False, use_cache=cached)
                for name, asked in given["prompts"].items()
            }
        answer["inputs"], answer["from an image"] = inputs, model(**inputs).logits
    if "page" in given:
        os.chdir(folder)
        exec(given["page"], {"image": Image.new("RGB", (9, 5), "red")})
    answer["ours"] = sorted(name for name in sys.modules if name.partition(".")[0] in OURS)
    torch.save(answer, f"{folder}/answers.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
