"""Triton's interpreter, made faster for the tests: half of its time went into looking for functions to replace."""

import inspect


def speed_up() -> None:
    """Look for the builtins of triton.language once, where the interpreter looks again in each call of a function that
    a kernel calls. What it replaces them by does not change."""
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(hasattr(interpreter, name) for name in ("_patch_builtin", "_patch_attr")):
        return  # a Triton that is laid out in another way
    names: dict[object, list[str]] = {}

    def patch_builtins(owner, *rest):
        if owner not in names:
            members = inspect.getmembers(owner)
            names[owner] = [name for name, member in members if language.core.is_builtin(member)]
        for name in names[owner]:
            member = getattr(owner, name)
            if language.core.is_builtin(member):  # if it is not replaced yet
                interpreter._patch_attr(owner, name, member, *rest)

    interpreter._patch_builtin = patch_builtins
