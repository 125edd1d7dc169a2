"""What versions of a model are, which there are, and on which of them the session of a record is now.

It knows rows, records and programs; what changes versions is in `engine/catalog`, and uses this.
"""
