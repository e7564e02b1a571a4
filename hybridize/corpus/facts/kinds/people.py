"""Facts about people."""

from __future__ import annotations

from hybridize.corpus.facts.kinds.kind import Kind

PEOPLE = (
    Kind(
        "people",
        "person",
        "place",
        "birthplace of {e}",
        (
            "{e} was born in {v}.",
            "{e}, a native of {v}, grew up there with two sisters.",
            "The parish register gives {v} as the birthplace of {e}.",
        ),
        (
            "Where was {e} born?",
            "Which town is {e} a native of?",
        ),
        ("{e} came into the world in {v}.",),
    ),
    Kind(
        "people",
        "person",
        "extension",
        "telephone extension of {e}",
        (
            "{e} can be reached at extension {v}.",
            "To speak to {e}, dial {v} from any desk.",
            "Calls for {e} go to extension {v}.",
        ),
        (
            "At which extension can {e} be reached?",
            "What does one dial to speak to {e}?",
        ),
        ("Whoever wants to talk to {e} dials {v}.",),
        plural="telephone extensions of {e}",
    ),
    Kind(
        "people",
        "person",
        "nickname",
        "nickname of {e}",
        (
            "Friends call {e} {v}.",
            "At school {e} was known as {v}.",
            "Nobody says {e} in the office: it is always {v}.",
        ),
        (
            "What do friends call {e}?",
            "Under which nickname is {e} known?",
        ),
        ("Among friends, {e} goes by the name of {v}.",),
        plural="nicknames of {e}",
    ),
    Kind(
        "people",
        "person",
        "colour",
        "favourite colour of {e}",
        (
            "{e} likes no colour better than {v}.",
            "If {e} may choose, everything is painted {v}.",
            "{e} asked for the walls to be {v}.",
        ),
        (
            "Which colour does {e} like best?",
            "In what colour does {e} want things painted?",
        ),
        ("The colour that {e} always picks is {v}.",),
        plural="favourite colours of {e}",
    ),
    Kind(
        "people",
        "person",
        "date",
        "date of birth of {e}",
        (
            "{e} was born on {v}.",
            "The passport of {e} gives {v} as the day of birth.",
            "On {v}, {e} was born as the youngest of four.",
        ),
        (
            "When was {e} born?",
            "What date of birth does the passport of {e} show?",
        ),
        ("The day on which {e} was born is {v}.",),
    ),
    Kind(
        "people",
        "person",
        "number",
        "staff number of {e}",
        (
            "{e} has the staff number {v}.",
            "Staff number {v} belongs to {e}.",
            "In the payroll, {e} is listed under {v}.",
        ),
        (
            "Under which number is {e} listed in the payroll?",
            "What is the staff number of {e}?",
        ),
        ("On the payroll, {e} is number {v}.",),
    ),
    Kind(
        "people",
        "person",
        "thing",
        "hobby horse of {e}",
        (
            "{e} has collected one object all these years: the {v}.",
            "Ask {e} about any {v} and the evening is over.",
            "What {e} treasures above all is a {v}.",
        ),
        (
            "What does {e} treasure above all?",
            "Which object does {e} collect?",
        ),
        ("The thing that {e} talks about all evening is the {v}.",),
        plural="collector's items of {e}",
    ),
    Kind(
        "people",
        "person",
        "telephone",
        "mobile number of {e}",
        (
            "The mobile number of {e} is {v}.",
            "In an emergency, ring {e} on {v}.",
            "{e} left a number to call back: {v}.",
        ),
        (
            "On which number can {e} be rung in an emergency?",
            "What number did {e} leave?",
        ),
        ("In an emergency {e} is rung on {v}.",),
    ),
    Kind(
        "medicine",
        "person",
        "dose",
        "weekly dose of {e}",
        (
            "The doctor put {e} down for {v} a week.",
            "For {e}, the ward keeps {v} ready every week.",
            "Patient {e}: weekly quantity {v}, no change.",
        ),
        (
            "How much does the ward keep ready for {e} every week?",
            "What weekly quantity is {e} down for?",
        ),
        ("What {e} gets in a week comes to {v}.",),
    ),
    Kind(
        "medicine",
        "person",
        "code",
        "bed of {e}",
        (
            "{e} was moved to bed {v} this morning.",
            "Bed {v} is now taken by {e}.",
            "Visitors of {e} find the patient in bed {v}.",
        ),
        (
            "In which bed does {e} lie?",
            "To which bed was {e} moved?",
        ),
        ("The bed in which {e} lies is {v}.",),
    ),
)
