"""Benchmarks of KVSlim: `python -m benchmarks --list` names them, `python -m benchmarks NAME` runs one.

A benchmark is a function under `quality/`, `speed/` or `memory/` that takes a subject and yields the values of rows;
its keyword arguments are its settings. The runner keeps rows with commit, versions and machine in build/benchmarks, and
prints the table that `render` makes of them. `models` is the only module that knows KVSlim's inner parts.
"""
