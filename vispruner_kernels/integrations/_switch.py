"""Replace methods of a module by giving it a subclass.

The class of the module becomes a subclass of the same name. FSDP2 and `torch.nn.utils.parametrize`
work in the same way. Copies that PyTorch makes of a module, such as the replicas of DataParallel,
have this class too and run on their own weights.

The methods of the subclass are data descriptors. So Python calls them even if others (accelerate, a
user) store a function as `module.forward`, before or after the replacement.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache, partial, update_wrapper, wraps
from types import MethodType
from typing import Any, TypeAlias

# A function of the module, its original method and the arguments by name.
Replacement: TypeAlias = Callable[[Any, Callable[..., Any], dict[str, Any]], Any]

METHODS = ("forward", "generate")
# Key in the `__dict__` of a module: its replacements, by the name of the method.
_REPLACED = "_vispruner_replaced"


class _Method:
    """A data descriptor for one method, which calls the replacement if the module has one."""

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
        # A replica starts with a copy of the original module's entries.
        if (
            known is None
            or known[0] is not stored
            or known[1] is not function
            or known[2].__self__ is not module
        ):
            call = self._call_of(module, stored)
            known = entries[self._known] = stored, function, MethodType(call, module)
        return known[2]

    def _call_of(self, module: Any, stored: Callable[..., Any] | None) -> Callable[..., Any]:
        """Make the function that calls the module's replacement or, without one, its method.

        The method is the function stored on the module, or the one that its class inherits.
        """
        inherited = getattr(super(self._class, module), self._name).__func__
        original = inherited if stored is None else stored
        signature = _signature(original, inherited, type(module), self._name)
        variadic = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        name, is_stored = self._name, stored is not None

        # The argument `module` may be a copy of the module that this function was made for.
        def call(module: Any, /, *args: Any, **kwargs: Any) -> Any:
            replaced = vars(module).get(_REPLACED)
            if replaced is None:
                return original(*args, **kwargs) if is_stored else original(module, *args, **kwargs)
            if args:
                kwargs = dict(signature.bind(*args, **kwargs).arguments)
                for extra in variadic:
                    kwargs.update(kwargs.pop(extra, {}))
            method = original if is_stored else partial(original, module)
            return replaced[name](module, method, kwargs)

        # Libraries follow `__wrapped__` to undo their changes of a model and to read the signature.
        # They copy `__dict__` of the function, so it has no other entries.
        unbound: Any = inherited
        if getattr(stored, "__self__", None) is module:
            unbound = stored.__func__  # type: ignore[union-attr]
        elif stored is not None:

            def unbound(module: Any, /, *args: Any, **kwargs: Any) -> Any:
                return stored(*args, **kwargs)

            update_wrapper(unbound, stored, updated=())
            first = inspect.Parameter("module_", inspect.Parameter.POSITIONAL_ONLY)
            parameters = [first, *signature.parameters.values()]
            unbound.__signature__ = signature.replace(parameters=parameters)
        return update_wrapper(call, unbound, updated=())

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)[self._name] = value

    def __delete__(self, module: Any) -> None:
        if self._name not in vars(module):
            raise AttributeError(self._name)
        del vars(module)[self._name]


def _signature(
    original: Callable[..., Any], inherited: Callable[..., Any], cls: type, name: str
) -> inspect.Signature:
    """The signature of the bound method.

    If the method takes only `*args, **kwargs`, return that of the next method in the method
    resolution order that names its parameters: this module and transformers need the names.
    """
    functions = [inherited, *(vars(base).get(name) for base in cls.__mro__)]
    signatures = [inspect.signature(partial(x, None)) for x in functions if inspect.isfunction(x)]
    if original is not inherited:
        signatures.insert(0, inspect.signature(original))
    for signature in signatures:
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        if not kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            return signature
    return signatures[0]


@lru_cache(64)
def _subclass(base: Any) -> type:
    """A subclass with the same name, because transformers writes the name into configurations."""

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
    """Replace methods of the module."""
    vars(module)[_REPLACED] = replacements
    cls: Any = type(module)
    module.__class__ = _subclass(cls)
    # Make the functions now, not while a compiler traces.
    for name in METHODS:
        getattr(module, name, None)


def switch_back(module: Any) -> None:
    """Undo `switch`. A class that others derived from ours (FSDP2) stays and calls the original."""
    for name in (_REPLACED, *(f"_vispruner_{name}" for name in METHODS)):
        vars(module).pop(name, None)
    if isinstance(vars(type(module)).get("forward"), _Method):
        module.__class__ = type(module).__mro__[1]


def is_switched(module: Any) -> bool:
    """Whether methods of the module are replaced."""
    return _REPLACED in vars(module)
