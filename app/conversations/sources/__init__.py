"""Sources: other programs' tables with conversations in them, which we only read.

A shape (one module each) says how a table is read and what a row of it means; `recognition` finds the shape of a table.
"""
