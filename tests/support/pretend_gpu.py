"""A simulated GPU: tensors report the device "cuda" while their data is in CPU memory.

It fails where a real GPU fails and CPU tensors do not: for operations across two devices and, during graph capture,
for everything that waits for the device or copies to or from the CPU. A captured graph is replayed with the memory
and the Python numbers of its capture. Triton kernels run in the interpreter, on GPU tensors only. It simulates
neither speed nor the order of streams.
"""

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

from mptserve.engine.gpu.capability import why_no_kernels

_aten = torch.ops.aten
_MEMORY = 4_000_000_000
_GPU = torch.device("cuda", 0)


class GpuTensor(Tensor):
    """A tensor on the simulated GPU. on_cpu: holds the data; views share its storage."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls: type["GpuTensor"], on_cpu: Tensor) -> "GpuTensor":
        made: GpuTensor = Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=_GPU,
        )
        made.on_cpu = on_cpu
        return made

    def __repr__(self, **_: Any) -> str:
        return f"on a pretended GPU: {self.on_cpu!r}"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OURS:
            return _run(_OURS[func], args, kwargs or {})
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_INDEXING = (operator.getitem, operator.setitem)
_OURS = {
    Tensor.__getitem__: operator.getitem,
    Tensor.__setitem__: operator.setitem,
    Tensor.contiguous: _aten.contiguous.default,
    Tensor.copy_: _aten.copy_.default,
    Tensor.nonzero: _aten.nonzero.default,
    Tensor.__invert__: _aten.bitwise_not.default,
}
"""Operations for which PyTorch initializes CUDA before it dispatches on the tensors."""


class _Everywhere(TorchDispatchMode):
    """Intercepts operations without tensor arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        captured_tensors = tree_leaves(result)

        def replay() -> None:
            for old, new in zip(captured_tensors, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self._steps.append(replay)

    def kernel(self, launch: Callable[[], None]) -> None:
        self._steps.append(launch)

    def replay(self) -> None:
        assert self._steps, "replayed without having been captured"
        STATE.replays += 1
        for step in self._steps:
            step()


class _State:
    """The state of the device. unpinned: number of copies from pageable CPU memory, which wait for the device."""

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self.unpinned = self.replays = 0
        self.pinned: dict[int, Tensor] = {}  # kept, so that no other tensor gets its address


STATE = _State()


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation on the CPU, with the checks of a GPU."""
    args, kwargs = tree_map(lambda x: _GPU if isinstance(x, torch.device) and x.type == "cuda" else x, (args, kwargs))
    if func not in _INDEXING:  # in inference mode, composite operations arrive here too
        with _Everywhere():
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    gpu_tensors = [x for x in tensors if isinstance(x, GpuTensor)]
    cpu_tensors = [x for x in tensors if not isinstance(x, GpuTensor)]
    on_gpu, copies = bool(gpu_tensors), False
    if func is _aten._to_copy.default:
        on_gpu = _is_cuda(kwargs["device"]) if kwargs.get("device") is not None else on_gpu
        copies = on_gpu != bool(gpu_tensors)
    elif func is _aten.copy_.default:
        on_gpu, copies = isinstance(args[0], GpuTensor), bool(gpu_tensors and cpu_tensors)
    elif not tensors:
        on_gpu = _is_cuda(kwargs.get("device"))
    elif gpu_tensors:
        cpu_shapes = [tuple(x.shape) for x in cpu_tensors if x.dim() > 0]
        assert not cpu_shapes, f"{func}: {cpu_shapes} are on the CPU, the others on the GPU"
        assert not _is_cpu(kwargs.get("device")), f"{func} goes from the GPU to the CPU"
    else:
        assert not _is_cuda(kwargs.get("device")), f"{func} goes from the CPU to the GPU"
    waits = copies or (on_gpu and func in (_aten._local_scalar_dense.default, _aten.nonzero.default))
    assert not (waits and STATE.graph), f"{func} cannot be captured"
    if func in _INDEXING:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        STATE.unpinned += sum(isinstance(x, list) for x in index)
    if copies:
        STATE.unpinned += sum(_address(x) not in STATE.pinned for x in cpu_tensors)
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if "device" in inner_kwargs:
        inner_kwargs["device"] = None if tensors and func is not _aten._to_copy.default else torch.device("cpu")
    is_pinned = inner_kwargs.pop("pin_memory", None)
    if func is _aten._to_copy.default and copies:
        inner_kwargs.pop("non_blocking", None)
        result = func(*inner_args, **inner_kwargs)
        if result.data_ptr() == inner_args[0].data_ptr():
            result = result.clone()
    else:
        result = func(*inner_args, **inner_kwargs)
    if STATE.graph is not None and on_gpu:
        STATE.graph.operation(func, inner_args, inner_kwargs, result)
    if not on_gpu:
        if is_pinned:
            _pin(result)
        return result
    wrappers = {id(x.on_cpu): x for x in gpu_tensors}
    return tree_map(
        lambda x: (wrappers[id(x)] if id(x) in wrappers else GpuTensor(x)) if isinstance(x, Tensor) else x, result
    )


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _inner(x: Any) -> Any:
    return x.on_cpu if isinstance(x, GpuTensor) else x


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _pin(x: Tensor) -> Tensor:
    STATE.pinned[_address(x)] = x
    return x


class _Event:
    def record(self) -> None: ...
    def synchronize(self) -> None:
        assert STATE.graph is None, "waits while a graph is captured"


@contextmanager
def _capture(graph: Graph, **_: Any) -> Iterator[None]:
    assert STATE.graph is None
    STATE.graph = graph
    try:
        yield
    finally:
        STATE.graph = None


def _synchronize(*_: Any) -> None:
    assert STATE.graph is None, "waits while a graph is captured"


@contextmanager
def pretend_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[_State]:
    """Simulate a GPU for this thread and the threads that it starts."""
    STATE.__init__()  # type: ignore[misc]
    run_thread, run_kernel = threading.Thread.run, InterpretedFunction.run

    def run_in_mode(self: threading.Thread) -> None:
        with _Everywhere():
            run_thread(self)

    def run_unwrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        for x in (*args, *kwargs.values()):
            assert isinstance(x, GpuTensor) or not isinstance(x, Tensor), f"{self.fn.__name__} got a tensor of the CPU"
        args, kwargs = tuple(map(_inner, args)), {key: _inner(x) for key, x in kwargs.items()}
        if STATE.graph is not None:
            STATE.graph.kernel(lambda: run_kernel(self, *args, **kwargs))
        run_kernel(self, *args, **kwargs)

    make_tensor = torch.tensor

    def made_there(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:  # PyTorch's own passes the mode by
        made = make_tensor(data, **kwargs)
        return made.to(device) if device is not None else made

    about = SimpleNamespace(multi_processor_count=4, total_memory=_MEMORY)
    with pytest.MonkeyPatch.context() as patch, _Everywhere():
        patch.setattr(threading.Thread, "run", run_in_mode)
        patch.setattr(InterpretedFunction, "run", run_unwrapped)
        patch.setattr(torch, "tensor", made_there)
        patch.setattr(Tensor, "pin_memory", lambda self: _pin(self.clone()))
        for name, stand_in in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "get_device_capability": lambda *_: capability,
            "get_device_name": lambda *_: "a pretended GPU",
            "get_device_properties": lambda *_: about,
            "mem_get_info": lambda *_: (_MEMORY, _MEMORY),
            "synchronize": _synchronize,
            "graph_pool_handle": lambda: (0, 0),
            "Event": _Event,
            "CUDAGraph": Graph,
            "graph": _capture,
        }.items():
            patch.setattr(torch.cuda, name, stand_in)
        why_no_kernels.cache_clear()
        try:
            yield STATE
        finally:
            why_no_kernels.cache_clear()
            STATE.pinned.clear()
