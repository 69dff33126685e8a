"""Wheel and sdist: built, looked into, installed beside nothing of ours, and used.

The wheel is made from the sdist, so neither may miss a file. The environment they go
into is new and sees the dependencies of the one that runs this (a full download into
an empty one is for .ci/nightly).
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / ".ci" / "smoke.py"


def run(*command: object, where: Path) -> None:
    """Run a command in a directory; its failure is ours."""
    print("+", *command, flush=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([str(c) for c in command], check=True, cwd=where, env=environment)


def check_wheel(wheel: Path) -> None:
    """Refuse a wheel whose files are not the package's in the checkout."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(
        [*listed, "opacus_pi"], check=True, cwd=ROOT, capture_output=True, text=True
    )
    wanted = set(found.stdout.split())
    held = {n for n in ZipFile(wheel).namelist() if n.startswith("opacus_pi/")}
    if held != wanted or "opacus_pi/py.typed" not in held:
        sys.exit(f"{wheel.name}: differs from the checkout in {sorted(held ^ wanted)}")


def new_environment(path: Path) -> Path:
    """A virtual environment that sees this one's packages, and its interpreter."""
    venv.create(path, with_pip=True, symlinks=True)
    python = path / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    )
    # The .pth files of a directory that a .pth file names are not read, so an editable
    # install of this package there does not count.
    here = sysconfig.get_path("purelib")
    (Path(found.stdout.strip()) / "dependencies.pth").write_text(here + "\n")
    return python


def main() -> None:
    """Build both, and use each from an environment of its own."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        built = work / "dist"
        run(sys.executable, "-m", "build", "--outdir", built, ROOT, where=work)
        (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
        check_wheel(wheel)
        for archive in (wheel, sdist):
            python = new_environment(work / archive.suffix.strip("."))
            run(python, "-m", "pip", "install", "-q", "--no-deps", archive, where=work)
            run(python, SMOKE, where=work)
            run(python.with_name("opacus-pi"), "--help", where=work)


if __name__ == "__main__":
    main()
