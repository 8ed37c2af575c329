"""What a run tells people: its metrics, a live display, alarms, the table and the curves."""

from pyrl.report.alarms import Alarms
from pyrl.report.curves import save_curves
from pyrl.report.metrics import Completion, MetricsLog, read_metrics
from pyrl.report.progress import Phases, Progress
from pyrl.report.table import Evaluation, Report

__all__ = [
    "Alarms",
    "Completion",
    "Evaluation",
    "MetricsLog",
    "Phases",
    "Progress",
    "Report",
    "read_metrics",
    "save_curves",
]
