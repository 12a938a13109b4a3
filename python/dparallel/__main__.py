"""`dparallel` and `python -m dparallel`: the command line."""

import gc
import os
import signal


def main() -> None:
    """Run the command line. Ctrl-C ends it with status 130 and no traceback, from the first import on."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # not where the parent process has SIGINT ignored
        # Not by an exception: an import of torch's takes seconds, and some of its parts catch any.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    gc.disable()  # imported modules stay: looking through them for garbage took an eighth of the start
    from . import cli

    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, handler)
    cli.main()


if __name__ == "__main__":
    main()
