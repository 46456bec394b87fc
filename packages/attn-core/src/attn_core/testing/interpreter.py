# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# What is exchanged here is private to Triton.
"""Triton's interpreter without its repetitions: the same numbers from the same operations, in half of the time.

Each operation of an interpreted kernel wraps its result in types whose shapes are unwrapped, checked and printed
anew; scans with a function of their own walk number by number. Both take more time than the arithmetic of tiles of
16 × 16, and say nothing about a kernel.
"""

from typing import Any


def shorten() -> None:
    """Exchange what the interpreter repeats; for a process that does nothing but interpret kernels."""
    _call_functions_without_patching_again()
    _remember_types()
    _scan_whole_rows()


def _call_functions_without_patching_again() -> None:
    """Starting a kernel has patched ``triton.language``; functions that it calls need not do it again."""
    from triton.runtime.interpreter import InterpretedFunction

    original = InterpretedFunction.__call__
    patched: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("attn_core") or module in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(module)
        return original(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


def _remember_types() -> None:
    from triton.language import core
    from triton.runtime import interpreter

    new_type, new_tensor, numpy_type = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    of_types: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    # By the shape of the type, an object that lives in ``of_types``.
    of_tensors: dict[int, tuple[Any, Any, Any]] = {}
    of_elements: dict[int, tuple[Any, Any]] = {}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        values = getattr(shape, "values", shape)  # Triton's tuple, or a list
        plain = tuple([size.value if isinstance(size, core.constexpr) else size for size in values])
        known = of_types.get(plain)
        if known is None:
            new_type(self, element_ty, shape)
            of_types[plain] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = known
        self.name = f"<{text}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else None
        known = of_tensors.get(id(shape))
        if known is None or known[0] is not shape:
            new_tensor(self, handle, type)
            of_tensors[id(shape)] = shape, self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.shape, self.numel = known

    def dtype_of(type: Any) -> Any:
        element = type.element_ty if isinstance(type, core.block_type) else type
        known = of_elements.get(id(element))
        if known is None or known[0] is not element:
            known = of_elements[id(element)] = element, numpy_type(element)
        return known[1]

    core.block_type.__init__ = init_type
    core.tensor.__init__ = init_tensor
    interpreter._get_np_dtype = dtype_of


def _scan_whole_rows() -> None:
    """The sequential scan, with the combining function called once for each step instead of once for each number."""
    import numpy as np
    from triton.runtime.interpreter import ScanOps

    def scan(self: Any, inputs: Any) -> list[Any]:
        arrays = [x.handle.data for x in inputs]
        results = [np.zeros_like(array) for array in arrays]
        before: tuple[Any, ...] | None = None
        for step in range(arrays[0].shape[self.axis]):
            at = (*(slice(None),) * self.axis, step)
            now = [self.to_tensor(np.ascontiguousarray(a[at]), x.dtype) for a, x in zip(arrays, inputs, strict=True)]
            before = tuple(now) if before is None else tuple(self.combine_fn.fn(*before, *now))
            for result, value in zip(results, before, strict=True):
                result[at] = value.handle.data.reshape(result[at].shape)
        return [self.to_tensor(result, x.dtype) for result, x in zip(results, inputs, strict=True)]

    ScanOps.generic_scan = scan
