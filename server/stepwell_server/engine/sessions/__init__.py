"""Operations on sessions: begin, find, read, list, transfer and end them.

They may use the table, store lookups and the session queues. They know nothing of steps.
"""
