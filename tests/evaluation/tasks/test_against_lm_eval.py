"""Our items beside those of lm-evaluation-harness, whose RULER tasks follow NVIDIA's: the same text, numbers apart.

The harness puts `input`, a blank and `gen_prefix` together; its words come from wonderwords, ours from our own list.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from typing import Any

import pytest

from hybridize.evaluation.tasks import make_items
from hybridize.evaluation.tasks.needles import NEEDLES
from hybridize.recipe.probes import RecallProbe
from tests.evaluation.tasks.conftest import PROSE, tokenizer_of

for module in ("lm_eval", "wonderwords", "nltk", "scipy"):
    pytest.importorskip(module)

UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
ENTRY = re.compile(r"\d+\. ")


@pytest.fixture(scope="module")
def ruler() -> Any:
    """The harness's generators. It looks for nltk's sentence model when it is imported, and would fetch it."""
    nltk = pytest.importorskip("nltk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "find", lambda name: name)
        patch.setattr(nltk, "sent_tokenize", lambda text: re.split(r"(?<=\.) ", text))
        from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, vt_utils

    class Generators:
        common, frequent, variables, needles, templates = cwe_utils, fwe_utils, vt_utils, prepare_niah, niah_utils

    return Generators


def ours(task: Any, tokens: int) -> tuple[str, tuple[str, ...]]:
    """Text and answers of an item."""
    tokenizer = tokenizer_of("byte-level")
    settings = RecallProbe(tasks=(task,), lengths=(tokens,), depths=(0.5,), samples=1)
    [item] = make_items(settings, tokenizer, PROSE, seed=0)
    return tokenizer.decode(item.prompt), item.answers


def normal(text: str) -> str:
    """Keys and values by what they are."""
    text = re.sub(UUID, "UUID", text)
    text = re.sub(r"\b\d{7}\b", "NUMBER", text)
    text = re.sub(r"(?<= for )(?!UUID)\S.*?(?= is: (?:NUMBER|UUID))", "KEY", text)
    # A list of keys has commas between them, and an "and".
    return re.sub(
        r"(?<= for )(?!KEY|UUID).*?(?= mentioned in)", lambda m: re.sub(r"(and )?[^,]+", r"\1KEY", m[0]), text
    )


def asked_frame(text: str) -> tuple[str, str]:
    """The instruction, and the question with the beginning of its answer."""
    head, rest = normal(text).split("\n", 1)
    return head, rest[rest.rindex("\n") :]


def harness_needles(ruler: Any, task: str, tokens: int) -> list[dict[str, Any]]:
    spec = NEEDLES[task]
    kind = {"noise": "repeat", "prose": "essay", "needles": "needle"}[spec.haystack]
    hay = " ".join(PROSE).split(" ") if kind == "essay" else ruler.needles.get_haystack(kind)
    samples: list[dict[str, Any]] = ruler.needles.generate_samples(
        hay,
        TOKENIZER=tokenizer_of("byte-level"),
        max_seq_length=tokens,
        template=ruler.templates.TEMPLATE,
        type_haystack=kind,
        type_needle_k="uuids" if task == "niah_multikey_3" else "words",
        type_needle_v=f"{spec.thing}s",
        num_needle_k=1 if spec.num_queries > 1 else spec.num_keys,
        num_needle_v=spec.num_values,
        num_needle_q=spec.num_queries,
        num_samples=2,
    )
    return samples


@pytest.mark.parametrize("task", NEEDLES)
def test_needles_are_asked_for_in_the_same_words(ruler: Any, task: str) -> None:
    text, answers = ours(task, 1500)
    for sample in harness_needles(ruler, task, 1500):
        theirs = f"{sample['input']} {sample['gen_prefix']}"
        assert asked_frame(text) == asked_frame(theirs)
        assert [normal(answer) for answer in answers] == [normal(answer) for answer in sample["outputs"]]


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_haystacks_of_lines_have_the_same_lines(ruler: Any, task: str) -> None:
    text, _ = ours(task, 1500)
    # The last line of ours may be cut.
    lines = Counter(normal(text).split("\n")[1:-2])
    for sample in harness_needles(ruler, task, 1500):
        theirs = Counter(normal(sample["input"]).split("\n")[1:-1])
        assert {*lines} == {*theirs}
        assert [count == 1 for _, count in sorted(lines.items())] == [count == 1 for _, count in sorted(theirs.items())]


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_multiquery"])
def test_haystacks_of_prose_have_the_same_needles(ruler: Any, task: str) -> None:
    needle = r"One of the special magic \w+s for (.*?) is: (\S+)\."
    text, _ = ours(task, 1500)
    keys = Counter(key for key, _ in re.findall(needle, text))
    for sample in harness_needles(ruler, task, 1500):
        theirs = Counter(key for key, _ in re.findall(needle, sample["input"]))
        assert sorted(keys.values()) == sorted(theirs.values())


def split_words(text: str) -> list[str]:
    return [word.strip() for word in ENTRY.split(text)[1:]]


def listed(text: str) -> tuple[str, str, Counter[int]]:
    """What stands before and after a numbered list, and how many words have each frequency."""
    head, entries, tail = text.split("\n")
    return head, tail, Counter(Counter(split_words(entries)).values())


def solved(example: str) -> tuple[tuple[str, str, Counter[int]], list[int]]:
    """The same of an example, and how often the words of its solution stand in the list."""
    question, solution = re.split(r"(?<=are:)", example)
    counts = Counter(split_words(question.split("\n")[1]))
    return listed(question), [counts[word] for word in split_words(solution)]


@pytest.mark.parametrize("tokens", [1500, 4096])
def test_common_words_have_the_same_frequencies(ruler: Any, tokens: int) -> None:
    text, answers = ours("common_words", tokens)
    start = text.index("\nBelow is")
    example, asked = text[:start], text[start + 1 :]
    their_example, their_list, their_answers = ruler.common.generate_input_output(30, tokens)
    assert solved(example) == solved(their_example)

    head, tail, theirs = listed(their_list)
    assert listed(asked)[:2] == (head, tail)
    assert len(answers) == len(their_answers)
    counts = Counter(split_words(asked.split("\n")[1])[:-1])  # the last may be cut
    others = [count for word, count in counts.items() if word not in answers]
    assert theirs == {max(counts.values()): 10, max(others): 20}


@pytest.mark.parametrize("tokens", [600, 2500])
def test_coded_words_have_the_same_frequencies(ruler: Any, tokens: int) -> None:
    text, answers = ours("frequent_words", tokens)
    counts = coded(text)
    total = next(n for n in range(10 * tokens) if int(n / 9 / (math.pi**2 / 6)) == counts[answers[1]])
    totals = range(total, total + 20)
    random.seed(0)
    found = [
        ruler.frequent.generate_input_output(
            10**6, tokenizer_of("byte-level"), num_words=n, vocab_size=max(tokens // 50, 5)
        )
        for n in totals
    ]
    same = [theirs for theirs, *_ in found if sorted(coded(theirs).values()) == sorted(counts.values())]
    assert same, "some number of words gives the same frequencies"
    frame = [re.sub(r"words\. .*\n", "words. CODE\n", version) for version in (text, same[0])]
    assert frame[0] == frame[1]
    assert len(answers) == len(found[0][1]) == 3


def coded(text: str) -> Counter[str]:
    """How often each coded word stands in the text, dots apart: with them ours fills the prompt."""
    code = text.split("coded words. ")[1].split("\n")[0]
    return Counter(word for word in code.split(" ") if word.strip("."))


def test_variables_are_asked_for_in_the_same_words(ruler: Any) -> None:
    text, answers = ours("variable_tracking", 1500)
    asked = text[text.rindex("Memorize") :]
    random.seed(0)
    theirs, their_answers = ruler.variables.generate_input_output(asked.count("The grass"), 1, 4)
    # Theirs puts statements into the lines of noise, and has a slip of the pen.
    theirs = re.sub(r" ?(VAR [A-Z]{5} = (?:VAR [A-Z]{5}|\d{5})) *\n?", r"\1\n", theirs).replace("assgined", "assigned")
    assert len(answers) == len(their_answers) == 5
    one, two = (
        re.sub(r"\b\d{5}\b", "NUMBER", re.sub(r"\b[A-Z]{5}\b", "NAME", version)).strip() for version in (asked, theirs)
    )
    assert one.split("\n")[:2] == two.split("\n")[:2]
    assert one.split("\n")[-1] == two.split("\n")[-1]
    # The last line of ours may be cut.
    assert {*one.split("\n")[2:-2]} == {line.strip() for line in two.split("\n")[2:-1] if line}
