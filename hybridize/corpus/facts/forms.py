"""The words in which any fact is stated, asked for and repeated; `kinds` has those that fit one kind only."""

from __future__ import annotations

STATEMENTS = (
    "The {label} is {v}.",
    "Note that the {label} is {v}.",
    "Please remember: the {label} is {v}.",
    "For the record, the {label} is {v}.",
    "By the way, the {label} is {v}.",
    "(The {label} is {v}.)",
    "As for the {label}, it is {v}.",
    "{v} is the {label}.",
    "{Label}: {v}",
    "NOTE: {Label}: {v}",
    "# {label} is {v}",
    "- {Label}: {v}",
)
AMONG = (
    "{v} is among the {plural}.",
    "The {plural} include {v}.",
    "{v} belongs to the {plural}.",
    "Also among the {plural}: {v}.",
)
"""State one value of several; `{plural}` is the label for all of them."""

RESTATEMENTS = (
    "As noted above, the {label} is {v}.",
    "To repeat, the {label} is {v}.",
    "Recall that the {label} is {v}.",
    "As stated earlier, the {label} is {v}.",
    "It was said before that the {label} is {v}.",
    "The {label}, as already mentioned, is {v}.",
    "Once again, the {label} is {v}.",
    "So we know that the {label} is {v}.",
    "Looking back, we find that the {label} is {v}.",
    "If you forgot the {label}, it is {v}.",
    "Remember the {label}? It is {v}.",
    "Let us go back to the {label}, which is {v}.",
)
LINES = (
    "{Label}: {v}",
    "{Label} = {v}",
    "{Label} => {v}",
    "{Label} -> {v}",
    "* {Label}: {v}",
    "Noted for the {label}: {v}",
    "{Label} (see above): {v}",
    "| {label} | {v} |",
)
QUESTIONS = (
    "Q: {question}\nA: {v}",
    "Q: {question} A: {v}",
    "{question} {v}.",
    "{question}\n{v}",
    "{question}\n\n{v}",
    "{question} The answer is {v}.",
    "{question} It is {v}.",
    "Test: {question}\nSolution: {v}",
    "User: {question}\nAssistant: {v}",
    "- {question}\n- {v}",
    '"{question}" - "{v}"',
    "> {question}\n\n{v}",
    "FAQ: {question}\n     {v}",
    "Exercise. {question} ({v})",
)
"""With a question of the fact's kind at `{question}`."""

CLOZES = (
    "The {label} is ____. Missing: {v}",
    "Fill in the blank: the {label} is ... {v}",
    "The {label} is [?]\n[?] = {v}",
    "Complete the sentence. The {label} is: {v}",
    "The {label} is (1). (1) {v}",
)
LABEL_QUESTION = ("What is the {label}?", "Tell me the {label}.", "And the {label}?", "What was the {label} again?")

HEADS = (
    "Summary",
    "Recap",
    "To sum up:",
    "Stated above:",
    "Overview",
    "Key points",
    "What to keep in mind:",
    "Checklist",
)
LIST_LINES = ("- {Label}: {v}", "* {Label}: {v}", "+ {Label} = {v}", "{Label}: {v}", "  {Label} ... {v}")
TABLE_HEADS = ("| Item | Value |", "| What | Answer |", "| Fact | As stated |")
QUIZ_LINES = ("({letter}) {question} {v}", "{letter}) {question}\n   {v}", "Q{letter}: {question}\nA{letter}: {v}")
TOGETHER = (
    "As said, {clauses}.",
    "In short, {clauses}.",
    "To keep them apart: {clauses}.",
    "We read above that {clauses}.",
)
"""With "the gate of flight KX 204 is B17 and ..." at `{clauses}`."""

ALL_VALUES = (
    "Q: What are the {plural}?\nA: {values}",
    "All {plural} so far: {values}",
    "The {plural} are {values}.",
    "To repeat, the {plural} are {values}.",
    "Which are the {plural}? {values}.",
    "{plural}: {values}",
)
"""With every value that was stated at `{values}`."""
