"""Making what is needed next while what is there is used."""

import atexit
import threading
from collections.abc import Generator
from contextlib import closing
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def ahead(things: Generator[T, None, None], count: int, name: str) -> Generator[T, None, None]:
    """The same things, made ahead by one thread of this name, which keeps at most ``count`` ready.

    Leaving early, or an error on either side, joins it; so does the interpreter's exit. It closes ``things``.
    """
    ready: SimpleQueue[T | BaseException | None] = SimpleQueue()
    room: SimpleQueue[None] = SimpleQueue()         # of as many as may still be made
    stop = threading.Event()

    def produce() -> None:
        try:
            with closing(things):
                while room.get() is None and not stop.is_set():
                    ready.put(next(things))
        except StopIteration:
            ready.put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            ready.put(error)

    thread = threading.Thread(target=produce, name=name, daemon=True)

    def close() -> None:
        stop.set()
        room.put(None)      # for a producer that waits for some: it sees at once that it is to stop
        thread.join()
        ready.put(None)     # at exit, the consumer may be a thread that waits, and is joined next

    for _ in range(count):
        room.put(None)
    thread.start()
    atexit.register(close)  # the interpreter must not end under a running thread
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.put(None)
            yield item
    finally:
        close()
        atexit.unregister(close)
