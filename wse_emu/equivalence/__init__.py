"""Judging: every stage of a run of the emulator against the dense float64 reference."""

from wse_emu.equivalence.decode import check_continuation
from wse_emu.equivalence.report import Failure, NearTie, RoutingSummary, StageCheck, VerifyReport
from wse_emu.equivalence.verify import verify_record

__all__ = ["Failure", "NearTie", "RoutingSummary", "StageCheck", "VerifyReport", "check_continuation", "verify_record"]
