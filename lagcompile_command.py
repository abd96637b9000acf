"""The command `lagcompile`: importing takes seconds, and Ctrl-C ends those with one line, too.

It stands beside the package because importing anything of the package imports torch.
"""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from lagcompile.workbench.cli import main as command
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
