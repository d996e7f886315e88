"""The words of the captions: synonyms of every class and sentence patterns of every layout.

No word of a colour, size, shape, material, count or setting stands for two classes.
"""

from __future__ import annotations

from string import Formatter

SHAPES: dict[str, tuple[tuple[str, str], ...]] = {
    "ball": (("ball", "balls"), ("sphere", "spheres"), ("globe", "globes"), ("orb", "orbs")),
    "cube": (("cube", "cubes"), ("box", "boxes"), ("block", "blocks")),
    "cylinder": (("cylinder", "cylinders"), ("drum", "drums"), ("can", "cans"),
                 ("barrel", "barrels")),
    "cone": (("cone", "cones"), ("party hat", "party hats"), ("teepee", "teepees")),
    "pyramid": (("pyramid", "pyramids"), ("tent", "tents")),
    "gem": (("gem", "gems"), ("diamond", "diamonds"), ("jewel", "jewels"),
            ("crystal", "crystals"), ("octahedron", "octahedrons")),
}  # fmt: skip
"""Singular and plural."""

COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("red", "scarlet", "crimson", "ruby"),
    "orange": ("orange", "tangerine", "pumpkin"),
    "yellow": ("yellow", "lemon", "canary"),
    "green": ("green", "emerald", "jade"),
    "blue": ("blue", "cobalt", "sapphire", "ultramarine"),
    "purple": ("purple", "violet", "plum"),
    "pink": ("pink", "rose", "rosy"),
    "white": ("white", "ivory", "pearl"),
}

SIZES: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}

MATERIALS: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "matte", "dull", "unadorned"),
    "shiny": ("shiny", "glossy", "polished", "gleaming"),
    "striped": ("striped", "stripy", "banded"),
    "checkered": ("checkered", "chequered", "checked"),
    "spotted": ("spotted", "dotted", "speckled"),
}
"""Adjectives."""

FINISHES: dict[str, tuple[str, ...]] = {
    "plain": ("without any pattern", "of bare clay"),
    "shiny": ("made of metal", "with a brilliant gleam"),
    "striped": ("with stripes", "covered in bands"),
    "checkered": ("with a checkerboard pattern", "covered in checks"),
    "spotted": ("with polka dots", "covered in spots"),
}
"""Phrases behind the noun that replace the adjective."""

SETTINGS: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "on a grassy field", "in a pasture with wild flowers",
               "on a lawn in spring", "on fresh grass below gentle hills"),
    "desert": ("in the desert", "among dry dunes", "on hot desert sand",
               "in a dusty wilderness", "on parched ground under a burning sun"),
    "beach": ("on a sandy beach", "at the seaside", "by the sea", "on the shore of the ocean",
              "on a beach with gentle waves"),
    "snow": ("in the snow", "on a snowy hillside", "in a winter landscape",
             "on fresh snow below frozen mountains", "on the ice of a cold frozen valley"),
    "night": ("at night", "under the moon", "in the moonlight", "beneath a starry sky",
              "at midnight under twinkling stars"),
    "autumn": ("in autumn", "among fallen leaves", "on a carpet of leaves",
               "in october when the leaves fall", "on an autumn day in the woods"),
    "lake": ("on a lake", "on calm water", "on the smooth water of a lake",
             "reflected in a still lake", "on a quiet pond"),
    "tiles": ("on a tiled floor", "in a hall with arched windows", "in a museum",
              "in a gallery with a tiled floor", "in a palace on marble tiles"),
}  # fmt: skip

LIGHTS: dict[str, tuple[str, ...]] = {
    "left": ("light from the left", "lit from the left", "the light comes from the left",
             "illuminated from the left side", "with shadows falling to the right",
             "the shadows point to the right", "casting shadows towards the right"),
    "right": ("light from the right", "lit from the right", "the light comes from the right",
              "illuminated from the right side", "with shadows falling to the left",
              "the shadows point to the left", "casting shadows towards the left"),
}  # fmt: skip

COUNTS: dict[str, str] = {name: name for name in ("two", "three", "four", "five")}

LAYOUTS: dict[str, tuple[str, ...]] = {
    "pair": (
        "{a} to the left of {b}",
        "{b} to the right of {a}",
        "{a} on the left and {b} on the right",
        "{b} on the right and {a} on the left",
        "on the left {a}, on the right {b}",
        "on the right {b}, on the left {a}",
        "{a} with {b} to its right",
        "{b} with {a} to its left",
        "{a} next to {b}, which stands on the right",
        "{b} beside {a}, which stands on the left",
    ),
    "row": (
        "{count} {many_a} in a row",
        "a row of {count} {many_a}",
        "{count} {many_a} side by side",
        "{count} matching {many_a} lined up",
        "a line of {count} identical {many_a}",
        "exactly {count} {many_a} next to each other",
        "{count} equal {many_a} standing in line",
    ),
    "flanked": (
        "{a} between two matching {many_b}",
        "{a} flanked by two {many_b}",
        "two equal {many_b} with {a} between them",
        "{a} in the middle, {b} on each side of it",
        "{a} in the centre, guarded by twin {many_b}",
        "two identical {many_b} to the left and right of {a}",
        "on either side of {a} stands {b}",
    ),
    "stack": (
        "{a} on top of {b}",
        "{a} balanced on {b}",
        "{b} carrying {a}",
        "{b} underneath {a}",
        "{a} standing on {b}",
        "{b} with {a} on top of it",
        "a stack of two things, {a} above {b}",
    ),
    "mirrored": (
        "two {many_a} between two {many_b}, mirror symmetric",
        "a symmetric group, two {many_a} inside and two {many_b} outside",
        "two {many_b} at the ends and two {many_a} in between",
        "four things in mirror symmetry, {many_b} outside and {many_a} inside",
        "two {many_a} flanked by two {many_b} in a mirrored arrangement",
        "an inner couple of {many_a} and an outer couple of {many_b}",
    ),
}
"""Fields: ``a`` and ``b`` with article, ``many_a`` and ``many_b`` in the plural, ``count``."""

PHRASES: tuple[str, ...] = (
    "{size} {colour} {material} {shape}",
    "{size} {material} {colour} {shape}",
    "{material} {size} {colour} {shape}",
    "{size} {colour} {shape} {finish}",
)

SENTENCES: tuple[str, ...] = (
    "{things} {setting}, {light}",
    "{things} {setting}, {light}",
    "{things}, {setting}, {light}",
    "{setting}, {things}, {light}",
    "{light}, {things} {setting}",
    "{setting}, {light}, {things}",
    "in this picture, {things} {setting}, {light}",
    "a quiet scene, {things} {setting}, {light}",
    "a view {setting}, {things}, {light}",
)

ARTICLES = ("a", "an")


def _all_phrases() -> list[str]:
    phrases = [*PHRASES, *SENTENCES, *ARTICLES, *COUNTS.values()]
    for table in (COLOURS, SIZES, MATERIALS, FINISHES, SETTINGS, LIGHTS, LAYOUTS):
        phrases += [phrase for choices in table.values() for phrase in choices]
    phrases += [form for choices in SHAPES.values() for forms in choices for form in forms]
    return phrases


def vocabulary() -> tuple[str, ...]:
    """Every word which a caption can contain, sorted; the comma is not a word."""
    literal = (text for phrase in _all_phrases() for text, *_ in Formatter().parse(phrase))
    words = {word for text in literal for word in text.replace(",", " ").split()}
    return tuple(sorted(words))
