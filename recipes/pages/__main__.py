"""Write the numbers in the pages anew: `python -m recipes.pages`; `--times full` takes those of a run that just ended first."""

import argparse
import sys

from lib.core import config
from lib.core.config import ROOT
from recipes.pages import marks, times


def main() -> int:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(prog="python -m recipes.pages", description=__doc__)
    parser.add_argument("--times", choices=times.PROFILES, action="append", default=[], help="profile whose last run is recorded")
    for profile in parser.parse_args().times:
        sys.stdout.write(f"times of {profile}: {', '.join(times.keep(profile, output=config.output_root()))}\n")
    for page in marks.update(ROOT):
        sys.stdout.write(f"{page}: changed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
