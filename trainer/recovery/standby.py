"""A process that becomes a trainer when its supervisor says so, with all imports done by then.

Much of a restart is Python loading JAX, Orbax and Torus. So while trainers run, the supervisor
keeps one of these for each: it loads, and waits for a line on its standard input, which holds the
arguments of `torus` and what is new in the environment. No device is touched before that, and the
end of the supervisor ends it.
"""

import json
import os
import select
import sys
from typing import IO

from trainer.commands.main import main as torus
from trainer.commands.main import run


def hand_over(stdin: IO[bytes], arguments: list[str], environment: dict[str, str]) -> None:
    """Turns a process into a trainer with these arguments and environment variables."""
    stdin.write(json.dumps([arguments, environment]).encode() + b"\n")
    stdin.close()


def main() -> int:
    if not select.select([sys.stdin], [], [], 0)[0]:  # not needed yet
        import trainer.loop  # noqa: F401
    line = sys.stdin.readline()
    if not line:
        return 0
    arguments, environment = json.loads(line)
    os.environ.update(environment)
    return torus(arguments)


if __name__ == "__main__":
    sys.exit(run(main))
