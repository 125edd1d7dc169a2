"""Generate the Python code under client/ from the protocol under proto/.

    python scripts/proto.py           write it
    python scripts/proto.py --check   write nothing; fail and name the files that are not what it would write

The path of a .proto file is its protobuf package and the Python package of its code, so that the generated imports
are right as they are. The generator has an environment of its own, .tools/gen, made on first use: its dependencies
(group `gen` in pyproject.toml) cannot live beside the run-time ones. This script itself needs only Python.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
GENERATED = ROOT / "client"
ENVIRONMENT = ROOT / ".tools" / "gen"
CONSTRAINTS = ROOT / "constraints-gen.txt"


def generator_python() -> Path:
    """Return the interpreter of the generator's environment, made anew when its requirements changed."""
    requirements: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["gen"]
    wanted = hashlib.sha256(repr(requirements).encode() + CONSTRAINTS.read_bytes()).hexdigest()
    python = ENVIRONMENT / "bin" / "python"
    stamp = ENVIRONMENT / "requirements.sha256"
    if not (python.exists() and stamp.exists() and stamp.read_text() == wanted):
        print(f"Making the generator's environment in {ENVIRONMENT.relative_to(ROOT)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--constraint", str(CONSTRAINTS), *requirements], check=True)
        stamp.write_text(wanted)
    return python


def sources() -> list[Path]:
    """Return the .proto files, relative to proto/."""
    return sorted(path.relative_to(PROTO) for path in PROTO.rglob("*.proto"))


def generate(target: Path) -> None:
    """Write the code of every .proto file under `target`, with an empty __init__.py in each of its packages."""
    target.mkdir(parents=True, exist_ok=True)
    outputs = [f"--{kind}_out={target}" for kind in ("python", "mypy", "grpc_python", "mypy_grpc")]
    python = generator_python()
    # The plug-ins of the environment come first on the PATH that protoc searches.
    subprocess.run(
        [python, "-m", "grpc_tools.protoc", f"--proto_path={PROTO}", *outputs, *map(str, sources())],
        check=True,
        stderr=subprocess.PIPE,
        env={"PATH": f"{python.parent}:/usr/bin:/bin"},
    )
    for package in {path.parent for path in sources()}:
        (target / package / "__init__.py").touch()


def generated_files(root: Path) -> dict[Path, bytes]:
    """Return the generated files under `root`: all there is in the packages of the .proto files."""
    found: dict[Path, bytes] = {}
    for package in {path.parent for path in sources()}:
        for path in (root / package).glob("*.py*"):
            found[path.relative_to(root)] = path.read_bytes()
    return found


def differences() -> list[str]:
    """Return one line for each generated file that is not what the protocol says."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        wanted = generated_files(Path(folder))
    present = generated_files(GENERATED)
    return [
        f"client/{path}: {'missing' if path not in present else 'no source' if path not in wanted else 'stale'}"
        for path in sorted(wanted.keys() | present.keys())
        if wanted.get(path) != present.get(path)
    ]


def main() -> int:
    """Generate, or check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if anything differs")
    if parser.parse_args().check:
        lines = differences()
        for line in lines:
            print(line)
        if lines:
            print("Generated code is not fresh. Run `make proto`.")
        return 1 if lines else 0
    for package in {path.parent for path in sources()}:
        for path in (GENERATED / package).glob("*_pb2*.py*"):
            path.unlink()
    generate(GENERATED)
    print(f"Generated the code of {len(sources())} .proto files under {GENERATED.relative_to(ROOT)}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
