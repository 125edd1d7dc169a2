"""Sessions come, are found, read and end.

It may touch the table, the store's look-ups and the turns of sessions; steps are not its affair.
"""
