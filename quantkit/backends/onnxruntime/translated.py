"""What torch.export, the ONNX exporter and onnxruntime say, in a sentence: their messages begin with terminal codes,
and end in pages of a graph. The original stays with the error that is raised, as its cause.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from quantkit.errors import InvalidRequest

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_BY_VALUES = re.compile(r"[Dd]ata-dependent|Could not guard|GuardOnDataDependent|specialized integer|unbacked", re.A)
_NO_FORM = re.compile(r"No ONNX function found for.*?op='([\w.]+)'|No decompositions? registered for.*?([\w.]+::\w+)")
_OTHER_FORM = re.compile(r"parameter '(\w+)' is not provided\. Signature: pkg\.onnxscript\.torch_lib::([a-z]+)_(\w+)")
_OTHER_INPUT = re.compile(r"[Uu]nsupported input type <class '([\w.]+)'>")
_LONGEST = 200  # characters of a message


def first_line(error: BaseException) -> str:
    """The type of an error with the first line of its message."""
    text = _ESCAPES.sub("", str(error)).strip().partition("\n")[0].strip()
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def root_cause(error: BaseException) -> BaseException:
    """What an error was raised from, and that from, to the first: exporters wrap what stopped them."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def export_advice(error: BaseException) -> str:
    """What to do about a model that cannot be exported."""
    text = "\n".join(str(one) for one in _causes(error))
    if found := _NO_FORM.search(text):
        return (
            f"ONNX has no form for {found[1] or found[2]}. Write it with other operations, or leave it out of the "
            "model and compute it on what the file returns."
        )
    if found := _OTHER_FORM.search(text):
        return f"ONNX's form of {found[2]}.{found[3]} wants {found[1]!r}: pass it."
    if found := _OTHER_INPUT.search(text):
        return f"An argument is a {found[1]}. Let the model's forward take tensors, lists and dicts of them."
    values = "must not choose its operations by the values of tensors"
    if _BY_VALUES.search(text):
        return f"Its forward {values}, as an `if`, a loop or a size that is computed from one does: use torch.where."
    return f"Its forward {values}."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from or behind, each once."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def not_exported(error: Exception) -> InvalidRequest:
    """What to say of a model that torch.export or the conversion to ONNX stopped at."""
    return InvalidRequest(
        f"The model cannot be exported to ONNX. {export_advice(error)} (torch.export: {first_line(root_cause(error))})"
    )
