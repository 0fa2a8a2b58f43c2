"""Collects the wheels that a GPU machine without a network lacks: `make gpu-bundle`.

    python benchmarks/gpu_jobs/bundle.py gpu-bundle

Such a machine has Python, torch with CUDA and the large scientific packages. pip resolves this project with its extras
for that Python and that torch, and every wheel that is not in `PRESENT` goes into the folder. bitsandbytes brings
libraries for a dozen versions of CUDA and ROCm: those for one CUDA and for CPUs are kept. `gpu.py --bundle FOLDER`
makes a virtual environment from the folder, over the packages of the interpreter that runs it.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[2]
EXTRAS = "train,eval,timm,quantization"
# What comes with torch, and packages that are large and that any machine for this kind of work has.
PRESENT = re.compile(
    r"(torch|torchvision|triton|nvidia-.*|cuda-.*|sympy|mpmath|networkx|numpy|pandas|pyarrow|scipy|scikit-learn|"
    r"matplotlib|contourpy|fonttools|kiwisolver|pillow|hf-xet|convllava-hf)"
)
LARGEST = 50 * 2**20  # bytes, all wheels together
GLIBC = range(5, 40)  # minor versions: pip compares platforms exactly


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write; replaced if it is there")
    parser.add_argument("--python", default="3.12", help="version of Python on the machine (%(default)s)")
    parser.add_argument("--torch", default="2.11.0", help="version of torch on the machine (%(default)s)")
    parser.add_argument("--cuda", default="130", help="whose library of bitsandbytes to keep (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-bundle-") as scratch:
        wanted = resolve(arguments.python, arguments.torch, Path(scratch))
        wheels = Path(scratch) / "wheels"
        pip("download", "--no-deps", "--dest", wheels, *platform(arguments.python), *wanted)
        for wheel in wheels.glob("bitsandbytes-*.whl"):
            keep_libraries(wheel, arguments.cuda)
        size = sum(wheel.stat().st_size for wheel in wheels.iterdir())
        if size > LARGEST:
            sys.exit(
                f"The wheels take {size / 2**20:.1f} MiB, and {LARGEST / 2**20:.0f} are the limit: extend PRESENT."
            )
        if arguments.folder.exists():
            shutil.rmtree(arguments.folder)
        shutil.copytree(wheels, arguments.folder)
    print(f"{len(wanted)} wheels, {size / 2**20:.1f} MiB, in {arguments.folder}")
    return 0


def resolve(python: str, torch: str, scratch: Path) -> list[str]:
    """`NAME==VERSION` of what is to be downloaded."""
    report = scratch / "report.json"
    pip(
        *("install", "--dry-run", "--ignore-installed", "--report", report, "--target", scratch / "target"),
        *platform(python),
        *(f"{ROOT}[{EXTRAS}]", f"torch=={torch}", "pytest-xdist"),
    )
    packages = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    names = {re.sub(r"[-_.]+", "-", package["name"]).lower(): package["version"] for package in packages}
    return [f"{name}=={version}" for name, version in sorted(names.items()) if not PRESENT.fullmatch(name)]


def platform(python: str) -> list[str]:
    tags = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64", "any"]
    options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    return options + [f"--platform={tag}" for tag in tags]


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q", *map(str, arguments)]
    subprocess.run(command, check=True)


def keep_libraries(wheel: Path, cuda: str) -> None:
    """Writes a wheel again without the libraries for other versions of CUDA, and for ROCm and XPU."""
    library = re.compile(r".*/libbitsandbytes_(\w+)\.(so|dll|dylib)")
    kept, record = {}, ""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            found = library.fullmatch(name)
            if name.endswith(".dist-info/RECORD"):
                record = name
            elif not found or found[1] in (f"cuda{cuda}", "cpu"):
                kept[name] = archive.read(name)
    if not any(name.endswith(f"libbitsandbytes_cuda{cuda}.so") for name in kept):
        sys.exit(f"{wheel.name} has no library for CUDA {cuda}.")
    lines = [f"{name},sha256={digest(data)},{len(data)}" for name, data in kept.items()] + [f"{record},,", ""]
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**kept, record: "\n".join(lines).encode()}.items():
            archive.writestr(name, data)


def digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    sys.exit(main())
