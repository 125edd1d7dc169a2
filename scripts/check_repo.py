"""Check what no other tool checks: that documents and code agree, and that every file keeps the project's rules.

Each rule is a function that yields one line per finding. The script prints them all and exits 1 if there is any.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import repository
from repository import documents, text_of, tracked_files
from wrap_documents import wrapped

MAX_MODULE_LINES = 800
GENERATED = ("client/stepwell/v1/", "server/stepwell_server/rpc/triton/inference/")
LOCK_FILES = {"uv.lock", "poetry.lock", "pdm.lock", "package-lock.json", "yarn.lock", "pnpm-lock.yaml"}
#: It has versions and hashes and no addresses: console/.npmrc has npm leave them out.
LOCK_FILE_OF_THE_CONSOLE = "console/package-lock.json"
REGISTRY_HOSTS = re.compile(
    r"pypi\.org|pythonhosted\.org|registry\.npmjs\.org|[-]-(?:extra-)?index-url|\"resolved\": \"http|/simple/?['\"\s]"
)
PATH_IN_DOCUMENT = re.compile(r"`([\w.-]+(?:/[\w.-]+)+/?|[\w-]+/)`|\]\((?!https?:|#|mailto:)([^)#\s]+)")
FOLDERS_OF_PACKAGES = ("", "client/stepwell", "server/stepwell_server", "tests")
MAKE_OPTIONS = ("", "-o .venv/.installed ")
#: Not those of other programs by their spelling: --python_out, --outDir.
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-])")
OPTIONS_OF_OTHERS = {
    f"--{name}"
    for name in [
        "base",
        "build-arg",
        "cap-drop",
        "check",
        "enums",
        "fail",
        "frame",
        "longs",
        "losses",
        "now",
        "pipe",
        "publish",
        "raise",
        "read-only",
        "security-opt",
        "seed",
        "since",
        "steps-per-s",
        "tag",
        "tmpfs",
        "trace",
        "units",
        "update",
        "volume",
        "wait",
    ]
}
"""Those of programs of others, and of scripts, that documents name."""
COMMANDS = "docs/surface/commands.txt"
VARIABLE = re.compile(r"\bSTEPWELL_[A-Z0-9_]+\b")


def modules() -> list[str]:
    """Return the Python files that people write."""
    return [name for name in tracked_files() if name.endswith(".py") and not name.startswith(GENERATED)]


def lines_matching(name: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line of a file that matches."""
    for number, line in enumerate(text_of(name).splitlines(), 1):
        if pattern.search(line):
            yield number, line.strip()


def module_length() -> Iterator[str]:
    """A module past 800 lines has taken on a second job."""
    for name in modules():
        lines = len(text_of(name).splitlines())
        if lines > MAX_MODULE_LINES:
            yield f"{name}: {lines} lines, {MAX_MODULE_LINES} at most"


def modules_say_what_they_hold() -> Iterator[str]:
    """A module begins with a docstring: ruff asks for it everywhere but in tests."""
    for name in modules():
        if text_of(name).strip() and ast.get_docstring(ast.parse(text_of(name))) is None:
            yield f"{name}: must begin with a docstring that says what it holds"


def no_lock_files() -> Iterator[str]:
    """Lock files name a package registry's host; constraints.txt holds the versions."""
    for name in tracked_files():
        if name == LOCK_FILE_OF_THE_CONSOLE:
            if '"resolved"' in text_of(name):
                yield f"{name}: names where packages come from: run npm in its folder, whose .npmrc forbids it"
        elif Path(name).name in LOCK_FILES:
            yield f"{name}: lock files are not committed, constraints.txt holds the versions"


def no_registry_hosts() -> Iterator[str]:
    """Which registry or mirror is used is the affair of each machine."""
    for name in tracked_files():
        for number, line in lines_matching(name, REGISTRY_HOSTS):
            yield f"{name}:{number}: names a package registry: {line[:80]}"


def no_machine_paths() -> Iterator[str]:
    """A path of the machine it was written on is of no use elsewhere."""
    folders = {repository.ROOT.parent, Path.home()}
    # A checkout right under a common folder (/tmp, /home) says nothing about the paths below that.
    shared = {Path("/"), Path("/tmp"), Path("/home"), Path("/usr"), Path("/opt"), Path("/var"), Path("/srv")}  # noqa: S108
    wanted = [re.escape(f"{folder}/") for folder in sorted(folders - shared)]
    if not wanted:
        return
    pattern = re.compile("|".join(wanted))
    for name in tracked_files():
        for number, line in lines_matching(name, pattern):
            yield f"{name}:{number}: holds a path of this machine: {line[:80]}"


def constraints_are_exact() -> Iterator[str]:
    """Every line of the constraints is name==version."""
    for name in (
        "constraints.txt",
        "constraints-gen.txt",
        "constraints-release.txt",
        "constraints-triton.txt",
    ):
        for number, line in enumerate(text_of(name).splitlines(), 1):
            if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line):
                yield f"{name}:{number}: not name==version: {line}"


def documents_name_real_paths() -> Iterator[str]:
    """A path in backticks or in a link of a document exists, seen from the root, a package or the document.

    Modules may be named without their suffix.
    """
    for name in documents():
        places = [repository.ROOT / name, *(repository.ROOT / folder / "x" for folder in FOLDERS_OF_PACKAGES)]
        for match in PATH_IN_DOCUMENT.finditer(text_of(name)):
            path = match[1] or match[2]
            if match[1] and not is_path(path):
                continue
            if path.split("/")[0] not in repository.MADE_AT_RUN_TIME and not any(
                (at.parent / one).exists() for at in places for one in (path, f"{path}.py")
            ):
                yield f"{name}: names {path}, which is not there"


def is_path(text: str) -> bool:
    """Tell a path of this repository from other words with a slash."""
    first = text.split("/", maxsplit=1)[0]
    return (
        text.endswith("/")
        or Path(text).suffix in {".py", ".proto", ".md", ".toml", ".txt", ".yaml"}
        or (repository.ROOT / first).is_dir()
    )


def documents_name_real_targets() -> Iterator[str]:
    """Every `make target` of a document is in the Makefile."""
    targets = makefile_targets()
    for name in documents():
        for target in re.findall(r"(?:`|^\$? *)make ([a-z][a-z-]*)", text_of(name), re.MULTILINE):
            if target not in targets:
                yield f"{name}: names `make {target}`, which the Makefile does not have"


def changelog_has_the_version() -> Iterator[str]:
    """The changelog's newest version is the distribution's."""
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    newest = re.search(r"^## \[(\d[^\]]*)\]", text_of("CHANGELOG.md"), re.MULTILINE)
    if newest is None or newest[1] != version:
        came = newest[1] if newest else "none"
        yield f"CHANGELOG.md: newest version must be {version}, as in pyproject.toml; is {came}"


def environment_variables_are_documented() -> Iterator[str]:
    """Every variable that the server reads is in a document, and no document names another."""
    from stepwell_server.cli.serve import SETTINGS

    read = {setting.variable for setting in SETTINGS}
    for name in modules():
        if name.startswith(("client/", "server/")):
            read.update(VARIABLE.findall(text_of(name)))
    # the pages of commands and settings are made from the code that commands.txt mirrors
    names = [*documents(), *(name for name in tracked_files() if name == COMMANDS)]
    documented = {variable: name for name in names for variable in VARIABLE.findall(text_of(name))}
    for variable in sorted(read - documented.keys()):
        yield f"{variable}: is read, and no document names it"
    # the switches of the tests and of make's targets, for developers
    for name in ("tests/support/secured.py", "scripts/apt_get.py"):
        read.update(VARIABLE.findall(text_of(name)))
    for variable in sorted(documented.keys() - read):
        yield f"{documented[variable]}: names {variable}, which nothing reads"


def documents_name_real_options() -> Iterator[str]:
    """Every option in a document is one of `stepwell`'s, which docs/surface/commands.txt has, or of another program."""
    known = set(OPTION.findall(text_of(COMMANDS))) | OPTIONS_OF_OTHERS
    for name in documents():
        if name != "CHANGELOG.md":  # names what was removed
            for option in sorted(set(OPTION.findall(text_of(name))) - known):
                yield f"{name}: names the option {option}, which no command has"


def architecture_has_each_room() -> Iterator[str]:
    """The map has a line for each folder of the client, and for two levels of folders of the server."""
    rows = set(re.findall(r"^\| `([\w/]+)` \|", text_of("ARCHITECTURE.md"), re.MULTILINE))
    for package, depth in (("client/stepwell/", 1), ("server/stepwell_server/", 2)):
        folders = [name[len(package) :].split("/")[:-1] for name in modules() if name.startswith(package)]
        rooms = {"/".join(parts[:depth]) for parts in folders if parts}
        for room in sorted(rooms - rows):
            yield f"ARCHITECTURE.md: has no line for {package}{room}"


def documents_are_wrapped() -> Iterator[str]:
    """Prose of documents has at most 100 columns, so that changes of it can be read."""
    for name in documents():
        if wrapped(text_of(name)) != text_of(name):
            yield f"{name}: has lines of prose over 100 columns: run `make format`"


def makefile_targets() -> set[str]:
    """Return the targets of the Makefile."""
    return set(re.findall(r"^([a-z][a-z-]*):", text_of("Makefile"), re.MULTILINE))


def commands_are_make_targets() -> Iterator[str]:
    """CI and the commit hooks run what everybody runs, by its name: what they did themselves would drift."""
    for name in tracked_files():
        if name.startswith(".github/workflows/"):
            allowed, key = {".ci/run"}, r"run"
        elif name == ".pre-commit-config.yaml":
            allowed, key = set(), r"entry"
            for repository in re.findall(r"- repo: *(.*)", text_of(name)):
                if repository != "local":
                    yield f"{name}: hooks must be local, make targets; got those of {repository}"
        else:
            continue
        allowed |= {f"make {option}{target}" for target in makefile_targets() for option in MAKE_OPTIONS}
        for command in re.findall(rf"^ *(?:- )?{key}: *(.*?) *(?:#.*)?$", text_of(name), re.MULTILINE):
            if command not in allowed:
                yield f"{name}: runs {command!r}; must be a make target" + (" or .ci/run" * (key == "run"))


def python_versions_agree() -> Iterator[str]:
    """The versions of Python that are allowed, named, found by make and tried by CI are the same."""
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    bounds = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"])
    if bounds is None:
        yield f"pyproject.toml: requires-python must be >=3.X,<3.Y; is {project['requires-python']}"
        return
    allowed = [f"3.{minor}" for minor in range(int(bounds[1]), int(bounds[2]))]
    classifiers = "\n".join(project.get("classifiers", []))
    supported = re.search(r"\(3, (\d+)\) <= .* <= \(3, (\d+)\)", text_of("Makefile"))
    found = {
        "pyproject.toml: classifiers": re.findall(r"Python :: (3\.\d+)$", classifiers, re.MULTILINE),
        "Makefile: SUPPORTED": [f"3.{n}" for n in range(int(supported[1]), int(supported[2]) + 1)]
        if supported
        else [],
    }
    for name in tracked_files():
        if name.startswith(".github/workflows/"):
            found[name] = re.findall(r"\"(3\.\d+)\"", text_of(name))
    for where, versions in found.items():
        if versions != allowed:
            yield f"{where}: must be Python {allowed}, as requires-python says; is {versions}"


def files_keep_the_editorconfig() -> Iterator[str]:
    """What .editorconfig asks of editors, and no formatter sees to in every kind of file."""
    for name in tracked_files():
        text = text_of(name)
        if text and not text.endswith("\n"):
            yield f"{name}: must end with a line break"
        for number, line in lines_matching(name, re.compile(r"[ \t]$")):
            yield f"{name}:{number}: has spaces at its end: {line[:80]}"
        if "\r" in text:
            yield f"{name}: must end its lines with LF"
        if name != "Makefile" and "\t" in text:
            yield f"{name}: has tabs"


RULES = (
    module_length,
    modules_say_what_they_hold,
    commands_are_make_targets,
    python_versions_agree,
    files_keep_the_editorconfig,
    no_lock_files,
    no_registry_hosts,
    no_machine_paths,
    constraints_are_exact,
    documents_name_real_paths,
    documents_name_real_targets,
    architecture_has_each_room,
    documents_are_wrapped,
    documents_name_real_options,
    changelog_has_the_version,
    environment_variables_are_documented,
)


def main() -> int:
    """Run every rule."""
    findings = [f"{line}  [{rule.__name__}]" for rule in RULES for line in rule()]
    for line in findings:
        print(line)
    print(f"{len(RULES)} rules, {len(tracked_files())} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
