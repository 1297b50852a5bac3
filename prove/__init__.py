"""The first hour on a card: everything that no CPU can prove, run once and written down as one table.

`plan` says what is to be shown, `parts` shows it, each row in a process of its own (`child`), and `record` keeps every
row as soon as it is finished.
"""
