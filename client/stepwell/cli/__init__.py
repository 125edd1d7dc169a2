"""The `stepwell` command: serve models, inspect sessions, step them, and read and set their state.

`main` is the program. It imports nothing heavy until a command runs, so that `stepwell --help` is fast.

::

    _root.py      the list of commands
    _of_server.py commands of the server's package: serve, check, doctor, tokens ...
    models.py sessions.py step.py state.py ...    a module for each other command
    toolkit/      what commands share
        help.py      commands whose help shows examples, JSON keys and exit codes
        errors.py    every expected error as one line on stderr and an exit code
        target.py    --server and --timeout-s, and the connection they make
        session.py   a session that exists, or may be opened
        values.py    inputs on the command line: JSON, files, stdin
        types.py     times and sizes
        complete.py  shell completion of models and sessions
        render.py    tables for people, JSON for programs
        lazy.py      commands whose code is imported when they are called
"""

from stepwell.cli._root import main

__all__ = ["main"]
