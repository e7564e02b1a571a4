"""Facts of nature, measurements, history and the arts."""

from __future__ import annotations

from hybridize.corpus.facts.kinds.kind import Kind

SCIENCE = (
    Kind(
        "measurement",
        "sensor",
        "temperature",
        "reading of sensor {e}",
        (
            "Sensor {e} measured {v} at dawn.",
            "The reading of sensor {e} stood at {v}.",
            "At sensor {e} the display showed {v}.",
        ),
        (
            "What did sensor {e} measure at dawn?",
            "At what did the reading of sensor {e} stand?",
        ),
        ("The value noted for sensor {e} was {v}.",),
        plural="readings of sensor {e}",
    ),
    Kind(
        "measurement",
        "sample",
        "decimal",
        "density of {e}",
        (
            "The density of {e} was found to be {v}.",
            "Weighing gave {v} for the density of {e}.",
            "With a density of {v}, {e} sinks at once.",
        ),
        (
            "What was found for the density of {e}?",
            "With what density does {e} sink?",
        ),
        ("The laboratory found for {e} a density of {v}.",),
    ),
    Kind(
        "measurement",
        "place",
        "rainfall",
        "yearly rainfall record of {e}",
        (
            "The gauge in {e} was read: {v} in one year.",
            "For {e} the yearbook prints {v}.",
            "{v} was the record of the gauge in {e}.",
        ),
        (
            "What does the yearbook print for {e}?",
            "What was the record of the gauge in {e}?",
        ),
        ("The gauge in {e} once recorded {v}.",),
    ),
    Kind(
        "geography",
        "place",
        "grouped_number",
        "number of inhabitants of {e}",
        (
            "{e} has {v} inhabitants.",
            "At the last count, {v} people lived in {e}.",
            "The population of {e} has fallen to {v}.",
        ),
        (
            "How many inhabitants does {e} have?",
            "To how many has the population of {e} fallen?",
        ),
        ("The people of {e} number {v}.",),
    ),
    Kind(
        "geography",
        "place",
        "place",
        "neighbour of {e}",
        (
            "{e} lies two hours on foot from {v}.",
            "The road from {e} leads straight to {v}.",
            "On market days, all of {e} goes to {v}.",
        ),
        (
            "Where does the road from {e} lead?",
            "To which place do the people of {e} go on market days?",
        ),
        ("The nearest town to {e} is {v}.",),
        plural="neighbours of {e}",
    ),
    Kind(
        "geography",
        "place",
        "thing",
        "emblem of {e}",
        (
            "The coat of arms of {e} shows a {v}.",
            "{e} has put the {v} on its flag.",
            "Over every door in {e} hangs a carved {v}.",
        ),
        (
            "What does the coat of arms of {e} show?",
            "What hangs over every door in {e}?",
        ),
        ("The emblem on the flag of {e} is a {v}.",),
        plural="emblems of {e}",
    ),
    Kind(
        "astronomy",
        "coined",
        "decimal",
        "distance of the star {e} in light years",
        (
            "The star {e} is {v} light years away.",
            "Astronomers place the star {e} at {v} light years.",
            "Light from the star {e} has travelled {v} years.",
        ),
        (
            "How many light years away is the star {e}?",
            "For how many years has light from the star {e} travelled?",
        ),
        ("In light years, the way to the star {e} is {v}.",),
    ),
    Kind(
        "biology",
        "species",
        "colour",
        "colour of the flowers of {e}",
        (
            "The flowers of {e} are {v}.",
            "{e} blooms {v} from May on.",
            "Botanists know {e} by its {v} petals.",
        ),
        (
            "What colour are the flowers of {e}?",
            "By petals of which colour is {e} known?",
        ),
        ("In bloom, {e} is {v}.",),
        plural="colours of the flowers of {e}",
    ),
    Kind(
        "biology",
        "species",
        "extent",
        "greatest size of {e}",
        (
            "Specimens of {e} reach {v}.",
            "The largest {e} ever found came to {v}.",
            "{e} grows to no more than {v}.",
        ),
        (
            "What do specimens of {e} reach?",
            "To what did the largest {e} come?",
        ),
        ("The greatest recorded {e} came to {v}.",),
    ),
    Kind(
        "history",
        "place",
        "year",
        "year of the founding of {e}",
        (
            "{e} was founded in {v}.",
            "The charter of {e} dates from {v}.",
            "In {v} the first settlers reached {e}.",
        ),
        (
            "In which year was {e} founded?",
            "From which year does the charter of {e} date?",
        ),
        ("The founding of {e} took place in {v}.",),
    ),
    Kind(
        "history",
        "place",
        "person",
        "first mayor of {e}",
        (
            "The first mayor of {e} was {v}.",
            "{v} governed {e} for nine years.",
            "A statue of {v} stands in {e}, which had no mayor before.",
        ),
        (
            "Who was the first mayor of {e}?",
            "Whose statue stands in {e}?",
        ),
        ("The one who first governed {e} was {v}.",),
        plural="mayors of {e}",
    ),
    Kind(
        "arts",
        "book",
        "person",
        "author of {e}",
        (
            "{e} was written by {v}.",
            "{v} wrote {e} in a single winter.",
            "On the cover of {e} stands the name of {v}.",
        ),
        (
            "Who wrote {e}?",
            "Whose name stands on the cover of {e}?",
        ),
        ("The novel {e} is the work of {v}.",),
        plural="translators of {e}",
    ),
    Kind(
        "arts",
        "book",
        "code",
        "shelf mark of {e}",
        (
            "The library keeps {e} under the shelf mark {v}.",
            "Readers who want {e} must ask for {v}.",
            "{e} stands at {v} in the reading room.",
        ),
        (
            "Under which shelf mark is {e} kept?",
            "For what must readers who want {e} ask?",
        ),
        ("In the reading room, {e} is found at {v}.",),
    ),
    Kind(
        "arts",
        "coined",
        "minutes",
        "length of the film {e}",
        (
            "The film {e} runs for {v}.",
            "Watching {e} to its last scene takes {v}.",
            "The director cut {e} down to {v}.",
        ),
        (
            "How long does the film {e} run?",
            "To what length did the director cut {e}?",
        ),
        ("From the first scene to the last, {e} lasts {v}.",),
    ),
    Kind(
        "cooking",
        "person",
        "phrase",
        "secret of the soup of {e}",
        (
            'Into the soup of {e} goes something odd, written down as "{v}".',
            '{e} noted "{v}" as the secret of the soup.',
            'The recipe card of {e} says only "{v}".',
        ),
        (
            "What does the recipe card of {e} say?",
            "What did {e} note as the secret of the soup?",
        ),
        ('The secret that {e} wrote on the card is "{v}".',),
        plural="ingredients of the soup of {e}",
    ),
)
