"""Words that questions are made of: common English ones, every one once."""

from __future__ import annotations

from functools import cache


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split()))


FIRST = _words(
    """
    amber ancient brave bright broad calm clever cold copper crisp curious distant eager early empty fading fierce
    gentle golden grand hidden hollow honest humble icy jolly keen lively lonely lucky mellow narrow noble odd pale
    patient plain proud quiet rapid rough royal rusty sharp silent silver simple sleepy smooth solid steady stormy
    sunny swift tender tidy tired urban velvet warm wild winter wooden young able alert basic blank blind blunt bold
    brief busy careful cheap clean clear common complex costly cruel damp dark deep dense direct dirty double dull
    easy equal exact faint fair famous fancy final firm flat foreign formal free fresh full funny giant global
    grateful gray great green handy happy harsh heavy helpful huge inner joint just kind large late lazy legal light
    local long loud loyal main major mild minor modern moral mutual naked native neat new nice normal novel obvious
    old open outer perfect polite poor popular precise pretty prime private public pure quick random rare raw ready
    real recent rich rigid ripe round sacred safe scarce secret senior serious shallow short shy sick single skilled
    slim slow small sober social soft sore sour spare special stable stale steep stiff still strange strict strong
    stupid subtle sudden super sweet tall tame tense thick thin tight tiny tough tragic true typical ugly unique
    upper useful usual vague vain valid vast vital vivid weak wealthy weird wet white whole wicked wide wise
    """
)
SECOND = _words(
    """
    anchor apple arrow badge barrel basket beacon bottle branch bridge bucket button cabin candle canyon castle
    circle cloud compass cotton cradle desert engine falcon feather forest garden glacier hammer harbor helmet
    island jacket kettle ladder lantern lemon marble meadow mirror monkey mountain needle orchard paddle pebble
    pencil pepper pillow planet pocket ribbon river saddle shadow spider statue sunset tailor temple timber valley
    wagon window actor advice agent album amount angle animal answer apron arch arena armor army artist aunt author
    autumn baby bacon baker balance band banker barn battle beach bean bear beard beast bell belt bench berry
    bicycle bird biscuit blanket block blood board boat body bone book border bowl box brain bread brick bride
    brother brush bubble bull bullet bundle burden bus bush butter cable cake camera camp canal cannon canvas
    captain card cargo carpet carrot cart cattle cave ceiling cell center chain chair chalk chapel chapter cheese
    chef cherry chest chicken child chimney choir church cinema city clay clerk client cliff clock cloth coach coal
    coast coat coffee coin collar colony column comet concert cook copy coral corn corner couch county couple court
    cousin cow crane cream creek crew crown cup curtain cushion customer dancer daughter dawn deck deer dentist desk
    devil diamond dinner dirt dish doctor dog doll dolphin donkey door dozen dragon drawer dream dress driver drum
    duck dust eagle ear earth echo egg elbow elephant emperor enemy envelope errand estate evening event eye fabric
    face factory family farm father fence festival fever field figure finger fire fish flag flame flock floor flour
    flower flute fog folder food foot fork fortune fountain fox frame friend frog frost fruit funeral fur gallery
    game garage garlic gate gift giraffe girl glass glove goat gold goose grain grape grass grave guard guest guide
    guitar gun habit hair hall hand hat hawk head heart heel hen hero hill hint hole holiday home honey hook horn
    horse hospital hotel hour house hunter idea image inch infant ink insect iron ivory jail jar jaw jelly jewel job
    joke journey judge juice jungle jury key king kitchen kite knee knife knight knot label laborer lady lake lamb
    lamp land language lawn lawyer leader leaf leather lecture leg lesson letter library lid lightning limb line
    lion lip liquid list liver lizard lock log loop lord lunch lung machine magnet maid mail manager map march
    market mask master match mayor meal meat medal melody member menu metal meter middle milk mill mine minute
    missile model moment monk month moon morning moth mother motor mouse mouth movie mud mug muscle museum music
    nail name nation neck nephew nerve nest net newspaper night noise noon nose note nurse nut oak oar ocean office
    oil onion orange orbit order organ oven owl owner ox oyster page paint palace palm pan panel paper parade parcel
    parent park parrot party path peace peach pear pen people pet phone photo piano picnic picture pie piece pig
    pilot pin pine pioneer pipe pirate pitch plane plant plate player plot plow poem poet point poison pole police
    pond pony pool porch port post pot potato powder priest prince prison prize profit proof puppet puppy purse
    puzzle queen question quilt rabbit race radio rail rain rat razor recipe record refund reptile rescue rice rifle
    ring road robe robin robot rock rocket roof room rooster root rope rose route rug ruler sail sailor salad salt
    sand sauce scale scarf scene school science scout screen script sea seat seed shade shark sheep sheet shelf
    shell shield ship shirt shoe shop shore shoulder shovel shower shrimp siege sign signal silk singer sink sister
    skeleton skill skin skirt sky slave sled sleeve slope smoke snail snake snow soap sock soil soldier son song
    soul soup spark spear speech spoon sport spring square squirrel stable stage stair stamp star station steam
    steel stem step stick stomach stone store storm story stove straw stream street string student sugar suit summer
    sun surgeon swan sweater sword symbol table tail tale tank tape target tax taxi tea teacher team tear tent thief
    thread throat throne thumb thunder ticket tide tiger tile tin title toad toe tomato tongue tool tooth torch tour
    towel tower town toy track trade trail train trap tray treasure treaty tree trial tribe trick troop truck
    trumpet trunk tube tunnel turkey turtle twin uncle uniform union vase vegetable veil vein vessel veteran village
    violin virus visitor voice volcano vote voyage waiter wall warrior water wave wax weapon weather weaver web
    wedding week whale wheat wheel whip whisper widow wife wind wine wing wire witness wizard wolf woman wood wool
    word worker worm wound wrist writer yard year
    """
)


@cache
def plain_words() -> tuple[str, ...]:
    """Single words, about a thousand."""
    return tuple(dict.fromkeys((*FIRST, *SECOND)))


@cache
def compounds() -> tuple[str, ...]:
    """Pairs joined by a hyphen, a quarter of a million."""
    return tuple(f"{first}-{second}" for first in FIRST for second in SECOND if first != second)
