"""`torus report`: draws a run as report.html and report.png, or several in one picture."""

from trainer.commands.parser import CommandParser

USAGE = """\
usage: torus report RUN [--out=FOLDER]
       torus report RUN RUN ... [--out=FOLDER]

Draws the run in folder RUN: loss of training and evaluation, learning rate, gradient norm, step
time, tokens per second, MFU (on CPU memory) and data wait, with the run's facts, events and
incidents. Writes report.html (one file that needs nothing else) and report.png into RUN, or into
FOLDER.

Several runs are compared: compare.png has their losses in one picture, compare.html also a table of
what differs between their configs and how they went, in the current folder or in FOLDER.

Works while the run is going on, after it crashed, and on a machine without devices.

  torus report runs/a
  torus report runs/a --out=reports
  torus report runs/a runs/b --out=runs
"""


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit status."""
    parser = CommandParser("report")
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("--out", metavar="FOLDER")
    arguments = parser.parse(argv)

    from trainer.compare import write_comparison
    from trainer.report import write_report

    if len(arguments.runs) == 1:
        paths = write_report(arguments.runs[0], arguments.out)
    else:
        paths = write_comparison(arguments.runs, arguments.out or ".")
    for path in paths:
        print(path)
    return 0
