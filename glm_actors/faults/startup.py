"""How a process starts quickly: the garbage collector waits until its libraries and its model are
loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """For code that imports and builds what stays for the life of the process.

    Imports make hundreds of thousands of objects of which none is garbage; looking for some among
    them takes a quarter of the CPU time of loading vLLM. What is there at the end is left out of
    every later collection too, each of which would stop an engine for as long as it looks at them.
    """
    if not gc.isenabled():  # inside another one
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
