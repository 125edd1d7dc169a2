"""The `stepwell` command: serve models, look at sessions, step them, and read and set their state.

`main` is the program. It imports nothing heavy until a command runs, so that `stepwell --help` is fast.

    _help.py      commands whose help shows examples, JSON keys and exit codes
    _errors.py    every expected error as one line on stderr and an exit code
    _target.py    --server and --timeout-s, and the connection they make
    _values.py    inputs on the command line: JSON, files, stdin
    _types.py     times and sizes
    _complete.py  models and sessions, as shells complete them
    _render.py    tables for people, JSON for programs
    _lazy.py      commands whose code is read when they are called
    _of_server.py commands that the server's package has: serve, check, doctor, tokens ...
    models.py sessions.py step.py state.py bench/ completion.py    the other commands
"""

from stepwell.cli._root import main

__all__ = ["main"]
