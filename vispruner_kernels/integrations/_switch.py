"""Modules whose methods are replaced, by a class of their own.

A module's class becomes a subclass of the same name, as FSDP2 and `torch.nn.utils.parametrize` do
it. Copies that PyTorch makes of a module, such as the replicas of DataParallel, have the class too
and run on their own weights. The methods are data descriptors, so they come first whatever others
(accelerate, a user) store on the module as `module.forward`, before or after.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, update_wrapper, wraps
from types import MethodType
from typing import Any, TypeAlias

# Takes the module, its original method and the arguments by name.
Replacement: TypeAlias = Callable[[Any, Callable[..., Any], dict[str, Any]], Any]

METHODS = ("forward", "generate")
# In the `__dict__` of a module: replacements by the names of methods.
_REPLACED = "_vispruner_replaced"


class _Method:
    """One method of a class, which the module may have replaced."""

    def __init__(self, cls: type, name: str) -> None:
        self._class, self._name, self._known = cls, name, f"_vispruner_{name}"

        @wraps(getattr(cls.__mro__[1], name))
        def unbound(module: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(module, name)(*args, **kwargs)

        self._unbound = unbound

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self._unbound
        entries = vars(module)
        stored, function = entries.get(self._name), getattr(self._class.__mro__[1], self._name)
        known = entries.get(self._known)
        # A replica begins with the entries of the module it was made of.
        if (
            known is None
            or known[0] is not stored
            or known[1] is not function
            or known[2].__self__ is not module
        ):
            inherited = getattr(super(self._class, module), self._name)
            original = inherited if stored is None else stored
            method = MethodType(_replaceable(self._name, original, inherited, module), module)
            known = entries[self._known] = stored, function, method
        return known[2]

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)[self._name] = value

    def __delete__(self, module: Any) -> None:
        if self._name not in vars(module):
            raise AttributeError(self._name)
        del vars(module)[self._name]


def _replaceable(
    name: str, original: Callable[..., Any], inherited: Callable[..., Any], module: Any
) -> Callable[..., Any]:
    """A method that calls what the module has in place of `original` at that time."""
    signature = inspect.signature(original)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        # It takes whatever the class takes. transformers looks for names there.
        signature = inspect.signature(inherited)
    variadic = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]

    def call(module: Any, /, *args: Any, **kwargs: Any) -> Any:
        replaced = vars(module).get(_REPLACED)
        if replaced is None:
            return original(*args, **kwargs)
        if args:
            kwargs = dict(signature.bind(*args, **kwargs).arguments)
            for extra in variadic:
                kwargs.update(kwargs.pop(extra, {}))
        return replaced[name](module, original, kwargs)

    # Others follow `__wrapped__` when they undo what they did to a model, and for the signature.
    # They copy `__dict__`, so nothing else stands there.
    unbound: Any = getattr(original, "__func__", None)
    if unbound is None or original.__self__ is not module:  # type: ignore[attr-defined]

        def stored(module: Any, /, *args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

        unbound = stored
        update_wrapper(unbound, original, updated=())
        first = inspect.Parameter("module_", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [first, *signature.parameters.values()]
        unbound.__signature__ = signature.replace(parameters=parameters)
    return update_wrapper(call, unbound, updated=())


@cache
def _subclass(base: Any) -> type:
    """Of the same name, which transformers writes into configurations."""

    def reduce(module: Any, protocol: Any) -> Any:
        if _REPLACED in vars(module):
            raise RuntimeError(
                "the model prunes: call remove() of its handle before copying it or saving it whole"
            )
        return base.__reduce_ex__(module, protocol)

    copied = ("__module__", "__qualname__", "__doc__")
    cls = type(base.__name__, (base,), {name: getattr(base, name) for name in copied})
    for name in METHODS:
        if hasattr(base, name):
            setattr(cls, name, _Method(cls, name))
    cls.__reduce_ex__ = reduce  # type: ignore[assignment, method-assign]
    return cls


def switch(module: Any, replacements: Mapping[str, Replacement]) -> None:
    """Replaces methods of the module."""
    vars(module)[_REPLACED] = replacements
    cls: Any = type(module)
    module.__class__ = _subclass(cls)
    # Made here, not while a compiler traces.
    for name in METHODS:
        getattr(module, name, None)


def switch_back(module: Any) -> None:
    """Undoes `switch`. A class that others derived from ours (FSDP2) stays, and passes calls on."""
    for name in (_REPLACED, *(f"_vispruner_{name}" for name in METHODS)):
        vars(module).pop(name, None)
    base = type(module).__mro__[1]
    if type(module) is _subclass(base):
        module.__class__ = base


def is_switched(module: Any) -> bool:
    """Whether methods of the module are replaced."""
    return _REPLACED in vars(module)
