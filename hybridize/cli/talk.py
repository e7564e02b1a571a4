"""Generation for people: text that appears as it is made, documents that are read once, conversations with memory."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridize.cli.output import Output
from hybridize.errors import UsageError

if TYPE_CHECKING:
    from hybridize.inference import Sampling

CHAT_TOKENS = 8192
"""Room for what is still to be said, where layers need any and nobody says how much."""


@dataclass(frozen=True)
class Talking:
    """How a model is set up and how it answers.

    Attributes:
        max_new_tokens: longest answer.
        sampling: how tokens are chosen. seed: of that.
        dtype: "auto" or the name of a torch dtype.
        context_tokens: room for the text in layers whose state grows; None: as much as is asked for.
        chunk_tokens: most tokens of a pass in prefill; None: what suits the device.
    """

    max_new_tokens: int = 128
    sampling: Sampling | None = None
    seed: int = 0
    dtype: str = "auto"
    context_tokens: int | None = None
    chunk_tokens: int | None = None


class Talker:
    """A loaded model that writes to `output` while it generates.

    Args:
        model: a folder, Hub id or GGUF file; hybrid or not.
        talking: how it answers.
        output: where the text goes.
        offline: take Hub files from the cache only.
    """

    def __init__(self, model: str, talking: Talking, *, output: Output, offline: bool) -> None:
        import torch

        from hybridize.model.load import load_any, load_tokenizer
        from hybridize.model.precision import computes_bfloat16

        self.talking = talking
        self.output = output
        device = "cuda" if torch.cuda.is_available() else "cpu"
        auto = torch.bfloat16 if computes_bfloat16(torch.device(device)) else torch.float32
        chosen = auto if talking.dtype == "auto" else getattr(torch, talking.dtype)
        with output.reporter().task("loading", None):
            # The model first: it registers the hybrid's classes, without which transformers would ask on the terminal
            # whether to run the code that an exported folder carries for others.
            self.model = load_any(model, dtype=chosen, offline=offline).to(device).eval()
            self.tokenizer = load_tokenizer(model, offline=offline)
        self._engine: Any = None
        self._saved: Path | None = None
        self._saved_tokens = 0
        self._went_on = False
        """Something was read, to its end."""
        self._messages: list[dict[str, str]] = []
        self._document = ""
        """Opens the next question of a conversation."""
        self._rendered = ""
        """Of a conversation, the text that the state has read."""

    # What is said.

    def restore(self, path: Path) -> None:
        """Goes on from a saved state."""
        from hybridize.inference.saved import look_into

        self._saved_tokens, note = look_into(path)
        self._saved = path
        conversation = json.loads(note.get("conversation", "{}"))
        self._messages = conversation.get("messages", [])
        self._document, self._rendered = conversation.get("document", ""), conversation.get("rendered", "")

    def save(self, path: Path) -> bool:
        """Keeps what was read and written, for `restore`; False where nothing was."""
        if not self._went_on:
            return False
        note = {"messages": self._messages, "document": self._document, "rendered": self._rendered}
        self._engine.save(path, note={"conversation": json.dumps(note, ensure_ascii=False)})
        return True

    def complete(self, prompt: str, *, write: bool = True) -> dict[str, Any]:
        """Reads a text after what was read before, and continues it if it is to write.

        Raises:
            UsageError: what was read before is a conversation.
        """
        from hybridize.evaluation.generation import prompt_ids

        if self._rendered:
            hint = "Add --chat, or read the text without it."
            raise UsageError("the saved state is that of a conversation.", where="--state", hint=hint)
        if self._saved is not None:
            tokens = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        else:
            tokens = prompt_ids(self.tokenizer, prompt)
        self._prepare(self._needed(tokens, write))
        if write:
            self.output.write(prompt)
        said, _ = self._go_on(tokens, write=write)
        return said

    def answer(self, question: str | None, document: str = "") -> dict[str, Any]:
        """Answers in the conversation so far. Without a question, reads the document that will open the next one.

        Raises:
            UsageError: the model's tokenizer has no chat template, or the template changes the document.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError("this model has no chat template.", where="--chat", hint="Use --prompt instead.")
        document = "\n\n".join(part for part in (self._document, document) if part)
        content = "\n\n".join(part for part in (document, question) if part)
        messages = [*self._messages, {"role": "user", "content": content}]
        text = self._template(messages, add_generation_prompt=question is not None)
        if question is None:
            if document not in text:
                hint = "Read it without --chat, or together with a question."
                raise UsageError("the chat template changes the document.", where="--prompt-file", hint=hint)
            text = text[: text.rindex(document) + len(document)]
        if not text.startswith(self._rendered):  # the template says otherwise now what was said: all of it again
            self._forget()
        fresh = self.tokenizer(text[len(self._rendered) :], add_special_tokens=False)["input_ids"]
        said, written = self._go_on(fresh, write=question is not None, chat=True)
        self._rendered = text + written
        self._document = document if question is None else ""
        if question is not None:
            self._messages = [*messages, {"role": "assistant", "content": said["text"]}]
        return said

    def _forget(self) -> None:
        """What was said stays known; what was read of it is read again."""
        self._rendered, self._saved = "", None
        if self._engine is not None:
            self._engine.reset()

    def _template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return text

    # How it is made.

    def _prepare(self, tokens: int, *, chat: bool = False) -> None:
        """Sets the engine up and, where there is one, restores the saved state.

        Where nobody says how much room there is to be, it is that of these tokens; a conversation gets more.
        """
        if self._engine is not None:
            return
        from hybridize.inference import Engine

        more = CHAT_TOKENS if chat else 0
        before = 0 if self._saved is None else self._saved_tokens
        room = self.talking.context_tokens or max(before + tokens + more, 1)
        self._engine = Engine(self.model, batch=1, context_tokens=room, chunk_tokens=self.talking.chunk_tokens)
        self._engine.seed(self.talking.seed)
        if self._saved is not None:
            self._engine.load(self._saved)

    def _needed(self, tokens: Sequence[int], write: bool) -> int:
        return len(tokens) + (self.talking.max_new_tokens if write else 0)

    def _go_on(self, tokens: Sequence[int], *, write: bool, chat: bool = False) -> tuple[dict[str, Any], str]:
        """Reads tokens and, if it is to write, writes an answer; also returns that with its special tokens."""
        from transformers import TextStreamer

        from hybridize.evaluation.generation import end_tokens

        output = self.output

        class Stream(TextStreamer):  # type: ignore[misc]
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                output.write(text + ("\n" if stream_end else ""))

        needed = self._needed(tokens, write)
        self._prepare(needed, chat=chat)
        self._engine.require_room([needed])  # before anything is read: a conversation without room stays as it is
        started = time.perf_counter()
        self._read(tokens)
        read = time.perf_counter()
        output.detail(f"{len(tokens)} tokens read in {read - started:.2f} s")
        said: dict[str, Any] = {"prompt_tokens": len(tokens), "context_tokens": self._engine.lengths[0]}
        written = ""
        if write:
            new = self._write(Stream(self.tokenizer, skip_special_tokens=True), end_tokens(self.model))
            seconds = time.perf_counter() - read
            output.detail(f"{len(new)} tokens in {seconds:.2f} s ({len(new) / seconds:.1f} tokens/s)")
            said |= {"text": self.tokenizer.decode(new, skip_special_tokens=True), "new_tokens": len(new)}
            written = self.tokenizer.decode(new, skip_special_tokens=False)
        self._went_on = True
        return {**said, "read_s": read - started, "seconds": time.perf_counter() - started}, written

    def _read(self, tokens: Sequence[int]) -> None:
        with self.output.reporter().task("reading", len(tokens)) as task:
            self._engine.read([tokens], on_tokens=task.advance)

    def _write(self, stream: Any, ends: Sequence[int]) -> list[int]:
        import torch

        new: list[int] = []
        for (tokens,) in self._engine.write(self.talking.max_new_tokens, self.talking.sampling, ends=ends):
            stream.put(torch.tensor(tokens))
            new += tokens
        stream.end()
        return new
