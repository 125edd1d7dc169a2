"""The proof that the rows of a step function never mix: the batch axis is followed through its graph.

A row's results depend on nothing but the row: not on other rows, not on their number, not on the row's place. The rules
state this for a list of operators (`rules`). For every other operator the axis is lost, and its name is the reason.
"""
