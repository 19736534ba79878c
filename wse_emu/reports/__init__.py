"""Telling: the ledger as a trace file."""

from wse_emu.reports.trace import LOGICAL_TIME, trace_events, write_trace

__all__ = ["LOGICAL_TIME", "trace_events", "write_trace"]
