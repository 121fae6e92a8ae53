"""Words of the word problems: people, things, and several wordings of everything that can happen to a number of things.

In a wording {a}, {b} and so on stand for numbers; {S} is the person ("Mia" or "she", {s} inside a sentence), {her} and
{hers} as in "gives her" and "her own"; {Other} and {Third} ({theirs} own) are others; {items}, {item}, {boxes} and
{box} are the things and what holds them, {place} where they are. All sentences are this project's own. Knows nothing
about numbers or splits.
"""

from __future__ import annotations

__all__ = [
    "ASIDES", "BOXES", "CLAUSES", "FINALS", "LEADS", "LEFT", "NAMES", "PLACES", "PRONOUNS", "QUESTIONS", "STARTS",
    "THINGS", "WORDS",
]  # fmt: skip

NAMES: dict[str, tuple[str, ...]] = {
    "she": ("Mia", "Ada", "Eva", "Gita", "Cleo", "Lena", "Nora", "Priya", "Rosa", "Sofia", "Tara", "Yuki", "Zoe",
            "Amina", "Bella", "Dina", "Fatima", "Helen", "Ines", "Julia"),
    "he": ("Tom", "Ben", "Dan", "Finn", "Hugo", "Ivan", "Jack", "Karl", "Leo", "Marco", "Noah", "Omar", "Paul", "Ravi",
           "Sam", "Theo", "Umar", "Victor", "Will", "Ali"),
}  # fmt: skip
"""People by the word that stands for them."""
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}
THINGS: tuple[tuple[str, str], ...] = (
    ("apples", "apple"), ("pencils", "pencil"), ("marbles", "marble"), ("stickers", "sticker"), ("books", "book"),
    ("shells", "shell"), ("cards", "card"), ("cookies", "cookie"), ("flowers", "flower"), ("buttons", "button"),
    ("stamps", "stamp"), ("eggs", "egg"), ("balloons", "balloon"), ("coins", "coin"), ("oranges", "orange"),
    ("candles", "candle"), ("bricks", "brick"), ("photos", "photo"), ("tickets", "ticket"), ("cupcakes", "cupcake"),
    ("toys", "toy"), ("beads", "bead"), ("plates", "plate"), ("bottles", "bottle"), ("pens", "pen"),
    ("lemons", "lemon"), ("rings", "ring"), ("stones", "stone"), ("plants", "plant"), ("chairs", "chair"),
    ("muffins", "muffin"), ("crayons", "crayon"), ("postcards", "postcard"), ("nuts", "nut"), ("peaches", "peach"),
    ("candies", "candy"), ("magnets", "magnet"), ("seeds", "seed"), ("tomatoes", "tomato"), ("notebooks", "notebook"),
)  # fmt: skip
BOXES: tuple[tuple[str, str], ...] = (
    ("boxes", "box"), ("bags", "bag"), ("packs", "pack"), ("baskets", "basket"), ("trays", "tray"), ("jars", "jar"),
    ("shelves", "shelf"), ("rows", "row"), ("crates", "crate"), ("piles", "pile"),
)  # fmt: skip
PLACES = (
    "in the kitchen", "at the market", "in the garden", "at school", "in the shop", "on the farm", "at home",
    "in the garage", "at the fair", "in the library", "by the lake", "at work",
)  # fmt: skip
WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
"""Numbers that may be written as words."""

# What a story begins with: the number of things at the start, given or to be computed from {a} and {b}.
STARTS: dict[str, tuple[str, ...]] = {
    "plain": (
        "{S} has {a} {items}.",
        "{S} had {a} {items} {place}.",
        "{S} starts with {a} {items}.",
        "{S} collected {a} {items} last week.",
        "There are {a} {items} {place}, and all of them are {name}'s.",
        "In the morning {name} counts {a} {items}.",
        "{S} owns {a} {items}.",
        "{S} bought {a} {items} {place}.",
        "{a} {items} belong to {name}.",
    ),
    "sum": (
        "{S} has {a} red {items} and {b} blue {items}.",
        "{S} found {a} {items} on Monday and {b} on Tuesday.",
        "{S} keeps {a} {items} upstairs and {b} {items} downstairs.",
        "{S} has {a} {items} and {Other} has {b} {items}. They put all of them together, and {name} looks after them.",
        "{S} made {a} {items} before lunch and {b} {items} after it.",
        "{a} large and {b} small {items} belong to {name}.",
        "{S} gets {a} {items} from {Other} and {b} from a neighbour.",
        "{S} gave away {a} {items} and had {b} left. Then {name} got back all that {s} had given away.",
    ),
    "groups": (
        "{S} has {a} {boxes} with {b} {items} in each.",
        "{S} buys {a} {boxes}. Each {box} holds {b} {items}.",
        "There are {b} {items} in every {box}, and {name} has {a} {boxes}.",
        "{S} fills {a} {boxes} with {b} {items} each.",
        "{name} puts {b} {items} into each of {a} {boxes}.",
        "For {a} days {name} collects {b} {items} a day.",
        "Each of the {a} {boxes} that {name} has contains {b} {items}.",
        "{S} gets {a} {boxes} of {b} {items}.",
    ),
    "more": (
        "{Other} has {a} {items}. {name} has {b} more than {Other}.",
        "{Other} found {a} {items}, and {name} found {b} {items} more than that.",
        "{name} has {b} {items} more than {Other}, who has {a}.",
        "Last year {name} had {a} {items}. This year {s} has {b} more.",
    ),
    "fewer": (
        "{Other} has {a} {items}. {name} has {b} fewer than {Other}.",
        "{name} has {b} {items} fewer than {Other}, who has {a}.",
        "{Other} found {a} {items}, and {name} found {b} less than that.",
        "Of {a} {items} {place}, {b} are broken. {name} keeps the others.",
        "Of the {a} {items} {place}, {b} belong to {Other} and the rest to {name}.",
    ),
    "times": (
        "{Other} has {a} {items}. {name} has {b} times as many.",
        "{name} has {b} times as many {items} as {Other}, who has {a}.",
        "{Other} found {a} {items}, and {name} found {b} times that number.",
    ),
    "share": (
        "{a} {items} are shared equally by {b} children, and {name} is one of them.",
        "{name} and some friends divide {a} {items} equally. There are {b} of them, and each gets the same number.",
        "{a} {items} are put into {b} {boxes}, the same number into each. {name} takes one {box}.",
    ),
}

# What happens to it: a number {y} is added, taken away, or it is multiplied.
CLAUSES: dict[str, tuple[str, ...]] = {
    "add": (
        "{S} buys {y} more.",
        "{Other} gives {her} {y} {items}.",
        "Then {s} finds another {y}.",
        "{y} more {items} are added.",
        "Later {s} gets {y} {items} from {Other}.",
        "After that {s} picks up {y} extra {items}.",
        "{S} wins {y} more {items} in a game.",
        "The next day {s} adds {y} {items}.",
        "{S} also takes the {y} {items} that {Other} did not want.",
        "On {hers} birthday {s} gets {y} more.",
    ),
    "subtract": (
        "{S} gives {y} of them to {Other}.",
        "{S} loses {y} of them.",
        "Then {y} {items} are lost.",
        "{S} sells {y} {items}.",
        "{Other} takes {y} of them away.",
        "On the way home {s} drops {y} of them.",
        "{y} of the {items} are old, and {s} throws them away.",
        "Later {s} uses {y} {items}.",
        "Then {y} of them break.",
        "{S} hands {y} {items} over to {Other}.",
    ),
    "multiply": (
        "Then {s} gets so many that {s} has {y} times as many.",
        "A month later {s} has {y} times as many {items}.",
        "{Hers} number of {items} grows to {y} times what it was.",
        "In the end {s} has {y} times that number.",
    ),
}

# What the last thing that happens is, where it changes what is asked: (clause, question).
FINALS: dict[str, tuple[tuple[str, str], ...]] = {
    "share": (
        ("{S} shares them equally among {y} friends.", "How many {items} does each friend get?"),
        ("{S} packs them into {y} {boxes}, the same number into each.", "How many {items} are in each {box}?"),
        ("They are dealt out equally to {y} people.", "How many {items} does one person get?"),
        ("{S} uses the same number of {items} every day for {y} days.", "How many {items} does {name} use per day?"),
    ),
    "boxes": (
        ("{S} packs them into {boxes} of {y} {items} each.", "How many {boxes} does {name} need?"),
        ("Each {box} holds {y} {items}.", "How many {boxes} can {name} fill?"),
        ("{S} uses {y} {items} a day.", "For how many days do they last?"),
        ("Everybody who comes gets {y} {items}.", "How many people can get some?"),
    ),
    "price": (
        ("{S} sells all of them for {y} dollars each.", "How many dollars does {name} get?"),
        ("Each {item} costs {y} dollars.", "How many dollars are all of {name}'s {items} worth?"),
        ("{S} needs {y} minutes for each {item}.", "How many minutes does {name} need for all of them?"),
        ("Every {item} weighs {y} grams.", "How many grams do {name}'s {items} weigh together?"),
    ),
    "difference": (
        ("{Third} has {y} {items}.", "How many more {items} does {name} have than {Third}?"),
        ("{Third} has only {y} {items}.", "How many fewer {items} does {Third} have than {name}?"),
        ("{Third} counts {y} {items} of {theirs} own.", "What is the difference between {name} and {Third}?"),
    ),
    "together": (
        ("{Third} has {y} {items}.", "How many {items} do {name} and {Third} have together?"),
        ("{Third} brings {y} {items}.", "How many {items} do {name} and {Third} have in all?"),
        ("{Third} counts {y} {items} of {theirs} own.", "What is the total for {name} and {Third}?"),
    ),
}
QUESTIONS = (
    "How many {items} does {name} have now?",
    "How many {items} does {s} have in the end?",
    "What is the number of {items} that {name} has now?",
    "How many {items} is that?",
    "Find the number of {items} that {name} has.",
    "So how many {items} does {name} have?",
)
LEFT = ("How many {items} are left?", "How many {items} does {name} have left?", "How many of them remain?")
"""Questions after something was taken away."""
LEADS = ("{question} {story}", "{story} {question}", "{story}\n{question}", "{story} Question: {question}")
"""How story and question stand together."""

# Sentences with a number {z} that has nothing to do with the question.
ASIDES = (
    "{Third} is {z} years old.",
    "It is {z} degrees outside.",
    "The shop is at number {z} of its street.",
    "{Third} lives {z} streets away.",
    "{Third} has {z} cousins.",
    "The bus was {z} minutes late.",
    "There are {z} windows in the room.",
    "{Third} read {z} pages of a novel in the meantime.",
    "Their street has {z} houses.",
    "A film that they want to see lasts {z} minutes.",
)
