"""Telling: the ledger as a trace file, and a run as one page.

>>> from wse_emu.reports import Passage, Run, write_report, write_trace
>>> ids = model.generate(prompt)  # doctest: +SKIP
>>> run = Run.of(model)  # before the next call of the model  # doctest: +SKIP
>>> write_trace(model.wafer.ledger, "trace.json")  # doctest: +SKIP
>>> write_report("report.html", run, title="my model", verification=model.verify(ids))  # doctest: +SKIP
"""

from wse_emu.reports.page import Passage, report_html, write_report
from wse_emu.reports.run import Run
from wse_emu.reports.trace import LOGICAL_TIME, trace_events, write_trace

__all__ = ["LOGICAL_TIME", "Passage", "Run", "report_html", "trace_events", "write_report", "write_trace"]
