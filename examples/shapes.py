"""The shapes world: pictures of one to five equal shapes in one colour, and clips of one shape that
moves.

Owns what a scene and a clip hold and how they are drawn. Seeded: the same split, seed and number
give the same scene, and the two splits share no random stream. Knows nothing of files, models or
tasks.
"""

from __future__ import annotations

import colorsys
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Array = npt.NDArray[np.float32]
Colour = tuple[int, int, int]  # red, green and blue from 0 to 255
Split = Literal["train", "eval"]

SHAPES = ("circle", "square", "triangle", "star")
# their hues in degrees
COLOURS = {"red": 357, "orange": 28, "yellow": 55, "green": 125, "blue": 222, "purple": 288}
COUNTS = (1, 2, 3, 4, 5)
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

HUE_JITTER = 7  # degrees to either side
SUPERSAMPLING = 4
# distance between a shape's and the background's colour; black and white are 442 apart
MIN_CONTRAST = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One shape in its place; lengths in pixels, `angle` in radians, `radius` that of the circle
    around it.
    """

    shape: str
    x: float
    y: float
    radius: float
    angle: float
    fill: Colour


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """Two colours that blend along `angle`, with clouds of `amplitude` grey levels and a fine grain
    on them.
    """

    colours: tuple[Colour, Colour]
    angle: float
    amplitude: float
    grain: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture and its gold answers: `count` figures of one `shape` and `colour` that do not
    touch.
    """

    width: int
    height: int
    background: Background
    figures: tuple[Figure, ...]
    shape: str
    colour: str

    @property
    def count(self) -> int:
        return len(self.figures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One figure that moves `distance` pixels in a direction; the gold answer is `motion`.

    It starts where `scene` shows it, sways sideways by `sway` pixels and turns by `spin` radians.
    `pace` below 1 slows down, above 1 speeds up.
    """

    scene: Scene
    motion: str
    num_frames: int
    fps: int
    distance: float
    pace: float
    sway: float
    spin: float

    def figure(self, index: int) -> Figure:
        """The figure in frame `index`."""
        (start,) = self.scene.figures
        time = index / max(self.num_frames - 1, 1)
        ahead, aside = self.distance * time**self.pace, self.sway * math.sin(math.tau * time)
        dx, dy = MOTIONS[self.motion]
        return replace(
            start,
            x=start.x + dx * ahead + dy * aside,
            y=start.y + dy * ahead + dx * aside,
            angle=start.angle + self.spin * time,
        )

    def draw(self, indices: list[int]) -> list[Image.Image]:
        """The frames of these numbers, in RGB."""
        background = draw_background(self.scene)
        return [_with_figures(background, (self.figure(index),)) for index in indices]


def scenes(split: Split, seed: int) -> Iterator[Scene]:
    """An endless stream of scenes; shapes, colours and counts come in equal shares and
    independently.
    """
    for number in itertools.count():
        yield make_scene(random.Random(f"scene {split} {seed} {number}"))


def clips(split: Split, seed: int) -> Iterator[Clip]:
    """An endless stream of clips of two to four seconds, the directions in equal shares."""
    for number in itertools.count():
        yield make_clip(random.Random(f"clip {split} {seed} {number}"))


def make_scene(rng: random.Random) -> Scene:
    """Between 72 and 590 pixels a side, at most twice as wide as high or the reverse."""
    size, stretch = (
        math.exp(rng.uniform(math.log(96), math.log(420))),
        math.exp(rng.uniform(-0.34, 0.34)),
    )
    width, height = (max(72, round(size * factor)) for factor in (stretch, 1 / stretch))
    shape, colour, count = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(COUNTS)
    fills = _fills(colour, count, rng)
    background = _background(fills, rng)
    figures = [
        Figure(shape=shape, x=x, y=y, radius=radius, angle=rng.uniform(-0.35, 0.35), fill=fill)
        for (x, y, radius), fill in zip(_places(width, height, count, rng), fills, strict=True)
    ]
    return Scene(
        width=width,
        height=height,
        background=background,
        figures=tuple(figures),
        shape=shape,
        colour=colour,
    )


def make_clip(rng: random.Random) -> Clip:
    """Between 96 and 240 pixels a side, both even as video encoders want them; moves by 30 to 55 %
    of a side.
    """
    width, height = (2 * rng.randrange(48, 121) for _ in range(2))
    motion, colour = rng.choice(list(MOTIONS)), rng.choice(list(COLOURS))
    dx, dy = MOTIONS[motion]
    radius = rng.uniform(0.13, 0.20) * min(width, height)
    sway = rng.uniform(0, 0.03) * min(width, height)
    distance = rng.uniform(0.3, 0.55) * (width if dx else height)
    fills = _fills(colour, 1, rng)
    figure = Figure(
        shape=rng.choice(SHAPES),
        x=_start(width, radius + sway, dx * distance, rng),
        y=_start(height, radius + sway, dy * distance, rng),
        radius=radius,
        angle=rng.uniform(-0.35, 0.35),
        fill=fills[0],
    )
    background = replace(_background(fills, rng), grain=0.0)
    fps = rng.choice((8, 10, 12, 15, 24, 25, 30))
    return Clip(
        scene=Scene(
            width=width,
            height=height,
            background=background,
            figures=(figure,),
            shape=figure.shape,
            colour=colour,
        ),
        motion=motion,
        num_frames=round(rng.uniform(2, 4) * fps),
        fps=fps,
        distance=distance,
        pace=rng.uniform(0.8, 1.3),
        sway=sway,
        spin=rng.uniform(-0.5, 0.5),
    )


def draw(scene: Scene) -> Image.Image:
    """The picture, in RGB."""
    return _with_figures(draw_background(scene), scene.figures)


def draw_background(scene: Scene) -> Image.Image:
    """The picture without its figures, in RGB."""
    background = scene.background
    y, x = (np.linspace(-0.5, 0.5, side, dtype=np.float32) for side in (scene.height, scene.width))
    # from -0.71 to 0.71
    blend = math.sin(background.angle) * y[:, None] + math.cos(background.angle) * x[None, :]
    first, second = (np.array(colour, np.float32) for colour in background.colours)
    pixels: Array = (first + second) / 2 + blend[:, :, None] * (second - first)
    rng = np.random.default_rng(background.seed)
    if background.amplitude:
        coarse = Image.fromarray(rng.uniform(-1, 1, rng.integers(3, 12, 2)).astype(np.float32))
        clouds = coarse.resize((scene.width, scene.height), Image.Resampling.BICUBIC)
        pixels += background.amplitude * np.asarray(clouds)[:, :, None]
    if background.grain:
        pixels += rng.normal(0, background.grain, pixels.shape).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def figure_mask(figure: Figure, left: int, top: int, side: int) -> Image.Image:
    """How much of each pixel the figure covers, 0 to 255, in the square window at (left, top)."""
    scale = SUPERSAMPLING
    mask = Image.new("L", (side * scale, side * scale))
    points = [((x - left) * scale, (y - top) * scale) for x, y in outline(figure)]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask.reduce(scale)


def outline(figure: Figure) -> list[tuple[float, float]]:
    """The corners of a figure's polygon; a circle has many."""
    inner = {"star": 0.45}.get(figure.shape, 1.0)
    corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[figure.shape]
    turn = figure.angle - math.pi / (4 if figure.shape == "square" else 2)  # upright at angle 0
    radii = (figure.radius * (inner if i % 2 else 1.0) for i in range(corners))
    angles = (turn + math.tau * i / corners for i in range(corners))
    return [
        (figure.x + r * math.cos(a), figure.y + r * math.sin(a))
        for r, a in zip(radii, angles, strict=True)
    ]


def _with_figures(background: Image.Image, figures: tuple[Figure, ...]) -> Image.Image:
    picture = background.copy()
    for figure in figures:
        left, top = (math.floor(centre - figure.radius) - 1 for centre in (figure.x, figure.y))
        mask = figure_mask(figure, left, top, math.ceil(2 * figure.radius) + 3)
        picture.paste(figure.fill, (left, top), mask)
    return picture


def _fills(colour: str, count: int, rng: random.Random) -> list[Colour]:
    """Colours of one name, nearly alike as those of equal things under one light."""
    hue = COLOURS[colour] + rng.uniform(-HUE_JITTER, HUE_JITTER)
    saturation, value = rng.uniform(0.7, 1.0), rng.uniform(0.65, 1.0)
    return [_rgb(hue, saturation, min(1.0, value * rng.uniform(0.93, 1.07))) for _ in range(count)]


def _background(fills: list[Colour], rng: random.Random) -> Background:
    """Plain, a gradient or clouds, in colours from which all fills stand out."""
    kind = rng.choice(("plain", "gradient", "noise"))
    first = _contrasting(fills, rng)
    return Background(
        colours=(first, _contrasting(fills, rng) if kind == "gradient" else first),
        angle=rng.uniform(0, math.tau),
        amplitude=rng.uniform(8, 28) if kind == "noise" else 0.0,
        grain=rng.uniform(1, 8) if kind == "noise" and rng.random() < 0.5 else 0.0,
        seed=rng.getrandbits(32),
    )


def _contrasting(fills: list[Colour], rng: random.Random) -> Colour:
    while True:
        colour = _rgb(rng.uniform(0, 360), rng.uniform(0, 0.3), rng.uniform(0.08, 1.0))
        if min(math.dist(colour, fill) for fill in fills) >= MIN_CONTRAST:
            return colour


def _places(
    width: int, height: int, count: int, rng: random.Random
) -> list[tuple[float, float, float]]:
    """(x, y, radius) of circles inside the picture that keep apart; tried anew until all have found
    room.
    """
    side = min(width, height)
    while True:
        radius = side * rng.uniform(0.13, 0.25 if count < 3 else 0.18)
        places: list[tuple[float, float, float]] = []
        for _ in range(20 * count):
            r = radius * rng.uniform(0.85, 1.15)
            x, y = rng.uniform(r + 1, width - r - 1), rng.uniform(r + 1, height - r - 1)
            if all(
                math.hypot(x - x2, y - y2) > 1.1 * (r + r2) + 0.02 * side for x2, y2, r2 in places
            ):
                places.append((x, y, r))
            if len(places) == count:
                return places


def _start(side: int, margin: float, distance: float, rng: random.Random) -> float:
    """Where to begin so that both ends of a way of `distance` (negative: backwards) lie `margin`
    inside the side.
    """
    return rng.uniform(margin - min(distance, 0), side - margin - max(distance, 0))


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)
