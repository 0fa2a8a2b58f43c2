"""A few samples of a run to look at: right and wrong ones, with small images, kept in the run's folder."""

import base64
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ConvLlavaError, first_line
from ..modeling.image_processing_convllava import ConvLlavaImageProcessor
from ..utils.atomic import write_atomic
from .comparison import is_scored
from .prediction_log import read_rows
from .samples import Sample
from .scorers import Row
from .sources import Source
from .validating import check_gallery


logger = logging.getLogger(__name__)

GALLERY_FILE = "gallery.json"
OF_EACH = 6  # right samples and wrong ones
_SIDE = 360  # pixels of the longer side
_QUALITY = 82


def save_gallery(folder: Path, source: Source) -> Path:
    """Chooses samples of a finished run, and writes them with their images as JPEG in base64."""
    rows = [row for row in read_rows(folder).values() if is_scored(row)]
    shown = [{**row, "jpeg": thumbnail(source, row)} for row in chosen(rows)]
    return write_atomic(folder / GALLERY_FILE, json.dumps(shown, ensure_ascii=False).encode())


def chosen(rows: Sequence[Row], of_each: int = OF_EACH) -> list[Row]:
    """Right samples, then wrong ones, spread over the run; the same ones each time."""
    right = [row for row in rows if is_right(row)]
    wrong = [row for row in rows if not is_right(row)]
    return [*_spread(right, of_each), *_spread(wrong, of_each)]


def is_right(row: Row) -> bool:
    """Whether a sample counts as right for who looks at it, where scores lie between 0 and 1."""
    return row["score"] >= 0.5


def thumbnail(source: Source, row: Row) -> str:
    """A sample's image, upright and small: a JPEG in base64."""
    sample = Sample(row["id"], row["row"], row["question"], (), image=row.get("image_key"))
    image: Any = ConvLlavaImageProcessor().fetch_images(source.image_of(sample))
    image = image.copy()
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def read_gallery(folder: Path) -> list[dict[str, Any]]:
    """What `save_gallery` has left; nothing where it was not called.

    Raises:
        ConvLlavaError: it is not a gallery: the message names the key that is not as expected.
    """
    path = folder / GALLERY_FILE
    if not path.exists():
        return []
    try:
        shown = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConvLlavaError(f"{str(path)!r} is not valid JSON: {first_line(error)}") from error
    check_gallery(shown, path)
    return shown


def _spread(rows: Sequence[Row], number: int) -> list[Row]:
    if len(rows) <= number:
        return list(rows)
    return [rows[index * len(rows) // number] for index in range(number)]
