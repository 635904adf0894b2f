"""Triton's interpreter, made faster for the tests: half of its time went into looking for functions to replace."""

import inspect


def speed_up() -> None:
    """Let the interpreter replace the builtins of triton.language once a launch, and look for them once a process. It
    does both again in each call of a function that a kernel calls. What it replaces them by does not change."""
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(
        hasattr(interpreter, name) for name in ("_patch_builtin", "_patch_attr", "_patch_lang", "_LangPatchScope")
    ):
        return  # a Triton that is laid out in another way
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
