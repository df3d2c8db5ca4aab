"""The argument parser of the commands: mistakes become a UsageError of one line, with a hint."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from sharding.errors import UsageError, nearest


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that raises instead of exiting; `--help` belongs to `torus` itself."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"torus {command}", add_help=False, allow_abbrev=False)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Returns the parsed arguments.

        Raises:
          UsageError: an argument that is unknown, missing or has a bad value.
        """
        arguments, unknown = self.parse_known_args(list(argv))
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            flag = unknown[0].split("=")[0]
            hint = nearest(flag, options) or f" (see {self.prog} --help)"
            self.error(f"does not take `{unknown[0]}`{hint}")
        return arguments

    def error(self, message: str) -> NoReturn:
        """Raises UsageError; argparse calls this for every mistake that it finds."""
        raise UsageError(f"{self.prog}: {message}")
