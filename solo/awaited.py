"""What a process waited in for one that does not answer: read off the error that ended the wait, so no step pays for it."""

import re
from traceback import walk_tb

from solo.errors import EnvironmentFault, SoloError

_SILENT = re.compile(r"rank [^:]+: no answer: |(rank 0|torchrun) no longer answers")       # in the words of `solo.peers`


def awaited(error: SoloError) -> str:
    """The collective, and who asked for it, that this process was in when another one was found not to answer.

    Args:
        error: of `solo.peers.together`.

    Returns:
        E.g. ``all_gather_into_tensor for solo.agreement.reach``, or ``the group's store for solo.callbacks.signals.asked``;
        empty where the error is another, or came out of neither.
    """
    silent = isinstance(error, EnvironmentFault) and _SILENT.match(str(error))
    return _collective(error.__cause__) if silent and error.__cause__ is not None else ""


def _collective(error: BaseException) -> str:
    """Of the innermost calls: what ran, and outside of it who called."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    calls = [(str(frame.f_globals.get("__name__")), frame.f_code.co_name) for frame in reversed(frames)]
    name = next((name for module, name in calls if module.startswith("torch.distributed") or module == "solo.dist"), "")
    name = "the group's store" if ("solo.peers", "answered") in calls else name
    for module, caller in calls:
        if module.startswith("solo.") and module not in ("solo.dist", "solo.peers"):
            return name and f"{name} for {module}.{caller}"
        if module.startswith("torch.autograd") and module != "torch.autograd.function":
            return f"{name} for a gradient" if name else "the backward pass, where DDP sums the gradient over ranks"
        if module.startswith(("lightning", "pytorch_lightning")):
            return name and f"{name} for Lightning"
    return name
