"""Making what is needed next while what is there is used."""

import atexit
import queue
import threading
from collections.abc import Generator
from contextlib import closing, suppress
from typing import TypeVar

T = TypeVar("T")


def ahead(things: Generator[T, None, None], count: int, name: str) -> Generator[T, None, None]:
    """The same things, made ahead by one thread of this name, which keeps at most ``count`` ready.

    Leaving early, or an error on either side, joins it; so does the interpreter's exit. It closes ``things``.
    """
    ready: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=count)
    stop = threading.Event()

    def put(item: T | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            with closing(things):
                for thing in things:
                    if not put(thing):
                        return
            put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=produce, name=name, daemon=True)

    def make_room() -> None:
        with suppress(queue.Empty):
            ready.get_nowait()

    def close() -> None:
        stop.set()
        make_room()  # for a producer that waits for some: it sees at once that it is to stop
        thread.join()
        make_room()
        with suppress(queue.Full):
            ready.put_nowait(None)  # at exit, the consumer may be a thread that waits, and is joined next

    thread.start()
    atexit.register(close)  # the interpreter must not end under a running thread
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        close()
        atexit.unregister(close)
