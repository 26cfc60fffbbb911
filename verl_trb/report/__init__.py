"""A run's report: `report.html`, one page that needs no network, and the pictures in it.

    python -m verl_trb.report RUN [RUN ...] [--out FOLDER]

Several runs draw into the same panels, one colour a run. Reads files only: it works while a run goes on, and on a
machine without verl or vLLM.

metrics.py   what metrics.jsonl says       panels.py   its curves             picture.py   report.png
samples.py   rollouts, token by token      settings.py what runs differ in    page.py      report.html
"""

from verl_trb.report.metrics import Metrics as Metrics
from verl_trb.report.metrics import Point as Point
from verl_trb.report.metrics import Summary as Summary
from verl_trb.report.metrics import points as points
from verl_trb.report.metrics import read_metrics as read_metrics
from verl_trb.report.metrics import run_label as run_label
from verl_trb.report.metrics import run_names as run_names
from verl_trb.report.metrics import summary as summary
from verl_trb.report.panels import COLORS as COLORS
from verl_trb.report.panels import LOOK as LOOK
from verl_trb.report.panels import MARKED as MARKED
from verl_trb.report.picture import draw_report as draw_report
