"""Stories and pages of facts about Saltmere, made from the tables of world.py.

A story is a list of beats; every beat is a template of world.say, and one draw of slots keeps
people, things and weather the same through the whole story.
"""

from world import (ANIMAL, ANIMALS, COLOURS, DAYS, FRUIT, NUMBERS, OBJECTS, PEOPLE, PLACES, SEASONS,
                   TIMES, TRADE, TRADES, WEATHER, person_slots, say)

OPENING = [
    "{when}, {who} [was on {his} way to|walked to|stood near|came back from|was sitting not far from] {place}.",
    "{when}, {who} [was in a good mood|put on {his} coat|could not sit still|had nothing to do] and [went to|walked all the way to|looked for company at] {place}.",
    "[It was|It had been] a {wxadj} {time}[ in {season}|]. {who} was [working|busy|resting] at {place}.",
    "{who} lived {home} with a {pet} called {pet_name}. {when}, [the two of them|both of them] went to {place}.",
    "There was once a {trait} [person|soul] in Saltmere called {A}. {when}, {he} [went|walked|hurried] to {place}.",
]
SCENE = ["{wxline}.", "{wxline}, and you could hear {hear}.", "You know {place}: {detail}.",
         "The clock in the tower showed {clock}.", "{A} had {pennies} pennies in {his} pocket[, and no more|].",
         "{A} was [known to be|] {trait}, [and everybody knew it|so people liked {him}|as you may know].",
         "[That day|That {time}], {wxcause}, and so {wxeffect}.",
         "{who_b} was [there too|already there], [eating {food_b}|looking at the sea|talking to {his_b} {pet_b}]."]
ENDING = [
    "[From that day on|Ever since that day], {A} and {B} were [good friends|the best of friends].",
    "{A} [went home|walked home {home}] and [ate|had] {food} for supper, and it [tasted better than ever|had never tasted so good].",
    "[That {time}|In the end] {A} [slept well|laughed about it all|felt much better], and so did {B}, I am sure.",
    "And {pet_name} the {pet} [said nothing|{sounds}|slept through it all], as always.",
    "\"[Well|So],\" said {B}, \"[now we know|that is how it goes|all is well that ends well].\"",
    "When {he} told the story at {place2}, [everybody laughed|nobody believed it|people asked to hear it again].",
    "{A} never forgot [it|that {time}|what {B} had said].",
]

STORIES = {
    "lost": [
        "[Then|Suddenly|At that moment] {A} [noticed|saw] that {his} {colour} {obj} was [gone|missing|no longer there]. [\"Where can it be?\" {he} cried.|{He} [turned red|went pale|looked in every pocket].]",
        "[{He} needed it to {use}.|Without it {he} could not {use}.|It was made of {made} and {he} loved it.]",
        "[First|At first] {he} looked [under the table|behind the door|in {his} bag], but [it was not there|there was only dust|{he} found nothing but an old button].",
        "[Then|After that|Next] {he} [went|ran] to {place2} and asked {who_b}. \"[Have you seen|Did you see] my {obj}?\" \"[No|I am afraid not],\" said {B}, \"but [I will help you look.|let us think. When did you have it last?|two can look better than one.]\"",
        "[{B} was {trait_b} and had an idea.|Together they looked [high and low|everywhere].|They followed small marks on the ground.]",
        "[At last|In the end|Just before dark] they [found|saw] it: [a {animal} had taken it and was sitting on it|it was {kept}, where it always is|it lay {kept}, just where {A} had left it|the wind had carried it onto a roof|it hung on {A}'s own back the whole time].",
        "[{A} [laughed|was so glad that {he} sang|did not know what to say].|\"[Thank you|Oh, thank you], {B}!\" {A} said. \"[Without you I would still be looking|You have good eyes].\"]",
    ],
    "weather": [
        "[But|Then] {wxcause2}, and so {wxeffect2}.",
        "\"What shall we do [now|about it]?\" [asked|said] {A}. [{B} looked at the sky.|{B} did not know either.|Nobody answered.]",
        "\"[We must wait|Let us wait] until it stops,\" said {B}. [But {A} did not want to wait.|So they waited, and it did not stop.|\"I have no time,\" {A} answered.]",
        "[So|Then] {A} took a {obj} [of {made}|] and a {obj2}[, because {he} wanted to {use2}|]. [It was hard work.|It took {n} hours.|{His} hands grew cold.]",
        "[First it went wrong,|At first it did not work,] because {A} [was too quick|had forgotten the {obj2}|pulled too hard]. Then {B} [held|carried] the other end, and [it worked|all went well].",
        "When [they were ready|it was done], {B} [made tea|gave {him} {food}|laughed out loud]. \"[You are {trait}, {A}|I did not think that you could do it],\" {he_b} said.",
    ],
    "count": [
        "{He} had {x} {things} [in a basket|in a bag|on a plate|with {him}].",
        "On the way {he} met {who_b}, who [looked hungry|looked sad|had none]. {A} gave {him_b} {y} of [the {things}|them]. Then {he} had {z} {things} left.",
        "[A little later|At {place2}], {he} found {u} more, so [now|that] {he} had {v} {things}.",
        "[\"{V},\" {he} counted, \"that is enough.\"|{He} counted them again: {v}.|{He} was happy with {v}.]",
        "[\"Why did you give some away?\" asked {his} {pet}, or so {A} dreamed that night.|\"If you give something away, you get something back,\" said {B}.|{B} thanked {him} and gave {him} a bowl of {food_b}.]",
    ],
    "make": [
        "{A} [wanted|had decided] to make {a_gift} for {who_b}, because [it was {his_b} birthday|{he_b} had helped {him} in the winter|{he_b} looked so sad].",
        "[\"I need {made},\" {he} said to {himself}.|For that {he} needed {made}.] {He} [got|bought|found] [it|what {he} needed] at {place2}.",
        "[The first one|At first it] [broke|fell apart|came out crooked], because {he} [was too fast|had not measured it|was thinking of {food}]. \"[Never mind|Try again],\" said {C}, \"[even a {trade_c} must try twice|slow hands are sure hands].\"",
        "So {he} [began again|tried again], and this time {he} [took {his} time|measured twice|asked {C} to hold one end].",
        "[After {n} days|Late at night|When the lamp was nearly out] the {obj} was ready. It was {colour} and [a little crooked|very fine|just the right size].",
        "[{B} turned it round and round.|{B} was so glad that {he_b} could not speak.] \"[Now I can {use}|With this I will {use} every day|Nobody ever made me something so fine],\" {he_b} said[ at last|].",
    ],
    "rescue": [
        "[There|Suddenly] {he} heard [a small sound|something]: [a {animal} was stuck|a {animal} sat and could not move|a little {animal} had fallen] [between two stones|under an old boat|in a hole|in a net].",
        "[It was afraid and|The poor thing] [looked at {him} with round eyes|did not dare to move|made itself very small].",
        "{A} tried to [pull|lift] it out with {his} hands, but [the hole was too narrow|it was too deep|{he} was not strong enough].",
        "[So {he} ran to|{He} called] {who_b}, who came with a {obj}. \"[Hold this|Be still|Slowly, slowly],\" said {B}. [One, two, three, and the {animal} was free.|They pulled together, and out it came.]",
        "The {animal} [ran away at once|stayed with them for a while|shook itself]. A {animal} can {can}, [you know|so it was soon gone].",
        "[The next {time}|{n} days later] it [came back|stood at {A}'s door] and brought [a shell|a feather|a friend|nothing, but it looked glad]. [{A} gave it [something to eat|{eats}].|]",
    ],
    "journey": [
        "[From there|Then] {he} wanted to go to {place2}, where people {do2}.",
        "[The way was long.|It is a long way.|{He} took a {obj} with {him}, to {use}.] [First {he} came past {place3}, where {detail3}.|On the way {he} heard {hear3}: that was {place3}.]",
        "There {he} met {who_b}. \"[Where are you going|Where to], {A}?\" \"To {place2},\" {he} said. \"[Then take|You will need] this {obj2},\" said {B}, \"[the way is dark|it is a long way|you never know].\"",
        "[In the middle of the way {wxcause2}, and so {wxeffect2}.|A {animal} walked with {him} for a while, {eats} in its mouth.] {A} was [not afraid|in good spirits|glad of the company], and {he} [went on|sang a song and went on].",
        "[At last|When the bell struck {n}] {he} [came to|stood before] {place2}. It is {what2}, and {detail2}. [{He} stayed until evening.|\"So this is it,\" {he} said.]",
    ],
    "quarrel": [
        "{B} was there too, and both of them wanted the same {colour} {obj}. \"[It is mine|I saw it first]!\" said {A}. \"[No, mine|I need it more]!\" [cried|said] {B}.",
        "[They pulled and pulled|Each pulled at one end], until [it nearly broke|they both fell over|it tore in the middle].",
        "{who_c} [heard the noise|came by] and asked what the matter was. [They both spoke at once.|{A} told {his} side, and {B} told {his_b} side.]",
        "\"[What do you need it for|Why do you want it]?\" asked {C}. [\"To {use},\" said {A}. \"To {use2},\" said {B}.|{A} wanted to {use}, and {B} only wanted to look at it.]",
        "\"[Then it is easy|Well],\" said {C}. \"[You take it on {day}, and you on {day2}|First {A} will use it, and then {B}|Use it together].\" [They were ashamed.|{A} looked at {his} feet.|Both had to laugh.]",
    ],
    "fear": [
        "[{A} was not afraid of much, but|Nobody knew it, but] {he} was afraid of [the dark|deep water|thunder|high ladders|{animal_s}]. [{He} never told anybody.|Even {pet_name} knew it.]",
        "\"[Come with me|Come along],\" said {who_b}, \"[it is only a short way|I will hold your hand|we must go there today].\" {A} [said nothing|shook {his} head|swallowed hard].",
        "[{His} heart beat like a drum.|{His} knees were as soft as butter.|{He} closed {his} eyes.] \"[I was afraid too, once|Everybody is afraid of something],\" said {B}. \"[Then I took one step, and then another one|You only have to begin].\"",
        "So {he} took [one step|{n} steps|a deep breath], and [nothing bad happened|the world did not end|it was not so bad]. [\"I did it!\" {he} shouted.|{He} began to laugh.]",
        "[Now {he} goes there every {day}.|Since then {he} has been a little afraid, but only a little.|\"You are braver than I am,\" said {B}.]",
    ],
    "stranger": [
        "A stranger had come [with the morning boat|over the old bridge|from Saint Brine], with a {colour} coat and a {obj} [on {his_c} back|under one arm]. [Nobody knew the name of the stranger.|People looked out of every window.]",
        "\"[Where do you come from|What brings you here]?\" asked {A}. \"[From far away|From the other side of the sea|I have forgotten it],\" said the stranger, \"and [I have walked for {n} days|I am looking for {place2}|I have eaten nothing since {day}].\"",
        "[{A} was {trait} and|{A} thought for a moment and] [brought {food}|pointed the way to {place2}|made room on the bench]. {who_b} [did not trust the stranger|asked {n} questions|only shook {his_b} head].",
        "[In return|As thanks] the stranger [sang a song that nobody knew|gave {him} the {obj}|told {him} how to {do_b}|mended {his} {tool}].",
        "[The next day|On {day}] the stranger was gone. [Only the {obj} was left, {kept}.|Some say it was a king.|{B} was sorry then, and said so.]",
    ],
    "race": [
        "\"[I bet|I am sure] that I am faster than you,\" said {who_b}. \"[To {place2} and back|Once around {place2}]!\" [{A} could not say no.|{A} laughed. \"We shall see.\"]",
        "{who_c} counted: one, two, three! {B} [ran|was off] like a {animal}, and {A} was [far behind|close behind|still tying a boot].",
        "[But|Then] {B} [stopped to talk|stopped to eat {food_b}|fell over a {obj}|looked back and ran into a {obj}], because {he_b} [was so sure of winning|did not look where {he_b} was going].",
        "{A} did not [stop|look left or right]. [Step by step|With the last of {his} breath] {he} came [closer|nearer], and at the end {he} was [first by a nose|first|one step ahead].",
        "\"[Well run|That was not fair],\" said {B}. [They shared a plate of {food}.|\"Again on {day}?\" \"Again on {day}.\"|{C} gave both of them a {colour} ribbon.]",
    ],
    "learn": [
        "{He} [wanted|had always wanted] to [learn|know] how to {do_b}. So {he} [asked|went to] {who_b}, because nobody in Saltmere can do it better.",
        "\"[It is not easy|It takes time],\" said {B}. \"[First you must learn to wait|First you sweep the floor|Watch my hands].\" [{A} watched all day.|{A} swept for {n} days.]",
        "[Then|On {day}] {he} was allowed to hold the {tool_b}. {He} [dropped it at once|did everything wrong|was proud and careless], and {B} [laughed|shook {his_b} head|said nothing].",
        "\"[Why does it not work?|What am I doing wrong?]\" \"Because you [are in a hurry|look at me and not at your hands|do not breathe],\" said {B}.",
        "[{n} weeks later|By {season}] {A} could {do_b} [alone|nearly as well as {B}|with closed eyes]. [\"Now you can teach somebody else,\" said {B}.|{B} gave {him} {food_b}, and that was more than praise.]",
    ],
}


def _draw_weather(rng, suffix=""):
    kind = rng.choice(list(WEATHER))
    adjectives, lines, effects = WEATHER[kind]
    cause, effect = rng.choice(effects)
    return {"wxadj" + suffix: rng.choice(adjectives), "wxline" + suffix: rng.choice(lines),
            "wxcause" + suffix: cause, "wxeffect" + suffix: effect}


def story_slots(rng, hero=None, place=None, animal=None, obj=None):
    """A cast, places, things and weather, without repeats; what is given is taken."""
    cast = [hero] if hero else []
    cast += rng.sample([p for p in PEOPLE if p is not hero], 3 - len(cast))
    places = [place] if place else []
    places += rng.sample([p for p in PLACES if p is not place], 3 - len(places))
    objects = [obj] if obj else []
    objects += rng.sample([o for o in OBJECTS if o is not obj], 2 - len(objects))
    animal = animal or rng.choice(ANIMALS)
    s = {}
    for person, suffix in zip(cast, ("", "_b", "_c")):
        s.update(person_slots(person, suffix))
        s["trade" + suffix] = person["trade"]
        s["do" + suffix] = TRADE[person["trade"]]["do"] if person["trade"] in TRADE else "whistle"
    s.update(B=s["A_b"], C=s["A_c"], He=s["he"].capitalize(), His=s["his"].capitalize(),
             himself=s["him"] + "self", sounds=ANIMAL[s["pet"]]["sound"])
    for p, suffix in zip(places, ("", "2", "3")):
        s.update({"place" + suffix: p["name"], "detail" + suffix: p["detail"],
                  "hear" + suffix: p["hear"], "what" + suffix: p["what"], "do" + suffix: p["do"]})
    for o, suffix in zip(objects, ("", "2")):
        s.update({"obj" + suffix: o["name"], "made" + suffix: o["made"], "use" + suffix: o["use"],
                  "kept" + suffix: o["kept"]})
    s.update(animal=animal["name"], animal_s=animal["plural"], can=animal["can"], eats=animal["eats"], a_gift=f"a {s['obj']}")
    s.update(_draw_weather(rng)), s.update(_draw_weather(rng, "2"))
    one, many = rng.choice(FRUIT)
    x = rng.randint(4, 14)
    y = rng.randint(1, x - 2)
    u = rng.randint(2, 6)
    s.update(x=NUMBERS[x], y=NUMBERS[y], z=NUMBERS[x - y], u=NUMBERS[u], v=NUMBERS[x - y + u],
             V=NUMBERS[x - y + u].capitalize(), things=many, n=NUMBERS[rng.randint(2, 12)],
             clock=f"{rng.randint(5, 21)}:{rng.randrange(0, 60, 5):02d}",
             pennies=rng.randint(2, 40), colour=rng.choice(COLOURS), time=rng.choice(TIMES), season=rng.choice(SEASONS))
    s["day"], s["day2"] = rng.sample(DAYS, 2)
    s["when"] = say(rng, "[one {wxadj} {time}|on a {wxadj} {time}|early one {time}|late one {time}"
                         "|one {time} in {season}|on {day}, early in the {season}]", **s)
    return s


def story(rng, beats=None, **given):
    """A whole story, or one of about `beats` sentences when a number is given."""
    s = story_slots(rng, **given)
    kind = rng.choice([k for k in STORIES if not given.get("animal") or k in ("rescue", "journey", "fear", "race")]
                      if rng.random() < 0.9 else list(STORIES))
    if kind == "learn" and s["trade_b"] == "child":
        kind = "lost"
    body = STORIES[kind]
    parts = [rng.choice(OPENING)]
    if beats is None:
        parts += rng.sample(SCENE, rng.randint(0, 2)) + body + rng.sample(ENDING, rng.randint(1, 2))
    else:
        parts += body[:beats]
    return " ".join(say(rng, part, **s) for part in parts)



# Each function gives a list of true sentences about one thing, the most important first.

def person_facts(rng, p):
    s = person_slots(p)
    out = ["{A} is {is_a}[ of Saltmere| in our town|].", "{He} {does}[, day after day|, and does it well|].",
           "{A} lives {home}.", "{He} has a {pet} called {pet_name}.",
           "{His} favourite food is {food}.", "[People say that {he} is|{He} is|Everybody calls {him}] {trait}.",
           "[You can find {him} at {work}|Most days {he} is at {work}|{He} works at {work}]."]
    if p["trade"] == "child":
        out.pop(6)
    s.update(He=s["he"].capitalize(), His=s["his"].capitalize())
    return [say(rng, t, **s) for t in out]


def animal_facts(rng, a):
    s = dict(a, sound="makes no sound at all" if "no sound" in a["sound"] else a["sound"])
    out = ["[A {name} lives|You can find a {name}] {lives}.",
           "[It eats|A {name} eats|What it likes to eat is] {eats}.", "A {name} has {cover}.",
           "[It can|A {name} can] {can}.",
           "[A {name} {sound}.|When it is [glad|afraid|hungry], a {name} {sound}.]"]
    owners = [p for p in PEOPLE if p["pet"] == a["name"]]
    if owners:
        p = rng.choice(owners)
        out.append(f"{p['name']} has a {a['name']} called {p['pet_name']}.")
    return [say(rng, t, **s) for t in out]


def place_facts(rng, p):
    out = ["{name} is {what} {where}.", "[People go there to {do}.|It is where people {do}.]",
           "[The strange thing is that|What everybody remembers is that|You should know that] {detail}.",
           "[When you stand there, you hear|There is always|The sound of the place is] {hear}."]
    if p["across"] == "yes":
        out.append("[The ferry goes to {name}|You can go to {name} by ferry][, when the sea allows it|].")
    workers = [t for t in TRADES if t["place"] == p["name"]]
    if workers:
        t = rng.choice(workers)
        who = next(q for q in PEOPLE if q["trade"] == t["trade"])
        out.append(f"{who['name']} the {t['trade']} works there.")
    return [say(rng, t, **p) for t in out]


def object_facts(rng, o):
    out = ["[You use a {name} to|A {name} is there to|With a {name} you can] {use}.",
           "A [good|] {name} is made of {made}.",
           "[In Saltmere it hangs or lies|People keep it|Most people have theirs] {kept}."]
    return [say(rng, t, **o) for t in out]


def trade_facts(rng, t):
    who = next(p for p in PEOPLE if p["trade"] == t["trade"])
    s = dict(t, A=who["name"], he=who["he"])
    out = ["A {trade} {does}.", "The {trade} [of Saltmere|in our town] is [called|] {A}.",
           "[Every|A] {trade} [needs|uses] a {tool}.", "The {trade} works at {place}.",
           "[Yesterday|Last week|On market day] {A} {did}."]
    return [say(rng, t, **s) for t in out]


def weather_facts(rng, kind):
    adjectives, lines, effects = WEATHER[kind]
    out = []
    for cause, effect in rng.sample(effects, len(effects)):
        out.append(say(rng, "[Once {c}, and so {e}.|I remember that {e}, because {c}.|{e}, because {c}.]",
                       c=cause, e=effect))
    return out + ["On such a day " + rng.choice(lines) + "."]


def count_facts(rng):
    x, y = rng.randint(2, 12), rng.randint(1, 8)
    one, many = rng.choice(FRUIT)
    p = rng.choice(PEOPLE)
    s = person_slots(p)
    if rng.random() < 0.5 and y < x:
        return [say(rng, "{A} had {x} {t} and [gave away|lost|ate] {y}. That leaves {z}.", **s,
                    x=NUMBERS[x], y=NUMBERS[y], z=NUMBERS[x - y],
                    t=many if many in ("apples", "pears", "plums", "eggs", "buns", "nuts") else "apples")]
    return [say(rng, "{A} had {x} {t} and got {y} more. That makes {z}.", **s, x=NUMBERS[x],
                y=NUMBERS[y], z=NUMBERS[x + y], t=many)]


SUBJECTS = {"person": (PEOPLE, person_facts), "animal": (ANIMALS, animal_facts),
            "place": (PLACES, place_facts), "object": (OBJECTS, object_facts),
            "trade": (TRADES, trade_facts), "weather": (list(WEATHER), weather_facts)}


def facts_page(rng):
    """One to three subjects, each with some of its facts."""
    out = []
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.15:
            out += count_facts(rng)
            continue
        table, facts = SUBJECTS[rng.choice(list(SUBJECTS))]
        lines = facts(rng, rng.choice(table))
        rest = lines[1:]
        rng.shuffle(rest)
        out += lines[:1] + rest[:rng.randint(1, len(rest))]
    return " ".join(out)
