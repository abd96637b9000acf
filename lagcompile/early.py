"""What has to happen before the slow imports: Ctrl-C during those of the command `lagcompile` is one line, too.

Imported first by the package. Invariant: no program but the command is changed.
"""

import sys
from pathlib import Path
from types import TracebackType


def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in one line that a person ended the command; Python then ends with the status of the signal."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv and Path(sys.argv[0]).stem == "lagcompile":
    sys.excepthook = end
