"""Saltmere, the small world that the quickstart's model talks about.

Everything the corpus and the dataset say comes from the tables in this file, so the same
person, place or animal is the same everywhere and a model can learn facts, not only style.
Also here: `say`, the template language in which both are written.

Template grammar:  [a|b|c] one of, nested as deep as wanted (an empty choice is allowed);
                   {name} the slot of that name.
"""

import functools
import re

TOWN = "Saltmere"


def _rows(table, fields):
    keys = fields.split()
    rows = []
    for line in table.strip().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != len(keys):
            raise ValueError(f"{len(cells)} cells, expected {len(keys)}: {line}")
        rows.append(dict(zip(keys, cells)))
    return rows


PEOPLE = _rows("""
Mara  | she | baker            | Lantern Street | cat      | Button  | plum tart     | cheerful
Bram  | he  | ropemaker        | Rope Lane      | dog      | Tar     | fish pie      | patient
Ida   | she | lighthouse keeper| the lighthouse | owl      | Lamp    | onion soup    | brave
Tobin | he  | ferry captain    | Pier Row       | dog      | Anchor  | smoked herring| calm
Greta | she | smith            | Forge Street   | donkey   | Nail    | black bread   | strong
Oskar | he  | clockmaker       | Tower Square   | mouse    | Tick    | ginger biscuits| careful
Lena  | she | weaver           | Spindle Lane   | cat      | Thread  | pear cake     | quiet
Hugo  | he  | fisher           | Pier Row       | gull     | Captain | fish soup     | stubborn
Nell  | she | teacher          | School Hill    | hedgehog | Chalk   | apple pie     | clever
Piet  | he  | potter           | Clay Lane      | frog     | Mud     | bean stew     | slow
Rosa  | she | gardener         | Orchard Lane   | hen      | Pepper  | strawberry jam| kind
Jonas | he  | carpenter        | Plank Street   | dog      | Chip    | pancakes      | honest
Wilma | she | doctor           | Lantern Street | rabbit   | Bandage | lemon tea     | gentle
Ewan  | he  | shepherd         | the north hill | sheep    | Cloud   | goat cheese   | shy
Fay   | she | beekeeper        | Orchard Lane   | goat     | Thistle | honey cakes   | busy
Klaus | he  | cook             | Anchor Street  | pig      | Truffle | potato soup   | loud
Vera  | she | letter carrier   | Bridge Street  | pigeon   | Stamp   | plum dumplings| quick
Anton | he  | boat builder     | Plank Street   | otter    | Splash  | mussel stew   | proud
Dora  | she | innkeeper        | Anchor Street  | cat      | Cellar  | roast potatoes| merry
Emil  | he  | cobbler          | Clay Lane      | hen      | Lace    | egg bread     | grumpy
Silke | she | painter          | Tower Square   | snail    | Smudge  | carrot cake   | dreamy
Matti | he  | miller           | Mill Lane      | donkey   | Sack    | porridge      | sleepy
Helga | she | harbour master   | Pier Row       | heron    | Signal  | crab salad    | strict
Ruben | he  | musician         | Bridge Street  | duck     | Fiddle  | cherry cake   | funny
Agnes | she | bookseller       | School Hill    | cat      | Comma   | cream buns    | curious
Lars  | he  | glassblower      | Forge Street   | fox      | Ember   | tomato soup   | daring
Tilda | she | tailor           | Spindle Lane   | mouse    | Pin     | rice pudding  | neat
Boris | he  | salt maker       | the salt meadow | horse    | Brine   | salted almonds| gruff
Pia   | she | net mender       | Rope Lane      | seal     | Knot    | shrimp rolls  | clever
Tom   | he  | child            | School Hill    | dog      | Biscuit | apple pie     | curious
Lily  | she | child            | Lantern Street | duck     | Puddle  | honey cakes   | brave
Finn  | he  | child            | Pier Row       | crab     | Pinch   | pancakes      | wild
Mina  | she | child            | Mill Lane      | goat     | Clover  | cherry cake   | shy
Otto  | he  | child            | Orchard Lane   | rabbit   | Hop     | cream buns    | greedy
June  | she | child            | Bridge Street  | frog     | Jump    | plum tart     | lucky
""", "name he trade home pet pet_name food trait")

# does: third person; did: past; do: base form; tool and place of work.
TRADES = _rows("""
baker            | bakes bread for the town       | bake bread        | baked twelve loaves       | oven       | the bakery
ropemaker        | twists long ropes for the boats| twist rope        | twisted a long rope       | hook       | the rope walk
lighthouse keeper| lights the great lamp at dusk  | light the lamp    | polished the great lamp   | oil can    | the lighthouse
ferry captain    | steers the ferry over the bay  | steer a boat      | steered through the waves | wheel      | the stone pier
smith            | shapes hot iron with a hammer  | shape iron        | hammered a new hinge      | hammer     | the forge
clockmaker       | mends the clocks of the town   | mend a clock      | mended a little clock     | small screwdriver | the clock tower
weaver           | weaves cloth on a wooden loom  | weave cloth       | wove a blue cloth         | loom       | the weaving house
fisher           | catches herring in the bay     | catch herring     | caught a basket of herring| net        | the fish hall
teacher          | teaches the children to read   | teach             | read a long story aloud   | slate      | the school
potter           | makes bowls and cups from clay | make a bowl       | made a round bowl         | wheel      | the pottery
gardener         | grows beans, roses and pears   | grow beans        | planted a row of beans    | spade      | the orchard
carpenter        | builds tables, doors and stairs| build a table     | built a small table       | saw        | the workshop
doctor           | cares for people who are ill   | wrap a bandage    | wrapped a sore foot       | leather bag| the sick house
shepherd         | watches the sheep on the hill  | watch sheep       | counted the sheep         | staff      | the north hill
beekeeper        | gathers honey from the hives   | gather honey      | filled six jars of honey  | smoke pot  | the orchard
cook             | cooks supper for the sailors   | cook soup         | cooked a pot of soup      | ladle      | the Blue Anchor
letter carrier   | carries letters to every door  | carry letters     | carried a bag of letters  | bag        | the post room
boat builder     | builds boats from oak and pine | build a boat      | bent a plank for a boat   | plane      | the boatyard
innkeeper        | keeps warm beds for travellers | make a warm bed   | made nine warm beds       | big key    | the Blue Anchor
cobbler          | mends boots and shoes          | mend a boot       | mended an old boot        | needle     | the shoe shop
painter          | paints pictures of the sea     | paint a picture   | painted a picture of the sea | brush   | the clock tower
miller           | grinds wheat into flour        | grind wheat       | ground ten sacks of wheat | millstone  | the mill
harbour master   | tells each boat where to tie up| read the tide     | wrote down every boat     | spyglass   | the harbour office
musician         | plays the fiddle at every feast| play the fiddle   | played a merry tune       | fiddle     | the market square
bookseller       | sells books and old maps       | find a good book  | sold a book of maps       | ladder     | the library
glassblower      | blows lamps and bottles of glass | blow glass      | blew a green bottle       | long pipe  | the forge
tailor           | sews coats and shirts          | sew a coat        | sewed a warm coat         | needle     | the weaving house
salt maker       | dries sea water to get salt    | make salt         | raked a heap of white salt| rake       | the salt meadow
net mender       | ties the holes in the nets     | tie a net         | tied a torn net           | bone needle| the fish hall
""", "trade does do did tool place")

ANIMALS = _rows("""
gull    | gulls    | screams  | fish and crusts      | on the roofs by the harbour | white feathers   | ride the wind without moving a wing | 3
cat     | cats     | purrs    | fish and milk        | near warm stoves            | soft fur         | walk without a sound                | 4
dog     | dogs     | barks    | bones and meat       | in houses with people       | thick fur        | follow a smell for miles            | 6
owl     | owls     | hoots    | mice                 | in hollow trees             | brown feathers   | see in the dark                     | 3
donkey  | donkeys  | brays    | hay and thistles     | in stables                  | grey hair        | carry heavy sacks                   | 8
mouse   | mice     | squeaks  | seeds and cheese     | in holes in the wall        | grey fur         | squeeze through a tiny gap          | 1
hedgehog| hedgehogs| snuffles | worms and beetles    | under hedges                | sharp spines     | roll up into a ball                 | 2
frog    | frogs    | croaks   | flies                | in wet grass and ponds      | smooth green skin| jump ten times its own length       | 1
hen     | hens     | clucks   | corn and seeds       | in wooden huts              | red feathers     | lay an egg every morning            | 3
rabbit  | rabbits  | thumps   | grass and carrots    | in holes under the ground   | brown fur        | hear a fox from far away            | 3
sheep   | sheep    | bleats   | grass                | on the north hill           | thick wool       | stay warm in the snow               | 7
goat    | goats    | bleats   | leaves and bark      | on the rocks                | short rough hair | climb a steep cliff                 | 7
pig     | pigs     | grunts   | roots and apples     | in muddy yards              | pink skin        | find things under the ground        | 7
pigeon  | pigeons  | coos     | crumbs and seeds     | in the clock tower          | grey feathers    | find the way home from anywhere     | 2
otter   | otters   | chirps   | fish and crabs       | by the river                | sleek brown fur  | swim under water for a long time    | 5
duck    | ducks    | quacks   | weeds and snails     | on the mill pond            | oily feathers    | float all day and stay dry          | 3
snail   | snails   | makes no sound | leaves         | under stones                | a round shell    | carry its house on its back         | 1
heron   | herons   | croaks   | fish and frogs       | at the edge of the water    | long grey feathers | stand still for an hour           | 5
fox     | foxes    | yelps    | mice and berries     | in the pine wood            | red fur          | hide so that nobody sees it         | 5
horse   | horses   | neighs   | hay and oats         | in stables                  | a long mane      | pull a full cart                    | 9
seal    | seals    | barks    | fish                 | on the rocks of Gull Island | smooth grey skin | dive deep and sleep in the water    | 8
crab    | crabs    | clicks   | anything it can find | under stones on the beach   | a hard shell     | walk sideways                       | 1
bee     | bees     | hums     | nectar from flowers  | in hives                    | soft stripes     | make honey                          | 0
whale   | whales   | sings    | tiny shrimps         | in the deep sea             | dark smooth skin | breathe out a fountain of water     | 10
herring | herring  | makes no sound | tiny sea creatures | in big shoals in the bay  | silver scales    | turn all together like one fish     | 2
""", "name plural sound eats lives cover can size")

# across: yes for places that the ferry goes to.
PLACES = _rows("""
the stone pier    | a long grey pier          | at the end of Pier Row       | wait for the ferry           | iron rings as big as plates hang in its wall | the slap of small waves   | no
the bakery        | a small warm shop         | on Lantern Street            | buy bread and cakes          | its chimney smokes before the sun is up      | the smell of fresh bread  | no
the lighthouse    | a tall white tower        | on the last rock of the cape | look far over the sea        | it has exactly ninety-nine steps             | the wind in the railing   | no
the market square | a wide square of flat stones | in the middle of the town | buy and sell things          | a fountain stands in its middle              | many voices               | no
the mill          | a round mill with four sails | on Mill Lane              | bring their wheat            | its sails can be seen from the sea           | the rumble of the stones  | no
the school        | a yellow house with tall windows | on School Hill        | learn to read and count      | an old ship's bell hangs over its door       | children singing          | no
the library       | a quiet room full of books| on School Hill               | borrow books and maps        | a cat sleeps on the atlas                    | turning pages             | no
the Blue Anchor   | an old inn with a blue door | on Anchor Street           | eat supper and sleep         | its sign was once part of a ship             | laughter and plates       | no
the boatyard      | a yard full of planks     | beside the river mouth       | build and mend boats         | a half finished boat always lies there       | hammers and saws          | no
the salt meadow   | a wide white field        | south of the town            | dry the sea water            | the ground shines like snow in summer        | nothing but wind          | no
the fish hall     | a long cool hall          | next to the stone pier       | sell the morning's fish      | its floor is washed three times a day        | shouting and splashing    | no
the orchard       | a garden of old fruit trees | behind Orchard Lane        | pick apples and pears        | two hundred trees stand there in rows        | bees                      | no
the pine wood     | a dark sweet wood         | behind the north hill        | gather sticks and mushrooms  | the oldest tree is wider than a door         | an owl at dusk            | no
the clock tower   | a tower of red brick      | on Tower Square              | see what time it is          | one of its four clocks is always late        | the big bell              | no
the old bridge    | a stone bridge with three arches | over the river        | fish from the wall           | every arch has a different face carved in it | running water             | no
the north hill    | a green round hill        | north of the town            | let their sheep graze        | you can see seven islands from the top       | sheep bells               | no
the forge         | a dark hot house          | on Forge Street              | have iron things made        | its fire never goes out                      | the ring of the hammer    | no
the harbour office| a narrow house with a flag| at the start of Pier Row     | ask about tides and boats    | a huge map covers one wall                   | a scratching pen          | no
Gull Island       | a small rocky island      | across the bay to the west   | watch the seals              | no house stands on it                        | a thousand birds          | yes
Otter Point       | a green point of land     | where the river Alder ends   | swim and have picnics        | the water there is always warm               | splashing otters          | yes
Fennick           | a village of red houses   | on the far side of the bay   | visit the Sunday fair        | every house there has a red door             | a brass band              | yes
Long Sand         | a beach three miles long  | to the east                  | look for shells              | it is under water twice a day                | the far surf              | yes
Whale Bay         | a deep blue bay           | a long way to the north      | look for whales              | a giant bone stands on its shore             | the breath of the whales  | yes
Saint Brine       | an old island town        | far out at sea               | see the old castle           | its streets are too narrow for carts         | church bells              | yes
""", "name what where do detail hear across")

OBJECTS = _rows("""
rope    | hemp            | tie up a boat        | on a hook by the door
lantern | tin and glass   | see in the dark      | beside the stairs
basket  | willow twigs    | carry apples         | under the table
kettle  | copper          | boil water           | on the stove
bell    | bronze          | call people together | above the gate
net     | thin strong thread | catch fish        | in the boat shed
ladder  | ash wood        | climb up to the roof | behind the shed
map     | thick paper     | find the way         | in a wooden drawer
oar     | pine wood       | row a boat           | across the beams
anchor  | black iron      | hold a boat in one place | at the bow
cup     | baked clay      | drink tea            | on the shelf
blanket | sheep's wool    | keep warm at night   | at the foot of the bed
drum    | wood and goat skin | keep time in a march | in the music chest
kite    | paper and sticks| play in the wind     | on top of the cupboard
key     | brass           | open a lock          | on a string
coat    | heavy wool      | keep out the rain    | on a peg
boot    | leather         | walk through mud     | by the door
candle  | bee's wax       | light a small room   | in a box
bucket  | wood and iron   | carry water          | next to the well
wheel   | oak             | move a heavy cart    | against the wall
whistle | tin             | call a dog           | in a coat pocket
flute   | cherry wood     | play a soft tune     | in a velvet bag
barrel  | oak and iron    | keep fish in salt    | in the cellar
broom   | birch twigs     | sweep the floor      | in the corner
spoon   | beech wood      | stir the soup        | in a jar
needle  | steel           | sew a torn shirt     | in a red cushion
ladle   | tin             | pour out soup        | over the stove
shovel  | iron and ash wood | dig a hole         | in the garden shed
""", "name made use kept")

WEATHER = {
    "fog": ("foggy misty grey".split(), [
        "the fog lay so thick on the water that nobody could see the end of the pier",
        "the houses on the other side of the street had turned into grey shadows",
        "every boat rang its bell so that no two boats would meet by mistake"],
        [("the fog was so thick", "the ferry had to go very slowly"),
         ("nobody could see the path", "people held on to the wall with one hand"),
         ("the air was so wet", "the washing did not dry all day")]),
    "rain": ("rainy wet dripping".split(), [
        "the rain ran down the windows in long crooked lines",
        "the gutters of the town sang and gurgled",
        "there were puddles on the street as big as tables"],
        [("it rained without a pause", "the river rose over the stepping stones"),
         ("the roof had a hole", "the rain came in and made the bed wet"),
         ("the ground was soft with rain", "the cart wheels sank into the mud")]),
    "storm": ("stormy wild".split(), [
        "the wind threw salt water as high as the roofs",
        "the shutters banged and the ropes in the harbour hummed like strings",
        "black clouds came over the sea like a herd of cattle"],
        [("the waves were too high", "the ferry stayed tied to the pier"),
         ("the wind pulled at every roof", "many tiles fell into the street"),
         ("a big wave broke over the wall", "two boats came loose from their ropes")]),
    "sun": ("sunny bright warm".split(), [
        "the sun lay on the water like a path of gold",
        "cats slept on every warm wall",
        "even the old stones of the pier felt warm"],
        [("the sun was so hot", "the butter melted on the table"),
         ("the sun had dried the hay", "the farmers could bring it home"),
         ("it was so warm", "all the children went swimming")]),
    "snow": ("snowy white cold".split(), [
        "the snow had covered all the boats, so that they looked like sleeping sheep",
        "every step made a soft creaking sound",
        "smoke stood straight up over all the chimneys"],
        [("the snow was deep", "the letter carrier came on a sledge"),
         ("the water in the well was frozen", "people melted snow in their kettles"),
         ("the night was so cold", "there was ice on the inside of the windows")]),
    "wind": ("windy breezy fresh".split(), [
        "hats rolled down the street like little wheels",
        "the flags on the harbour office cracked like whips",
        "the sails of the mill turned so fast that they could not be counted"],
        [("the wind blew from the sea", "the whole town smelled of salt"),
         ("the wind was strong and steady", "the boats came home early"),
         ("the wind blew out the candle", "the room was dark all at once")]),
}

COLOURS = "red blue green yellow white black brown grey".split()
SEASONS = "spring summer autumn winter".split()
TIMES = "morning evening afternoon night".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
FRUIT = [("apple", "apples"), ("pear", "pears"), ("plum", "plums"), ("egg", "eggs"),
         ("shell", "shells"), ("coin", "coins"), ("fish", "fish"), ("bun", "buns"),
         ("candle", "candles"), ("nut", "nuts"), ("stone", "stones"), ("cup", "cups"),
         ("loaf", "loaves"), ("feather", "feathers"), ("button", "buttons"), ("rope", "ropes")]
NUMBERS = ("no one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
           "fifteen sixteen seventeen eighteen nineteen twenty").split()

# Things that nobody in Saltmere has heard of, so that a question about them has an answer too.
UNKNOWN = [w.strip() for w in """computers; telephones; trains; aeroplanes; the internet; football;
Paris; London; France; America; China; rockets; robots; television; electricity; elephants; lions;
tigers; bananas; chocolate; coffee; pizza; the moon landing; physics; chess; cars; motorbikes;
cameras; guitars; politics; the stock market; dragons; unicorns; volcanoes; deserts; kangaroos;
penguins; Rome; Berlin; the president; language models; graphics cards; programming; Spain;
basketball; dinosaurs; plastic; cinemas; submarines; satellites""".replace("\n", " ").split(";")]

PERSON = {p["name"]: p for p in PEOPLE}
TRADE = {t["trade"]: t for t in TRADES}
ANIMAL = {a["name"]: a for a in ANIMALS}
_PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}


def person_slots(person, suffix=""):
    """Slots for one person: A, he, him, his, who_A ...; `suffix` names a second person's."""
    he, him, his = _PRONOUNS[person["he"]]
    child = person["trade"] == "child"
    trade = TRADE.get(person["trade"])
    slots = {"A": person["name"], "he": he, "him": him, "his": his, "trait": person["trait"],
             "home": ("on " if "Street" in person["home"] or "Lane" in person["home"]
                      or person["home"] in ("Pier Row", "School Hill", "Tower Square",
                                            "the north hill") else
                      "in " if person["home"] == "the lighthouse" else "near ") + person["home"],
             "pet": person["pet"], "pet_name": person["pet_name"], "food": person["food"],
             "who": f"little {person['name']}" if child else f"{person['name']} the {person['trade']}",
             "is_a": f"a {person['trait']} {'boy' if he == 'he' else 'girl'}" if child
                     else f"the {person['trade']}",
             "does": trade["does"] if trade else "goes to the school with the other children",
             "did": trade["did"] if trade else "learned a new song by heart",
             "tool": trade["tool"] if trade else "little bag",
             "work": trade["place"] if trade else "the school"}
    return {k + suffix: v for k, v in slots.items()}


@functools.lru_cache(maxsize=None)
def _compile(template):
    """A template as nested lists: str, ("slot", name) or ("choice", [sequences])."""
    stack, current = [], [[]]
    for token in re.findall(r"[\[\]|]|\{\w+\}|[^\[\]|{}]+", template):
        if token == "[":
            stack.append(current)
            current = [[]]
        elif token == "|" and stack:
            current.append([])
        elif token == "]":
            done, current = ("choice", current), stack.pop()
            current[-1].append(done)
        elif token[0] == "{":
            current[-1].append(("slot", token[1:-1]))
        else:
            current[-1].append(token)
    if stack:
        raise ValueError("unclosed [ in " + template)
    return current[0]


def _expand(rng, parts, slots, out):
    for part in parts:
        if isinstance(part, str):
            out.append(part)
        elif part[0] == "slot":
            out.append(str(slots[part[1]]))
        else:
            _expand(rng, part[1][int(rng.random() * len(part[1]))], slots, out)


def say(rng, template, **slots):
    """One expansion of `template`; call `polish` once the whole text is put together."""
    out = []
    _expand(rng, _compile(template), slots, out)
    return "".join(out)


_START = re.compile(r"(^|\n|[.!?] +|\.\" +|[.!?] +\"|: \")(\"?)([a-z])")
_SPACE = re.compile(r" +")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeioAEIO]|hour|honest|u[ng])(?!one\b|once\b|uni)")


def polish(text):
    """Capitals at sentence starts, a/an, single spaces."""
    text = _SPACE.sub(" ", text).replace(" ,", ",").replace(" .", ".").strip()
    text = _ARTICLE.sub(lambda m: m.group(1) + "n ", text)
    return _START.sub(lambda m: m.group(1) + m.group(2) + m.group(3).upper(), text)
