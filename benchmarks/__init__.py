"""Benchmarks: each checks its result before it times it. Host seconds: they say what this emulator costs, nothing about a wafer."""
