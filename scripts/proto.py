"""Generate the Python code of the protocols under proto/.

    python scripts/proto.py           write it
    python scripts/proto.py --check   write nothing; fail and name the files that are not what it would write

The path of a .proto file is its protobuf package. For our own protocol it is the Python package of its code too, so
that the generated imports are right as they are. The protocol of others that the server speaks, `inference`, goes
into the server (see `PACKAGES`). The generator has an environment of its own, .tools/gen, made on first use: its dependencies
(group `gen` in pyproject.toml) cannot live beside the run-time ones. This script itself needs only Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

from tools import environment

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"


@dataclasses.dataclass(frozen=True)
class Package:
    """Where the code of one folder of proto/ goes, and what is made of it."""

    source: str
    """The folder, relative to proto/."""
    root: Path
    """The code of `a/b.proto` goes to `a/` under this folder, relative to the repository."""
    kinds: tuple[str, ...]
    """Plug-ins of protoc."""
    is_private: bool = False
    """Its messages get a descriptor pool of their own, and so can be there twice in a process."""

    @property
    def sources(self) -> list[Path]:
        """The .proto files, relative to proto/."""
        return sorted(path.relative_to(PROTO) for path in (PROTO / self.source).rglob("*.proto"))

    @property
    def folders(self) -> list[Path]:
        """Folders of the code, relative to the repository."""
        return sorted({self.root / path.parent for path in self.sources})


PACKAGES = (
    Package("stepwell", Path("client"), ("python", "mypy", "grpc_python", "mypy_grpc")),
    # Its clients bring messages of the same names, and a pool refuses a name that it has already.
    Package("inference", Path("server/stepwell_server/rpc/triton"), ("python", "mypy"), is_private=True),
)
COMMENTS = Path("server/stepwell_server/rpc/http/comments.json")
"""The comments of our own protocol by full name, for the OpenAPI document: descriptors in Python have none."""
COMMON_POOL = "_descriptor_pool.Default()"
OWN_POOL = "_descriptor_pool.DescriptorPool()"


def generate(target: Path) -> None:
    """Write the code of every package under `target`, with an empty __init__.py in each of its folders."""
    programs = environment("gen")
    for package in PACKAGES:
        root = target / package.root
        root.mkdir(parents=True, exist_ok=True)
        outputs = [f"--{kind}_out={root}" for kind in package.kinds]
        # The plug-ins of the environment come first on the PATH that protoc searches.
        subprocess.run(
            [
                programs / "python",
                "-m",
                "grpc_tools.protoc",
                f"--proto_path={PROTO}",
                *outputs,
                *map(str, package.sources),
            ],
            check=True,
            stderr=subprocess.PIPE,
            env={"PATH": f"{programs}:/usr/bin:/bin"},
        )
        for folder in package.folders:
            (target / folder / "__init__.py").touch()
            if package.is_private:
                use_own_pool(target / folder)

    write_comments(programs / "python", target)


def write_comments(python: Path, target: Path) -> None:
    """Write the comments of our own protocol."""
    with tempfile.TemporaryDirectory() as folder:
        described = Path(folder) / "descriptors"
        sources = [str(source) for source in PACKAGES[0].sources]
        options = [f"--proto_path={PROTO}", "--include_source_info", f"--descriptor_set_out={described}"]
        subprocess.run([python, "-m", "grpc_tools.protoc", *options, *sources], check=True)
        command = [python, Path(__file__).with_name("proto_comments.py"), described]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    (target / COMMENTS).parent.mkdir(parents=True, exist_ok=True)
    (target / COMMENTS).write_bytes(found)


def use_own_pool(folder: Path) -> None:
    """Let each module of a folder register its messages in a pool of its own."""
    for path in folder.glob("*_pb2.py"):
        code = path.read_text()
        if code.count(COMMON_POOL) != 1:
            raise SystemExit(f"{path.name}: {COMMON_POOL} must be there once, to be replaced")
        path.write_text(code.replace(COMMON_POOL, OWN_POOL))


def generated_files(root: Path) -> dict[Path, bytes]:
    """Return the generated files under `root`: all there is in the folders of the packages."""
    paths = [
        path for package in PACKAGES for folder in package.folders for path in (root / folder).glob("*.py*")
    ]
    paths += [root / COMMENTS] if (root / COMMENTS).exists() else []
    return {path.relative_to(root): path.read_bytes() for path in paths}


def differences() -> list[str]:
    """Return one line for each generated file that is not what the protocol says."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        wanted = generated_files(Path(folder))
    present = generated_files(ROOT)
    return [
        f"{path}: {'missing' if path not in present else 'no source' if path not in wanted else 'stale'}"
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
    for package in PACKAGES:
        for folder in package.folders:
            for path in (ROOT / folder).glob("*_pb2*.py*"):
                path.unlink()
    generate(ROOT)
    for package in PACKAGES:
        print(f"Generated the code of {len(package.sources)} .proto files under {package.root}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
