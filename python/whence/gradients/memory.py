"""How many bytes tensors and arrays hold while a model runs."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Watches Python's memory, and arrays with it.

    Yields:
        What says how many bytes more than at the beginning there were at most, since it was last
        asked.
    """
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()

    def most() -> int:
        found = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.reset_peak()
        return found

    try:
        yield most
    finally:
        if started:
            tracemalloc.stop()


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that tensors made inside it hold, and arrays with them.

    On the processor and on other devices alike. Not counted is what operations need for themselves
    while they run.

    Attributes:
        most: The most that was held at once, so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0
        self._known: Any = WeakIdKeyDictionary()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to skip it, which takes a second and 70 MB

    def __enter__(self) -> Held:
        self._tracing = traced()
        self._arrays = self._tracing.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._look()
        self._tracing.__exit__(*error)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation; what it returns is new where it was given to none before."""
        kwargs = kwargs or {}
        self._look()
        for given in tree_leaves((args, kwargs)):
            self._meet(given, made=False)
        found = operation(*args, **kwargs)
        for each in tree_leaves(found):
            self._meet(each, made=True)
        self._look()
        return found

    def _look(self) -> None:
        self.most = max(self.most, self._now + self._arrays())

    def _meet(self, value: Any, *, made: bool) -> None:
        """Counts the memory of a tensor that was not seen before; none that came from elsewhere."""
        if not isinstance(value, Tensor):
            return
        memory = value.untyped_storage()
        if memory in self._known:
            return
        self._known[memory] = True
        if made:
            size = memory.nbytes()
            self._now += size
            weakref.finalize(memory, self._free, size)

    def _free(self, size: int) -> None:
        self._now -= size
