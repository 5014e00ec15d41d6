"""One run of the golden record in a process of its own: what came out of it, as JSON. tools/golden.py starts it.

    python tools/golden_run.py '{"network": "digits_vit", "samples": 64, "budget": "6 bits", ...}'

The quantkit that Python finds first is what runs. Only its public names are used, and of a result the fields that
``codes_of`` reads, whose names may differ between the checkouts that are compared. Networks and images are those of
this tool's own checkout and of the benchmark data.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import resource
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import quantkit

REPOSITORY = Path(__file__).resolve().parent.parent
CARRIED = REPOSITORY / "calibration"
DATA = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
# network -> weights, images, and the array of calibration images among them
NETWORKS = {
    "digits_cnn": (CARRIED / "digits_cnn.safetensors", CARRIED / "digits.npz", "images"),
    "digits_vit": (CARRIED / "digits_vit.safetensors", CARRIED / "digits.npz", "images"),
    "resnet20": (DATA / "resnet20.safetensors", DATA / "cifar10_calib.npz", "images"),
    "resnet8": (DATA / "resnet8_mlperf.safetensors", DATA / "cifar10_calib.npz", "images"),
    "mobilenetv1": (DATA / "mobilenetv1_025_vww.safetensors", DATA / "vww_images.npz", "calib"),
    "vit_hybrid": (DATA / "vit_hybrid_cifar10.safetensors", DATA / "cifar10_calib.npz", "images"),
}
# what a quantizer says of its numbers -> the attributes that may hold it
FIELDS = {
    "codes": ("codes",),
    "scale": ("scale", "scales"),
    "zero_point": ("zero_point", "zero_points"),
    "bits": ("bits",),
}


@dataclass
class Case:
    """A float network with its calibration images and, for the digits, what is right on ``unseen`` ones."""

    model: nn.Module
    images: Tensor
    unseen: Tensor | None = None
    labels: Tensor | None = None

    @torch.no_grad()
    def top1(self, model: nn.Module) -> float:
        """The share of right answers, in percent."""
        assert self.unseen is not None and self.labels is not None, "a limit on accuracy needs labels"
        return 100 * float((model(self.unseen).argmax(-1) == self.labels).float().mean())


@dataclass
class Forwards:
    """How often modules of one class are called, and with how many samples. Recorded steps that are replayed are no
    calls.
    """

    kind: type[nn.Module]
    calls: int = 0
    samples: int = 0
    phases: dict[str, str] = field(default_factory=dict)

    def seen(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if type(module) is not self.kind:
            return
        self.calls += 1
        size = args[0].shape[0] if args and isinstance(args[0], Tensor) else 0
        self.samples += size if type(size) is int else 0  # a symbolic size must not be asked for its value

    def close(self, phase: str) -> None:
        """Note what was counted as the phase's, and count from zero."""
        self.phases[phase] = f"{self.calls} calls, {self.samples} samples"
        self.calls = self.samples = 0


@contextmanager
def counted(kind: type[nn.Module]) -> Iterator[Forwards]:
    forwards = Forwards(kind)
    hook = register_module_forward_pre_hook(forwards.seen)
    try:
        yield forwards
    finally:
        hook.remove()


def recipe_model(name: str) -> ModuleType:
    """The module ``recipes/models/<name>.py`` of this tool's checkout."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "recipes" / "models" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case_of(network: str, samples: int) -> Case:
    weights, file, array = NETWORKS[network]
    recipe = recipe_model(network)
    model = recipe.build()
    model.load_state_dict(load_file(weights))
    held = np.load(file)
    if "calibration" not in held:
        return Case(model, recipe.preprocess(held[array][:samples]))
    images = recipe.preprocess(held[array])
    labels = torch.from_numpy(held["labels"]).long()
    seen, unseen = held["calibration"][:samples], held["evaluation"]
    return Case(model, images[seen], images[unseen], labels[unseen])


def quantized(case: Case, run: Mapping[str, Any]) -> quantkit.Result:
    """What the run asks for: a plan that gives every layer one scheme is applied, a budget is met."""
    options = {"progress": False, **run["options"]}
    if "target" in options:
        options["target"] = REPOSITORY / options["target"]
    images = case.images if run["calibrated"] else None
    if run["scheme"]:
        layers = (n for n, module in case.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))
        return quantkit.apply(case.model, dict.fromkeys(layers, run["scheme"]), images, **options)
    if run["evaluated"]:
        options["evaluate"] = case.top1
    return quantkit.quantize(case.model, run["budget"], images, **options)


def digest(*parts: object) -> str:
    """A short hash of bytes and of what prints the same in every process."""
    total = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:16]


def plan_of(plan: quantkit.Plan) -> dict[str, str]:
    """Schemes and sites of a plan, without how they came about."""
    sites = {f"site {name}": str(fmt) for name, fmt in plan.sites.items()}
    return {name: str(scheme) for name, scheme in plan.schemes.items()} | sites


def codes_of(quantizer: Any) -> str:
    """A hash of a weight's or a site's numbers, whatever type holds them: codes, scales as float32, zero points (none
    are as good as zeros) and bits.
    """
    found = {key: value for key, names in FIELDS.items() if (value := _first_of(quantizer, names)) is not None}
    if not found:
        raise ValueError(f"nothing of {', '.join(FIELDS)} in {quantizer!r}: teach codes_of its names")
    parts: list[object] = []
    for key, value in found.items():
        numbers = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        if (key == "zero_point" and not numbers.any()) or (key == "bits" and "codes" in found):
            continue  # a weight's width is the plan's
        numbers = numbers.astype(np.float32 if key == "scale" else np.int64)
        parts += [key, numbers.shape if key == "codes" else numbers.size, numbers.tobytes()]
    return digest(*parts)


def _first_of(quantizer: Any, names: tuple[str, ...]) -> Any:
    """The first of these attributes that holds something; methods are none: some quantizers compute codes."""
    held = (getattr(quantizer, name, None) for name in names)
    return next((value for value in held if value is not None and not callable(value)), None)


def graph_of(path: Path) -> dict[str, Any]:
    """An ONNX graph: how many of which operations, and a hash of what each output is computed from, which sees neither
    names of inner values nor the order of nodes.
    """
    model = onnx.load(path)
    graph = model.graph
    known = {"": digest("left out")}
    known |= {value.name: digest("input", value.name, _typed(value)) for value in graph.input}
    known |= {tensor.name: digest("constant", _unnamed(tensor)) for tensor in graph.initializer}
    for node in graph.node:
        attributes = sorted((a.name, _unnamed(a.t) if a.HasField("t") else _bytes(a)) for a in node.attribute)
        made = digest(node.domain, node.op_type, attributes, [known[name] for name in node.input])
        known |= {name: digest(made, k) for k, name in enumerate(node.output) if name}
    outputs = sorted((value.name, known[value.name], _typed(value)) for value in graph.output)
    operations = Counter(node.op_type for node in graph.node)
    versions = sorted((opset.domain, opset.version) for opset in model.opset_import)
    return {"computation": digest(outputs, versions, sorted(operations.items()))} | dict(sorted(operations.items()))


def _typed(value: onnx.ValueInfoProto) -> tuple[Any, ...]:
    """Element type and sizes, None where a size follows the input."""
    kind = value.type.tensor_type
    return kind.elem_type, [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]


def _unnamed(tensor: onnx.TensorProto) -> bytes:
    bare = onnx.TensorProto()
    bare.CopyFrom(tensor)
    for name in ("name", "doc_string", "metadata_props"):
        bare.ClearField(name)
    return _bytes(bare)


def _bytes(message: Any) -> bytes:
    return message.SerializeToString(deterministic=True)


@torch.no_grad()
def divergence(wanted: Tensor, found: Tensor) -> float:
    """Mean KL divergence of the softmax of ``found`` from that of ``wanted``."""
    p, q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_mb() -> float:
    """The most memory this process has held: of its own since it was started where Linux tells it, since ru_maxrss
    goes on from what the parent held.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    own = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    return (own or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e3


def record_of(case: Case, run: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out a run and export what came out, and say what that is and what it took."""
    start = cpu_s()
    with counted(type(case.model)) as forwards, tempfile.TemporaryDirectory() as folder:
        result = quantized(case, run)
        forwards.close("quantize")
        held = peak_mb()
        path = Path(folder) / "model.onnx"
        result.export_onnx(path, **({} if run["calibrated"] else {"example": case.images}))
        forwards.close("export")
        # taken before anything is computed for the record alone
        taken = {"cpu_s": cpu_s(), "work_s": cpu_s() - start, "result_mb": held, "peak_mb": peak_mb()}
        graph = graph_of(path)
    simulated = result.simulated()
    codes = {name: codes_of(weight) for name, weight in simulated.weights.items()}
    codes |= {f"site {name}": codes_of(found) for name, found in simulated.ranges.items()}
    with torch.no_grad():
        kl = divergence(case.model(case.images), result.model(case.images))
    what = {"plan": plan_of(result.plan), "codes": codes, "graph": graph, "forwards": forwards.phases}
    return what | {"kl": kl, "metrics": result.metrics, "quantkit": quantkit.__file__} | taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="a run of tools/golden.py as JSON")
    run = json.loads(parser.parse_args().run)
    torch.set_num_threads(1)  # what is computed and counted must not depend on the machine's load
    missing = [file for file in NETWORKS[run["network"]][:2] if not file.exists()]
    if missing:
        print(json.dumps({"skipped": f"no {missing[0]}: set QUANTKIT_DATA to the folder of the benchmark data"}))
        return
    print(json.dumps(record_of(case_of(run["network"], run["samples"]), run)))


if __name__ == "__main__":
    main()
