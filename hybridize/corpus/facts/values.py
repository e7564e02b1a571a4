"""What facts say of things: numbers, codes, dates, amounts and words, none of which can be guessed."""

from __future__ import annotations

import random
import re
import string

from hybridize.corpus.facts import vocabulary as words
from hybridize.corpus.facts.names import Draw, coined, person, place

SEVEN_DIGITS = re.compile(r"(?<!\d)(?<!\d[ ,.:/'_-])\d(?:[ ,.:/'_-]?\d){6}(?![ ,.:/'_-]?\d)")
"""A number of seven digits, however it is grouped: the recall probe's needles are such numbers."""
_SHORT, _LONG = (2, 3, 4, 5, 6), (8, 9, 10, 11, 12)


def draw_value(draw: Draw, rng: random.Random) -> str:
    """A value that is no number of seven digits."""
    while SEVEN_DIGITS.search(value := draw(rng)):
        pass
    return value


def _digits(rng: random.Random, count: int) -> str:
    return str(rng.randint(10 ** (count - 1), 10**count - 1))


def short_number(rng: random.Random) -> str:
    return _digits(rng, rng.choice(_SHORT))


def grouped_number(rng: random.Random) -> str:
    return f"{int(_digits(rng, rng.choice((4, 5, 6, 8, 9)))):,}".replace(",", rng.choice(",,,' _"))


def long_number(rng: random.Random) -> str:
    digits = _digits(rng, rng.choice(_LONG))
    separator = rng.choice(("", "", "", " ", "-"))
    size = rng.choice((3, 4))
    return separator.join(digits[i : i + size] for i in range(0, len(digits), size))


def number(rng: random.Random) -> str:
    return rng.choice((short_number, short_number, grouped_number, long_number))(rng)


def decimal(rng: random.Random) -> str:
    return f"{rng.randint(0, 999)}.{_digits(rng, rng.randint(1, 3))}"


def pin(rng: random.Random) -> str:
    return "".join(rng.choices(string.digits, k=rng.choice((4, 5, 6))))


def extension(rng: random.Random) -> str:
    return _digits(rng, rng.choice((3, 4, 5)))


def telephone(rng: random.Random) -> str:
    return f"0{_digits(rng, rng.choice((2, 3)))} {_digits(rng, 3)} {_digits(rng, rng.choice((3, 4)))}"


def port(rng: random.Random) -> str:
    return str(rng.randint(1024, 65535))


def money(rng: random.Random) -> str:
    amount = rng.randint(10, 99_999) if rng.random() < 0.7 else rng.randint(10, 999)
    cents = rng.choice(("", f".{rng.randint(0, 99):02d}"))
    return f"{rng.choice(words.CURRENCIES)}{amount:,}{cents}"


def hexadecimal(rng: random.Random) -> str:
    digits = "".join(rng.choices("0123456789abcdef", k=rng.randint(4, 12)))
    return rng.choice((digits, digits, digits.upper(), f"0x{digits}"))


def code(rng: random.Random) -> str:
    """Letters, digits and signs in one of many patterns."""
    pattern = rng.choice(
        ("ADD", "A-DDD", "AADDD", "DDADA", "AA-DDDD", "DDDA", "AAA-DD", "ADADAD", "A/DD", "DD-AA-DD", "AADDDDA")
    )
    letters = {"A": string.ascii_uppercase, "D": string.digits}
    return "".join(rng.choice(letters.get(sign, sign)) for sign in pattern)


def gate(rng: random.Random) -> str:
    return f"{rng.choice('ABCDEFGH')}{rng.randint(1, 68)}"


def date(rng: random.Random) -> str:
    year, month, day = rng.randint(1702, 2031), rng.randint(1, 12), rng.randint(1, 28)
    name = words.MONTHS[month - 1]
    forms = (f"{day} {name} {year}", f"{name} {day}, {year}", f"{year}-{month:02d}-{day:02d}", f"{day} {name}")
    return rng.choice(forms)


def year(rng: random.Random) -> str:
    return str(rng.randint(1204, 1989))


def time(rng: random.Random) -> str:
    hour, minute = rng.randint(0, 23), rng.randint(0, 59)
    return rng.choice((f"{hour:02d}:{minute:02d}", f"{hour % 12 + 1}:{minute:02d} {rng.choice(('am', 'pm'))}"))


def moment(rng: random.Random) -> str:
    return f"{rng.choice(words.WEEKDAYS)} at {time(rng)}"


def temperature(rng: random.Random) -> str:
    return f"{rng.choice(('', '', '-'))}{rng.randint(1, 480)}.{rng.randint(0, 9)} {rng.choice(('°C', 'degrees', 'K'))}"


def extent(rng: random.Random) -> str:
    return f"{_amount(rng)} {rng.choice(('m', 'cm', 'feet', 'metres'))}"


def rainfall(rng: random.Random) -> str:
    return f"{_amount(rng)} {rng.choice(('mm', 'inches', 'litres'))}"


def dose(rng: random.Random) -> str:
    return f"{_amount(rng)} {rng.choice(('ml', 'mg', 'drops', 'units'))}"


def _amount(rng: random.Random) -> str:
    return rng.choice((short_number, decimal))(rng)


def minutes(rng: random.Random) -> str:
    return f"{rng.randint(11, 480)} minutes"


def size(rng: random.Random) -> str:
    digits = _digits(rng, rng.choice((*_SHORT[2:], *_LONG)))
    return rng.choice((digits, f"{int(digits):,}"))


def version(rng: random.Random) -> str:
    return f"{rng.randint(0, 19)}.{rng.randint(0, 40)}.{rng.randint(0, 99)}"


def address(rng: random.Random) -> str:
    return ".".join(str(rng.randint(2, 254)) for _ in range(4))


def setting(rng: random.Random) -> str:
    return rng.choice((short_number, decimal, lambda r: r.choice(words.THINGS)))(rng)


def colour(rng: random.Random) -> str:
    return rng.choice((rng.choice(words.COLOURS), f"{rng.choice(words.SHADES)} {rng.choice(words.COLOURS)}"))


def material(rng: random.Random) -> str:
    return f"{rng.choice(words.QUALITIES)} {rng.choice(words.MATERIALS)}"


def thing(rng: random.Random) -> str:
    return rng.choice(words.THINGS)


def phrase(rng: random.Random) -> str:
    """Two to four words that say something, if nothing sensible."""
    quality, first, second = rng.choice(words.QUALITIES), *rng.sample(words.THINGS, 2)
    deed, where = rng.choice(words.DEEDS), rng.choice(words.PLACES_OF_THINGS)
    forms = (
        f"{quality} {first}",
        f"{first} and {second}",
        f"{deed} the {first}",
        f"{deed} the {quality} {first}",
        f"{first} {where}",
    )
    found = rng.choice(forms)
    return found if len(found.split()) <= 4 else f"{quality} {second}"


def password(rng: random.Random) -> str:
    first, second = coined(rng).lower(), rng.choice(words.THINGS)
    return rng.choice(
        (
            f"{first}{rng.randint(2, 999)}",
            f"{second}!{rng.randint(10, 99)}",
            f"{first}_{second}",
            f"{second.title()}{rng.choice('#$%&*')}{first}",
        )
    )


def nickname(rng: random.Random) -> str:
    return rng.choice((coined(rng)[:5], f"the {rng.choice(words.THINGS)}", rng.choice(words.THINGS).title()))


VALUES: dict[str, Draw] = {
    draw.__name__: draw
    for draw in (
        *(
            number,
            short_number,
            grouped_number,
            long_number,
            decimal,
            pin,
            extension,
            telephone,
            port,
            money,
            hexadecimal,
        ),
        *(
            code,
            gate,
            date,
            year,
            time,
            moment,
            temperature,
            extent,
            rainfall,
            dose,
            minutes,
            size,
            version,
            address,
            setting,
            colour,
        ),
        *(material, thing, phrase, password, nickname, person, place),
    )
}
"""Every sort of value, by the word that kinds of facts use for it."""
