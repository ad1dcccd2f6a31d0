"""How a command ends by an error: said once by the processes of a run, with its exit code, and a word for torchrun."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from zili.durable import refused_by_disk
from zili.errors import PeerError, ZiliError
from zili.parallel.layout import processes

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it (128 + SIGINT)."""
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_SECONDS_BEHIND = 2.0


def end_by(error: Exception) -> NoReturn:
    """Say what a user can cure in one line, anything else with its traceback; end with the code of `error`."""
    error = _lost_peer(error) or refused_by_disk(error) or error
    if isinstance(error, ZiliError):
        text, code, heard, cause = f"zili: {_who()}{error}\n", error.exit_code, _is_heard(error), _is_cause(error)
    else:
        text, code, heard, cause = "".join(traceback.format_exception(error)), ZiliError.exit_code, True, True
    if heard:
        print(text, end="", file=sys.stderr, flush=True)
    if isinstance(error, ZiliError) and error.agreed:
        from zili.parallel.world import await_the_others

        await_the_others()
    if not cause:
        stay_behind()
    leave_word(text, code)
    _end(code)


def stay_behind() -> None:
    """Let another process end first. torchrun ends those of a machine as soon as one has ended, and names that one as
    the root cause: it should be one that says why."""
    if _ERROR_FILE in os.environ:
        time.sleep(_SECONDS_BEHIND)


def leave_word(text: str, code: int) -> None:
    """Leave a message that torchrun prints under its own traceback as the root cause, and puts into its error file.

    The form is that of torch.distributed.elastic.multiprocessing.errors.ErrorHandler. By itself it would leave the
    whole traceback, also of an error that a user can cure.
    """
    if _ERROR_FILE in os.environ:
        text = text.rstrip()
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        said = {"message": text, "errorCode": code, "extraInfo": extra}
        with suppress(OSError):
            Path(os.environ[_ERROR_FILE]).write_text(json.dumps({"message": said}), encoding="utf-8")


def leave_the_others() -> None:
    """Leave the process group, if there is one."""
    if _joined():
        from zili.parallel.world import leave

        leave()


def place() -> tuple[int, int, int]:
    """`processes()`. If torchrun's variables are not numbers, that is the error, and this process reports it."""
    try:
        return processes()
    except ZiliError:
        return 0, 1, 0


def _end(code: int) -> NoReturn:
    """End this process; one among others without tidying up."""
    if not _joined():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    # The traceback holds what uses the process group, and a group that is taken apart under it sometimes ends the
    # process with a signal instead of this code, or waits for processes that are gone.
    os._exit(code)


def _joined() -> bool:
    """Whether this process has others beside it. Not one that has imported nothing to join them with."""
    world = sys.modules.get("zili.parallel.world")
    return world is not None and world.has_others()


def _lost_peer(error: Exception) -> PeerError | None:
    """What is wrong where `error` is only how this process hears that another is gone."""
    if isinstance(error, ZiliError) or not _joined():
        return None
    from zili.parallel.world import is_of_the_others

    if not is_of_the_others(error):
        return None
    said = re.sub(r"^\[\S+:\d+\] ", "", str(error).partition("\n")[0])  # without the place in torch's sources
    return PeerError(f"another process of the run is gone or does not answer; it may have said why. Here: {said}")


def _is_heard(error: ZiliError) -> bool:
    """Whether this process says what all of them may have met. One that is alone with its error always does."""
    rank, _, here = place()
    if error.agreed or isinstance(error, PeerError):
        return rank == 0
    # Before they join, the processes of a machine have read the same recipe, and the first of them says what is wrong.
    return _joined() or error.alone or here == 0


def _is_cause(error: ZiliError) -> bool:
    """Whether this process is the one of its machine that should be seen to end first."""
    return not isinstance(error, PeerError) and (place()[2] == 0 or (not error.agreed and _is_heard(error)))


def _who() -> str:
    rank = place()[0]
    return f"process {rank}: " if rank else ""
