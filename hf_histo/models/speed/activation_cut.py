"""The frozen part of a model below its first trained layer, run once: its activations, on disk, memory-mapped.

A model is not taken apart. It runs as it is, with every module that comes before the cut replaced by one that does
nothing, and the stored activation put in at the cut. The replacements return NaN: whatever bypasses the cut, such as
a residual connection, makes the output NaN, and the cut is moved outwards until nothing does.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from numpy.typing import NDArray
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from hf_histo.files import atomic_file
from hf_histo.models.speed import attention

CHUNK_BYTES = 2**26  # of a file of activations: what a kill costs, and what a process holds in memory while it writes
CHUNK_ROWS = 1024
DIGEST_BYTES = 16  # of the checksum (xxh3, 128 bits) at the end of a file

logger = logging.getLogger(__name__)


@dataclass
class Call:
    """A module's call in a forward pass: its name, first input tensor, output, and the order of start and end.

    `attends`: whether the module itself, not one in it, calls `F.scaled_dot_product_attention`.
    """

    name: str
    module: nn.Module
    entered: int
    given: torch.Tensor | None
    left: int = -1
    output: Any = None
    attends: bool = False


class _Reached(Exception):
    """Ends a forward pass at the cut."""

    def __init__(self, activation: torch.Tensor) -> None:
        self.activation = activation


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block, a call of `module` calls `forward`."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@dataclass(frozen=True)
class Cut:
    """A point at which a model can take a stored activation instead of pixels.

    Attributes:
        module: name of the module whose input is stored.
        skipped: what the modules before it returned for a sample batch, as tensors on the meta device, by name.
        pixels, activation: the model's input and the module's, for the sample batch, on the meta device.
        share: of the floating-point operations of a forward pass that are before the cut, in [0, 1].
    """

    module: str
    skipped: dict[str, Any]
    pixels: torch.Tensor
    activation: torch.Tensor
    share: float = 0.0

    def activations(self, model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """The input of `module` for pixels (B, 3, H, W): (B, ...), without a graph; nothing behind it is run."""

        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            raise _Reached(_first_tensor((args, kwargs)))

        hook = model.get_submodule(self.module).register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        try:
            with torch.no_grad():
                model(pixel_values=pixels)
        except _Reached as reached:
            return reached.activation.detach()
        finally:
            hook.remove()
        raise RuntimeError(f"{self.module} was not reached")

    @contextmanager
    def entered(self, model: nn.Module) -> Iterator[None]:
        """Within the block, `model(pixel_values=activations)` continues from the cut."""
        stored: list[torch.Tensor] = []

        def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            stored[:] = [kwargs["pixel_values"]]
            return args, {**kwargs, "pixel_values": self._nothing(self.pixels, stored[0])}

        def put(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            first = _first_tensor((args, kwargs))
            return tree_map(lambda leaf: stored[0] if leaf is first else leaf, (args, kwargs))

        def skip(output: Any, *args: Any, **kwargs: Any) -> Any:
            return tree_map(lambda leaf: self._nothing(leaf, stored[0]), output)

        with ExitStack() as stack:
            for module, hook in ((model, take), (model.get_submodule(self.module), put)):
                handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            for name, output in self.skipped.items():
                stack.enter_context(replaced(model.get_submodule(name), partial(skip, output)))
            yield

    def _nothing(self, like: Any, stored: torch.Tensor) -> Any:
        """NaN in the shape of `like`, a result for the sample batch, for the batch of `stored`; it takes no memory."""
        if not isinstance(like, torch.Tensor):
            return like
        shape = (len(stored), *like.shape[1:]) if like.shape[:1] == self.pixels.shape[:1] else like.shape
        value = math.nan if like.is_floating_point() else 0
        return torch.full((), value, dtype=like.dtype, device=stored.device).expand(shape)


def find(model: nn.Module, pixels: torch.Tensor) -> Cut | None:
    """The last cut before the first layer that training moves, or None where there is nothing to save.

    There is none if the first layer is trained, or if what is frozen differs from one pass to the next (dropout) or
    between training and evaluation (batch norm that follows the data). `model` keeps its mode and the random stream
    its state.

    Args:
        model: called as `model(pixel_values=...)`, returns an object with `logits`.
        pixels: a sample batch, float (B, 3, H, W), on the model's device. B identifies the batch dimension, so it
            should be a size that no layer has, such as 5.
    """
    training = model.training
    with torch.random.fork_rng(), torch.no_grad():
        try:
            return _find(model.eval(), pixels)
        finally:
            model.train(training)


def _find(model: nn.Module, pixels: torch.Tensor) -> Cut | None:
    with FlopCounterMode(display=False) as whole:
        calls, logits = record(model, pixels)
    # The parameters of what a module calls are found there; where it calls nothing, all below are its own.
    last = [call.left < after.entered for call, after in itertools.pairwise(calls)] + [True]
    moved = (any(p.requires_grad for p in c.module.parameters(alone)) for c, alone in zip(calls, last, strict=True))
    first = next(itertools.compress(calls, moved), None)
    if first is None:
        return None
    by_name = {call.name: call for call in calls}
    parts = first.name.split(".")
    outwards = [by_name.get(".".join(parts[:depth])) for depth in range(len(parts), 0, -1)]
    found: Call | None = None
    for call in outwards:
        # The outermost module with the same input, so that hooks on what wraps a layer see the activation, too.
        if call is None or (found and call.given is not found.given):
            continue
        if found or _continues(model, _cut(calls, call, pixels), pixels, logits):
            found = call
    if found is None:
        return None
    cut = _cut(calls, found, pixels)
    with FlopCounterMode(display=False) as before:
        evaluated = cut.activations(model, pixels)
    trained = cut.activations(model.train(), pixels)
    is_fixed = trained.shape == evaluated.shape and torch.allclose(trained, evaluated, rtol=1e-3, atol=1e-5)
    if not before.get_total_flops() or not is_fixed:
        return None
    return dataclasses.replace(cut, share=before.get_total_flops() / whole.get_total_flops())


def _cut(calls: list[Call], at: Call, pixels: torch.Tensor) -> Cut:
    """The cut at the input of a call; skipped are the outermost modules that were done before, and only once."""
    assert at.given is not None
    often = {name for name, group in itertools.groupby(sorted(c.name for c in calls)) if len(list(group)) > 1}
    done = {call.name: call.output for call in calls if call.left < at.entered and call.name not in often}
    outermost = {name: output for name, output in done.items() if not any(above in done for above in _above(name))}
    on_meta = partial(tree_map, lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf)
    return Cut(at.name, on_meta(outermost), pixels.to("meta"), at.given.to("meta"))


def _continues(model: nn.Module, cut: Cut, pixels: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether the model gives the logits of the pixels from the cut, too."""
    if cut.activation.shape[:1] != pixels.shape[:1]:
        return False
    given = cut.activations(model, pixels)
    with cut.entered(model):
        try:
            resumed = model(pixel_values=given).logits
        except RuntimeError:  # what replaces a module can't be written in place
            return False
    return torch.allclose(resumed, logits, rtol=1e-3, atol=1e-5)  # NaN is close to nothing


def record(model: nn.Module, pixels: torch.Tensor) -> tuple[list[Call], torch.Tensor]:
    """The calls of the modules below `model` in a forward pass, in the order in which they began, and the logits."""
    calls: list[Call] = []
    running: list[Call] = []
    clock = itertools.count()

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        running.append(Call(name, module, next(clock), tensors[0] if tensors else None))
        calls.append(running[-1])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = running.pop()
        call.left, call.output = next(clock), output

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        if running:
            running[-1].attends = True
        return F.scaled_dot_product_attention(*args, **kwargs)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                first = module.register_forward_pre_hook(partial(enter, name), prepend=True, with_kwargs=True)
                stack.callback(first.remove)
                stack.callback(module.register_forward_hook(leave).remove)
        with attention.Replaced(attend):
            logits = model(pixel_values=pixels).logits
    return calls, logits


def _above(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))


def _first_tensor(inputs: Any) -> torch.Tensor:
    return next(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))


@dataclass
class Store:
    """Activations of all rows of a table, for one or more views, as files that are mapped into memory.

    A file holds some hundred rows of a view and appears whole or not at all: what is complete after a kill stays, and
    processes may share the work, and the folder. It ends in a checksum, so that a damaged one counts as missing.

    Attributes:
        folder: of the files.
        rows: of the table.
        like: an activation for a batch, for its shape (B, ...), dtype and memory format.
        views: number of them.
    """

    folder: Path
    rows: int
    like: torch.Tensor
    views: int = 1
    _maps: dict[Path, torch.Tensor] = field(default_factory=dict, repr=False)
    _intact: set[Path] = field(default_factory=set, repr=False)

    @property
    def shape(self) -> torch.Size:
        """Shape of one image's activation."""
        return self.like.shape[1:]

    @property
    def row_bytes(self) -> int:
        return self.shape.numel() * self.like.element_size()

    @property
    def chunk(self) -> int:
        """Rows in a file; the last one may hold fewer."""
        return max(1, min(CHUNK_ROWS, CHUNK_BYTES // self.row_bytes))

    def missing(self, process: int = 0, processes: int = 1) -> list[tuple[int, range]]:
        """The views and rows of the files that are not there, or damaged, and that are this process's to write."""
        ranges = [range(start, min(start + self.chunk, self.rows)) for start in range(0, self.rows, self.chunk)]
        mine = list(itertools.product(range(self.views), ranges))[process::processes]
        return [(view, rows) for view, rows in mine if not self._is_intact(self._file(view, rows.start), len(rows))]

    def write(self, view: int, rows: range, activations: torch.Tensor) -> None:
        """Write the file that holds `rows` of a view; activations (len(rows), ...)."""
        plain = activations.to("cpu", self.like.dtype).reshape(len(rows), *self.shape).contiguous()
        content = plain.view(-1).view(torch.uint8).numpy()
        with atomic_file(self._file(view, rows.start)) as temporary, temporary.open("wb") as file:
            content.tofile(file)
            file.write(xxhash.xxh3_128_digest(content.data))

    def read(self, view: int, index: NDArray[np.int64]) -> torch.Tensor:
        """The activations (B, ...) of the rows `index` (B,), on the CPU."""
        found = torch.empty(len(index), *self.shape, dtype=self.like.dtype)
        for place, row in enumerate(index.tolist()):
            found[place] = self._map(view, row - row % self.chunk)[row % self.chunk]
        if self.like.dim() == 4 and self.like.is_contiguous(memory_format=torch.channels_last):
            found = found.contiguous(memory_format=torch.channels_last)
        return found

    def _is_intact(self, path: Path, rows: int) -> bool:
        if path in self._intact or not path.exists():
            return path in self._intact
        size = rows * self.row_bytes
        if path.stat().st_size == size + DIGEST_BYTES:
            content = np.memmap(path, np.uint8, "r")
            if xxhash.xxh3_128_digest(content[:size].data) == content[size:].tobytes():
                self._intact.add(path)
                return True
        logger.warning("%s is damaged, its activations are computed again", path)
        return False

    def _file(self, view: int, start: int) -> Path:
        return self.folder / f"view-{view}-rows-{start:09}.bin"

    def _map(self, view: int, start: int) -> torch.Tensor:
        path = self._file(view, start)
        if path not in self._maps:
            rows = min(self.chunk, self.rows - start)
            numbers = torch.from_file(str(path), size=rows * self.shape.numel(), dtype=self.like.dtype)
            self._maps[path] = numbers.view(rows, *self.shape)
        return self._maps[path]


def key(cut: Cut, model: nn.Module, *inputs: Any) -> str:
    """32 hexadecimal digits for what is before the cut, its weights included, and the `repr` of what goes into it."""
    digest = xxhash.xxh3_128(repr((cut.module, cut.activation.shape[1:], cut.activation.dtype, inputs)).encode())
    for name in cut.skipped:
        digest.update(repr((name, model.get_submodule(name))).encode())
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())
    for name, tensor in sorted(frozen.items()):
        # The frozen copy of a head that peft keeps is random and unused.
        if not name.startswith(f"{cut.module}.") and ".original_module." not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
