"""The compiling process: ``python -m stepwell_server.compile MODEL PROGRAM [--import MODULE]...``.

With ``--compare`` it holds the program that is in PROGRAM already against Keras instead.

It speaks JSON lines on what was its standard output: ``{"protection": ...}``, which the kernel gives (`sandbox`),
``{"stage": ...}`` as each stage begins, then
``{"done": ...}``, true or the comparison, or ``{"error": ..., "kind": ...}``. Whatever else prints lands on
standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepwell_server import program_file
from stepwell_server.compile import limits, sandbox
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.unexpected import failure
from stepwell_server.program import ProofOptions

Speak = Callable[[dict[str, Any]], None]


def main() -> int:
    """Compile one model; returns the exit code: 0, or 2 for a model that cannot be served."""
    speak = _protocol()
    parser = argparse.ArgumentParser(prog="python -m stepwell_server.compile")
    parser.add_argument("model", type=Path)
    parser.add_argument("program", type=Path)
    parser.add_argument("--import", dest="imports", action="append", default=[])
    parser.add_argument("--steps", type=int, help="time steps to compare over")
    parser.add_argument("--trust", action="store_true", help="also where the graph proves too little")
    parser.add_argument("--compare", action="store_true", help="compare the program in PROGRAM with Keras")
    parser.add_argument(
        "--data", type=Path, help="sequences to compare on, or to look at before the model is compiled"
    )
    parser.add_argument("--max-model-bytes", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    arguments = parser.parse_args()
    if arguments.imports and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    protection = _protected(arguments)
    speak({"protection": str(protection), "missing": protection.missing})
    try:
        done = _work(arguments, speak)
    except ModelError as error:
        speak({"error": str(error), "kind": type(error).__name__, "details": error.details})
        return 2
    # SystemExit: a user's module may call sys.exit().
    except (Exception, SystemExit) as error:
        told = failure(arguments.model, error)
        speak({"error": str(told), "kind": type(told).__name__, "details": told.details})
        return 2
    speak({"done": done})
    return 0


def _protected(arguments: argparse.Namespace) -> sandbox.Protection:
    """Give up all that compiling does not need. What modules of the operator's read, nobody knows: they may read all."""
    sandbox.limit(
        arguments.timeout_s, limits.Limits(arguments.max_model_bytes).disk_bytes, os.cpu_count() or 1
    )
    readable = [arguments.model, arguments.program, *([arguments.data] if arguments.data else [])]
    readable += [Path(entry) for entry in sys.path if entry]
    writable = [Path(os.environ["TMPDIR"]), arguments.program.parent]
    return sandbox.enter(None if arguments.imports else readable, writable)


def _work(arguments: argparse.Namespace, speak: Speak) -> Any:
    """Compile, or compare; return what is said of it when it is done."""
    speak({"stage": "load"})
    from stepwell_server.compile.sizes import check_sizes  # brings HDF5

    check_sizes(arguments.model, arguments.max_model_bytes)
    # After the protocol is safe: loading TensorFlow prints.
    if arguments.compare:
        from stepwell_server.compile.own_data import compare
        from stepwell_server.compile.pipeline import import_modules

        import_modules(arguments.imports)
        program = program_file.load(arguments.program, sys.maxsize, is_own=True)
        return compare(arguments.model, program, arguments.data).to_json()
    from stepwell_server.compile.pipeline import compile_model

    program = compile_model(
        arguments.model,
        arguments.imports,
        lambda stage: speak({"stage": stage}) if stage != "load" else None,
        ProofOptions(arguments.steps, arguments.trust),
        arguments.data,
    )
    program_file.save(program, arguments.program)
    return True


def _protocol() -> Speak:
    """Keep standard output for messages, and send all that others print to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def speak(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    return speak


if __name__ == "__main__":
    sys.exit(main())
