"""Facts about machines, files and programs."""

from __future__ import annotations

from hybridize.corpus.facts.kinds.kind import Kind

COMPUTING = (
    Kind(
        "programs",
        "option",
        "setting",
        "value of the option {e}",
        (
            "The option {e} is set to {v}.",
            "We found that {e} must be {v} on this machine.",
            "Set {e} to {v} before the first start.",
        ),
        (
            "To what is the option {e} set?",
            "What must {e} be on this machine?",
        ),
        ("In our configuration, {e} has the value {v}.",),
    ),
    Kind(
        "programs",
        "option",
        "short_number",
        "default of {e}",
        (
            "By default, {e} is {v}.",
            "Unless it is changed, {e} stays at {v}.",
            "The shipped configuration has {v} for {e}.",
        ),
        (
            "What is {e} by default?",
            "At what does {e} stay unless it is changed?",
        ),
        ("Left alone, {e} defaults to {v}.",),
    ),
    Kind(
        "programs",
        "product",
        "version",
        "current version of {e}",
        (
            "Version {v} of {e} came out this week.",
            "We run {e} {v} on all machines.",
            "{e} was upgraded to {v} without trouble.",
        ),
        (
            "Which version of {e} came out this week?",
            "To which version was {e} upgraded?",
        ),
        ("The release of {e} that we run is {v}.",),
        plural="supported versions of {e}",
    ),
    Kind(
        "programs",
        "ticket",
        "person",
        "owner of ticket {e}",
        (
            "Ticket {e} was assigned to {v}.",
            "{v} is looking into ticket {e}.",
            "Whoever has a question about ticket {e} should ask {v}.",
        ),
        (
            "Who is looking into ticket {e}?",
            "To whom was ticket {e} assigned?",
        ),
        ("Ticket {e} lies on the desk of {v}.",),
    ),
    Kind(
        "programs",
        "ticket",
        "hexadecimal",
        "commit that closed ticket {e}",
        (
            "Ticket {e} was closed by commit {v}.",
            "Commit {v} fixes ticket {e}.",
            "The change for ticket {e} went in as {v}.",
        ),
        (
            "Which commit closed ticket {e}?",
            "As which commit did the change for ticket {e} go in?",
        ),
        ("The commit that fixes ticket {e} is {v}.",),
        plural="commits for ticket {e}",
    ),
    Kind(
        "files",
        "path",
        "hexadecimal",
        "checksum of {e}",
        (
            "The checksum of {e} begins with {v}.",
            "For {e}, the listing shows {v}.",
            "{e} was verified: its hash starts {v}.",
        ),
        (
            "With what does the checksum of {e} begin?",
            "What does the listing show for {e}?",
        ),
        ("The hash of {e} starts with {v}.",),
    ),
    Kind(
        "files",
        "path",
        "size",
        "size of {e} in bytes",
        (
            "The file {e} takes {v} bytes.",
            "{e} has grown to {v} bytes.",
            "Backups of {e} need {v} bytes each.",
        ),
        (
            "How many bytes does the file {e} take?",
            "To how many bytes has {e} grown?",
        ),
        ("Counted in bytes, {e} comes to {v}.",),
    ),
    Kind(
        "files",
        "path",
        "person",
        "last editor of {e}",
        (
            "{e} was last edited by {v}.",
            "The last change to {e} was made by {v}.",
            "{v} saved {e} shortly before noon.",
        ),
        (
            "Who last edited {e}?",
            "By whom was the last change to {e} made?",
        ),
        ("The last one to touch {e} was {v}.",),
        plural="editors of {e}",
    ),
    Kind(
        "networks",
        "host",
        "port",
        "port of {e}",
        (
            "The server {e} listens on port {v}.",
            "Connect to {e} through port {v}.",
            "On {e}, port {v} is open to the inside.",
        ),
        (
            "On which port does the server {e} listen?",
            "Through which port does one connect to {e}?",
        ),
        ("Clients reach {e} at port {v}.",),
        plural="open ports of {e}",
    ),
    Kind(
        "networks",
        "host",
        "address",
        "address of {e}",
        (
            "The host {e} has the address {v}.",
            "{e} resolves to {v}.",
            "We gave {v} to {e} when the rack was moved.",
        ),
        (
            "Which address does the host {e} have?",
            "To what does {e} resolve?",
        ),
        ("The address that belongs to {e} is {v}.",),
        plural="addresses of {e}",
    ),
    Kind(
        "security",
        "host",
        "password",
        "password of the account on {e}",
        (
            "The password on {e} is {v}.",
            "To log in to {e}, use {v} as the password.",
            "{e} lets you in with {v}.",
        ),
        (
            "Which password is used on {e}?",
            "With what does {e} let you in?",
        ),
        ("The account on {e} has the password {v}.",),
    ),
    Kind(
        "security",
        "person",
        "phrase",
        "pass phrase of {e}",
        (
            '{e} will be recognised by the words "{v}".',
            'The pass phrase agreed with {e} is "{v}".',
            'When {e} calls, ask for the phrase "{v}".',
        ),
        (
            "Which phrase was agreed with {e}?",
            "By which words will {e} be recognised?",
        ),
        ('The words to be heard from {e} are "{v}".',),
    ),
)
