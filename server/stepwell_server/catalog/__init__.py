"""Models and their versions, as people and folders ask for them: loads, uploads, defaults, and what a restart brings back.

`catalog` loads and unloads, `files/` knows which files there are and makes programs of them. It may touch the compiler, the
engine's face and files; it knows neither the wire nor the engine's parts.
"""
