"""Captions of tiny scenes in plain English, which state every scored attribute."""

from __future__ import annotations

import random
from collections.abc import Mapping

from . import grammar
from .scenes import ATTRIBUTES, Scenes

VOCABULARY: tuple[str, ...] = grammar.vocabulary()
"""Every word the captions can contain."""

_VOWELS = tuple("aeiou")


def caption(scenes: Scenes, *, seed: int) -> list[str]:
    """One caption of at most 44 words per scene: lower case, words and commas only.

    Wording depends on the seed and on the scene's place in the batch.
    """
    rng = random.Random(seed)
    names = list(ATTRIBUTES)
    classes = zip(*(value.tolist() for value in scenes.truth().values()), strict=True)
    return [_describe(dict(zip(names, row, strict=True)), rng) for row in classes]


def _describe(classes: Mapping[str, int], rng: random.Random) -> str:
    """Caption of a scene with the given class indices (-1 where not applicable)."""
    names = {name: ATTRIBUTES[name][index] for name, index in classes.items() if index >= 0}
    pattern = rng.choice(grammar.LAYOUTS[names["layout"]])
    fields = {"count": grammar.COUNTS[names["count"]]} if "count" in names else {}
    for kind in "ab":
        if f"shape_{kind}" in names:
            plural = f"{{many_{kind}}}" in pattern
            fields["many_" * plural + kind] = _noun_phrase(names, kind, plural, rng)
    return rng.choice(grammar.SENTENCES).format(
        things=pattern.format(**fields),
        setting=rng.choice(grammar.SETTINGS[names["setting"]]),
        light=rng.choice(grammar.LIGHTS[names["light"]]),
    )


def _noun_phrase(names: Mapping[str, str], kind: str, plural: bool, rng: random.Random) -> str:
    """One kind of object: "a large red striped ball", or in the plural "large red balls ..."."""
    material = names[f"material_{kind}"]
    phrase = rng.choice(grammar.PHRASES).format(
        size=rng.choice(grammar.SIZES[names[f"size_{kind}"]]),
        colour=rng.choice(grammar.COLOURS[names[f"colour_{kind}"]]),
        material=rng.choice(grammar.MATERIALS[material]),
        finish=rng.choice(grammar.FINISHES[material]),
        shape=rng.choice(grammar.SHAPES[names[f"shape_{kind}"]])[plural],
    )
    if plural:
        return phrase
    return f"{grammar.ARTICLES[phrase.startswith(_VOWELS)]} {phrase}"


def _gallery_entry(layout: str, a: str, b: str, setting: str, light: str, *, seed: int,
                   count: str = "") -> tuple[str, dict[str, int]]:  # fmt: skip
    """Caption and class indices; ``a`` and ``b`` read "size colour material shape"."""
    names = {"layout": layout, "setting": setting, "light": light, "count": count}
    for kind, words in (("a", a), ("b", b)):
        parts = words.split() or [""] * 4
        names |= {f"{key}_{kind}": word for key, word in
                  zip(("size", "colour", "material", "shape"), parts, strict=True)}  # fmt: skip
    classes = {key: values.index(names[key]) if names[key] else -1
               for key, values in ATTRIBUTES.items()}  # fmt: skip
    return _describe(classes, random.Random(seed)), classes


GALLERY: tuple[tuple[str, dict[str, int]], ...] = (
    _gallery_entry("mirrored", "small orange shiny ball", "large blue striped cone",
                   "lake", "left", seed=5),
    _gallery_entry("row", "large red spotted ball", "", "meadow", "right", seed=4, count="four"),
    _gallery_entry("flanked", "large white shiny ball", "large purple striped cylinder",
                   "tiles", "left", seed=1),
    _gallery_entry("stack", "large yellow shiny gem", "large red checkered cube",
                   "beach", "right", seed=7),
    _gallery_entry("row", "large pink shiny gem", "", "lake", "right", seed=1, count="three"),
    _gallery_entry("pair", "large green striped ball", "large orange checkered pyramid",
                   "snow", "left", seed=2),
    _gallery_entry("flanked", "small yellow plain cone", "large blue checkered ball",
                   "desert", "right", seed=7),
    _gallery_entry("mirrored", "large white spotted cube", "small red shiny pyramid",
                   "autumn", "left", seed=7),
    _gallery_entry("stack", "small pink plain ball", "large white striped cylinder",
                   "night", "right", seed=1),
)  # fmt: skip
"""Varied captions for demonstrations, with the class indices that they state."""
