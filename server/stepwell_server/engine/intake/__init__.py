"""Changes come in: they wait in their model's inbox, are checked, claim their sessions and become jobs.

What waits for a session's turn or for rows waits here too. It may touch claims, rows and jobs; it runs nothing and
knows no transport.
"""
