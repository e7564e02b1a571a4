"""Facts of journeys, buildings, meetings and games."""

from __future__ import annotations

from hybridize.corpus.facts.kinds.kind import Kind

DAILY = (
    Kind(
        "travel",
        "flight",
        "gate",
        "gate of flight {e}",
        (
            "Flight {e} leaves from gate {v}.",
            "Gate {v} has been assigned to flight {e}.",
            "Passengers on flight {e}, please proceed to gate {v}.",
        ),
        (
            "From which gate does flight {e} leave?",
            "To which gate should passengers on flight {e} proceed?",
        ),
        ("Boarding for flight {e} takes place at gate {v}.",),
    ),
    Kind(
        "travel",
        "flight",
        "time",
        "departure time of flight {e}",
        (
            "Flight {e} departs at {v}.",
            "The new departure time of flight {e} is {v}.",
            "At {v}, flight {e} will leave the ground.",
        ),
        (
            "At what time does flight {e} depart?",
            "When will flight {e} leave the ground?",
        ),
        ("Flight {e} is due to depart at {v}.",),
    ),
    Kind(
        "travel",
        "train",
        "minutes",
        "delay of train {e}",
        (
            "Train {e} is running late by {v}.",
            "A delay of {v} was announced for train {e}.",
            "Because of works on the line, train {e} loses {v}.",
        ),
        (
            "By how much is train {e} late?",
            "What delay was announced for train {e}?",
        ),
        ("Train {e} arrives behind schedule by {v}.",),
    ),
    Kind(
        "travel",
        "train",
        "short_number",
        "coach with the dining car of train {e}",
        (
            "The dining car of train {e} is coach {v}.",
            "On train {e}, meals are served in coach {v}.",
            "Coach {v} of train {e} holds the restaurant.",
        ),
        (
            "In which coach of train {e} are meals served?",
            "Which coach of train {e} is the dining car?",
        ),
        ("To eat on train {e}, walk to coach {v}.",),
    ),
    Kind(
        "travel",
        "coined",
        "place",
        "home port of the ship {e}",
        (
            "The ship {e} sails from {v}.",
            "{v} is painted on the stern of the {e}, whose home it is.",
            "Every autumn the {e} returns to {v} for repairs.",
        ),
        (
            "From which port does the ship {e} sail?",
            "Where does the {e} return for repairs?",
        ),
        ("The {e} has her berth in {v}.",),
        plural="ports of call of the ship {e}",
    ),
    Kind(
        "buildings",
        "door",
        "pin",
        "code of door {e}",
        (
            "The code of door {e} is {v}.",
            "To open door {e}, type {v} and press the star.",
            "Door {e} was given the new code {v} last night.",
        ),
        (
            "Which code opens door {e}?",
            "What must be typed to open door {e}?",
        ),
        ("Door {e} opens with {v}.",),
    ),
    Kind(
        "buildings",
        "door",
        "colour",
        "colour of the key to door {e}",
        (
            "The key to door {e} has a tag in {v}.",
            "Look for the {v} tag: that key fits door {e}.",
            "Door {e} takes the key with the {v} ring.",
        ),
        (
            "What colour is the tag on the key to door {e}?",
            "Which colour marks the key that fits door {e}?",
        ),
        ("The key that fits door {e} is marked in {v}.",),
    ),
    Kind(
        "buildings",
        "place",
        "extent",
        "height of the tower in {e}",
        (
            "The tower in {e} rises to {v}.",
            "With its {v}, the tower in {e} is hard to miss.",
            "Surveyors put the tower in {e} at {v}.",
        ),
        (
            "What did surveyors measure for the tower in {e}?",
            "How high does the tower in {e} rise?",
        ),
        ("The tower in {e} measures {v}.",),
    ),
    Kind(
        "meetings",
        "meeting",
        "code",
        "room of the {e}",
        (
            "The {e} takes place in room {v}.",
            "Room {v} has been booked for the {e}.",
            "We moved the {e} to room {v}, which has a projector.",
        ),
        (
            "In which room does the {e} take place?",
            "Which room has been booked for the {e}?",
        ),
        ("Everyone invited to the {e} should come to room {v}.",),
    ),
    Kind(
        "meetings",
        "meeting",
        "moment",
        "time of the {e}",
        (
            "The {e} starts on {v}.",
            "Please keep {v} free for the {e}.",
            "The next {e} will be held on {v}.",
        ),
        (
            "When does the {e} start?",
            "Which day and hour should be kept free for the {e}?",
        ),
        ("The {e} has been called for {v}.",),
    ),
    Kind(
        "meetings",
        "meeting",
        "person",
        "chair of the {e}",
        (
            "{v} will chair the {e}.",
            "At the {e}, the chair was taken by {v}.",
            "The {e} is led by {v} this year.",
        ),
        (
            "Who will chair the {e}?",
            "By whom is the {e} led this year?",
        ),
        ("The person in the chair at the {e} is {v}.",),
        plural="guests of the {e}",
    ),
    Kind(
        "games",
        "person",
        "number",
        "score of {e}",
        (
            "{e} finished the tournament with {v} points.",
            "With {v} points, {e} went home early.",
            "The scoreboard shows {v} for {e}.",
        ),
        (
            "How many points did {e} finish with?",
            "What does the scoreboard show for {e}?",
        ),
        ("In the tournament {e} ended up with a score of {v}.",),
    ),
    Kind(
        "games",
        "company",
        "colour",
        "jersey of the team of {e}",
        (
            "The team of {e} plays in {v}.",
            "All players of {e} put on {v} shirts.",
            "This season {e} will wear {v}.",
        ),
        (
            "In which colour does the team of {e} play?",
            "What colour are the shirts of {e}?",
        ),
        ("The shirts of the team of {e} are {v}.",),
    ),
)
