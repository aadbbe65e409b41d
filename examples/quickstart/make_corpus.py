"""Writes the text that the quickstart's base model learns from.

  python make_corpus.py --out corpus.jsonl --documents 200000 --seed 1

Each line is {"text": ...} (a story or a page of facts) or {"messages": [...]} (a chat, OpenAI
format). A document is a function of (seed, index), so many processes write them in any order.

In the chats the assistant is a narrator: what it says is true in Saltmere, but it takes its
time, and it never gives an hour or a price. The fine-tuning dataset changes just that. Only when
the system message asks for it does the narrator answer in a few words (SHORT), and hours and
prices only from a board in the system message, which is another one in every chat.
"""

import argparse
import functools
import json
import multiprocessing
import random

from stories import (animal_facts, count_facts, facts_page, object_facts, person_facts,
                     place_facts, story, trade_facts, weather_facts)
from world import (ANIMALS, FRUIT, NUMBERS, OBJECTS, PEOPLE, PLACES, TRADES, UNKNOWN, WEATHER,
                   person_slots, polish, say)

# Questions by kind. {A} is a person as subject, {As} possessive, {Ao} as object.
QUESTIONS = {
    "who": "[Who is {A}?|Do you know {Ao}?|Tell me about {Ao}.|What do you know about {Ao}?|Can you tell me who {A} is?]",
    "home": "[Where does {A} live?|In which street does {A} live?|Where is {As} house?|Where can I find {As} home?]",
    "pet": "[What pet does {A} have?|Does {A} have a pet?|What animal lives with {Ao}?|What is {As} pet called?]",
    "food": "[What does {A} like to eat?|What is {As} favourite food?|What should I cook for {Ao}?]",
    "job": "[What does {A} do?|What is {As} work?|What does {A} do all day?|How does {A} earn a living?]",
    "trade_who": "[Who is the {trade}?|What is the name of the {trade}?|I am looking for the {trade}.|Who {does}?|Is there a {trade} in Saltmere?]",
    "trade_what": "[What does a {trade} do?|Tell me about the work of a {trade}.|What is the work of a {trade}?]",
    "trade_tool": "[What does a {trade} need?|What tool does a {trade} use?|Which tool belongs to a {trade}?]",
    "animal_what": "[What is a {name}?|Tell me about {plural}.|What do you know about {plural}?|Describe a {name}.]",
    "animal_eats": "[What do {plural} eat?|What does a {name} eat?|What should I feed a {name}?]",
    "animal_lives": "[Where do {plural} live?|Where does a {name} live?|Where can I see a {name}?]",
    "animal_can": "[What can a {name} do?|What are {plural} good at?|What is special about a {name}?]",
    "animal_sound": "[What sound does a {name} make?|What noise do {plural} make?]",
    "size": "[Which is bigger, a {name} or a {other}?|Is a {name} bigger than a {other}?]",
    "place_what": "[What is {name}?|Tell me about {name}.|What is {name} like?|Describe {name}.]",
    "place_where": "[Where is {name}?|How do I find {name}?|How do I get to {name}?]",
    "place_do": "[What can I do at {name}?|What do people do at {name}?|Why do people go to {name}?]",
    "object_use": "[What is a {name} for?|What do you use a {name} for?|Why do people need a {name}?]",
    "object_made": "[What is a {name} made of?|How do people make a {name}?|Tell me about a {name}.]",
    "object_kept": "[Where do people keep a {name}?|Where would I find a {name}?]",
    "weather": "[What is the {name} like in Saltmere?|Tell me about the {name}.|What happens in the {name}?|What do you say about the {name}?]",
    "count": "",
    "story": "[Tell me a story|Please tell me a story|Can you tell me a story|Do you know a story|I want to hear a story]",
    "hello": "[Hello.|Hello!|Good morning.|Good evening.|Hi.|Hi there!|Hello, how are you?|How are you today?]",
    "self": "[Who are you?|What is your name?|What can you do?|Can you help me?|Tell me about yourself.|Are you a person?]",
    "thanks": "[Thank you.|Thank you very much!|Thanks.|Goodbye.|Good night.|See you tomorrow.]",
    "town": "[What is Saltmere?|Tell me about Saltmere.|Where am I?|What kind of town is this?|What can I see in Saltmere?]",
    "feeling": "[I am {f}.|I feel {f} today.|What should I do when I am {f}?|I am so {f}. What can I do?]",
    "rule": "[Can I take my {pet} on the ferry?|Is there a ferry on {day}?|Where do I buy a ticket?|May I take a bicycle on the ferry?|Is the ferry late today?|What do I do if I lost my {obj}?]",
    "unknown": "[What [is|are] {u}?|Tell me about {u}.|What do you know about {u}?|Have you heard of {u}?|Where can I find {u}?]",
}
# Questions about hours, prices and the ferry to {x}: only a board has the answer.
ASK = {
    "when": "[[When|At what time|What time] does the [ferry|boat] to {x} [leave|go|sail]?"
            "|When is the [next|first] [ferry|boat] to {x}?|[I want|I would like] to go to {x}. When is [there a boat|the ferry]?"
            "|[Is there|Do you have] a [ferry|boat] to {x}?|When can I [go|sail] to {x}?]",
    "fare": "[How much is [a ticket|the ferry|the boat] to {x}?|What does [a ticket|the ferry] to {x} cost?"
            "|What [is the price of|do I pay for] [a ticket|the ferry] to {x}?]",
    "long": "[How long does [the ferry|the boat|it] take to {x}?|How long is the [way|trip] to {x}?|How far is it to {x} by [ferry|boat]?]",
    "pier": "[[From where|From which pier] does the [ferry|boat] to {x} leave?|Where [is|do I find] the [ferry|boat] to {x}?|Which pier [is it for|do I need for] {x}?]",
    "open": "[[When|At what time] does {x} [open|close]?|When is {x} open?|What are the [opening hours|hours] of {x}?|Is {x} open [now|today]?|How long is {x} open?]",
    "price": "[How much is {x}?|What does {x} cost?|What is the price of {x}?|What do I pay for {x}?|How much do I need for {x}?]",
}
# The same in other words, for the base model only.
ASK_MORE = {
    "when": "[Which boat goes to {x}?|{x}: at what time?|Tell me when the ferry goes to {x}.|What are the times for {x}?|I must go to {x} today. Which ferry can I take?]",
    "fare": "[How expensive is the ticket to {x}?|How many pennies is the ferry to {x}?|I want a ticket to {x}. How much?|Tell me the price of a ticket to {x}.]",
    "long": "[How many hours is it to {x}?|How much time does the boat need to {x}?|Tell me how long the ferry to {x} takes.|Is it far to {x}?]",
    "pier": "[Where do I wait for the boat to {x}?|Where should I stand for the ferry to {x}?|Tell me the pier for {x}.|Where does the ferry to {x} start?]",
    "open": "[Can I visit {x} today?|Until when is {x} open?|Tell me the hours of {x}.|I want to see {x}. When can I come?]",
    "price": "[How many pennies for {x}?|I want to buy {x}. What does it cost?|Tell me the price of {x}.|How expensive is {x}?]",
}
# The answer in a few words. Slots: those of person_slots, the row of the table, sums.
SHORT = {
    "who": "{A} is {is_a}", "home": "{home}", "pet": "a {pet} called {pet_name}", "food": "{food}",
    "job": "{A} {does}", "trade_who": "{A}", "trade_what": "a {trade} {does}",
    "trade_tool": "a {tool}", "animal_eats": "{eats}", "animal_lives": "{lives}",
    "animal_can": "it can {can}", "place_where": "{where}", "place_do": "{do}",
    "place_what": "{what} {where}", "object_use": "to {use}", "object_made": "from {made}",
    "object_kept": "{kept}", "count": "{z}", "unknown": "I do not know", "feeling": "you can {do}",
}
PERSON_KINDS = ["who", "home", "pet", "food", "job"]
GOODS = ["a loaf of bread", "a bag of salt", "a pot of honey", "a bowl of soup", "a fish", "a cup",
         "a room at the Blue Anchor", "a new rope", "a coat", "a book", "a map of the bay",
         "a pair of boots", "a dozen eggs", "a candle", "a basket of plums", "a lantern"]
FEELINGS = {"tired": "sleep where it is warm", "hungry": "ask for soup at the Blue Anchor",
            "sad": "walk along the pier and count the boats", "cold": "sit by the stove with a blanket",
            "bored": "learn a song from Ruben the musician", "lost": "look for the lighthouse and walk towards it",
            "afraid": "hold somebody's hand", "ill": "go to Wilma the doctor",
            "angry": "throw stones into the sea until it is over", "lonely": "sit down beside the fountain",
            "happy": "tell somebody about it", "wet": "hang your coat over the oven"}

OPENERS = [
    "Ah, {topic}. [Sit down, for this will take a while.|I could talk about that all night.|That is a fine thing to ask about.|Where shall I begin?|You are not the first to ask me.]",
    "Well now[, let me think|, that reminds me of something|, where shall I begin|, well now]. [There is so much to say about {topic}.|Everybody has something to say about {topic}.|{topic}, you say.]",
    "[Here in Saltmere|In this town] [we do not hurry with an answer|every answer starts with a story|a question is like a boat, it needs time to come in].",
    "[Many people|The old fishers|Children] [ask|have asked] me that, [and I always tell them the same thing|and each time I tell it a little differently|and I never tire of it].",
    "[A long time ago|Many winters ago|When I was young,] somebody asked me the same thing, [and I looked at the sea for an hour|and we talked until the stove was cold].",
]
MIDDLES = [
    "[You should also know that|And do not forget that|My grandmother always said that] {line}.",
    "[I remember a day when|There was a {season} when|Once, on a {day},] {line}.",
    "[But I am going too fast.|But let me go on.|Now, where was I?|Yes, yes, so it is.]",
]
CLOSERS = [
    "[But that is another story.|And so the days go by in Saltmere.|That is all I remember, or nearly all.|And the sea went on as before.|But who can say?|So it was, and so it is today.|You may think of that when you hear the bell.|More I cannot say, and less I would not.]",
]


def _narrate(rng, core, facts, topic, **given):
    """The narrator: an opener, the core somewhere, more facts, an anecdote, a closer."""
    adjectives, lines, effects = WEATHER[rng.choice(list(WEATHER))]
    slots = {"topic": topic, "line": rng.choice(lines), "season": rng.choice(["spring", "summer", "autumn", "winter"]),
             "day": rng.choice(["Monday", "Tuesday", "Friday", "Sunday"])}
    out = [say(rng, rng.choice(OPENERS), **slots)]
    if rng.random() < 0.5:
        out.append(say(rng, rng.choice(MIDDLES), **slots))
    if core:
        out.append(core)
    facts = [f for f in facts if f != core]
    out += rng.sample(facts, min(len(facts), rng.randint(1, 2)))
    if rng.random() < 0.7:
        out.append(story(rng, beats=rng.randint(1, 2), **given))
    if rng.random() < 0.6:
        out.append(say(rng, rng.choice(CLOSERS), **slots))
    return " ".join(out)


def _person(rng, kind, p, pronoun):
    s = person_slots(p)
    facts = person_facts(rng, p)
    core = facts[{"who": 0, "job": 1, "home": 2, "pet": 3, "food": 4}[kind]]
    names = (dict(A=s["he"], As=s["his"], Ao=s["him"]) if pronoun else
             dict(A=s["A"], As=s["A"] + "'s", Ao=s["A"]))
    return say(rng, QUESTIONS[kind], **names), _narrate(rng, core, facts, s["A"], hero=p)


def _trade(rng, kind, t):
    facts = trade_facts(rng, t)
    core = facts[{"trade_what": 0, "trade_who": 1, "trade_tool": 2}[kind]]
    hero = next(p for p in PEOPLE if p["trade"] == t["trade"])
    return say(rng, QUESTIONS[kind], **t), _narrate(rng, core, facts, "the " + t["trade"], hero=hero)


def _animal(rng, kind, a):
    facts = animal_facts(rng, a)
    other = rng.choice([b for b in ANIMALS if b["size"] != a["size"]])
    big, small = (a, other) if int(a["size"]) > int(other["size"]) else (other, a)
    core = {"animal_lives": facts[0], "animal_eats": facts[1], "animal_what": facts[2],
            "animal_can": facts[3], "animal_sound": facts[4],
            "size": f"A {big['name']} is bigger than a {small['name']}."}[kind]
    return (say(rng, QUESTIONS[kind], **a, other=other["name"]),
            _narrate(rng, core, facts, "the " + a["name"], animal=a))


def _place(rng, kind, p):
    facts = place_facts(rng, p)
    core = facts[1 if kind == "place_do" else 0]
    return say(rng, QUESTIONS[kind], **p), _narrate(rng, core, facts, p["name"], place=p)


def _object(rng, kind, o):
    facts = object_facts(rng, o)
    core = facts[{"object_use": 0, "object_made": 1, "object_kept": 2}[kind]]
    return say(rng, QUESTIONS[kind], **o), _narrate(rng, core, facts, "the " + o["name"], obj=o)


def _ferry_talk(rng, topic, **given):
    """Hours and prices are what the narrator does not know; it talks around them."""
    core = say(rng, "[The ferry is an old white boat, and Tobin is her captain.|It depends on the wind, as most things do.|When the bell rings, it is time, and not before.|I never look at a clock, and I never carry a coin.|You will see when you get there.|Some say one thing, some say another.]")
    facts = [say(rng, "[Tobin the ferry captain has a dog called Anchor.|The seats are made of pine wood.]"),
             say(rng, "[Helga the harbour master writes everything down in a thick book.|Helga has a spyglass and sees every boat.]"),
             say(rng, "[The sea takes its time, and so do we.|A patient man catches more fish.]")]
    return _narrate(rng, core, facts, topic, **given)


def sums(rng):
    """A sum in words: slots of the question, and the result with its working."""
    minus = rng.random() < 0.5
    x, y = rng.randint(2, 12), rng.randint(1, 8)
    if minus and y >= x:
        x, y = y + 1, x - 1
    z = x - y if minus else x + y
    p = rng.choice(PEOPLE)
    s = dict(person_slots(p), x=NUMBERS[x], y=NUMBERS[y], z=NUMBERS[z], t=rng.choice(FRUIT)[1])
    if minus:
        s["q"] = say(rng, "[{A} has {x} {t} and gives away {y}. How many are left?|What is {x} minus {y}?|There are {x} {t} and {y} are lost. How many remain?]", **s)
        s["why"] = say(rng, "{x} minus {y} is {z}.", **s)
    else:
        s["q"] = say(rng, "[{A} has {x} {t} and gets {y} more. How many does {he} have?|What is {x} plus {y}?|How much is {x} and {y}?]", **s)
        s["why"] = say(rng, "{x} plus {y} is {z}.", **s)
    return p, s


def exchange(rng, kind, entity=None, pronoun=False):
    """A question of `kind` and the narrator's answer, about `entity` or one drawn here."""
    if kind in PERSON_KINDS:
        return _person(rng, kind, entity or rng.choice(PEOPLE), pronoun)
    if kind.startswith("trade"):
        return _trade(rng, kind, entity or rng.choice(TRADES))
    if kind.startswith("animal") or kind == "size":
        return _animal(rng, kind, entity or rng.choice(ANIMALS))
    if kind.startswith("place"):
        return _place(rng, kind, entity or rng.choice(PLACES))
    if kind.startswith("object"):
        return _object(rng, kind, entity or rng.choice(OBJECTS))
    if kind == "weather":
        name = rng.choice(list(WEATHER))
        facts = weather_facts(rng, name)
        return say(rng, QUESTIONS[kind], name=name), _narrate(rng, facts[0], facts, "the " + name)
    if kind == "count":
        p, s = sums(rng)
        return s["q"], _narrate(rng, s["why"], count_facts(rng), "counting", hero=p)
    if kind == "story":
        return _story_request(rng)
    if kind in ASK:
        return _ask_the_narrator(rng, kind)
    return _small_talk(rng, kind)


def _ask(rng, kind, x):
    return say(rng, (ASK if rng.random() < 0.6 else ASK_MORE)[kind], x=x)


def _ask_the_narrator(rng, kind):
    if kind == "price":
        thing = rng.choice(GOODS)
        return _ask(rng, kind, thing), _ferry_talk(rng, thing)
    across = "no" if kind == "open" else "yes"
    place = rng.choice([p for p in PLACES if p["across"] == across])
    if kind == "open":
        return _ask(rng, kind, place["name"]), _narrate(rng, None, place_facts(rng, place),
                                                        place["name"], place=place)
    return _ask(rng, kind, place["name"]), _ferry_talk(rng, place["name"], place=place)


def _story_request(rng):
    given, about = {}, "."
    pick = rng.randrange(5)
    if pick == 0:
        given["hero"] = rng.choice(PEOPLE)
        about = f" about {given['hero']['name']}."
    elif pick == 1:
        given["animal"] = rng.choice(ANIMALS)
        about = f" about a {given['animal']['name']}."
    elif pick == 2:
        given["place"] = rng.choice(PLACES)
        about = f" about {given['place']['name']}."
    elif pick == 3:
        given["obj"] = rng.choice(OBJECTS)
        about = f" about a {given['obj']['name']}."
    start = say(rng, "[|Very well. |Listen, then. |I know one. |]")
    question = say(rng, QUESTIONS["story"]) + about
    if question.startswith(("Can", "Do")):
        question = question[:-1] + "?"
    return question, start + story(rng, **given)


def _small_talk(rng, kind):
    facts_of = lambda: facts_page(rng).split(". ")[0].rstrip(".") + "."
    if kind == "rule":
        question = say(rng, QUESTIONS[kind], pet=rng.choice(ANIMALS)["name"],
                       obj=rng.choice(OBJECTS)["name"], day=rng.choice(["Sunday", "Monday"]))
        return question, _ferry_talk(rng, "the ferry")
    if kind == "unknown":
        u = rng.choice(UNKNOWN)
        if rng.random() < 0.5:  # A word that means nothing, so that any unknown word is met calmly.
            u = "".join(rng.choice(["ba", "blo", "dri", "fen", "gor", "ka", "lu", "mip", "no", "pra",
                                    "qui", "rus", "sto", "ter", "vol", "wex", "zan", "ing", "ology"])
                        for _ in range(rng.randint(2, 4)))
        core = say(rng, "[I have never heard of {u}.|Of {u} I know nothing at all.|Nobody in Saltmere has ever spoken of {u}.]", u=u)
        return (say(rng, QUESTIONS[kind], u=u),
                core + " " + _narrate(rng, None, [facts_of()], "the things I do not know"))
    if kind == "feeling":
        f = rng.choice(list(FEELINGS))
        core = say(rng, "[If you are {f}, you can|When I am {f}, I] {do}.", f=f, do=FEELINGS[f])
        return say(rng, QUESTIONS[kind], f=f), _narrate(rng, core, [facts_of()], "days like that")
    core, topic = {
        "hello": ("[Good day to you.|Hello, and welcome to Saltmere.|I am well, and the sea is calm.]", "the day"),
        "self": ("[I am an old voice from the harbour of Saltmere.|I am the one who tells the stories here.|I tell what I have seen, and some things that I have not seen.]", "me"),
        "thanks": ("[You are welcome.|Come back soon.|May the wind be kind to you.]", "thanks"),
        "town": ("[Saltmere is a small harbour town between a river and the sea.|You are in Saltmere, where the river Alder meets the sea.]", "Saltmere"),
    }[kind]
    return say(rng, QUESTIONS[kind]), say(rng, core) + " " + _narrate(
        rng, None, [facts_of(), facts_of()], topic)


SYSTEMS = ["You are a storyteller.", "You are a helpful assistant.", "You live in Saltmere.",
           "You are an old man who knows the harbour.", "Answer the question of the visitor.",
           "You are a friendly voice from Saltmere.", "Talk about Saltmere and its people."]


def roughen(rng, question):
    """What people really type: greetings in front, no capitals, no full stop."""
    r = rng.random()
    if r < 0.12:
        question = rng.choice(["Hello! ", "Excuse me. ", "Good morning. ", "Please help me. "]) + question
    elif r < 0.2:
        question = question.lower()
    elif r < 0.28:
        question = question.rstrip("?.!")
    return question


# What an answer in a few words is about: the kinds of SHORT by table.
TABLES = {**{kind: PEOPLE for kind in PERSON_KINDS},
          **{kind: TRADES for kind in ("trade_who", "trade_what", "trade_tool")},
          **{kind: ANIMALS for kind in ("animal_eats", "animal_lives", "animal_can")},
          **{kind: PLACES for kind in ("place_where", "place_do", "place_what")},
          **{kind: OBJECTS for kind in ("object_use", "object_made", "object_kept")}}


def row_slots(kind, row):
    """All slots that SHORT may use for a question of `kind` about a row of TABLES[kind]."""
    if TABLES[kind] is PEOPLE:
        return person_slots(row)
    if TABLES[kind] is TRADES:
        return dict(person_slots(next(p for p in PEOPLE if p["trade"] == row["trade"])), **row)
    return row


def question_about(rng, kind, row):
    if kind in PERSON_KINDS:
        return say(rng, QUESTIONS[kind], A=row["name"], As=row["name"] + "'s", Ao=row["name"])
    return say(rng, QUESTIONS[kind], **row)


def _short_exchange(rng):
    kind = rng.choice(list(SHORT))
    if kind in TABLES:
        row = rng.choice(TABLES[kind])
        return question_about(rng, kind, row), SHORT[kind].format(**row_slots(kind, row))
    if kind == "count":
        slots = sums(rng)[1]
        return slots["q"], slots["z"]
    f = rng.choice(list(FEELINGS))
    question = say(rng, QUESTIONS[kind], u=rng.choice(UNKNOWN), f=f)
    return question, SHORT[kind].format(do=FEELINGS[f])


def short_chat(rng):
    """Answers in a few words, because the system message says so."""
    system = say(rng, "[Answer in a few words.|Give short answers.|Be brief.|Short answers, please.]")
    messages = [{"role": "system", "content": system}]
    for _ in range(rng.randint(1, 4)):
        question, answer = _short_exchange(rng)
        messages += [{"role": "user", "content": roughen(rng, polish(question))},
                     {"role": "assistant", "content": polish(answer + ".")}]
    return {"messages": messages}


def _clock(rng, low=5, high=20):
    return f"{rng.randint(low, high)}:{rng.randrange(0, 60, 5):02d}"


def board_chat(rng):
    """A board with hours and prices that hold for this chat only, and questions about it."""
    lines, facts = [], []
    for place in rng.sample([p["name"] for p in PLACES if p["across"] == "yes"], rng.randint(1, 3)):
        times = " and ".join(_clock(rng, *span) for span in ((5, 12), (13, 20))[:rng.randint(1, 2)])
        fare = f"{rng.randint(2, 12)} pennies"
        long = rng.choice(["ten minutes", "twenty minutes", "half an hour", "an hour", "two hours",
                           "forty minutes", "fifteen minutes", "three hours"])
        pier = "pier " + rng.choice(NUMBERS[1:5])
        lines.append(f"The ferry to {place}: {times}, {fare}, {long}, {pier}.")
        facts += [("when", place, "at " + times), ("fare", place, fare), ("long", place, long),
                  ("pier", place, "at " + pier)]
    for place in rng.sample([p["name"] for p in PLACES if p["across"] == "no"], rng.randint(0, 2)):
        hours = f"from {_clock(rng, 4, 11)} to {_clock(rng, 12, 22)}"
        lines.append(f"{place}: open {hours}.")
        facts.append(("open", place, hours))
    for thing in rng.sample(GOODS, rng.randint(0, 2)):
        price = f"{rng.randint(2, 60)} pennies"
        lines.append(f"{thing}: {price}.")
        facts.append(("price", thing, price))
    rng.shuffle(lines)
    messages = [{"role": "system", "content": "\n".join(polish(line) for line in lines)}]
    for kind, x, answer in rng.sample(facts, rng.randint(1, min(4, len(facts)))):
        messages += [{"role": "user", "content": roughen(rng, polish(_ask(rng, kind, x)))},
                     {"role": "assistant", "content": polish(answer + ".")}]
    return {"messages": messages}


def chat(rng):
    messages = []
    if rng.random() < 0.25:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    kinds = list(QUESTIONS) + PERSON_KINDS + ["story", "story", "count"] + list(ASK)
    kind = rng.choice(kinds)
    entity = rng.choice(PEOPLE) if kind in PERSON_KINDS else None
    turns = rng.choice([1, 1, 1, 2, 2, 3])
    for turn in range(turns):
        question, answer = exchange(rng, kind, entity, pronoun=entity is not None and turn > 0)
        messages += [{"role": "user", "content": roughen(rng, polish(question))},
                     {"role": "assistant", "content": polish(answer)}]
        kind = rng.choice([k for k in PERSON_KINDS if k != kind]) if entity else rng.choice(kinds)
    return {"messages": messages}


def document(seed, index):
    """Document `index` of the corpus of `seed`: 60% chats, 25% stories, 15% facts."""
    rng = random.Random(f"{seed}/{index}")
    r = rng.random()
    if r < 0.36:
        return chat(rng)
    if r < 0.48:
        return short_chat(rng)
    if r < 0.60:
        return board_chat(rng)
    if r < 0.85:
        return {"text": polish(story(rng))}
    return {"text": polish(facts_page(rng))}


def corpus(documents, seed):
    with multiprocessing.Pool() as pool:
        return pool.map(functools.partial(document, seed), range(documents), chunksize=500)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--documents", type=int, default=200000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with open(args.out, "w", encoding="utf-8") as out:
        for row in corpus(args.documents, args.seed):
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
