"""The real trainer as one of many processes, without the others, without their chips and without memory.

The process group is torch's `fake` one, whose collectives answer at once, and tensors are fake: shapes without bytes.
Everything else is the code that trains.
"""

from zili.rehearsal.rehearse import rehearse
from zili.rehearsal.result import Rehearsal

__all__ = ["Rehearsal", "rehearse"]
