"""The text that the embedded model learns from: a small invented world, written by a grammar.

The world has people, towns and creatures. Every one has a few facts (where a person lives, which river a town
lies on, what a creature eats). Documents are drawn from four kinds:

* descriptions, which state facts in many wordings and orders;
* stories, in which people of the world lose, seek and find things;
* arithmetic, as bare sums and as small word problems;
* questions with their answers.

One fact in four is *held out*: the training text states it, often, but never asks about it. The validation
questions ask about exactly those, so a right answer shows that the model can use what it read, not that it saw
the question. Validation text comes from seeds that training never uses.

Everything follows from integer seeds through ``random.Random``, so the same call gives the same text anywhere.

    python tools/demo_corpus.py --documents 5        # read a few documents
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

WORLD_SEED = 20261123
HELD_OUT_SHARE = 0.25
CHOICES = 4

JOBS = ["baker", "teacher", "farmer", "doctor", "singer", "potter", "sailor", "painter", "miller", "tailor"]
PETS = ["cat", "dog", "goat", "parrot", "rabbit", "turtle", "pony", "frog"]
COLOURS = ["red", "blue", "green", "yellow", "purple", "orange", "white", "brown"]
FOODS = ["soup", "bread", "honey", "cheese", "apples", "rice", "fish", "cake", "beans", "plums"]
RIVERS = ["Aldra", "Bessen", "Corvi", "Dunmel", "Esker", "Fallow"]
PRODUCTS = ["silk", "salt", "glass", "wool", "clocks", "boats", "paper", "lamps"]
HABITATS = ["caves", "forests", "swamps", "meadows", "lakes", "mountains", "deserts", "gardens"]
DIETS = ["moss", "seeds", "worms", "berries", "leaves", "beetles", "roots", "nuts"]
SOUNDS = ["whistle", "hum", "croak", "bark", "chirp", "hiss", "growl", "squeak"]
THINGS = ["key", "lantern", "book", "ring", "map", "drum", "coin", "kite", "basket", "bell", "flute", "hat"]
PLACES = [
    "under the bridge",
    "behind the mill",
    "in the old well",
    "on the roof",
    "near the market",
    "in the tall grass",
    "beside the road",
    "inside the barn",
    "at the harbour",
    "below the stairs",
]
FEELINGS = ["happy", "proud", "glad", "calm", "tired but happy", "surprised"]
WEATHER = ["sunny", "rainy", "windy", "cold", "foggy", "warm"]
TIMES = ["One morning", "One evening", "Last winter", "In the spring", "On market day", "Before dawn", "After lunch"]


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: how it is stated (``{s}`` subject, ``{v}`` value), said of ``{p}`` (a pronoun), and asked."""

    name: str
    values: list[str]
    statements: list[str]
    continued: list[str]
    questions: list[str]


@dataclass(frozen=True)
class Entity:
    """One person, town or creature: its name as it stands in a sentence, its pronoun, and its facts."""

    kind: str
    name: str
    pronoun: str
    facts: dict[str, str]
    held_out: frozenset[str]


@dataclass(frozen=True)
class World:
    """All entities and, per kind, the attributes that they have."""

    entities: list[Entity]
    attributes: dict[str, list[Attribute]]

    def of_kind(self, kind: str) -> list[Entity]:
        return [entity for entity in self.entities if entity.kind == kind]


def _names(rng: random.Random, count: int, endings: list[str], taken: set[str]) -> list[str]:
    onsets = ["B", "Br", "D", "F", "G", "H", "J", "K", "L", "M", "N", "P", "R", "S", "T", "V", "W", "Z", "Th", "Cl"]
    middles = ["a", "e", "i", "o", "u", "ai", "or", "el", "an", "ir"]
    names: list[str] = []
    while len(names) < count:
        name = rng.choice(onsets) + rng.choice(middles) + rng.choice(endings)
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


def _attributes(towns: list[str]) -> dict[str, list[Attribute]]:
    return {
        "person": [
            Attribute(
                "home",
                towns,
                [
                    "{s} lives in {v}.",
                    "The home of {s} is in {v}.",
                    "{s} has a house in {v}.",
                    "In {v} you can meet {s}.",
                    "{s} comes from {v}.",
                    "{v} is where {s} lives.",
                ],
                ["{p} lives in {v}.", "{p} has a house in {v}.", "{p} comes from {v}."],
                ["Where does {s} live?", "Which town is the home of {s}?"],
            ),
            Attribute(
                "job",
                JOBS,
                [
                    "{s} works as a {v}.",
                    "{s} is a {v}.",
                    "The job of {s} is {v}.",
                    "People know {s} as a good {v}.",
                    "{s} earns money as a {v}.",
                    "Every day {s} works as a {v}.",
                ],
                ["{p} works as a {v}.", "{p} is a {v}.", "{p} earns money as a {v}."],
                ["What is the job of {s}?", "What does {s} work as?"],
            ),
            Attribute(
                "pet",
                PETS,
                [
                    "{s} has a {v}.",
                    "The pet of {s} is a {v}.",
                    "{s} keeps a {v} at home.",
                    "A {v} lives with {s}.",
                    "{s} takes care of a {v}.",
                    "{s} loves to play with a {v}.",
                ],
                ["{p} has a {v}.", "{p} keeps a {v} at home.", "{p} takes care of a {v}."],
                ["What pet does {s} have?", "Which animal lives with {s}?"],
            ),
            Attribute(
                "colour",
                COLOURS,
                [
                    "{s} likes the colour {v}.",
                    "The favourite colour of {s} is {v}.",
                    "{s} always wears {v}.",
                    "The coat of {s} is {v}.",
                    "{s} painted the door {v}.",
                    "Of all colours {s} likes {v} best.",
                ],
                ["{p} likes the colour {v}.", "{p} always wears {v}.", "{p} painted the door {v}."],
                ["What is the favourite colour of {s}?", "Which colour does {s} like?"],
            ),
            Attribute(
                "food",
                FOODS,
                [
                    "{s} likes to eat {v}.",
                    "The favourite food of {s} is {v}.",
                    "{s} eats {v} every day.",
                    "For dinner {s} always wants {v}.",
                    "{s} never says no to {v}.",
                    "{s} cooks {v} very well.",
                ],
                ["{p} likes to eat {v}.", "{p} eats {v} every day.", "{p} never says no to {v}."],
                ["What is the favourite food of {s}?", "What does {s} like to eat?"],
            ),
        ],
        "town": [
            Attribute(
                "river",
                RIVERS,
                [
                    "{s} lies on the river {v}.",
                    "The river {v} flows through {s}.",
                    "Boats reach {s} on the {v}.",
                    "{s} was built by the {v}.",
                    "In {s} children swim in the {v}.",
                ],
                ["It lies on the river {v}.", "The river {v} flows through it.", "Boats reach it on the {v}."],
                ["Which river flows through {s}?", "On which river does {s} lie?"],
            ),
            Attribute(
                "product",
                PRODUCTS,
                [
                    "{s} is known for its {v}.",
                    "People in {s} make {v}.",
                    "All the towns buy their {v} from {s}.",
                    "{s} sells {v} to all other towns.",
                    "Traders go to {s} to buy {v}.",
                ],
                ["It is known for its {v}.", "People there make {v}.", "It sells {v} to all other towns."],
                ["What is {s} known for?", "What do people in {s} make?"],
            ),
        ],
        "creature": [
            Attribute(
                "habitat",
                HABITATS,
                [
                    "{s} lives in {v}.",
                    "You can find {s} in {v}.",
                    "The home of {s} is in {v}.",
                    "In {v} there is often {s}.",
                    "{s} likes to sleep in {v}.",
                ],
                ["It lives in {v}.", "You can find it in {v}.", "It likes to sleep in {v}."],
                ["Where can you find {s}?", "Where does {s} live?"],
            ),
            Attribute(
                "diet",
                DIETS,
                [
                    "{s} eats {v}.",
                    "The food of {s} is {v}.",
                    "{s} feeds on {v}.",
                    "To feed {s} you need {v}.",
                    "When hungry, {s} looks for {v}.",
                ],
                ["It eats {v}.", "It feeds on {v}.", "When hungry, it looks for {v}."],
                ["What does {s} eat?", "What is the food of {s}?"],
            ),
            Attribute(
                "sound",
                SOUNDS,
                [
                    "{s} makes a {v}.",
                    "The sound of {s} is a {v}.",
                    "At night {s} calls with a {v}.",
                    "When you hear a {v}, it may be {s}.",
                    "{s} says hello with a {v}.",
                ],
                ["It makes a {v}.", "At night it calls with a {v}.", "It says hello with a {v}."],
                ["What sound does {s} make?", "How does {s} call at night?"],
            ),
        ],
    }


def build_world(people: int = 100, towns: int = 16, creatures: int = 40) -> World:
    """The one world that all texts speak of (about 650 facts, a quarter of them held out from questions)."""
    rng = random.Random(WORLD_SEED)
    taken: set[str] = set()
    town_names = _names(rng, towns, ["mere", "vale", "ford", "wick", "stad"], taken)
    person_names = _names(rng, people, ["ra", "lo", "min", "dy", "ska", "ven", "tis", "na", "rik", "bel"], taken)
    creature_names = [
        "the " + name.lower() for name in _names(rng, creatures, ["ggle", "zzit", "mp", "ndle", "bbo", "lf"], taken)
    ]
    attributes = _attributes(town_names)
    named = (
        [("person", n) for n in person_names]
        + [("town", n) for n in town_names]
        + [("creature", n) for n in creature_names]
    )
    facts = {name: {a.name: rng.choice(a.values) for a in attributes[kind]} for kind, name in named}
    held: dict[str, set[str]] = {name: set() for _, name in named}
    for kind, kind_attributes in attributes.items():
        members = [name for k, name in named if k == kind]
        for attribute in kind_attributes:
            for name in rng.sample(members, round(HELD_OUT_SHARE * len(members))):
                held[name].add(attribute.name)
    pronouns = {"town": "It", "creature": "It"}
    entities = [
        Entity(kind, name, pronouns.get(kind) or rng.choice(["He", "She"]), facts[name], frozenset(held[name]))
        for kind, name in named
    ]
    return World(entities, attributes)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def describe(world: World, rng: random.Random) -> str:
    """A description of one to three entities: all or some of their facts, in any order and wording."""
    parts = []
    for entity in rng.sample(world.entities, rng.choice([1, 1, 2, 3])):
        attributes = world.attributes[entity.kind]
        chosen = rng.sample(attributes, rng.randint(min(2, len(attributes)), len(attributes)))
        for position, attribute in enumerate(chosen):
            forms = attribute.statements if position == 0 or rng.random() < 0.5 else attribute.continued
            value = entity.facts[attribute.name]
            parts.append(_sentence(rng.choice(forms).format(s=entity.name, v=value, p=entity.pronoun)))
    return " ".join(parts)


def ask(entity: Entity, attribute: Attribute, form: int) -> str:
    """The question as validation and training write it, up to where the answer begins."""
    return f"Question: {_sentence(attribute.questions[form].format(s=entity.name))} Answer:"


def quiz(world: World, rng: random.Random) -> str:
    """A few questions with answers, never about a held-out fact."""
    lines: list[str] = []
    while len(lines) < 3:
        entity = rng.choice(world.entities)
        attribute = rng.choice(world.attributes[entity.kind])
        if attribute.name in entity.held_out:
            continue
        value = entity.facts[attribute.name]
        question = ask(entity, attribute, rng.randrange(len(attribute.questions)))
        if rng.random() < 0.25:
            options = rng.sample([v for v in attribute.values if v != value], CHOICES - 1) + [value]
            rng.shuffle(options)
            question = question.replace(" Answer:", f" Choices: {', '.join(options)}. Answer:")
        lines.append(f"{question} {value}.")
    return "\n".join(lines)


def story(world: World, rng: random.Random) -> str:
    """A short story: somebody loses a thing, seeks it with a friend, and finds it; details stay consistent."""
    people = world.of_kind("person")
    hero, friend = rng.sample(people, 2)
    thing, place, wrong = rng.choice(THINGS), *rng.sample(PLACES, 2)
    colour, town, pet = hero.facts["colour"], hero.facts["home"], hero.facts["pet"]
    he, him = hero.pronoun.lower(), {"He": "him", "She": "her"}[hero.pronoun]
    count = rng.randint(2, 9)
    opening = rng.choice(
        [
            f"{rng.choice(TIMES)} {hero.name} the {hero.facts['job']} walked through {town} with a {colour} {thing}.",
            f"{rng.choice(TIMES)} {hero.name} went to the market of {town} and bought a {colour} {thing}.",
            f"It was a {rng.choice(WEATHER)} day in {town}, and {hero.name} could not find the {colour} {thing}.",
        ]
    )
    loss = rng.choice(
        [
            f"But soon the {thing} was gone.",
            f"The {pet} ran away, and the {thing} was lost.",
            f"Then the wind took the {thing} away.",
            f"A thief took the {thing} and hid it.",
        ]
    )
    seek = rng.choice(
        [
            f"{hero.name} asked {friend.name} for help. They looked {wrong}, but the {thing} was not there.",
            f'"Have you seen my {thing}?" {hero.name} asked. "No," said {friend.name}, "but let us look {wrong}."',
            f"{friend.name}, who is a {friend.facts['job']}, searched {wrong} for {count} hours.",
        ]
    )
    find = rng.choice(
        [
            f"At last the {pet} of {hero.name} found the {thing} {place}.",
            f"In the end {friend.name} saw something {colour} {place}. It was the {thing}!",
            f"They found the {thing} {place}, and {hero.name} gave {friend.name} {count} coins.",
        ]
    )
    ending = rng.choice(
        [
            f"{hero.name} was {rng.choice(FEELINGS)} and shared some {hero.facts['food']} with {friend.name}.",
            f'"Thank you," said {hero.name}. {friend.name} went with {him} to eat {friend.facts["food"]}.',
            f"That night {he} slept well in {town}, with the {thing} beside {him}.",
        ]
    )
    return " ".join([opening, loss, seek, find, ending])


def arithmetic(world: World, rng: random.Random) -> str:
    """Bare sums and word problems over small numbers; every result is right."""
    parts = []
    for _ in range(rng.randint(3, 6)):
        a, b = rng.randint(1, 20), rng.randint(1, 20)
        who, what = rng.choice(world.of_kind("person")).name, rng.choice(["coins", "nuts", "books", "apples"])
        parts.append(
            rng.choice(
                [
                    f"{a} + {b} = {a + b}.",
                    f"{max(a, b)} - {min(a, b)} = {max(a, b) - min(a, b)}.",
                    f"{a % 10} x {b % 10} = {(a % 10) * (b % 10)}.",
                    f"{who} had {a} {what} and got {b} more. Now {who} has {a + b} {what}.",
                    f"{who} had {max(a, b)} {what} and lost {min(a, b)}. Now {who} has {max(a, b) - min(a, b)} {what}.",
                ]
            )
        )
    return " ".join(parts)


KINDS: list[tuple[Callable[[World, random.Random], str], float]] = [
    (describe, 0.45),
    (story, 0.25),
    (quiz, 0.20),
    (arithmetic, 0.10),
]


def documents(world: World, seed: int) -> Iterator[str]:
    """Documents without end; the same seed gives the same ones. Training uses even seeds, validation odd ones."""
    rng = random.Random(seed)
    kinds, weights = zip(*KINDS, strict=True)
    while True:
        yield rng.choices(kinds, weights)[0](world, rng).replace(" a orange", " an orange")


def validation_questions(world: World) -> list[dict[str, object]]:
    """Questions about the held-out facts, in every wording."""
    return _questions(world, held_out=True, seed=1)


def calibration_questions(world: World) -> list[dict[str, object]]:
    """Questions about the other facts, which training may have asked too."""
    return _questions(world, held_out=False, seed=2)


def _questions(world: World, held_out: bool, seed: int) -> list[dict[str, object]]:
    """Facts in every wording as multiple choice (`question`, `choices`, `gold`); chance is 1 in 4."""
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    for entity in world.entities:
        for attribute in world.attributes[entity.kind]:
            if (attribute.name in entity.held_out) != held_out:
                continue
            value = entity.facts[attribute.name]
            choices = rng.sample([v for v in attribute.values if v != value], CHOICES - 1) + [value]
            rng.shuffle(choices)
            for form in range(len(attribute.questions)):
                question = ask(entity, attribute, form)
                rows.append({"question": question, "choices": choices, "gold": choices.index(value)})
    rng.shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Print documents of the demo world.")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stream = documents(build_world(), arguments.seed)
    for _ in range(arguments.documents):
        print(next(stream), end="\n\n")


if __name__ == "__main__":
    main()
