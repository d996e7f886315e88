"""Captions say what is true, unambiguously, in words that are single tokens."""

import re

import pytest
import torch

from gspn2_diffusers.tiny_scenes import grammar
from gspn2_diffusers.tiny_scenes.captions import GALLERY, VOCABULARY, caption
from gspn2_diffusers.tiny_scenes.scenes import (
    ATTRIBUTES,
    sample_scenes,
    scenes_from_attributes,
)
from gspn2_diffusers.tiny_scenes.tokenizer import MODEL_MAX_LENGTH, build_tokenizer

SCENES = sample_scenes(3000, seed=4)
CAPTIONS = caption(SCENES, seed=5)
TOKENIZER = build_tokenizer()

SHAPES = {name: [form for forms in choices for form in forms]
          for name, choices in grammar.SHAPES.items()}  # fmt: skip
MATERIALS = {name: grammar.MATERIALS[name] + grammar.FINISHES[name] for name in grammar.MATERIALS}
TABLES = {"shape": SHAPES, "colour": grammar.COLOURS, "size": grammar.SIZES, "material": MATERIALS}


def mentions(text: str, table: dict) -> list[tuple[int, str]]:
    """Position and class of every synonym in the text, in the order of the text."""
    found = []
    for name, synonyms in table.items():
        for synonym in synonyms:
            found += [(m.start(), name) for m in re.finditer(rf"\b{synonym}\b", text)]
    return sorted(found)


def class_names(i: int) -> dict[str, str]:
    truth = {name: int(value[i]) for name, value in SCENES.truth().items()}
    return {name: ATTRIBUTES[name][index] for name, index in truth.items() if index >= 0}


def test_grammar_covers_every_class():
    assert list(grammar.SHAPES) == list(ATTRIBUTES["shape_a"])
    assert list(grammar.COLOURS) == list(ATTRIBUTES["colour_a"])
    assert list(grammar.SIZES) == list(ATTRIBUTES["size_a"])
    assert list(grammar.MATERIALS) == list(grammar.FINISHES) == list(ATTRIBUTES["material_a"])
    assert list(grammar.SETTINGS) == list(ATTRIBUTES["setting"])
    assert list(grammar.LIGHTS) == list(ATTRIBUTES["light"])
    assert list(grammar.LAYOUTS) == list(ATTRIBUTES["layout"])
    assert list(grammar.COUNTS) == list(ATTRIBUTES["count"])


def test_captions_are_short_plain_text_from_the_vocabulary():
    words = set(VOCABULARY)
    for text in CAPTIONS:
        assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", text), text
        spoken = re.findall(r"[a-z]+", text)
        assert len(spoken) <= 44
        assert words.issuperset(spoken)


def test_every_word_of_the_vocabulary_is_used():
    spoken = set(re.findall(r"[a-z]+", " ".join(CAPTIONS)))
    assert spoken == set(VOCABULARY)
    assert len(VOCABULARY) > 200


@pytest.mark.parametrize("kind", TABLES)
def test_objects_are_described_by_exactly_the_true_classes(kind):
    for i, text in enumerate(CAPTIONS):
        names = class_names(i)
        true = {names[key] for key in (f"{kind}_a", f"{kind}_b") if key in names}
        assert {name for _, name in mentions(text, TABLES[kind])} == true, text


def test_attributes_stand_with_their_own_object():
    """The nth mentioned shape, colour, size and material all belong to the same kind."""
    for i, text in enumerate(CAPTIONS):
        names = class_names(i)
        if "shape_b" not in names:
            continue
        described = list(zip(*([name for _, name in mentions(text, table)]
                               for table in TABLES.values()), strict=True))  # fmt: skip
        true = {tuple(names[f"{kind}_{side}"] for kind in TABLES) for side in "ab"}
        assert set(described) == true, text


@pytest.mark.parametrize(("name", "table"), [("setting", grammar.SETTINGS),
                                             ("light", grammar.LIGHTS)])  # fmt: skip
def test_setting_and_light_are_stated_once_and_truly(name, table):
    for i, text in enumerate(CAPTIONS):
        stated = {found for _, found in mentions(text, table)}
        assert stated == {class_names(i)[name]}, text


def test_counts_of_rows_are_stated():
    for i, text in enumerate(CAPTIONS):
        names = class_names(i)
        if "count" in names:
            assert {n for _, n in mentions(text, {k: [k] for k in grammar.COUNTS})} == {
                names["count"]
            }


def test_left_and_right_of_a_pair_agree_with_the_picture():
    pairs = [i for i in range(len(SCENES)) if SCENES.layout[i] == 0]
    for i in pairs:
        text, names = CAPTIONS[i], class_names(i)
        for phrase in grammar.LIGHTS[names["light"]]:
            text = text.replace(phrase, "")
        (at_first, first), *_ = mentions(text, SHAPES)
        first_is_a = first == names["shape_a"]
        assert first_is_a == _says_first_is_left(text, at_first), text


def _says_first_is_left(text: str, shape_at: int) -> bool:
    before = re.search(r"on the (left|right) an? ", text[:shape_at])
    side = before or re.search(r"(?:on the|to the|to its) (left|right)", text[shape_at:])
    right_named_first = side.group(1) == "right"
    says_where_second_is = "to its" in side.group(0) or "which stands" in text
    return right_named_first if says_where_second_is else not right_named_first


def test_no_synonym_serves_two_classes():
    for table in (*TABLES.values(), grammar.SETTINGS, grammar.LIGHTS):
        said = [synonym for synonyms in table.values() for synonym in synonyms]
        assert len(said) == len(set(said))


def test_gallery_entries_state_buildable_scenes():
    assert len({entry["layout"] for _, entry in GALLERY}) == 5
    for text, classes in GALLERY:
        scenes_from_attributes({name: torch.tensor([c]) for name, c in classes.items()}, seed=0)
        assert len(TOKENIZER(text).input_ids) <= MODEL_MAX_LENGTH


def test_every_word_is_one_token():
    for word in (*VOCABULARY, ","):
        assert len(TOKENIZER(word).input_ids) == 3, word
    assert len(TOKENIZER) < 2000


def test_captions_fit_into_the_model():
    longest = max(len(ids) for ids in TOKENIZER(CAPTIONS).input_ids)
    assert longest <= MODEL_MAX_LENGTH


def test_unknown_words_split_into_pieces():
    pieces = TOKENIZER.tokenize("zebra 42 café")
    assert "".join(pieces).startswith("zebra</w>4</w>2</w>")
    assert TOKENIZER.unk_token not in pieces


def test_saved_tokenizer_loads_with_identical_ids(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = type(TOKENIZER).from_pretrained(tmp_path)
    assert loaded(CAPTIONS[:50]).input_ids == TOKENIZER(CAPTIONS[:50]).input_ids
    assert loaded.model_max_length == MODEL_MAX_LENGTH
    assert loaded.pad_token == loaded.eos_token
