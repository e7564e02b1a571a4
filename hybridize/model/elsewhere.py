"""Load an exported folder in a process that cannot import hybridize, and say what it generates.

Run as a script by `export` (and by anyone who doubts): `python -I elsewhere.py DIR`, with a JSON object on
standard input: `{"prompts": [[token ids], ...], "new_tokens": n}`. Prints one JSON object. This is the
only place that runs the code of an exported folder, and that code has just been written by us.
"""

import importlib.abc
import json
import os
import sys
from collections.abc import Sequence
from types import ModuleType


class _Absent(importlib.abc.MetaPathFinder):
    """Makes our packages look as if they were not installed."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname.split(".")[0] in ("hybridize", "hybridize_kernels"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def main() -> int:
    folder = sys.argv[1]
    request = json.load(sys.stdin)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.meta_path.insert(0, _Absent())
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    leaked = sorted(name for name in sys.modules if name.split(".")[0] in ("hybridize", "hybridize_kernels"))
    generated = []
    with torch.no_grad():
        for prompt in request["prompts"]:
            tokens = torch.tensor([prompt])
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=request["new_tokens"],
                do_sample=False,
                pad_token_id=0,
            )
            generated.append(out[0, tokens.shape[1] :].tolist())
    sys.stdout.write(
        "\n" + json.dumps({"class": type(model).__name__, "leaked": leaked, "generated": generated}) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
