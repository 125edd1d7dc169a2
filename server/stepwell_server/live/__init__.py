"""Models that come and go while the server runs: loads, uploads, and what becomes of each version.

Here belongs who loads and unloads, at whose word, and what outlives a restart; `models/` has what a server begins with.
It may touch the compiler, the engine's face and files; it knows neither the wire nor the engine's parts.
"""
