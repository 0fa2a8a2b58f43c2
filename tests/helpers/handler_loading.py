"""Loads handler.py the way Hugging Face's inference toolkit does, in this process or in a fresh one.

The toolkit puts the repository's folder first on `sys.path`, executes the file handler.py there under the name
`handler.EndpointHandler` (so relative imports cannot work), and calls `EndpointHandler(folder)`. Each request is one
call with the decoded body.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from helpers.paths import MODELING


MODULE = "handler.EndpointHandler"


def make_repository(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint and what is published beside it for endpoints."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    for name in ("handler.py", "requirements.txt"):
        shutil.copy(MODELING / name, folder)
    return folder


def load_handler(folder: str | Path):
    """An `EndpointHandler` of the repository in `folder`."""
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(MODULE, Path(folder) / "handler.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))
