"""The words of the demo world: people, kinds of facts with their values, events.

Every word here, with its leading space, is one token of the demo tokenizer.
"""

from dataclasses import dataclass

NAMES = (
    "Mira", "Oren", "Tal", "Bess", "Ivo", "Lena", "Hugo", "Nell",
    "Pim", "Sara", "Rolf", "Dina", "Kai", "Vera", "Amos", "Gwen",
    "Teo", "Rosa", "Finn", "Edda", "Lars", "Nora", "Otto", "Iris",
    "Jan", "Cleo", "Bram", "Wanda", "Emil", "Tess", "Karl", "Olga",
    "Hans", "Lotte", "Anton", "Petra", "Simon", "Marta", "Felix", "Greta",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of fact: ``"<name>'s <noun> is <value>."``.

    Attributes:
        noun: What the fact is about, as in "Mira's lamp".
        category: How a question names the value, as in "what colour".
        values: The possible values, the most frequent first.
    """

    noun: str
    category: str
    values: tuple[str, ...]


KINDS = (
    Kind("lamp", "colour", (
        "red", "blue", "green", "white", "black", "yellow", "brown", "pink",
        "grey", "gold", "silver", "orange", "purple", "violet", "teal", "amber",
    )),
    Kind("home", "town", (
        "Arlen", "Dover", "Salem", "Torin", "Weston", "Calder", "Milton", "Oslo",
        "Verden", "Harlow", "Linden", "Sorrel", "Ashton", "Parma", "Bergen", "Delft",
    )),
    Kind("door", "number", tuple(str(10 + 37 * i % 90) for i in range(90))),
    Kind("trade", "work", (
        "baking", "weaving", "fishing", "mining", "sewing", "brewing", "painting", "farming",
        "hunting", "writing", "carving", "trading", "sailing", "tanning", "singing", "teaching",
    )),
    Kind("meal", "food", (
        "soup", "bread", "fish", "rice", "stew", "cheese", "pie", "beans",
        "corn", "ham", "eggs", "plums", "honey", "cake", "pears", "nuts",
    )),
    Kind("coat", "cloth", (
        "wool", "silk", "linen", "cotton", "leather", "felt", "fur", "velvet",
        "tweed", "denim", "satin", "lace",
    )),
    Kind("token", "animal", (
        "fox", "owl", "bear", "wolf", "hare", "goat", "swan", "crow",
        "deer", "seal", "toad", "lynx", "mole", "duck", "moth", "crab",
    )),
)  # fmt: skip

EVENTS = (
    "In the morning {name} walks to the market.",
    "The rain falls on the old mill.",
    "Then {name} sits down by the fire.",
    "A ship comes into the harbour.",
    "At noon {name} rings the big bell.",
    "The wind blows over the hills.",
    "Now {name} opens the garden gate.",
    "Two dogs run along the river.",
    "Later {name} buys a bag of salt.",
    "The children play near the bridge.",
    "After lunch {name} mends the roof.",
    "Some birds fly across the valley.",
    "Soon {name} carries water from the well.",
    "The baker closes his small shop.",
    "Before dark {name} visits the mayor.",
    "A cart rolls through the square.",
    "At dusk {name} lights a candle.",
    "The moon rises above the forest.",
    "By night {name} tells a long tale.",
    "The whole village goes to sleep.",
)  # fmt: skip
