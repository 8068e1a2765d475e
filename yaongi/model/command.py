"""What the model's commands share."""

import sys
from typing import Protocol


class Command(Protocol):
    """Parsed settings that can be run."""

    def run(self) -> None:
        """Does what the command says; raises ValueError or OSError with one line."""


def run_command(command: Command) -> None:
    """Runs a command; a mistake of the user's ends the process with its one line and status 1."""
    try:
        command.run()
    except (ValueError, OSError) as error:
        sys.exit(str(error))
