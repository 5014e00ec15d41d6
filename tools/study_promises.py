"""Do memory and time stay within what is announced? Peak memory and processor time of profiles and of applied plans.

    python tools/study_promises.py [--only NAME ...] [--list] [--keep FILE] [--markdown FILE]

A profile is measured and a plan applied, each in a process of its own, on one thread, where a tiny network has been
quantized before, so that libraries are loaded. Memory is the peak of the resident memory above what was
resident before, time that of the processor. The rule: measured memory is at most 1.5 times what was announced, and
what was announced at most 4 times what was measured; time is within a factor of 2. Exit code 1 where it does not hold.
Linux only (``/proc``); the language models need transformers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what learning loads at its first step
from golden_run import case_of
from study_preparing import resident
from torch import Tensor, nn

from quantkit.plan import Plan
from quantkit.progress import one_call, said
from quantkit.stages.apply import Application, apply_plan
from quantkit.stages.forecast import forecast
from quantkit.stages.options import ApplyOptions, Run
from quantkit.stages.profile import measure
from quantkit.stages.request import Request, make_ready

MB = 1e6
LEAST_SECONDS = 0.5  # what takes less is nothing that anybody waits for
LEAST_BYTES = 8e6  # and less memory than this is the allocator's own affair
QUIET = Run(progress=False)


@dataclass(frozen=True)
class Case:
    """A network with its calibration inputs, the candidates of its profile, and how its plan is applied."""

    build: Callable[[], tuple[nn.Module, Any]]
    schemes: tuple[str, ...] = ("w4a8", "w8a8")
    learning: str = "none"
    profiled: bool = True
    memory: str | None = None


@dataclass(frozen=True)
class Promise:
    """One verb on one network: bytes and seconds, announced and measured."""

    network: str
    verb: str
    announced_bytes: float
    measured_bytes: float
    announced_seconds: float
    measured_seconds: float

    @property
    def memory_kept(self) -> bool:
        measured = max(self.measured_bytes, LEAST_BYTES)
        return measured <= 1.5 * max(self.announced_bytes, LEAST_BYTES) and self.announced_bytes <= 4 * measured

    @property
    def time_kept(self) -> bool:
        announced, measured = (max(s, LEAST_SECONDS) for s in (self.announced_seconds, self.measured_seconds))
        return 0.5 <= announced / measured <= 2

    @property
    def row(self) -> str:
        broken = [name for name, kept in (("memory", self.memory_kept), ("time", self.time_kept)) if not kept]
        verdict = f"not {' and '.join(broken)}" if broken else "yes"
        return (
            f"| {self.network} | {self.verb} | {self.announced_bytes / MB:,.0f} | {self.measured_bytes / MB:,.0f} "
            f"| {self.announced_seconds:.1f} | {self.measured_seconds:.1f} | {verdict} |"
        )


HEADER = "\n".join(
    [
        "| network | verb | MB announced | MB measured | s announced | s measured | kept |",
        "|---|---|---|---|---|---|---|",
    ]
)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def benchmark(name: str, samples: int) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        case = case_of(name, samples)
        return case.model, case.images

    return build


def wide_conv() -> tuple[nn.Module, Any]:
    """One output reads 4,096 channels at 16 places: 65,536 inputs."""
    return nn.Sequential(nn.Conv1d(4096, 16, 16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 10)), randn(16, 4096, 24)


def wide_linear() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(4096, 64), nn.ReLU(), nn.Linear(64, 10)), randn(256, 4096)


def many_classes() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 50_000)), randn(128, 64)


def large_images() -> tuple[nn.Module, Any]:
    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    body = [*stage(3, 32), *stage(32, 64), *stage(64, 128), *stage(128, 128)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 100)), randn(128, 3, 64, 64)


def tokens(count: int, length: int, vocabulary: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part} for part in ids.split(4)]


def bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    config = BertConfig(vocab_size=2000, max_position_embeddings=512, num_labels=4, **sizes)
    return BertForSequenceClassification(config), tokens(8, 512, 2000)


def llama() -> tuple[nn.Module, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=2000, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    config.num_attention_heads = config.num_key_value_heads = 4
    config.use_cache = False
    return LlamaForCausalLM(config), tokens(2, 1024, 2000)


CASES = {
    "resnet20": Case(benchmark("resnet20", 64)),
    "resnet8": Case(benchmark("resnet8", 128)),
    "mobilenetv1": Case(benchmark("mobilenetv1", 32)),
    "vit_hybrid": Case(benchmark("vit_hybrid", 32)),
    "convolution of 65,536 inputs": Case(wide_conv, ("w4a8",), profiled=False),
    "the same in 1 GB": Case(wide_conv, ("w4a8",), memory="1 GB"),
    "linear of 4,096 inputs": Case(wide_linear),
    "50,000 classes": Case(many_classes),
    "512 tokens": Case(bert),
    "1,024 tokens": Case(llama),
    "64 pixels": Case(large_images),
    "learned as a network": Case(benchmark("digits_cnn", 128), ("w3a8",), "network", profiled=False),
    "learned in blocks": Case(benchmark("digits_cnn", 128), ("w3a8",), "block", profiled=False),
}


def request_for(case: Case, model: nn.Module, inputs: Any) -> Request:
    return make_ready(model.eval(), inputs, schemes=case.schemes, memory=case.memory)


class Meter:
    """Counts from where it is made."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free is given back
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self.before, self.started = resident("VmRSS"), time.process_time()

    @property
    def bytes(self) -> int:
        return resident("VmHWM") - self.before

    @property
    def seconds(self) -> float:
        return time.process_time() - self.started


def profiled(network: str, case: Case, model: nn.Module, inputs: Any) -> Promise:
    request = request_for(case, model, inputs)
    expected = forecast(request)
    meter = Meter()
    measure(request, QUIET)
    return Promise(network, "profile", expected.peak_bytes, meter.bytes, expected.seconds, meter.seconds)


def applied(network: str, case: Case, model: nn.Module, inputs: Any) -> Promise:
    request = request_for(case, model, inputs)
    plan = Plan.of({name: schemes[0] for name, schemes in request.candidates.items()})
    options = ApplyOptions(
        reconstruction=case.learning, correction="none", reparameterization="none", memory=case.memory
    )
    meter = Meter()
    result = apply_plan(request.session, plan, Application(options, run=QUIET))
    bytes, seconds = float(result.notes["working_bytes"]), announced_seconds()
    return Promise(network, "apply", bytes, meter.bytes, seconds, meter.seconds)


def announced_seconds() -> float:
    """The last that was said of the time of rounding and learning: nothing that is kept with a result has it."""
    found = [match for text in said() if (match := re.search(r"about (\d+) s of the processor$", text))]
    return float(found[-1][1])


VERBS = {"profile": profiled, "apply": applied}


@one_call()
def measured(network: str, verb: str) -> Promise:
    """What a verb takes on a network in this process, after a tiny one has loaded the libraries."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tiny = Case(lambda: (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)), randn(16, 3, 8, 8)))
    for work in VERBS.values():
        work("", tiny, *tiny.build())
    return VERBS[verb](network, CASES[network], *CASES[network].build())


def in_own_process(network: str, verb: str) -> Promise:
    command = [sys.executable, __file__, "--measure", network, verb]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Promise(**json.loads(done.stdout.splitlines()[-1]))


def kept(file: Path | None, network: str, verb: str) -> Promise | None:
    """What an earlier run has measured."""
    lines = file.read_text().splitlines() if file is not None and file.exists() else []
    every = [Promise(**json.loads(line)) for line in lines]
    return next((one for one in every if (one.network, one.verb) == (network, verb)), None)


PAGE = """# Do memory and time stay within what is announced?

`quantkit plan` and every verb say beforehand what they will take. `python tools/study_promises.py` compares: peak of
the resident memory above what was resident when the verb began, the model, its inputs and all libraries being there,
and seconds of the processor on one thread. Kept is a promise where the measured memory is at most 1.5 times what was
announced, what was announced at most 4 times what was measured, and the time within a factor of 2; memory below
{least:.0f} MB and times below {seconds} s count as that much.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help="these networks")
    parser.add_argument("--list", action="store_true", help="print the names and exit")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="lines of JSON: a run that was killed goes on there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page of results")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(CASES))
        return
    if asked.measure:
        print(json.dumps(asdict(measured(*asked.measure))))
        return
    print(HEADER)
    promises = []
    for network in asked.only or CASES:
        for verb in VERBS if CASES[network].profiled else ("apply",):
            promises.append(kept(asked.keep, network, verb) or in_own_process(network, verb))
            print(promises[-1].row, flush=True)
            if asked.keep is not None and kept(asked.keep, network, verb) is None:
                with asked.keep.open("a") as file:
                    print(json.dumps(asdict(promises[-1])), file=file)
    if asked.markdown:
        table = "\n".join([HEADER, *(promise.row for promise in promises)])
        asked.markdown.write_text(PAGE.format(least=LEAST_BYTES / MB, seconds=LEAST_SECONDS, table=table))
    raise SystemExit(not all(promise.memory_kept and promise.time_kept for promise in promises))


if __name__ == "__main__":
    main()
