"""The harness of `make against` with two servers of the tree, one of them with a defect: it finds what it must."""

from __future__ import annotations

from pathlib import Path

import pytest

from against import programs
from against.differences import Report
from against.malformed_calls import send_malformed
from against.pair import Pair
from support.load.driver import MODEL
from support.secured import Server
from support.servers import fault_servers, served
from support.servers.fault_servers import FaultyServer

pytestmark = [pytest.mark.slow, pytest.mark.plain("both servers are asked without TLS, byte by byte")]
#: What another process has from the start: its folder is where Python looks for modules first.
ANOTHER_REASON = """
from stepwell_server import errors
errors.SessionNotFound.reason = "SESSION_LOST"
"""
PROGRAMS, SEED = 8, 3


def play(pair: Pair) -> None:
    for program in programs.with_restarts(programs.draw(PROGRAMS, SEED, [MODEL]), 4):
        pair.play(program)


def reported(base: Server, tree: Server) -> Report:
    report = Report([])
    with Pair("two servers", base, tree, report, SEED) as pair:
        play(pair)
    return report


def test_two_servers_without_a_defect_answer_alike(tmp_path: Path) -> None:
    base, tree = (fault_servers.local(tmp_path / name, "--durability", "sync") for name in ("base", "tree"))
    report = reported(base, tree)
    assert report.is_good, "\n".join(report.lines())
    assert sum(report.calls.values()) > 400


@pytest.mark.parametrize("defect", ["forget-requests", "judge-nothing"])
def test_a_defect_of_exactly_once_is_found(defect: str) -> None:
    report = reported(fault_servers.local(None), FaultyServer(None, defect=defect))
    assert report.unwanted
    assert any(": Step" in shown for shown in report.shown), report.shown


def test_a_store_that_loses_commits_is_found(tmp_path: Path) -> None:
    tree = FaultyServer(tmp_path / "tree", "--durability", "sync", defect="drop-commits")
    report = reported(fault_servers.local(tmp_path / "base", "--durability", "sync"), tree)
    assert report.unwanted, "the restarts show it"


def test_another_reason_in_answers_to_malformed_messages_is_found(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ANOTHER_REASON)
    report, others = _compared(tmp_path)
    for _ in range(2):  # a busy machine once showed another difference, in statistics
        if others:
            report, others = _compared(tmp_path)
    assert report.unwanted
    assert not others, others
    assert sum(report.calls.values()) - report.unwanted > 200, "the others are alike"


def _compared(path: Path) -> tuple[Report, list[str]]:
    """What differs between a server and one with the planted reason, and what of it is something else."""
    base = served.local_server("seq")
    tree = served.local_server("seq", env={"PYTHONPATH": str(path)})
    report = Report([])
    with Pair("two servers", base, tree, report, SEED) as pair:
        send_malformed(pair, 300, SEED, lambda _: None)
    return report, [shown for shown in report.shown if "SESSION_LOST" not in shown]
