"""Build the container image with whatever builds images here, and run a session in it as it is meant to be run.

With podman, docker or buildah; `make image` calls it. `--base debian` makes the base image of Debian's packages by
debootstrap, as root, where no registry of images is reached. `--check MODEL.stepwell` runs the image with a read-only root
file system, as its own user and without capabilities, and steps a session there. buildah alone cannot run it so: as root
this does it by itself, in a mount namespace.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILDERS = ("podman", "docker", "buildah")
BASE = "localhost/stepwell-base:trixie"
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
VOLUMES = ("/var/lib/stepwell", "/var/cache/stepwell")
"""Where the image writes."""
USER = "10001"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TIMEOUT_S = 120.0


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--builder", choices=BUILDERS, help="default: the first that is installed")
    parser.add_argument("--tag", default="stepwell", help="name of the image; default: stepwell")
    parser.add_argument("--base", choices=["python", "debian"], default="python")
    parser.add_argument("--check", metavar="MODEL.stepwell", type=Path, help="step a session in the image")
    parser.add_argument("--only-check", action="store_true", help="the image is there: do not build it")
    parser.add_argument("--print", action="store_true", dest="prints", help="print the commands alone")
    parser.add_argument(
        "options", nargs="*", help="more options of the build, after --: --build-arg NATIVE=no"
    )
    arguments = parser.parse_args()
    builder = arguments.builder or next(filter(shutil.which, BUILDERS), None)
    if builder is None:
        print(
            "nothing builds images here; on Debian, as root: apt-get install podman, or buildah and netavark"
        )
        return 1
    commands = (
        [] if arguments.only_check else build(builder, arguments.tag, arguments.base, arguments.options)
    )
    if arguments.prints:
        print("\n".join(" ".join(command) for command in commands))
        return 0
    if arguments.base == "debian" and not arguments.only_check:
        make_base(builder)
    for command in commands:
        subprocess.run(command, cwd=ROOT, check=True)
    if arguments.check is not None:
        check(builder, arguments.tag, arguments.check.resolve())
    return 0


def build(builder: str, tag: str, base: str, options: Sequence[str]) -> list[list[str]]:
    """The commands that build the image."""
    command = [builder, *(["build"] if builder != "buildah" else [*storage(), "bud", *isolation()])]
    if base == "debian":
        command += ["--build-arg", f"PYTHON={BASE}"]
    certificates = Path(os.environ.get("SSL_CERT_FILE", ""))
    if builder != "docker" and certificates.is_file():  # of a network that has authorities of its own
        command += ["--volume", f"{certificates}:/etc/ssl/certs/ca-certificates.crt:ro"]
    # the image's health check is of Docker's format alone
    command += ["--format", "docker"] if builder != "docker" else []
    return [[*command, *options, "--tag", tag, "--file", "deploy/Containerfile", "."]]


def storage() -> list[str]:
    """How buildah keeps images: as plain folders, which works everywhere."""
    return ["--storage-driver", "vfs"]


def isolation() -> list[str]:
    """How buildah runs steps: by chroot, which needs no namespaces, and with the limits that there are."""
    import resource

    limits = []
    for name, which in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        _, hard = resource.getrlimit(which)
        limits += ["--ulimit", f"{name}={hard}:{hard}"]
    return ["--isolation", "chroot", "--network", "host", *limits]


def make_base(builder: str) -> None:
    """Make the base image of Debian's packages."""
    with tempfile.TemporaryDirectory(prefix="stepwell-base-") as folder:
        root, packed = Path(folder) / "root", Path(folder) / "root.tar"
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "trixie", str(root)], check=True
        )
        (root / "usr/bin/python").symlink_to("python3")
        subprocess.run(["tar", "-C", str(root), "-cf", str(packed), "."], check=True)
        if builder != "buildah":
            subprocess.run(
                [builder, "import", "--change", f"ENV PATH={_PATH}", str(packed), BASE], check=True
            )
            return
        buildah = ["buildah", *storage()]
        made = output([*buildah, "from", "scratch"])
        subprocess.run([*buildah, "add", "--quiet", made, str(packed), "/"], check=True)
        subprocess.run([*buildah, "config", "--env", f"PATH={_PATH}", made], check=True)
        subprocess.run([*buildah, "commit", "--quiet", "--rm", made, BASE], check=True)


def check(builder: str, tag: str, model: Path) -> None:
    """Run the image as it is meant to be run, and step a session in it.

    Raises:
        RuntimeError: it does not serve.
    """
    with tempfile.TemporaryDirectory(prefix="stepwell-image-") as folder:
        shared = Path(folder) / "model"
        shared.mkdir()
        shutil.copy(model, shared / "m.stepwell")
        shared.chmod(0o755)
        (shared / "m.stepwell").chmod(0o644)
        arguments = ["serve", "m=/model/m.stepwell", "--listen", "127.0.0.1:0", "--metrics-listen", "off"]
        with run(builder, tag, shared, arguments) as server:
            address = ""
            assert server.stdout is not None
            for line in server.stdout:
                print(line, end="")
                if "listening on " in line and line.startswith("stepwell: "):
                    address = line.rpartition(" ")[2].strip()
                    break
            if not address:
                raise RuntimeError("the image does not serve, see above")
            step(address)
    print(f"{tag}: a session was stepped, with a read-only root file system and as user {USER}")


def step(address: str) -> None:
    """Open a session, step it, look at its state, close it."""
    import numpy as np

    import stepwell

    with stepwell.connect(address, timeout_s=_TIMEOUT_S) as client, client.open_session("m") as session:
        inputs = {
            each.name: np.zeros((1, *(size or 1 for size in each.shape)), each.dtype)
            for each in client.model("m").inputs
        }
        session.step(inputs)
        assert session.get_state().revision == 1


@contextlib.contextmanager
def run(builder: str, tag: str, model: Path, arguments: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """The image as a process: read-only, without capabilities, with the network of this machine."""
    if builder == "buildah":
        with mounted(tag) as (root, environment):
            command = ["unshare", "--mount", "sh", "-euc"]
            command += [_script(root, model, environment, ["stepwell", *arguments])]
            with process(command) as server:
                yield server
        return
    command = [builder, "run", "--rm", "--read-only", "--cap-drop", "all", "--network", "host"]
    command += ["--security-opt", "no-new-privileges", "--volume", f"{model}:/model:ro"]
    with process([*command, tag, *arguments]) as server:
        yield server


@contextlib.contextmanager
def process(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended with the block."""
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield server
    finally:
        server.terminate()
        server.communicate(timeout=_TIMEOUT_S)


@contextlib.contextmanager
def mounted(tag: str) -> Iterator[tuple[str, list[str]]]:
    """The image's files, and its environment."""
    buildah = ["buildah", *storage()]
    made = output([*buildah, "from", tag])
    try:
        said = json.loads(output([*buildah, "inspect", "--type", "image", tag]))
        environment: list[str] = said["OCIv1"]["config"]["Env"]
        assert said["OCIv1"]["config"]["User"].split(":")[0] == USER
        yield output([*buildah, "mount", made]), environment
    finally:
        subprocess.run([*buildah, "rm", made], check=True, stdout=subprocess.DEVNULL)


def _script(root: str, model: Path, environment: Sequence[str], command: Sequence[str]) -> str:
    """What a shell does in a mount namespace of its own: a read-only root, two volumes, the model, another user."""
    lines = [f"mount --bind '{root}' '{root}'"]
    lines += [f"mount -t tmpfs -o uid={USER},gid={USER},mode=0700 none '{root}{each}'" for each in VOLUMES]
    lines += [f"mkdir -p '{root}/model'", f"mount --bind '{model}' '{root}/model'"]
    lines += [f"mount -t proc none '{root}/proc'", f"mount --rbind /dev '{root}/dev'"]
    lines += [f"mount -o remount,bind,ro '{root}/model'", f"mount -o remount,bind,ro '{root}'"]
    become = f"setpriv --reuid {USER} --regid {USER} --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all"
    said = " ".join(f"'{each}'" for each in environment)
    asked = " ".join(f"'{each}'" for each in command)
    lines.append(f"exec chroot '{root}' /usr/bin/{become} env -i {said} {asked}")
    return "\n".join(lines)


def output(command: Sequence[str]) -> str:
    """What a command says."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
