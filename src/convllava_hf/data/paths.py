"""Where images may be: inside one folder, no matter what a data set says."""

import functools
import os
from collections.abc import Mapping
from typing import Any

from ..errors import ConvLlavaError
from .conversations import SampleError


class ImageFolder:
    """Joins the paths of a data set to the folder of its images, and refuses those that lead out of it.

    Args:
        folder: paths are relative to it. `None` where the data set holds its images itself.
        others: folders in which absolute paths may lie as well (caches of `datasets`).

    Raises:
        ConvLlavaError: `folder` is no folder.
    """

    def __init__(self, folder: str | os.PathLike | None, others: tuple[str | os.PathLike, ...] = ()):
        if folder is not None and not os.path.isdir(folder):
            raise ConvLlavaError(f"The image folder {os.fspath(folder)!r} does not exist: check the path.")
        self.folder = None if folder is None else os.path.abspath(folder)
        self.others = tuple(os.path.realpath(other) for other in others)

    def path_of(self, name: str) -> str:
        """The absolute path of an image. Whether there is a file is not asked.

        Raises:
            SampleError: the path is a URL, or leads out of the folder: through `..`, by being absolute, or by a link.
        """
        if "://" in name or "\0" in name:
            raise SampleError("malformed", f"The image {name!r} is not a path; expected a file in the image folder.")
        if self.folder is None:
            if not os.path.isabs(name) or not self.others:
                raise SampleError("malformed", f"The image {name!r} is a path: name the folder that holds the images.")
            path, roots = name, self.others
        else:
            path = os.path.join(self.folder, name)
            roots = (_real(self.folder), *self.others)
        # Real paths of folders are remembered, so that millions of images cost one look each.
        parent, last = os.path.split(path)
        real = os.path.join(_real(parent), last)
        if last in ("", ".", "..") or os.path.islink(real):
            real = os.path.realpath(real)
        if not any(real.startswith(os.path.join(root, "")) for root in roots):
            leads = "is" if real == path else f"leads to {real!r}, which is"
            folder = self.folder or self.others[0]
            raise SampleError("path escape", f"The image {name!r} {leads} not inside the image folder {folder!r}.")
        return path


def located(image: str | Mapping, folder: ImageFolder) -> dict[str, Any]:
    """`bytes` and `path` of an image; where there are no bytes, the path is absolute and in the folder."""
    if isinstance(image, str):
        return {"bytes": None, "path": folder.path_of(image)}
    if image.get("bytes") is not None:
        return {"bytes": image["bytes"], "path": image.get("path")}
    return {"bytes": None, "path": folder.path_of(image["path"])}


@functools.lru_cache(maxsize=2**16)
def _real(folder: str) -> str:
    return os.path.realpath(folder)
