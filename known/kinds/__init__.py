"""Rows of the table, families together."""
