"""The commands of `stepwell` that need the server's code. `stepwell.cli` finds them as entry points, when they are called.

options.py      settings as options of a command: `stepwell_server.settings` has all of each setting
compiling.py    what check and compile have in common
described.py    a compiled file in the protocol's words, for models show
serve.py check.py compile.py    the commands
"""
