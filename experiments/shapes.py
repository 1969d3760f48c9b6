"""A world of simple scenes, in which all that a caption leaves open can be counted.

A scene is one object on a background, 36 x 36 in colour. It has five attributes, each drawn evenly
and apart from the others:
    shape, colour, size, cell (the ninth of the picture that its centre is in), background
and small irregularities: the place in its cell, radius, turn, proportions, shades. A caption names
some of what is true, in several phrasings: "a red star", "something small at the top left". So it
is known what a prompt fixes and how all that it leaves open is distributed.
A scene is a function of (seed, number). Left out: several objects, textures, shadows.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 36
FINE = 8  # a shape is drawn this many times as large and then shrunk: its edges are soft

COLOURS = {
    "red": (220, 45, 45),
    "orange": (240, 140, 30),
    "yellow": (245, 225, 60),
    "green": (45, 165, 70),
    "turquoise": (60, 205, 205),
    "blue": (55, 95, 225),
    "purple": (140, 60, 185),
    "pink": (245, 120, 185),
}
BACKGROUNDS = {
    "white": (238, 238, 238),
    "grey": (185, 185, 185),
    "sand": (236, 214, 170),
    "sky": (180, 212, 240),
}
RADII = {"small": 3.7, "medium": 4.7, "large": 5.6}  # in pixels
CENTRES = (6.0, 18.0, 30.0)  # of the three columns, and of the three rows
CELLS = {
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "centre": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}
SHAPES = ["circle", "square", "triangle", "star", "ring", "cross"]
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": list(COLOURS),
    "size": list(RADII),
    "cell": list(CELLS),
    "background": list(BACKGROUNDS),
}


# --------------------------------------------------------------------------------------------------
# Scenes.


@dataclass
class Scene:
    """One picture before it is drawn. Lengths in pixels, angles in radians, shades in bytes."""

    facts: dict  # {attribute: value}
    centre: tuple  # x and y
    radius: float
    turn: float
    stretch: float  # width over height
    colour: tuple  # of the object
    background: tuple


def new_scene(seed, number, named=None, cells=None):
    """The scene of a seed and a number.

    named {attribute: value}: what is given. cells: the names of those that the object may be in.
    """
    random = np.random.default_rng([seed, number])
    facts = {}
    for name, values in ATTRIBUTES.items():
        if name == "cell" and cells:
            values = cells
        facts[name] = values[random.integers(len(values))]
    facts |= named or {}
    column, row = CELLS[facts["cell"]]
    x, y = random.uniform(-0.7, 0.7, 2)
    shade = random.uniform(-8, 8)
    return Scene(
        facts=facts,
        centre=(CENTRES[column] + x, CENTRES[row] + y),
        radius=RADII[facts["size"]] + random.uniform(-0.2, 0.2),
        turn=random.uniform(-0.35, 0.35),
        stretch=random.uniform(0.93, 1.07),
        colour=tuple(np.add(COLOURS[facts["colour"]], random.uniform(-12, 12, 3))),
        background=tuple(np.add(BACKGROUNDS[facts["background"]], shade)),
    )


def ellipse(radius, points=60):
    angles = np.arange(points) * 2 * math.pi / points
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def star_points():
    angles = np.arange(10) * math.pi / 5 - math.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.2, 0.5)
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


TRIANGLE = np.array([(0.0, -1.15), (1.1, 0.8), (-1.1, 0.8)])
SQUARE = np.array([(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)])
ARM = 0.36  # half the width of a cross's arms
CROSS = np.array(
    [
        (-ARM, -1.1),
        (ARM, -1.1),
        (ARM, -ARM),
        (1.1, -ARM),
        (1.1, ARM),
        (ARM, ARM),
        (ARM, 1.1),
        (-ARM, 1.1),
        (-ARM, ARM),
        (-1.1, ARM),
        (-1.1, -ARM),
        (-ARM, -ARM),
    ]
)
# The outline of each shape, of radius 1 about (0, 0): points [n, 2] of x and y (down).
OUTLINES = {
    "circle": ellipse(1.0),
    "square": SQUARE,
    "triangle": TRIANGLE,
    "star": star_points(),
    "ring": ellipse(1.1),
    "cross": CROSS,
}
HOLES = {"ring": ellipse(0.58)}


def cover(shape, centre, radius, turn, stretch):
    """How much of each pixel the object covers: float [SIDE, SIDE] in [0, 1]."""
    cos = math.cos(turn)
    sin = math.sin(turn)
    turning = np.array([[cos, sin], [-sin, cos]])
    stretching = np.array([math.sqrt(stretch), 1 / math.sqrt(stretch)])
    mask = Image.new("L", (SIDE * FINE, SIDE * FINE))
    canvas = ImageDraw.Draw(mask)
    for outlines, fill in ((OUTLINES, 255), (HOLES, 0)):
        if shape in outlines:
            points = (outlines[shape] * stretching) @ turning * radius + centre
            canvas.polygon([tuple(point) for point in points * FINE], fill=fill)
    small = mask.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def draw(scene, picture=None):
    """A Scene -> uint8 [SIDE, SIDE, 3]. picture: one to draw the object on, if not its own."""
    covered = cover(scene.facts["shape"], scene.centre, scene.radius, scene.turn, scene.stretch)[
        :, :, None
    ]
    background = np.array(scene.background) if picture is None else picture
    drawn = covered * np.array(scene.colour) + (1 - covered) * background
    return drawn.clip(0, 255).round().astype(np.uint8)


def draw_crowd(seed, number):
    """An object in each of the nine cells, on one background -> uint8 [SIDE, SIDE, 3]."""
    first = 9 * number
    picture = None
    for place, cell in enumerate(CELLS):
        scene = new_scene(seed, first + place, named={"cell": cell})
        picture = draw(scene, picture)
    return picture


def draw_many(seed, numbers):
    """-> uint8 [n, 3, SIDE, SIDE], and the facts of each."""
    pictures = []
    facts = []
    for number in numbers:
        scene = new_scene(seed, number)
        pictures.append(draw(scene).transpose(2, 0, 1))
        facts.append(scene.facts)
    return np.stack(pictures), facts


# --------------------------------------------------------------------------------------------------
# Captions.

# How often a caption names each attribute.
NAMED = {"shape": 0.7, "colour": 0.5, "size": 0.35, "cell": 0.4, "background": 0.3}
NOUNS = ["shape", "thing", "object"]  # for an object whose shape is not named


def phrase(facts, noun="shape", style=0):
    """One sentence that names these facts {attribute: value} and nothing else.

    noun: in place of a shape that is not named. style: 0 or 1, two ways to say the same.

    >>> phrase({"shape": "star", "colour": "red"})
    'a red star'
    >>> phrase({"size": "small", "cell": "top left"}, style=1)
    'something small at the top left'
    """
    adjectives = [facts[name] for name in ("size", "colour") if name in facts]
    if style == 1 and "shape" not in facts:
        words = ["something", *" and ".join(adjectives).split()]
    else:
        words = [*adjectives, facts.get("shape", noun)]
        article = "an" if words[0][0] in "aeiou" else "a"
        words = [article, *words]
    # The longest sentences have no longer form.
    if style == 1 and "shape" in facts and not ("cell" in facts and "background" in facts):
        words = ["picture", "of", *words]
    if "cell" in facts:
        words += ["in" if facts["cell"] == "centre" else "at", "the", facts["cell"]]
    if "background" in facts:
        words += ["on", facts["background"]]
    return " ".join(words)


def caption(random, facts):
    """A true sentence about a scene of these facts, which names some of them."""
    named = {name: value for name, value in facts.items() if random.random() < NAMED[name]}
    return full_caption(random, named)


def full_caption(random, facts):
    """A sentence that names all of these facts, in one of several phrasings."""
    return phrase(facts, NOUNS[random.integers(len(NOUNS))], int(random.random() < 0.3))


def all_words():
    """Every word that a caption may have."""
    words = ["a", "an", "and", "something", "picture", "of", "in", "at", "the", "on", *NOUNS]
    for values in ATTRIBUTES.values():
        for value in values:
            words += value.split()
    return sorted(set(words))


# --------------------------------------------------------------------------------------------------
# Reading a picture by a program: no network has to be trusted.

TURNS = np.linspace(-0.35, 0.35, 8)
WORST = 0.24  # the largest error of a fit, root mean square over the object's pixels


def area_and_middle(shape):
    """Of an outline of radius 1: its area, and its centre of mass, y alone (x is 0)."""
    covered = cover(shape, (SIDE / 2, SIDE / 2), 10, 0, 1)
    rows = np.arange(SIDE) + 0.5 - SIDE / 2
    return covered.sum() / 100, (covered.sum(1) * rows).sum() / covered.sum() / 10


AREAS = {shape: area_and_middle(shape) for shape in SHAPES}


def nearest(palette, colour):
    """The name in {name: number or colour} that is nearest."""
    distances = {name: np.abs(np.subtract(value, colour)).sum() for name, value in palette.items()}
    return min(distances, key=distances.get)


def background_of(pixels):
    """Pixels [SIDE, SIDE, 3] -> the median of those of the border [3]."""
    is_border = np.ones((SIDE, SIDE), bool)
    is_border[2:-2, 2:-2] = False
    return np.median(pixels[is_border], axis=0)


def read(picture):
    """uint8 [SIDE, SIDE, 3] -> its facts {attribute: value}, or None where it is no clean scene.

    The object is what differs from the background. Each shape is drawn with its area at its place,
    in several turns; the one that fits best is the answer, if it fits.
    """
    pixels = picture.astype(np.float64)
    background = background_of(pixels)
    pixels = pixels - background  # the object on nothing
    differences = np.linalg.norm(pixels, axis=2)
    strongest = differences >= 0.85 * np.sort(differences.ravel())[-6]
    contrast = np.median(pixels[strongest], axis=0)
    colour = background + contrast
    if np.linalg.norm(contrast) < 50:
        return None
    covered = (pixels @ contrast / (contrast @ contrast)).clip(0, 1)
    covered[covered < 0.15] = 0  # what is not quite even

    total = covered.sum()
    steps = np.arange(SIDE) + 0.5
    middle = np.array([covered.sum(0) @ steps, covered.sum(1) @ steps]) / total
    best = None
    for shape, (area, offset) in AREAS.items():
        radius = math.sqrt(total / area)
        for turn in TURNS:
            # The outline's centre lies where its centre of mass, turned, is at `middle`.
            centre = middle - radius * offset * np.array([-math.sin(turn), math.cos(turn)])
            error = ((cover(shape, centre, radius, turn, 1.0) - covered) ** 2).sum()
            if best is None or error < best[0]:
                best = (error, shape, radius, centre)
    error, shape, radius, centre = best
    if math.sqrt(error / max(total, 1)) > WORST:
        return None
    column, row = (int(np.abs(np.subtract(CENTRES, place)).argmin()) for place in centre)
    cells = {place: name for name, place in CELLS.items()}
    return {
        "shape": shape,
        "colour": nearest(COLOURS, colour),
        "size": nearest(RADII, radius),
        "cell": cells[column, row],
        "background": nearest(BACKGROUNDS, background),
    }
