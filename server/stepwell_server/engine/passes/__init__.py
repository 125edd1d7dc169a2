"""Runs jobs: each model's loop drains the inbox, selects jobs, runs a pass, and has it committed and answered.

It may use executors and the rows of claimed sessions. It does not know how sessions begin and end.
"""
