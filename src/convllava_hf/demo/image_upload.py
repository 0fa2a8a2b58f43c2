"""The part of the page that takes images from strangers."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from gradio import component_meta


@contextlib.contextmanager
def _without_a_stub_file() -> Iterator[None]:
    """Gradio writes a `.pyi` next to the module of every class of components: into this package's own folder."""
    write_it = getattr(component_meta, "create_or_modify_pyi", None)
    component_meta.create_or_modify_pyi = lambda *args: None
    try:
        yield
    finally:
        component_meta.create_or_modify_pyi = write_it


with _without_a_stub_file():

    class ImageInput(gr.Image):
        """An upload that hands on the path of a file that was uploaded here; `read_image` looks into it.

        Gradio's own opens it with any of PIL's formats, and fetches it from wherever the visitor's request says.
        """

        def get_block_name(self) -> str:
            return "image"

        async def async_move_resource_to_block_cache(self, url_or_file_path) -> str | None:
            if url_or_file_path is not None and "://" in str(url_or_file_path):
                raise gr.Error(
                    "Images are taken from your device, not from addresses: upload it.", print_exception=False
                )
            return await super().async_move_resource_to_block_cache(url_or_file_path)

        def preprocess(self, payload) -> str | None:
            if payload is None or payload.path is None:
                return None
            path = Path(payload.path).resolve()
            # Gradio has checked it too; it keeps the host's files private, so we do not rely on Gradio only.
            if not path.is_relative_to(Path(self.GRADIO_CACHE).resolve()) or not path.is_file():
                raise gr.Error("The image is not here any more. Drop it again.", print_exception=False)
            return str(path)
