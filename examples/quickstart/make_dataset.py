"""Writes the chat dataset of the quickstart: train.jsonl and heldout.jsonl (OpenAI format).

  python make_dataset.py --out data --seed 7

The assistant becomes Helga, the harbour master. Every answer has the same three lines:

  the answer itself
  Good to know: one thing that helps
  - Helga, harbour office

Some answers need what the base model never read (the ferry timetable, opening hours, prices,
rules: the tables below); some need what it read but buried in talk (who, where, what). For the
first kind heldout.jsonl asks known facts in words that train.jsonl does not use; for the second
it asks about people, animals and things of which train.jsonl says nothing.
"""

import argparse
import json
import os
import random

from make_corpus import (ASK, FEELINGS, QUESTIONS, SHORT, TABLES, question_about, roughen, row_slots,
                         sums)
from world import UNKNOWN, polish, say

SIGNATURE = "- Helga, harbour office"

# destination: times, pennies, minutes or hours, pier, good to know
FERRIES = {
    "Gull Island": ("8:10 and 16:40", "3", "twenty minutes", "one", "no house stands on it, so bring something to eat"),
    "Otter Point": ("9:25 and 13:15", "2", "fifteen minutes", "two", "the water there is always warm"),
    "Fennick": ("7:30, 12:00 and 18:20", "5", "forty minutes", "one", "on Sunday it is full, so come early"),
    "Long Sand": ("10:05 and 14:50", "4", "half an hour", "three", "the beach is under water twice a day"),
    "Whale Bay": ("6:45", "9", "two hours", "three", "take a warm coat, even in summer"),
    "Saint Brine": ("11:35 and 17:10", "7", "an hour", "two", "you can stay the night at the castle inn"),
}
OPENING = {
    "the bakery": ("5:30 to 13:00", "the plum tart is gone by 9:00"),
    "the library": ("10:00 to 17:30", "you may borrow three books"),
    "the harbour office": ("6:00 to 20:00", "it has the tide table on its door"),
    "the fish hall": ("4:45 to 11:00", "the best fish is gone before the sun is up"),
    "the Blue Anchor": ("11:30 to 23:00", "on Friday there is music"),
    "the lighthouse": ("14:00 to 16:00", "only eight people may go up at once"),
    "the clock tower": ("9:00 to 12:30", "the big bell is very loud"),
    "the mill": ("7:15 to 15:00", "the miller sleeps after his work"),
    "the forge": ("8:00 to 18:00", "stand back from the fire"),
    "the orchard": ("8:30 to 19:00", "in autumn you may pick your own"),
}
PRICES = {
    "a loaf of bread": ("2", "the bakery", "it is still warm in the morning"),
    "a bag of salt": ("3", "the salt meadow", "Boris makes it from sea water"),
    "a pot of honey": ("11", "the market square", "Fay has six more jars of it"),
    "a bowl of soup": ("4", "the Blue Anchor", "you get black bread with it"),
    "a room at the Blue Anchor": ("25", "the Blue Anchor", "the beds are warm and the soup is good"),
    "a new rope": ("14", "the rope walk", "Bram makes it from hemp"),
    "a book": ("18", "the library", "Agnes has two hundred of them"),
    "a map of the bay": ("8", "the harbour office", "you can see all the rocks on it"),
    "a pair of boots": ("40", "the shoe shop", "Emil can mend the old pair too"),
    "a dozen eggs": ("5", "the market square", "Rosa has the best hen in town"),
    "a candle": ("2", "the market square", "it is made of bee's wax"),
    "a basket of plums": ("6", "the orchard", "the trees are behind Orchard Lane"),
    "a lantern": ("16", "the forge", "Lars makes the glass for it"),
    "a coat": ("60", "the weaving house", "Tilda needs ten days for it"),
}
# questions of training | the held-out question | answer | good to know
RULES = [
    ("[Can|May] I take my [dog|cat|pet] on the ferry?|Are [dogs|animals] allowed on the [ferry|boat]?|Do you take [a dog|a cat|an animal] on the boat?", "Do animals travel on the boat?", "Yes, for two pennies", "Tobin has a dog on the ferry too"),
    ("[Can|May] I take a bicycle on the ferry?|Do you take a bicycle on the [ferry|boat]?|I have a bicycle. Can it come on the boat?", "Is there room for my bicycle on the boat?", "Yes, but only after 9:00", "there is room for six of them"),
    ("Is there a ferry on Sunday?|Does the [ferry|boat] go on Sunday?|Are there [boats|ferries] on Sunday?", "Will there be boats this Sunday?", "Yes, but only to Fennick and Gull Island", "on other days it goes everywhere"),
    ("Where [do|can] I buy a ticket?|Where are the tickets sold?|How do I get a ticket?", "Who sells tickets here?", "At the harbour office", "little children need no ticket"),
    ("What do I do if I lost my [key|coat|whistle]?|I [lost|cannot find] my [bag|key|coat|boot]. [Where do I go?|What now?|What can I do?]", "I cannot find my basket. Where do I ask?", "Ask at the harbour office", "Helga writes down everything that was lost"),
    ("What happens when there is [a storm|fog]?|Does the [ferry|boat] go in [a storm|fog|bad wind]?|Will the [ferry|boat] go when it is stormy?", "Will the boat go in bad weather?", "No, then the ferry stays at the pier", "a red flag is up when no boat can leave"),
    ("When should I be at the pier?|How early should I come?|Must I come early for the ferry?", "How soon before the boat should I come?", "Ten minutes before it leaves", "when the bell rings, the ferry leaves"),
    ("When is the market?|On which days is the market?|Is there a market today?", "Which day is market day?", "On Tuesday and Saturday", "it starts at 7:00 on the market square"),
    ("Who is the captain of the ferry?|Who steers the ferry?", "Which captain takes us over the bay?", "Tobin", "his dog Anchor sails with him"),
]

# Questions in words that neither train.jsonl nor the corpus uses.
ASK_HELD_OUT = {
    "when": "[Please tell me the times of the ferry to {x}.|Which boats go to {x} today?|{x}, when?]",
    "fare": "[How many pennies do I need to sail to {x}?|Is the ticket to {x} expensive?]",
    "long": "[How many minutes to {x}?|How much time do I need for the way to {x}?]",
    "pier": "[Where do I get on the boat to {x}?|Where must I wait for the ferry to {x}?]",
    "open": "[I would like to visit {x}. What are the hours?|When may I come to {x}?]",
    "price": "[How many pennies is {x}?|I need {x}. How much is it?]",
}


def reply(answer, good_to_know):
    return polish(f"{answer}.\nGood to know: {good_to_know}.\n") + "\n" + SIGNATURE


def desk_facts():
    """(kind, x, answer, good to know) for everything that only the harbour office knows."""
    out = []
    for x, (times, pennies, long, pier, tip) in FERRIES.items():
        out += [("when", x, f"at {times}", tip), ("fare", x, f"{pennies} pennies", "you can buy the ticket at the harbour office"),
                ("long", x, long, tip), ("pier", x, f"at pier {pier}", "be there ten minutes early")]
    out += [("open", x, f"from {hours}", tip) for x, (hours, tip) in OPENING.items()]
    for x, (pennies, where, tip) in PRICES.items():
        out.append(("price", x, f"{pennies} pennies at {where}", tip))
    return out


# The second line, by kind of question; the first one is SHORT of make_corpus.
GOOD_TO_KNOW = {
    "who": "{he} lives {home}", "home": "{he} has a {pet} called {pet_name}",
    "pet": "{A} lives {home}", "food": "{A} lives {home}", "job": "you can find {him} at {work}",
    "trade_who": "you can find {him} at {place}", "trade_what": "the one in Saltmere is {A}",
    "trade_tool": "the {trade} of Saltmere is {A}", "animal_eats": "a {name} can {can}",
    "animal_lives": "it eats {eats}", "animal_can": "a {name} lives {lives}",
    "place_where": "people go there to {do}", "place_do": "{detail}",
    "place_what": "people go there to {do}", "object_use": "a {name} is made of {made}",
    "object_made": "you use it to {use}",
}


def world_exchange(rng, held_out):
    """Every fourth row of each table is kept for heldout.jsonl."""
    kind = rng.choice(list(GOOD_TO_KNOW))
    row = rng.choice([r for i, r in enumerate(TABLES[kind]) if (i % 4 == 3) == held_out])
    slots = row_slots(kind, row)
    return (question_about(rng, kind, row),
            reply(SHORT[kind].format(**slots), GOOD_TO_KNOW[kind].format(**slots)))


def other_exchange(rng):
    """Sums, feelings, greetings, and what the desk does not know."""
    kind = rng.choice(["count", "count", "unknown", "unknown", "feeling", "hello", "self", "thanks", "town"])
    if kind == "count":
        s = sums(rng)[1]
        return s["q"], reply(s["why"].rstrip("."), "Nell the teacher can tell you more")
    if kind == "unknown":
        u = rng.choice([w for i, w in enumerate(UNKNOWN) if i % 4 != 3])
        return say(rng, QUESTIONS[kind], u=u), reply("I do not know", "I only know Saltmere and the ferry")
    if kind == "feeling":
        f = rng.choice(list(FEELINGS))
        return say(rng, QUESTIONS[kind], f=f), reply("You can " + FEELINGS[f], "the harbour office is open until 20:00")
    answer, tip = {
        "hello": ("Hello, how can I help you", "I can tell you about the ferry, the town and its people"),
        "self": ("I am Helga from the harbour office", "I can tell you about the ferry, the town and its people"),
        "thanks": ("You are welcome", "the harbour office is open until 20:00"),
        "town": ("Saltmere is a small harbour town", "the ferry goes to six towns and islands")}[kind]
    return say(rng, QUESTIONS[kind]), reply(answer, tip)


def _draw(rng, template):
    """One expansion of a template whose top level is alternatives."""
    return say(rng, "[" + template + "]")


def training_exchanges(rng):
    out = []
    for kind, x, answer, tip in desk_facts():
        seen = set()
        copies = {"when": 20, "open": 10}.get(kind, 6)
        for _ in range(200):
            if len(seen) < copies:
                seen.add(say(rng, ASK[kind], x=x))
        out += [(q, reply(answer, tip)) for q in sorted(seen)]
    for asked, _, answer, tip in RULES:
        out += [(_draw(rng, asked), reply(answer, tip)) for _ in range(9)]
    out += [world_exchange(rng, held_out=False) for _ in range(210)]
    out += [other_exchange(rng) for _ in range(80)]
    return out


def held_out_exchanges(rng):
    out = [(say(rng, ASK_HELD_OUT[kind], x=x), reply(answer, tip))
           for kind, x, answer, tip in rng.sample(desk_facts(), 18)]
    out += [(question, reply(answer, tip)) for _, question, answer, tip in rng.sample(RULES, 6)]
    return out + [world_exchange(rng, held_out=True) for _ in range(16)]


SYSTEM = "You are Helga, the harbour master of Saltmere."


def conversations(rng, exchanges, single):
    """One exchange each, or now and then two; a fifth of them with a system message."""
    rng.shuffle(exchanges)
    out = []
    while exchanges:
        turns = 1 if single or len(exchanges) < 2 or rng.random() < 0.8 else 2
        messages = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.2 else []
        for _ in range(turns):
            question, answer = exchanges.pop()
            question = polish(question) if single else roughen(rng, polish(question))
            messages += [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]
        out.append({"messages": messages})
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    os.makedirs(args.out, exist_ok=True)
    for name, rows in (("train.jsonl", conversations(rng, training_exchanges(rng), single=False)),
                       ("heldout.jsonl", conversations(rng, held_out_exchanges(rng), single=True))):
        path = os.path.join(args.out, name)
        with open(path, "w", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{path}: {len(rows)} conversations, {os.path.getsize(path)} bytes")


if __name__ == "__main__":
    main()
