"""The report of a run: pictures and one self-contained HTML page, from the run's directory alone. Imports no torch."""

from nano_pretrain.report.page import render_report

__all__ = ["render_report"]
