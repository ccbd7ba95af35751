"""Measuring blocks and models beside their peers, each number next to its error.

case.py      what is run: a text, sizes, forward or backward or decode
peers.py     who else computes it, and how their module is made
checking.py  the error of everyone against the meaning
measuring.py interleaved times, the machine's ceiling;  memory.py  peak memory
run.py       one case → a row of cells
suite.py     the standing tables in `suites/*.yaml`, resumable
"""
