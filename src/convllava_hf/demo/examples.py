"""Example images, drawn here: they need no license, no download and no binary file in a Space."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


_INK = "#1b2430"
_PRICES = (
    ("Earl Grey, pot", "4.20"),
    ("Scone with jam", "3.50"),
    ("Carrot cake", "4.80"),
    ("Sparkling water", "2.60"),
    ("Oat milk", "0.50"),
)
_RAIN = (("Jan", 62), ("Feb", 48), ("Mar", 55), ("Apr", 71), ("May", 94), ("Jun", 83), ("Jul", 40), ("Aug", 36))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _street_sign() -> Image.Image:
    image = Image.new("RGB", (1200, 800), "#bcd9ee")
    pen = ImageDraw.Draw(image)
    for y in range(560):
        pen.line((0, y, 1200, y), fill=(140 + y // 10, 185 + y // 14, 228 + y // 40))
    pen.ellipse((930, 70, 1050, 190), fill="#ffe9a8")
    pen.polygon([(0, 800), (0, 560), (320, 430), (640, 540), (900, 450), (1200, 570), (1200, 800)], fill="#6f9d6b")
    pen.polygon([(0, 800), (0, 660), (1200, 620), (1200, 800)], fill="#55606b")
    for x in range(60, 1200, 220):
        pen.polygon([(x, 726), (x + 110, 722), (x + 112, 736), (x, 740)], fill="#e8e8e8")
    pen.rectangle((588, 330, 612, 690), fill="#8a929b")
    pen.rounded_rectangle((300, 120, 900, 330), 18, fill="#0c5c3c", outline="white", width=8)
    pen.text((600, 190), "HARBOUR STREET", font=_font(62), fill="white", anchor="mm")
    pen.text((600, 270), "City center 3 km", font=_font(46), fill="white", anchor="mm")
    return image


def _receipt() -> Image.Image:
    image = Image.new("RGB", (900, 1200), "#7a5b43")
    pen = ImageDraw.Draw(image)
    for y in range(0, 1200, 150):
        pen.line((0, y, 900, y + 12), fill="#6b4e38", width=6)
    pen.rectangle((158, 78, 758, 1138), fill="#5a4231")
    pen.rectangle((150, 70, 750, 1130), fill="#fbfaf5")
    pen.text((450, 150), "THE CORNER TEAROOM", font=_font(44), fill=_INK, anchor="mm")
    pen.text((450, 205), "12 Mill Lane, Ashford", font=_font(26), fill=_INK, anchor="mm")
    pen.text((450, 245), "14 March, 15:42   Table 7", font=_font(26), fill=_INK, anchor="mm")
    pen.line((190, 295, 710, 295), fill=_INK, width=3)
    for index, (name, price) in enumerate(_PRICES):
        y = 350 + 75 * index
        pen.text((195, y), name, font=_font(32), fill=_INK, anchor="lm")
        pen.text((705, y), price, font=_font(32), fill=_INK, anchor="rm")
    pen.line((190, 725, 710, 725), fill=_INK, width=3)
    pen.text((195, 790), "TOTAL", font=_font(46), fill=_INK, anchor="lm")
    total = sum(float(price) for _, price in _PRICES)
    pen.text((705, 790), f"{total:.2f}", font=_font(46), fill=_INK, anchor="rm")
    pen.text((450, 920), "Thank you, come again", font=_font(30), fill=_INK, anchor="mm")
    for index, x in enumerate(range(230, 670, 9)):
        pen.rectangle((x, 980, x + (index * 7) % 5 + 1, 1060), fill=_INK)
    return image


def _chart() -> Image.Image:
    image = Image.new("RGB", (1200, 800), "white")
    pen = ImageDraw.Draw(image)
    pen.text((600, 60), "Rain in millimetres", font=_font(44), fill=_INK, anchor="mm")
    for value in range(0, 101, 20):
        y = 700 - 5.6 * value
        pen.line((120, y, 1140, y), fill="#d9dee4", width=2)
        pen.text((100, y), str(value), font=_font(28), fill=_INK, anchor="rm")
    for index, (month, value) in enumerate(_RAIN):
        x = 160 + 122 * index
        pen.rectangle((x, 700 - 5.6 * value, x + 78, 700), fill="#2f7ebc")
        pen.text((x + 39, 735), month, font=_font(28), fill=_INK, anchor="mm")
    return image


def _table() -> Image.Image:
    image = Image.new("RGB", (1200, 750), "#efe6d8")
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 430, 1200, 750), fill="#b98a5e")
    for y in range(455, 750, 60):
        pen.line((0, y, 1200, y - 14), fill="#a87a50", width=4)
    pen.ellipse((150, 440, 370, 640), fill="#c8342b")
    pen.ellipse((195, 470, 260, 525), fill="#e4726a")
    pen.rounded_rectangle((500, 330, 690, 610), 20, fill="#2d5f9a")
    pen.arc((650, 390, 770, 540), -90, 90, fill="#2d5f9a", width=24)
    pen.ellipse((500, 310, 690, 360), fill="#1f4470")
    pen.rounded_rectangle((850, 520, 1110, 590), 8, fill="#3c7a4a")
    pen.rounded_rectangle((870, 450, 1090, 520), 8, fill="#d9a93a")
    pen.text((980, 555), "ATLAS", font=_font(40), fill="white", anchor="mm")
    pen.text((980, 485), "BIRDS", font=_font(40), fill=_INK, anchor="mm")
    return image


_EXAMPLES: tuple[tuple[str, Callable[[], Image.Image], str], ...] = (
    ("street-sign", _street_sign, "What is written on the sign?"),
    ("receipt", _receipt, "What does the carrot cake cost, and what is the total?"),
    ("rain", _chart, "Which month had the most rain?"),
    ("table", _table, "Where is the blue mug? Answer with its box as [x1, y1, x2, y2]."),
)


def write_examples(folder: Path) -> list[tuple[str, str]]:
    """Draws the examples into a folder; the path of each image and a question about it."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for name, draw, question in _EXAMPLES:
        path = folder / f"{name}.png"
        draw().save(path)
        examples.append((str(path), question))
    return examples
