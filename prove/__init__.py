"""The first hour on a card: everything that no CPU can prove, run once and written down as one table.

`run` plans the rows and shows those that are missing. `checks` says how each is shown, in a process of its own (see
`child` and `jobs`). `record` keeps every row as soon as it is finished.
"""
