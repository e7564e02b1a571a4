"""Facts of shops, factories, money and law."""

from __future__ import annotations

from hybridize.corpus.facts.kinds.kind import Kind

TRADE = (
    Kind(
        "commerce",
        "invoice",
        "money",
        "total of invoice {e}",
        (
            "Invoice {e} comes to {v}.",
            "The total of invoice {e} is {v}, to be paid at once.",
            "We received {v} for invoice {e}.",
        ),
        (
            "To how much does invoice {e} come?",
            "What was received for invoice {e}?",
        ),
        ("The amount due on invoice {e} is {v}.",),
    ),
    Kind(
        "commerce",
        "invoice",
        "date",
        "due date of invoice {e}",
        (
            "Invoice {e} is due on {v}.",
            "Payment of invoice {e} is expected by {v}.",
            "After {v}, a fee is added to invoice {e}.",
        ),
        (
            "When is invoice {e} due?",
            "By which date is payment of invoice {e} expected?",
        ),
        ("The last day to pay invoice {e} is {v}.",),
    ),
    Kind(
        "commerce",
        "product",
        "money",
        "price of the {e}",
        (
            "The {e} costs {v}.",
            "For {v} you can take the {e} home.",
            "In the catalogue, the {e} is listed at {v}.",
        ),
        (
            "How much does the {e} cost?",
            "At what price is the {e} listed?",
        ),
        ("A {e} sells for {v}.",),
    ),
    Kind(
        "commerce",
        "company",
        "grouped_number",
        "turnover of {e} in thousands",
        (
            "{e} reported a turnover of {v} thousand.",
            "Last year {e} took in {v} thousand in all.",
            "The turnover of {e} rose to {v} thousand.",
        ),
        (
            "How many thousand did {e} take in last year?",
            "To how many thousand did the turnover of {e} rise?",
        ),
        ("In thousands, the turnover of {e} stands at {v}.",),
    ),
    Kind(
        "commerce",
        "company",
        "long_number",
        "account number of {e}",
        (
            "The account of {e} has the number {v}.",
            "Please transfer the sum to {e}, account {v}.",
            "{e} banks under the account number {v}.",
        ),
        (
            "To which account number are sums for {e} transferred?",
            "Under which account number does {e} bank?",
        ),
        ("Money for {e} goes to account {v}.",),
    ),
    Kind(
        "industry",
        "product",
        "code",
        "part number of the {e}",
        (
            "The part number of the {e} is {v}.",
            "Order the {e} under part number {v}.",
            "Part {v} is a replacement for the {e}.",
        ),
        (
            "Under which part number is the {e} ordered?",
            "Which part replaces the {e}?",
        ),
        ("In the parts list, the {e} stands as {v}.",),
        plural="spare parts of the {e}",
    ),
    Kind(
        "industry",
        "product",
        "long_number",
        "serial number of the {e}",
        (
            "The {e} on our bench bears the serial number {v}.",
            "Stamped on the {e} is the number {v}.",
            "Serial number {v} identifies the {e}.",
        ),
        (
            "What serial number does the {e} bear?",
            "Which number is stamped on the {e}?",
        ),
        ("The number on the plate of the {e} reads {v}.",),
    ),
    Kind(
        "industry",
        "company",
        "material",
        "material used by {e}",
        (
            "{e} makes everything of {v}.",
            "The works of {e} need {v} by the cartload.",
            "For its frames, {e} trusts in {v}.",
        ),
        (
            "Of what does {e} make everything?",
            "What material do the works of {e} need?",
        ),
        ("What {e} builds with is {v}.",),
        plural="materials used by {e}",
    ),
    Kind(
        "logistics",
        "sample",
        "place",
        "destination of {e}",
        (
            "The crate with {e} goes to {v}.",
            "We shipped {e} to {v} by rail.",
            "{v} is waiting for {e}.",
        ),
        (
            "Where was {e} shipped?",
            "To which place does the crate with {e} go?",
        ),
        ("The crate that holds {e} is bound for {v}.",),
    ),
    Kind(
        "logistics",
        "sample",
        "code",
        "shelf of {e}",
        (
            "In the store, {e} lies on shelf {v}.",
            "Shelf {v} holds {e} and nothing else.",
            "Put {e} back on shelf {v} after use.",
        ),
        (
            "On which shelf does {e} lie?",
            "Where in the store must {e} be put back?",
        ),
        ("Look for {e} on shelf {v}.",),
    ),
    Kind(
        "law",
        "company",
        "person",
        "lawyer of {e}",
        (
            "{e} is represented by {v}.",
            "{v} signed the contract for {e}.",
            "In court, {v} spoke on behalf of {e}.",
        ),
        (
            "Who spoke on behalf of {e}?",
            "By whom is {e} represented?",
        ),
        ("The one who signs for {e} is {v}.",),
        plural="directors of {e}",
    ),
    Kind(
        "law",
        "ticket",
        "code",
        "file reference of case {e}",
        (
            "Case {e} is kept under the reference {v}.",
            "The court filed case {e} as {v}.",
            "Quote {v} in all letters about case {e}.",
        ),
        (
            "Under which reference is case {e} kept?",
            "As what did the court file case {e}?",
        ),
        ("Letters about case {e} must quote {v}.",),
    ),
)
