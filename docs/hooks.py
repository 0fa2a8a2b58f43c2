"""For MkDocs: links from the pages to files of the repository that are not in `docs`.

They are relative, so that they work on a page as it is in the repository. On the site an image becomes a file of the
site, and any other link the name of the file.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File


_MARKED = re.compile(r"(?<=<code>)[^<]*`[^<]*(?=</code>)")
_OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_files(files, config):
    root = Path(config.docs_dir).parent
    for page in files.documentation_pages():
        for is_image, _, path in _OUTSIDE.findall(page.content_string):
            if is_image and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown, **kwargs):
    return _OUTSIDE.sub(lambda link: f"![{link[2]}]({link[3]})" if link[1] else f"`{link[3]}`", markdown)


def on_page_content(html, **kwargs):
    """Types in docstrings that are written as transformers writes them: (`dict` or `int`, *optional*)."""
    return _MARKED.sub(lambda code: re.sub("[`*]", "", code[0]), html)
