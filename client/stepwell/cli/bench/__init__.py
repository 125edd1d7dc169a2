"""`stepwell bench`: load a server and measure what it does.

The command starts processes of its own, each with an event loop, so that the client is not the limit:

    command.py    the options
    plan.py       what a run does, and each process's share of it
    fleet.py      the processes: starts them, tells them when to begin and to stop, collects what they counted
    worker.py     one process: opens its sessions, steps them, closes them
    lanes.py      one of a process's parallel lines of calls, for each mode
    inputs.py     random inputs, made before the run
    histogram.py  latencies in bounded memory
    cpu.py        the server's processor time, where it can be read
    report.py     the result, for people and for programs
"""

from stepwell.cli.bench.command import bench

__all__ = ["bench"]
