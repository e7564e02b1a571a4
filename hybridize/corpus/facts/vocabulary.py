"""Parts that names and values are made of."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split()))


GIVEN_NAMES = _words(
    """
    Ada Agnes Alan Alma Amira Anders Anita Anton Astrid Basil Beatriz Bela Boris Bruno Camille Carla Cedric Chiara
    Clara Conrad Dalia Daniel Daphne Denis Dora Edgar Edith Elias Elif Emil Enzo Erik Esther Fatima Felix Fiona Franz
    Freya Gemma Georg Greta Gustav Hana Hannah Hector Helga Hugo Ida Ilse Imre Ines Ingrid Irina Isaac Ivan Jakob Jana
    Jonas Judith Kamil Karin Kenji Klara Lars Leila Leon Linus Lotte Lucia Magda Malik Mara Marco Marta Mateo Milan
    Mina Nadia Nils Nina Noor Olaf Olga Oskar Otto Paula Pavel Petra Priya Rafael Rashid Rita Roman Rosa Ruben Sanjay
    Selma Signe Simon Sofia Stefan Sven Tariq Tessa Thea Theo Tilda Tomas Ursula Vera Viktor Walter Yara Yusuf Zeno
    """
)
HEADS = _words(
    """
    Adr Alv Ambr Ard Bal Barv Berk Brann Bril Cald Carv Chel Corv Dar Delv Dorn Drav Eld Elv Esk Fal Farr Fenn Gald
    Garr Gorm Halv Harg Hesk Ilm Irv Jarn Jask Jord Kald Karr Kelv Kest Korv Lann Larv Lisk Lorn Mald Marr Melv Morv
    Nald Narv Nesk Norr Ond Orv Osk Pald Parv Pell Rald Rask Rav Rill Sald Sarv Selk Sorr Tald Tarv Tel Tolv Ulv Urs
    Vald Varr Vesk Vorn Wald Werr Wisk Yald Yorv Zann Zelv Zorr
    """
)
"""First syllables; what follows them begins with a vowel."""
SURNAME_TAILS = _words(
    "adze aker ander anov arsen azzi egger ekker elin endahl ensen eriksen escu etti ikova ilsen indo inger inski isch "
    "itzky ogawa olin omaa onsky orini osso ovich uelo ulescu unen ustad"
)
PLACE_TAILS = _words(
    "abad aby afjord aholm amouth anby anza arup asund avia egrad elsk enau engen ensk ermoor erness estad etown ewick "
    "ichi ikon imunda ingby iskoye ograd olitz omere onara oping ovar ulon umba urgh uvale"
)
COINED_TAILS = _words(
    """
    adyne aflex alis antis aron axo elle ematic enta etra icor idian ilux imax inox ivo ola onix ora ovia uma yx
    """
)
GENUS_TAILS = _words("aria ella enia idium ina ula opsis osa")
SPECIES = _words(
    """
    alpestris borealis gracilis hirsuta maritima montana nitida ovata palustris rubra tenuis viridis vulgaris
    """
)

COLOURS = _words(
    """
    amaranth auburn azure beige bronze burgundy carmine cerise charcoal cobalt crimson cyan ecru emerald fuchsia indigo
    jade khaki lavender lilac magenta maroon mauve mustard navy ochre olive periwinkle plum russet rust saffron sage
    salmon scarlet sepia sienna slate taupe teal terracotta turquoise ultramarine umber vermilion violet viridian
    """
)
SHADES = _words("pale deep dusty matt glossy faded bluish greenish smoky light dark")
MATERIALS = _words(
    """
    birch brass cedar ceramic cork felt granite larch linen maple marble nylon pewter pine slate teak tin walnut
    zinc
    """
)
QUALITIES = _words(
    "borrowed broken crooked dented empty folded frozen hollow leaning muddy painted polished restless rusted shiny "
    "sleepless spotted striped thirsty unfinished upside-down waxed woven"
)
THINGS = _words(
    """
    accordion almanac anvil barometer bathtub bellows birdcage bobbin bonfire caravan chandelier compost corkscrew
    cushion dictionary doorbell dumpling ferry fiddle gondola haystack hedgehog inkwell kayak lighthouse mandolin
    marmalade metronome microscope moss omelette oyster pancake parachute periscope radish rhubarb rucksack sandcastle
    scarecrow snowplough sewing-machine suitcase teapot telescope thimble trombone typewriter umbrella walrus
    watermill windmill
    """
)
DEEDS = _words("bring bury count feed fold follow hide lift mend open paint polish return sell weigh wind")
PLACES_OF_THINGS = (
    *(
        "at the back",
        "behind the barn",
        "by the ferry",
        "in the attic",
        "near the well",
        "on the roof",
        "past midnight",
    ),
    *("under the stairs", "without delay", "before breakfast", "after the rain", "in plain view"),
)
MONTHS = _words("January February March April May June July August September October November December")
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
CURRENCIES = ("$", "€", "£", "CHF ", "SEK ", "¥")

HOST_ROLES = _words(
    """
    api backup build cache db dns edge ftp git ldap mail ns print proxy relay smtp store vpn web wiki
    """
)
TOP_LEVELS = _words("example test invalid lan internal")
FOLDERS = _words(
    """
    archive assets backup conf data drafts etc exports incoming lib logs media opt srv share src usr var
    """
)
STEMS = _words(
    """
    accounts audit budget catalog changes config contacts figures index inventory ledger minutes notes payroll
    report schedule stock summary totals
    """
)
SUFFIXES = _words("bak bin cfg conf csv dat db gz html ini json log md pdf sql tar txt xml yaml zip")
OPTION_GROUPS = _words(
    """
    auth cache cluster compiler editor http index logger net parser pool queue render scheduler search session
    storage sync worker
    """
)
OPTION_NAMES = _words(
    "backlog batch_size buffer_kb burst chunk_kb depth fanout grace_ms idle_limit interval_ms keepalive_s linger_ms "
    "max_entries max_retries min_free page_kb prefetch quota_mb retention_days threads timeout_s ttl_s watermark"
)
SUBJECTS = _words(
    """
    budget safety staffing design pricing roadmap curriculum drainage lighting logistics maintenance outreach
    parking recruitment
    """
)
GATHERINGS = _words("briefing committee hearing review seminar workshop rehearsal inspection")
