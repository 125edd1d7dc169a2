"""Two builds side by side: `make against ARGS="--programs 200 --malformed 20000 --seed 7"`.

Serves the wheels of a commit, the base, and this tree, and sends the same requests to both: programs of calls on sessions
(with retries, reused request ids, wrong revisions, restarts), then malformed messages. Both fronts, in memory and on disk.
Each answer must be the same: status, reason, text, revision, position, the bytes of outputs and states, all other fields.
What may differ is in `answers.py` (random or from the clock) and in `wanted.toml` (on purpose). Everything else is
printed, and the exit code is 1. The same seed gives the same report.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

from against import builds, differences, programs
from against.builds import Build
from against.malformed_calls import send_malformed
from against.pair import BuiltServer, Pair, progress
from support.models import programs as models
from support.servers import both_fronts, served, server_process

STORES = ("memory", "disk")
MODELS = ("seq", "tokens", "multi")
RESTART_EVERY = 5
"""Programs, of which one has a restart in its middle."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--programs", type=int, default=60, help="for each front and store (default: 60)")
    parser.add_argument(
        "--malformed", type=int, default=4000, help="messages for each front and store (default: 4000)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of everything that is drawn (default: 1)")
    parser.add_argument("--front", choices=both_fronts.FRONTS, help="only this front")
    parser.add_argument("--store", choices=STORES, help="only this store")
    options = parser.parse_args(arguments)
    for name in [name for name in os.environ if name.startswith("STEPWELL_")]:
        del os.environ[name]  # settings of servers
    try:
        base = builds.of_commit(options.base, _say)
        report = differences.Report(differences.wanted())
    except (builds.BuildError, differences.WantedError) as error:
        print(error, file=sys.stderr)
        return 2
    tree = builds.of_tree()
    print(f"base: {base.name}, seed {options.seed}")
    for front in [options.front] if options.front else both_fronts.FRONTS:
        if front not in base.fronts or front not in tree.fronts:
            report.notes.append(f"the {front} front was not compared: not both builds have it")
            continue
        for store in [options.store] if options.store else STORES:
            with _pair(front, store, (base, tree), report, options.seed) as pair:
                _compare(pair, options)
    print("\n".join(report.lines()))
    return 0 if report.is_good else 1


def _compare(pair: Pair, options: argparse.Namespace) -> None:
    drawn = programs.with_restarts(programs.draw(options.programs, options.seed, MODELS), RESTART_EVERY)
    for program in progress(drawn, _say, pair.label):
        pair.play(program)
    pair.restart(is_killed=False)  # a program may have unloaded the model that malformed messages name
    send_malformed(pair, options.malformed, options.seed, _say)


@contextlib.contextmanager
def _pair(
    front: str, store: str, both: Sequence[Build], report: differences.Report, seed: int
) -> Iterator[Pair]:
    served_models = _models()
    with tempfile.TemporaryDirectory(prefix="stepwell-against-") as folder:
        made = []
        for number, build in enumerate(both):
            data_dir = Path(folder, str(number)) if store == "disk" else None
            durability = ["--durability", "sync"] if store == "disk" else []
            caches = build.cache_dir or models.cache_dir()
            options = ["--front", front, "--log-level", "warning", "--max-message-bytes", "1MiB", *durability]
            made.append(BuiltServer(build, served_models, data_dir, caches, *options))
        files = [path for name, path in served_models.items() if "@" in name]
        label = f"{front} front, {store} store"
        with Pair(label, made[0], made[1], report, seed, files) as pair:
            yield pair


def _models() -> Mapping[str, Path]:
    """The files of the models; each build compiles them itself."""
    found = {name: models.saved(served.MODELS[name]).path for name in MODELS[1:]}
    first, second = models.saved(served.MODELS[MODELS[0]]), server_process.retrained()
    return {f"{MODELS[0]}@1": first.path, f"{MODELS[0]}@2": second.path, **found}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
