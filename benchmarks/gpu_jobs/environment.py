"""A virtual environment from a folder of wheels, over the packages of the interpreter that makes it."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path


ROOT = Path(__file__).parents[2]


def make_environment(folder: Path, bundle: Path) -> Path:
    """Installs the wheels and this checkout, without a network.

    What the wheels bring takes precedence; all else, torch for one, comes from the interpreter's own packages.

    Args:
        folder: for the environment.
        bundle: the wheels, see `bundle.py`.

    Returns:
        The environment's Python.
    """
    wheels = sorted(map(str, bundle.resolve().glob("*.whl")))
    if not wheels:
        sys.exit(f"There are no wheels in {bundle}. Make them with: make gpu-bundle")
    run(sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder))
    python = folder / "bin" / "python"
    inner = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    below = [path for path in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]) if is_packages(path)]
    Path(inner, "below.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in below))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", f"--python={python}", "install", "--quiet")
    offline = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir")
    run(*pip, *offline, "--ignore-installed", *wheels)
    run(*pip, *offline, "--no-build-isolation", "--editable", str(ROOT))
    return python


def is_packages(path: str) -> bool:
    return os.path.basename(path) in ("site-packages", "dist-packages") and os.path.isdir(path)


def run(*command: str) -> str:
    """The command's output; the script ends with the command's errors where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[:6])} ... failed:\n{done.stdout}{done.stderr}")
    return done.stdout
