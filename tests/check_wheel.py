"""Use an unpacked wheel without the checkout: `python check_wheel.py FOLDER`, run by `make wheel`."""

import sys
from importlib import import_module
from pathlib import Path


ROOT = Path(__file__).parents[1]


def main(folder: str) -> None:
    unpacked = Path(folder).resolve()
    package = unpacked / "convllava_hf"
    sources = {path: package / path.relative_to(ROOT / "src" / "convllava_hf") for path in ROOT.glob("src/**/*.py")}
    sources |= {path: package / "modeling" / path.name for path in (ROOT / "modeling").iterdir() if path.is_file()}
    card = Path("publish") / "MODEL_CARD.md"
    sources[ROOT / "src" / "convllava_hf" / card] = package / card
    recipes = (ROOT / "recipes" / "miniature").glob("*.yaml")
    sources |= {path: package / "miniature" / "recipes" / path.name for path in recipes}
    if missing := [str(source.relative_to(ROOT)) for source, there in sources.items() if not there.is_file()]:
        sys.exit(f"The wheel lacks {', '.join(missing)}: see [tool.setuptools] in pyproject.toml")

    sys.path.insert(0, str(unpacked))
    for name in ("modeling", "cli", "convert", "inference", "publish"):
        module = import_module(f"convllava_hf.{name}")
        if unpacked not in Path(module.__file__).parents:
            sys.exit(f"{name} was imported from {module.__file__}, not from {unpacked}")


if __name__ == "__main__":
    main(sys.argv[1])
