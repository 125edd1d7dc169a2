"""``stepwell check MODEL.keras``: may it be stepped, and how close is stepping to Keras?"""

from __future__ import annotations

import argparse
import enum
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from stepwell_server.compile.comparison import Comparison, Difference
from stepwell_server.compile.errors import DataError, ModelError
from stepwell_server.compile.launch import compare_with_keras, compile_program
from stepwell_server.program import Program, ProofOptions
from stepwell_server.settings import SettingsError, default_cache_dir, variable_of

#: Lines at most for the time steps of one output.
_RANGES = 16


class Verdict(enum.Enum):
    """What came of a comparison; the value is for people."""

    EQUAL = "stepping it is what Keras computes on these sequences"
    DIFFERS = "stepping it is NOT what Keras computes on these sequences; serve --check-with refuses it"
    INCONCLUSIVE = (
        "nothing can be said of an output, because rounding alone moves Keras's own values too far; give other "
        "sequences with --data"
    )

    @classmethod
    def of(cls, found: Comparison) -> Verdict:
        """Return the verdict on a comparison."""
        if found.worst is not None and not found.worst.is_allowed:
            return cls.DIFFERS
        return cls.EQUAL if found.is_conclusive else cls.INCONCLUSIVE

    def __str__(self) -> str:
        return f"verdict: {self.name.lower()}: {self.value}"


def main(argv: Sequence[str] | None = None, prog: str = "python -m stepwell_server.check") -> int:
    """Check a model and print what came of it.

    Returns:
        The exit code: 0 if it may be stepped and equals Keras, 1 if it differs on the sequences, 2 if it is
        refused or cannot be checked.
    """
    try:
        arguments = _parser(prog).parse_args(argv)
    except SettingsError as error:
        sys.stderr.write(f"stepwell: not checked: {error} ('{prog} --help' shows how)\n")
        return 2
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _check(arguments)
    except KeyboardInterrupt:  # The compiling process was ended on the way here, and its folder removed.
        sys.stderr.write("stepwell: interrupted\n")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _check(arguments: argparse.Namespace) -> int:
    try:
        cache_dir = arguments.cache_dir or _cache_dir()
        options = ProofOptions(arguments.probe_steps, arguments.trust_causality)
        program = compile_program(
            arguments.model, cache_dir, arguments.imports, _progress, options, data=arguments.data
        )
        _progress("compare")
        found = compare_with_keras(arguments.model, program, arguments.data, arguments.imports)
    except DataError as error:
        return _not_done(arguments, "not checked", f"--data: {error}")
    except ModelError as error:
        return _not_done(arguments, "refused", str(error))
    except SettingsError as error:
        return _not_done(arguments, "not checked", str(error))
    except OSError as error:
        return _not_done(arguments, "not checked", f"--cache-dir: {error}")
    verdict = Verdict.of(found)
    if arguments.json:
        sys.stdout.write(json.dumps(_document(program, found, verdict), indent=2) + "\n")
    else:
        sys.stdout.write("\n".join([*_lines(program, found, arguments.data), "", str(verdict)]) + "\n")
    return 0 if verdict is Verdict.EQUAL else 1


def _not_done(arguments: argparse.Namespace, verdict: str, reason: str) -> int:
    """Say why there is nothing to show: in one line, and in the document if one was asked for."""
    sys.stderr.write(f"stepwell: {verdict}: {reason}\n")
    if arguments.json:
        sys.stdout.write(json.dumps({"verdict": verdict, "reason": reason}, indent=2) + "\n")
    return 2


def _cache_dir() -> Path:
    """As serve has it: from the environment, or the user's own."""
    named = os.environ.get(variable_of("cache_dir"))
    return Path(named) if named else default_cache_dir()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Leave it to the caller, who says it in one line."""
        raise SettingsError(message)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        description="Prove that a Keras model may be stepped, and compare stepping it with Keras's own call of it "
        "over whole sequences.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL.keras", help="file that Keras saved")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.npy",
        help="Your own sequences, (batch, T, features) or (T, features); an .npz with one array for each input of a "
        "model that has several. Default: the hard sequences of the proof.",
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="Module to import first, for the model's own layers and functions. May be given again.",
    )
    parser.add_argument(
        "--probe-steps",
        type=_steps,
        metavar="N",
        help="Time steps over which the proof compares, if more than 512 and twice what the layers reach.",
    )
    parser.add_argument(
        "--trust-causality",
        action="store_true",
        help="Go on where the graph does not prove that the model may be stepped.",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="Folder for compiled models, as of serve. [STEPWELL_CACHE_DIR]",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON document.")
    return parser


def _steps(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"must be a number of time steps from 1 to 100000; got {text!r}")
    return int(text)


def _progress(stage: str) -> None:
    sys.stderr.write(f"{stage}...\n")


def _document(program: Program, found: Comparison, verdict: Verdict) -> dict[str, object]:
    return {
        "verdict": verdict.name.lower(),
        "reason": verdict.value,
        "fingerprint": program.fingerprint,
        "proof": {
            "compared_steps": program.proof.steps,
            "compared_share": program.proof.compared,
            "unproven": program.proof.unproven,
        },
        "executor": program.executor,
        "executor_reason": program.executor_reason,
        **found.to_json(),
    }


def _lines(program: Program, found: Comparison, data: Path | None) -> list[str]:
    lines = [f"proof: {program.proof}"]
    if program.proof.unproven:
        lines.append(f"not proven: {program.proof.unproven}")
    lines.append(f"executor: {program.executor} ({program.executor_reason})")
    what = "the proof's sequences" if data is None else str(data)
    lines.append(f"compared with Keras on {what}: {found.rows} rows of {found.steps} time steps")
    for output in found.outputs:
        largest, step = output.largest
        lines += [
            "",
            f"output {output.output!r}: the largest difference is {largest:.2g}, at time step {step}",
            f"  {output.share:.2g} times what rounding may make, at most (time step {output.time} of row {output.row})"
            + ("" if output.is_allowed else ": STEPPING IT IS NOT WHAT KERAS COMPUTES"),
        ]
        if output.skipped:
            lines.append(
                f"  nothing can be said of {output.skipped:.1%} of its rows and time steps: there one rounding of the inputs "
                "moves Keras's own values by a tenth or more"
            )
        lines += [f"  {name:>16}  {value:.3g}" for name, value in _ranges(output)]
    return lines


def _ranges(output: Difference) -> list[tuple[str, float]]:
    """Return the largest difference of each time step, or of ranges of them where there are many."""
    count = len(output.by_step)
    if count == 1:
        return []
    width = -(-count // _RANGES)
    found = []
    for first in range(0, count, width):
        last = min(first + width, count) - 1
        name = f"step {first}" if first == last else f"steps {first}-{last}"
        found.append((name, max(output.by_step[first : last + 1])))
    return found


if __name__ == "__main__":
    sys.exit(main())
