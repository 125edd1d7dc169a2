"""The versions of models, and which version each stored session is on.

It knows rows, records and programs; `engine/catalog` changes versions and uses this.
"""
