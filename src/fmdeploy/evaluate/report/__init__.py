"""The report: one self-contained HTML page from whatever artifacts are given."""

from fmdeploy.evaluate.report.stage import ReportConfig, report

__all__ = ["ReportConfig", "report"]
