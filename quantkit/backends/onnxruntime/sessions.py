"""onnxruntime sessions as quantkit opens them: on the CPU, a given number of threads, without busy waiting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantkit.backends.onnxruntime.translated import first_line
from quantkit.errors import InvalidRequest, QuantkitError
from quantkit.program.input_shapes import leaf_names
from quantkit.program.inputs import Batch
from quantkit.program.intercept import tensors_of
from quantkit.store import data_file

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def open_session(
    path: str | Path,
    threads: int = 0,
    optimized: bool = True,
    save_optimized: str | Path | None = None,
    profile: str | Path | None = None,
) -> InferenceSession:
    """A session on an ONNX file. ``threads`` 0 leaves their number to onnxruntime.

    Without optimization every operation runs in float as the file spells it: the file's exact meaning.
    ``save_optimized`` writes the graph that really runs, its tensors beside it as they may not fit into one file.
    ``profile``: how the name of the file begins into which ``end_profiling`` writes the time of every node. Raises
    QuantkitError where onnxruntime cannot load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
        beside = data_file(save_optimized).name
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", beside)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _errors() as error:
        raise QuantkitError(
            f"onnxruntime {onnxruntime.__version__} cannot load {Path(path).name}: {first_line(error)}. If quantkit "
            "wrote the file, please report this; an older onnxruntime may lack what the file needs."
        ) from error


def run_session(session: InferenceSession, batch: Batch) -> list[np.ndarray]:
    """Every output of a session on a batch; raises InvalidRequest for inputs that it rejects."""
    try:
        return list(session.run(None, feeds(session, batch)))
    except _errors() as error:
        shapes = ", ".join(f"{i.name} {i.shape}" for i in session.get_inputs())
        given = ", ".join(str(tuple(t.shape)) for t in tensors_of(batch))
        raise InvalidRequest(
            f"onnxruntime stopped on inputs of shape {given}; the file takes {shapes}. Pass inputs of these sizes, or "
            f"export with an example of other ones. ({first_line(error)})"
        ) from error


def _errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: its classes have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (*found, RuntimeError, ValueError)


def feeds(session: InferenceSession, batch: Batch) -> dict[str, np.ndarray]:
    """A batch as the session's inputs: keyword tensors by name, the others in order."""
    args, kwargs = batch
    named = dict(zip(leaf_names(kwargs, "input"), tensors_of(kwargs), strict=True))
    others = iter(tensors_of(args))
    names = [i.name for i in session.get_inputs()]
    return {n: (named[n] if n in named else next(others)).detach().cpu().contiguous().numpy() for n in names}
