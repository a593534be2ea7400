"""The figures of a finished run as one HTML page that needs nothing else: no network, no fonts, no scripts."""

from padst_cli.report.history import read_log
from padst_cli.report.html import LayerRow, ReportData, write_report
from padst_cli.report.supports import Support

__all__ = ["LayerRow", "ReportData", "Support", "read_log", "write_report"]
