"""Where a model's weights lie: the device each layer runs on, and weights that are fetched while they are used.

accelerate puts a hook on every module whose weights lie on disk or in host memory (`device_map`, `disk_offload`,
`cpu_offload`): it fetches them when the module runs and lets go of them afterwards. `Weights` has these hooks fetch once for a
stage of many runs, the next stage's while this one works.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import ChainMap
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ENDS = -1
"""The stage that is no layer: embeddings, position encodings, final norm and head."""


class Fetcher(NamedTuple):
    """A module whose weights are fetched, and the hook that does it."""

    module: nn.Module
    hook: Any

    @property
    def device(self) -> torch.device:
        return torch.device(self.hook.execution_device)

    def names(self) -> list[str]:
        from accelerate.utils import named_module_tensors

        found = named_module_tensors(
            self.module,
            include_buffers=self.hook.offload_buffers,
            recurse=self.hook.place_submodules,
            remove_non_persistent=True,
        )
        return [name for name, _ in found]

    def sizes(self) -> list[int]:
        """Bytes of each of its tensors."""
        tensors = self.module.state_dict(keep_vars=True)
        return [tensors[name].nbytes for name in self.names()]

    def fetch(self) -> dict[str, Tensor]:
        """Its weights on the device where it runs; those that lie on disk are read now, not when they are first used."""
        return {name: self._fetched(name) for name in self.names()}

    def _fetched(self, name: str) -> Tensor:
        weights, device = self.hook.weights_map, self.device
        value: Tensor = weights[name]
        if value.device != device:
            return value.to(device)
        loader = getattr(weights, "dataset", weights)
        in_memory = getattr(weights, "prefix", "") + name in getattr(loader, "state_dict", loader)
        return value if in_memory else _read(value)


def fetchers(module: nn.Module) -> list[Fetcher]:
    """The module and those inside it whose weights are fetched when they run."""
    found = []
    for inner in module.modules():
        hook = vars(inner).get("_hf_hook")
        for part in getattr(hook, "hooks", (hook,)):
            if getattr(part, "offload", False) and hasattr(part, "weights_map"):
                found.append(Fetcher(inner, part))
    return found


def devices_of(module: nn.Module) -> set[torch.device]:
    """Where a module's weights are while it runs."""
    fetched = fetchers(module)
    own = {p.device for p in module.parameters() if not (fetched and p.is_meta)}
    return own | {fetcher.device for fetcher in fetched}


def check_exchange(name: str, home: torch.device, layers: Sequence[nn.Module]) -> None:
    """Raises NotImplementedError for a layer on several devices and for one on a device that cannot exchange tensors with
    its neighbours'; `home` has the embeddings and sees the logits."""
    before = home
    for number, layer in enumerate(layers):
        found = devices_of(layer)
        if len(found) > 1:
            raise NotImplementedError(
                f"{name} is not served: layer {number} lies on {' and '.join(sorted(map(str, found)))}, a layer must lie on "
                "one device (a device_map by whole layers)"
            )
        device = next(iter(found), before)
        for other in {before, home} - {device}:
            _check_pair(name, number, device, other)
        before = device


def _check_pair(name: str, number: int, device: torch.device, other: torch.device) -> None:
    sent = torch.arange(1.0, 9.0)
    try:
        same = torch.equal(sent, sent.to(other).to(device).to(other).cpu())
        reason = "what is sent does not come back"
    except Exception as error:
        same, reason = False, str(error).splitlines()[0]
    if not same:
        raise NotImplementedError(
            f"{name} is not served: layer {number} lies on {device}, which cannot exchange tensors with {other}: {reason}"
        )


def _read(lazy: Tensor) -> Tensor:
    """A copy of a tensor that is read from its file as it is used, in pages that go back to the system with the copy: the C
    library would keep them."""
    pages = mmap.mmap(-1, max(1, lazy.nbytes))
    copy = torch.frombuffer(pages, dtype=lazy.dtype, count=lazy.numel()).view(lazy.shape)
    return copy.copy_(lazy)


class Weights:
    """Weights that are fetched, held for one stage at a time. A context manager; at its end no thread of it is left."""

    def __init__(self, stages: Sequence[Sequence[Fetcher]], ahead: bool) -> None:
        """stages: whose weights each stage needs, in order; ahead: fetch the next stage's while one is held."""
        self._stages, self._ahead = stages, ahead
        self._next: Future[list[dict[str, Tensor]]] | None = None
        self._streams: dict[torch.device, Any] = {}

    def __enter__(self) -> Weights:
        self._thread = ThreadPoolExecutor(1, "atp_fast weights")
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._next = None

    @contextlib.contextmanager
    def held(self, stage: int) -> Iterator[None]:
        """Inside, stage number `stage` has its weights; the stages must be held in order."""
        mine = self._stages[stage]
        if self._next is None:
            values = self._fetch(mine)
        else:
            values, self._next = self._next.result(), None
        if self._ahead and stage + 1 < len(self._stages):
            self._next = self._thread.submit(self._fetch, self._stages[stage + 1])
        with contextlib.ExitStack() as stack:
            while values:  # nothing else holds on to them when the stage ends
                stack.enter_context(_held(mine[len(values) - 1], values.pop()))
            yield

    def _fetch(self, stage: Sequence[Fetcher]) -> list[dict[str, Tensor]]:
        found = []
        for fetcher in stage:
            with torch.no_grad(), self._beside(fetcher.device):
                found.append(fetcher.fetch())
        for stream in self._streams.values():
            stream.synchronize()
        return found

    def _beside(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Copies to a GPU do not wait for its work."""
        if device.type != "cuda":
            return contextlib.nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._streams[device])


@contextlib.contextmanager
def _held(fetcher: Fetcher, values: dict[str, Tensor]) -> Iterator[None]:
    """Inside, a module has these weights and its hook fetches nothing; then both are as they were."""
    module, hook = fetcher
    for value in values.values():
        if value.is_cuda:
            value.record_stream(torch.cuda.current_stream(value.device))
    own = hook.weights_map
    hook.weights_map = ChainMap(values, own)
    try:
        hook.pre_forward(module)
        hook.offload = False
        yield
    finally:
        hook.weights_map, hook.offload = own, True
        hook.post_forward(module, None)
