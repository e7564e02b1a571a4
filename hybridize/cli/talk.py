"""Generation for people: text that appears as it is made, conversations with memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from hybridize.cli.output import Output
from hybridize.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the likeliest."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """For transformers' `generate`; every value is said, so that none comes from the model's folder."""
        if self.temperature == 0:
            sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"max_new_tokens": self.max_new_tokens, **sampling}


class Talker:
    """A loaded model that writes to `output` while it generates.

    Args:
        model: a folder, Hub id or GGUF file; hybrid or not.
        sampling: how tokens are chosen.
        dtype: "auto" or the name of a torch dtype.
        output: where the text goes.
        offline: take Hub files from the cache only.
    """

    def __init__(self, model: str, sampling: Sampling, *, dtype: str, output: Output, offline: bool) -> None:
        import torch

        from hybridize.model.load import load_any, load_tokenizer
        from hybridize.model.precision import computes_bfloat16

        self.sampling = sampling
        self.output = output
        device = "cuda" if torch.cuda.is_available() else "cpu"
        auto = torch.bfloat16 if computes_bfloat16(torch.device(device)) else torch.float32
        chosen = auto if dtype == "auto" else getattr(torch, dtype)
        with output.reporter().task("loading", None):
            # The model first: it registers the hybrid's classes, without which transformers would ask on the terminal
            # whether to run the code that an exported folder carries for others.
            self.model = load_any(model, dtype=chosen, offline=offline).to(device).eval()
            self.tokenizer = load_tokenizer(model, offline=offline)
        torch.manual_seed(sampling.seed)
        self.messages: list[dict[str, str]] = []

    def complete(self, prompt: str) -> dict[str, Any]:
        """Continues a text."""
        import torch

        from hybridize.evaluation.generation import prompt_ids

        self.output.write(prompt)
        tokens = torch.tensor([prompt_ids(self.tokenizer, prompt)])
        return self._generate({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})

    def answer(self, question: str) -> dict[str, Any]:
        """Answers in the conversation so far.

        Raises:
            UsageError: the model's tokenizer has no chat template.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError("this model has no chat template.", where="--chat", hint="Use --prompt instead.")
        self.messages.append({"role": "user", "content": question})
        inputs = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = self._generate(inputs)
        self.messages.append({"role": "assistant", "content": answer["text"]})
        return answer

    def _generate(self, inputs: Any) -> dict[str, Any]:
        import torch
        from transformers import TextStreamer

        output = self.output

        class Stream(TextStreamer):  # type: ignore[misc]
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                output.write(text + ("\n" if stream_end else ""))

        tokens = inputs["input_ids"].to(self.model.device)
        mask = inputs["attention_mask"].to(self.model.device)
        started = time.perf_counter()
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                streamer=Stream(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                pad_token_id=_pad_id(self.tokenizer),
                **self.sampling.arguments(),
            )
        seconds = time.perf_counter() - started
        new = made[0, tokens.shape[1] :]
        output.detail(f"{len(new)} tokens in {seconds:.1f} s ({len(new) / seconds:.1f} tokens/s)")
        return {
            "text": self.tokenizer.decode(new, skip_special_tokens=True),
            "prompt_tokens": int(tokens.shape[1]),
            "new_tokens": len(new),
            "seconds": seconds,
        }


def _pad_id(tokenizer: Any) -> int:
    """The pad token, else the end token, else 0; either may have the number 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
