"""Changes to Triton's interpreter for the tests. It becomes faster, and an element of a matrix product no longer
depends on its place in the tile."""

import inspect

import numpy as np


def set_up() -> None:
    """Change the interpreter of this process. A second call does nothing."""
    speed_up()
    sum_products_in_float64()


def sum_products_in_float64() -> None:
    """Let ``tl.dot`` sum products of float16 and float32 in float64 and round once.

    A GPU sums all elements of a matrix product in the same order. NumPy's BLAS has separate code for the edge of a
    matrix, so a similarity could differ in its last bit between two kernels. For similarities of 10¹⁰ that bit is far
    above 1.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot
    if dot.__module__ == __name__:
        return

    def create_dot(self, a, b, d, *options):
        if any(x.data.dtype not in (np.float16, np.float32) for x in (a, b, d)):
            return dot(self, a, b, d, *options)
        with np.errstate(over="ignore", invalid="ignore"):  # inf and NaN are meant
            total = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
            return interpreter.TensorHandle(total.astype(d.data.dtype) + d.data, d.dtype.scalar)

    builder.create_dot = create_dot


def speed_up() -> None:
    """Let the interpreter replace the builtins of triton.language once per launch, and look for them once per process.
    By itself it does both again in every call of a function inside a kernel, which takes half of its time. The
    replacements are the same."""
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(
        hasattr(interpreter, name) for name in ("_patch_builtin", "_patch_attr", "_patch_lang", "_LangPatchScope")
    ):
        return  # this version of Triton has a different layout
    patch_lang = interpreter._patch_lang
    if patch_lang.__module__ == __name__:
        return
    names: dict[object, list[str]] = {}
    modules: dict[object, list] = {}

    def patch_builtins(owner, *rest):
        if owner not in names:
            members = inspect.getmembers(owner)
            names[owner] = [name for name, member in members if language.core.is_builtin(member)]
        for name in names[owner]:
            member = getattr(owner, name)
            if language.core.is_builtin(member):  # if it is not replaced yet
                interpreter._patch_attr(owner, name, member, *rest)

    def patch_languages(function):
        if function not in modules:
            used = [value for value in function.__globals__.values() if inspect.ismodule(value)]
            modules[function] = [value for value in used if value in (language, language.core)]
        if all(module.range.__name__ == "_new_range" for module in modules[function]):  # a kernel's launch did it
            return interpreter._LangPatchScope()
        return patch_lang(function)

    interpreter._patch_builtin = patch_builtins
    interpreter._patch_lang = patch_languages
