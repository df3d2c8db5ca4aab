"""`torus report`: draws a run as report.html and report.png."""

from trainer.commands.parser import CommandParser

USAGE = """\
usage: torus report RUN [--out=FOLDER]

Draws the run in folder RUN: loss of training and evaluation, learning rate, gradient norm, step
time, tokens per second, MFU (on CPU memory) and data wait, with the run's facts, events and
incidents. Writes report.html (one file that needs nothing else) and report.png into RUN, or into
FOLDER.

Works while the run is going on, after it crashed, and on a machine without devices.

  torus report runs/a
  torus report runs/a --out=/tmp/a
"""


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit status."""
    parser = CommandParser("report")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--out", metavar="FOLDER")
    arguments = parser.parse(argv)

    from trainer.report import write_report

    for path in write_report(arguments.run, arguments.out):
        print(path)
    return 0
