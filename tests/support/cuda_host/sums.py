"""One call of `column_sums` on 3 columns of a [4, 5] float32 matrix, without PyTorch: python sums.py MODULE."""

import ctypes
import importlib.util
import sys

spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
assert spec and spec.loader  # noqa: PT018
cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
matrix, out = (ctypes.c_float * 20)(*range(20)), libc.malloc(ctypes.c_size_t(12))  # the sanitizer guards its ends
cuda.column_sums(cuda.Queue(0, 0), cuda.Matrix(ctypes.addressof(matrix), 5, cuda.Type.f32), 4, 3, 0, out)
assert list((ctypes.c_float * 3).from_address(out)) == [30, 34, 38]
print("checked")
