"""One picture out of several runs of the same prompts: runs side by side, prompts as captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK, FAINT = "#ffffff", "#1a1a1a", "#6a6a6a"
MARGIN = 28  # pixels around a card, and between cards
GUTTER = 6  # pixels between the images of a card
TITLE_SIZE, CAPTION_SIZE, LINE_HEIGHT = 17, 16, 22
TITLE_BAND = 30  # pixels above the images


def draw_comparison(
    images: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str], cards_per_row: int = 2
) -> Image.Image:
    """Draw one card per prompt: an image from each run under the run's name, the prompt below.

    Args:
        images: run's name -> one image per prompt, all of one size.

    Raises:
        ValueError: no prompt, or a run without exactly one image per prompt.
    """
    _check(images, prompts)
    columns = min(cards_per_row, len(prompts))
    cards = [
        _draw_card({name: run[index] for name, run in images.items()}, prompt)
        for index, prompt in enumerate(prompts)
    ]
    rows = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    row_heights = [max(card.height for card in row) + MARGIN for row in rows]
    card_width = cards[0].width + MARGIN
    sheet = Image.new("RGB", (columns * card_width + MARGIN, sum(row_heights) + MARGIN), BACKGROUND)
    top = MARGIN
    for row, height in zip(rows, row_heights, strict=True):
        for column, card in enumerate(row):
            sheet.paste(card, (MARGIN + column * card_width, top))
        top += height
    return sheet


def _check(images: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str]) -> None:
    if not prompts:
        raise ValueError("expected at least one prompt; got none")
    for name, run in images.items():
        if len(run) != len(prompts):
            raise ValueError(f"expected {len(prompts)} images of {name}; got {len(run)}")


def _draw_card(images: Mapping[str, Image.Image], prompt: str) -> Image.Image:
    width, height = next(iter(images.values())).size
    card_width = len(images) * (width + GUTTER) - GUTTER
    caption_font = ImageFont.load_default(CAPTION_SIZE)
    lines = wrap(prompt, caption_font, card_width)
    caption_top = TITLE_BAND + height + 8
    card = Image.new("RGB", (card_width, caption_top + LINE_HEIGHT * len(lines)), BACKGROUND)
    draw = ImageDraw.Draw(card)
    for column, (name, image) in enumerate(images.items()):
        left = column * (width + GUTTER)
        title_font = ImageFont.load_default(TITLE_SIZE)
        draw.text((left + width / 2, TITLE_BAND / 2), name, INK, title_font, anchor="mm")
        card.paste(image, (left, TITLE_BAND))
    for index, line in enumerate(lines):
        draw.text((0, caption_top + index * LINE_HEIGHT), line, FAINT, caption_font)
    return card


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Break text into lines of at most ``width`` pixels; a longer word keeps a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
