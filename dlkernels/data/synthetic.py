"""Sets made here, for networks whose real data does not fit in a package. Each is drawn by its seed and stated in full.

- ``synthetic_images``: ten classes, each a fixed random pattern; an image is its class's pattern plus as much noise.
- ``synthetic_pairs``: three to eight letters after "copy" or "reverse", to be answered with the letters in the same or
  in reverse order.
- ``synthetic_captions``: one or two coloured shapes, described: "a red square above a blue circle".
- ``synthetic_questions``: such scenes, asked for the colour of a shape, the shape of a colour, or whether there is one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .sets import (
    CaptionedImages,
    ClassifiedImages,
    Columns,
    QuestionedImages,
    SequencePairs,
    classified_images,
    image_facts,
    three_parts,
)
from .vocabulary import END, SPECIAL, START, Vocabulary, padded

TRAIN, TEST = 2000, 400  # examples; those for validation are drawn from the training ones

LETTERS = "abcdefghijklmnopqrstuvwxyz"
COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 1.0, 0.0)}
SHAPES = ("square", "circle", "triangle")
RELATIONS = {"above": (0, 2), "beside": (0, 1)}  # the cells of the two shapes, of four: top left, top right, bottom ...
ANSWERS = (*COLOURS, *SHAPES, "yes", "no")


def synthetic_images(seed: int = 0, image_size: int = 32, num_classes: int = 10) -> ClassifiedImages:
    """Noisy patterns, ``[N, 3, image_size, image_size]``, and which pattern it is."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(num_classes, 3, image_size, image_size, generator=generator)
    labels = torch.randint(num_classes, (TRAIN + TEST,), generator=generator)
    noise = torch.rand(TRAIN + TEST, 3, image_size, image_size, generator=generator)
    images = (255 * (patterns[labels] + noise) / 2).round().to(torch.uint8)
    train, test = (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:])
    return classified_images(train, test, num_classes, seed)


def synthetic_pairs(seed: int = 0) -> SequencePairs:
    """Letters to copy or to reverse, and the answers."""
    chance = random.Random(seed)
    vocabulary = Vocabulary.of(["copy", "reverse", *LETTERS])
    sources, targets = [], []
    for _ in range(TRAIN + TEST):
        order = chance.choice(("copy", "reverse"))
        letters = chance.choices(LETTERS, k=chance.randint(3, 8))
        sources.append(vocabulary.numbers([order, *letters]))
        targets.append(sentence(vocabulary, letters if order == "copy" else letters[::-1]))
    return SequencePairs(vocabulary=vocabulary, **apart((padded(sources), padded(targets)), seed))


def synthetic_captions(seed: int = 0, image_size: int = 32) -> CaptionedImages:
    """Scenes and what is to be seen in them."""
    chance = random.Random(seed)
    vocabulary = Vocabulary.of(["a", *RELATIONS, *COLOURS, *SHAPES])
    scenes = [Scene.drawn(chance) for _ in range(TRAIN + TEST)]
    captions = padded([sentence(vocabulary, scene.caption().split()) for scene in scenes])
    parts = apart((pictures(scenes, image_size, seed), captions), seed)
    return CaptionedImages(vocabulary=vocabulary, **parts, **image_facts(parts["train"][0]))


def synthetic_questions(seed: int = 0, image_size: int = 32) -> QuestionedImages:
    """Scenes, questions about them, and the answers."""
    chance = random.Random(seed)
    vocabulary = Vocabulary.of(["what", "colour", "shape", "is", "the", "thing", "there", "a", *COLOURS, *SHAPES])
    scenes = [Scene.drawn(chance) for _ in range(TRAIN + TEST)]
    asked = [scene.question(chance) for scene in scenes]
    questions = padded([vocabulary.encode(question) for question, _ in asked])
    answers = torch.tensor([ANSWERS.index(answer) for _, answer in asked])
    parts = apart((pictures(scenes, image_size, seed), questions, answers), seed)
    return QuestionedImages(vocabulary=vocabulary, answers=ANSWERS, **parts, **image_facts(parts["train"][0]))


@dataclass(frozen=True)
class Thing:
    """A coloured shape."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """One or two things on black; the first is above the second or, to the left, beside it."""

    things: tuple[Thing, ...]
    relation: str

    @classmethod
    def drawn(cls, chance: random.Random) -> Scene:
        """Any scene, all equally likely but for the number of things."""
        things = [Thing(chance.choice(list(COLOURS)), chance.choice(SHAPES)) for _ in range(chance.randint(1, 2))]
        return cls(tuple(things), chance.choice(list(RELATIONS)))

    def caption(self) -> str:
        """What is to be seen."""
        return f" {self.relation} ".join(f"a {thing.colour} {thing.shape}" for thing in self.things)

    def question(self, chance: random.Random) -> tuple[str, str]:
        """A question that has one answer, and the answer."""
        shapes = [thing.shape for thing in self.things]
        colours = [thing.colour for thing in self.things]
        thing = chance.choice(self.things)
        kinds = ["presence"]
        if shapes.count(thing.shape) == 1:
            kinds.append("colour")
        if colours.count(thing.colour) == 1:
            kinds.append("shape")
        kind = chance.choice(kinds)
        if kind == "colour":
            return f"what colour is the {thing.shape}", thing.colour
        if kind == "shape":
            return f"what shape is the {thing.colour} thing", thing.shape
        shape = chance.choice(SHAPES)
        return f"is there a {shape}", "yes" if shape in shapes else "no"

    def picture(self, size: int) -> Tensor:
        """Float32 ``[3, size, size]`` in [0, 1]: each thing in its quarter."""
        half = size // 2
        image = torch.zeros(3, size, size)
        for thing, cell in zip(self.things, RELATIONS[self.relation], strict=False):
            top, left = half * (cell // 2), half * (cell % 2)
            colour = torch.tensor(COLOURS[thing.colour]).view(3, 1, 1)
            image[:, top : top + half, left : left + half] = colour * mask(thing.shape, half)
        return image


def mask(shape: str, size: int) -> Tensor:
    """Where a shape is, bool ``[size, size]``."""
    across = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(across, across, indexing="ij")
    if shape == "square":
        return (x.abs() < 0.8) & (y.abs() < 0.8)
    if shape == "circle":
        return x**2 + y**2 < 0.7
    return (x.abs() < (y + 0.9) / 2) & (y < 0.8)


def pictures(scenes: Sequence[Scene], size: int, seed: int) -> Tensor:
    """Scenes with a little noise, so that no two are equal, uint8 ``[N, 3, size, size]``."""
    images = torch.stack([scene.picture(size) for scene in scenes])
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    return (255 * (0.9 * images + 0.1 * noise)).round().to(torch.uint8)


def sentence(vocabulary: Vocabulary, words: Sequence[str]) -> Tensor:
    """The numbers of ``words`` between the start and the end symbol."""
    return vocabulary.numbers([SPECIAL[START], *words, SPECIAL[END]])


def apart(columns: Columns, seed: int) -> dict[str, Any]:
    """The first examples for training and validation, the rest for testing."""
    return three_parts(tuple(column[:TRAIN] for column in columns), tuple(column[TRAIN:] for column in columns), seed)
