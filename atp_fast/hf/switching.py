"""What holds for a while: functions of single modules exchanged, one thread on a model, torch's modes as we need them."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Function = Callable[..., Tensor]
P = ParamSpec("P")
T = TypeVar("T")

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_WRITTEN = "_torchdynamo_orig_callable"  # of a compiled function: the one that was written
_making_a_lock = threading.Lock()


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The model and all inside it, each once; nn.Module.modules takes milliseconds for a few hundred."""
    found = [model]
    known = set(found)
    for module in found:  # which grows
        for child in module._modules.values():
            if child is not None and child not in known:
                known.add(child)
                found.append(child)
    return found


def parameters_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters; what several modules hold comes several times."""
    return (p for m in modules_of(model) for p in m._parameters.values() if p is not None)


@contextlib.contextmanager
def alone_with(model: nn.Module) -> Iterator[None]:
    """Inside, no other thread is inside with the same model: it waits. What torch compiled of it runs as it was written."""
    with _making_a_lock:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        own = {module: vars(module) for module in modules_of(model)}
        calls = [
            (m, "_compiled_call_impl") for m, has in own.items() if has.get("_compiled_call_impl")
        ]
        forwards = [
            (m, "forward") for m, has in own.items() if hasattr(has.get("forward"), _WRITTEN)
        ]
        with (
            switched(calls, lambda module, compiled: None),
            switched(forwards, lambda module, compiled: getattr(compiled, _WRITTEN)),
        ):
            yield


def recording(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run outside torch.inference_mode, under which no graph can be recorded."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


def own_forwards(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    """What `switched` may exchange to replace these modules' code: accelerate fetches the weights, then calls _old_forward;
    a forward that another has put in place is left alone."""
    found = []
    for module in modules:
        if "_old_forward" in vars(module):
            found.append((module, "_old_forward"))
        elif "forward" not in vars(module):
            found.append((module, "forward"))
    return found


@contextlib.contextmanager
def switched(
    functions: Sequence[tuple[nn.Module, str]], replace: Callable[[Any, Any], Function | None]
) -> Iterator[None]:
    """Inside, module.name is replace(module, module.name) for each of these (module, name); all is restored at the end."""
    before = [(module, name, vars(module).get(name)) for module, name in functions]
    try:
        for module, name in functions:
            setattr(module, name, replace(module, getattr(module, name)))
        yield
    finally:
        for module, name, own in before:
            if own is None:  # the class's function
                vars(module).pop(name, None)
            else:
                setattr(module, name, own)
