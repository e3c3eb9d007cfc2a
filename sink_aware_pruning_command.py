"""Start `sinks`: a name that no other project has, since a folder named lib of another one may come first on the path."""

import sys
from pathlib import Path


def main() -> int:
    """Run the command with this repository's lib, and return its exit code."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from lib.commands.command import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
