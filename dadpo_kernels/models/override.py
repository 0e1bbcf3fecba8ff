"""A forward of ours for one instance of a model, which survives copies, pickles and wrappers.

The instance gets a subclass of its class, of the same name. An attribute of the instance would not do: pickle looks a
bound method up by its name and finds the class's, and accelerate puts an attribute of its own in its place.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Protocol

_OVERRIDE = "_dadpo_override"  # attributes of the instance
_BEHIND = "_dadpo_behind"


class Override(Protocol):
    """What runs instead of an instance's forward for the calls that it wants; can be pickled."""

    def wants(self, kwargs: dict[str, Any]) -> bool:
        """Whether to take a call with these arguments, by name."""

    def __call__(self, causal: Any, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """`forward(**kwargs)` is what the call would have been."""


def override_forward(causal: Any, override: Override) -> None:
    """Let the override take the calls of this instance's forward that it wants; a later one replaces it.

    A forward that somebody gave the instance stays behind the override: accelerate leaves its autocast there after a
    run in mixed precision.
    """
    attributes = vars(causal)
    if not hasattr(type(causal), _OVERRIDE):
        causal.__class__ = _overridden(type(causal))  # type: ignore[arg-type]
    bound = types.MethodType(type(causal).forward, causal)
    if "_old_forward" in attributes:  # a hook of accelerate runs it, and puts it on the instance when it is removed
        attributes["_old_forward"] = bound
    elif "forward" in attributes and _innermost(attributes["forward"]) is not type(causal).forward:
        attributes[_BEHIND] = attributes.pop("forward")
        attributes.pop("_original_forward", None)  # what accelerate would put back in place of the override
    attributes[_OVERRIDE] = override


@functools.cache
def _overridden(cls: type) -> type:
    """The subclass of a model's class whose instances ask their override."""
    signature = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    positional = [n for n, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The class's forward is looked up and bound at each call, so that a copy of the model runs its own layers.
        behind = vars(self).get(_BEHIND) or functools.partial(cls.forward, self)  # type: ignore[attr-defined]
        override = vars(self).get(_OVERRIDE)
        if override is not None and len(args) <= len(positional):
            named = dict(zip(positional, args, strict=False)) | kwargs
            if override.wants(named):
                return override(self, behind, named)
        elif override is not None and override.wants(kwargs):
            return override(self, functools.partial(behind, *args), kwargs)
        return behind(*args, **kwargs)

    def reduce(self: Any, protocol: Any) -> tuple:
        return _new, (cls,), cls.__getstate__(self)  # type: ignore[call-arg]

    def set_state(self: Any, state: dict[str, Any]) -> None:
        # Pickle restores what accelerate put on the instance by its name, which is that of the override now.
        if getattr(state.get(_BEHIND), "__func__", None) is forward:
            del state[_BEHIND]
        if getattr(state.get("forward"), "__func__", None) is forward:
            del state["forward"]
            state.pop("_original_forward", None)
        cls.__setstate__(self, state)  # type: ignore[attr-defined]

    forward.overridden = cls  # type: ignore[attr-defined]
    # Trainers and `generate` read the signature. No `__wrapped__`, which `functools.wraps` would set: accelerate
    # follows it to remove its own wrapper, and would remove the override.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = cls.forward.__doc__  # type: ignore[attr-defined]
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, _OVERRIDE: None}
    methods = {"forward": forward, "__reduce_ex__": reduce, "__setstate__": set_state}
    return type(cls.__name__, (cls,), names | methods)


def _new(cls: type) -> Any:
    return object.__new__(_overridden(cls))  # type: ignore[arg-type]


def source(causal: Any) -> str:
    """The module that wrote the forward of an instance, behind an override."""
    function = _innermost(vars(causal).get(_BEHIND) or causal.forward)
    if hasattr(function, "overridden"):
        function = _innermost(function.overridden.forward)
    return function.__module__


def _innermost(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function that wrappers call in the end."""
    while (inner := getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)) is not None:
        forward = inner
    return forward
