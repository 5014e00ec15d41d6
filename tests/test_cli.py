"""The command line: every verb, exit codes, and what it prints where."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from quantkit.backends.onnxruntime import writer as onnx_writer
from quantkit.cli import main
from quantkit.errors import InvalidRequest
from quantkit.plan import Plan, Profile
from quantkit.stages import profile as stage
from quantkit.version import VERSION
from tests.conftest import REPOSITORY
from tests.recipe.tiny import rewritten, write_tiny

VERBS = ("run", "plan", "profile", "bench", "allocate", "export", "explain", "list")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder with a recipe whose profile has been measured."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = rewritten(write_tiny(folder), workdir=str(folder / "work"))
    assert main(["profile", str(recipe), "--quiet", "--out", str(folder / "profile.safetensors")]) == 0
    return folder


@pytest.fixture
def recipe(shared: Path, tmp_path: Path, monkeypatch) -> str:
    """The recipe's path; the command runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return str(shared / "tiny.yaml")


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_bench_writes_a_target_that_limits_on_latency_are_met_with(
    recipe: str, shared: Path, tmp_path: Path, capsys
) -> None:
    assert main(["bench", recipe, "--quiet", "--seconds", "0", "--batch", "4", "--out", "times/target.yaml"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^stem\.0 +[\d.]+ +[\d.]+ +[\d.]+", printed, re.M)
    assert "1 thread(s), batch 4: float" in printed
    assert "written to times/target.yaml: pass it as target" in printed
    allocate = ["allocate", str(shared / "profile.safetensors"), "--quiet", "--budget", "latency=100%, 9 bits"]
    assert main(allocate) == 1
    assert "run `quantkit bench RECIPE`" in capsys.readouterr().err
    assert main([*allocate, "--target", "times/target.yaml"]) in (0, 2)  # 2: this machine is no faster on integers
    assert main(["plan", recipe, "--set", "target=times/target.yaml", "--set", "budget=latency=200%"]) == 0
    assert main(["plan", recipe, "--set", "target=missing.yaml"]) == 1
    assert f"target: Cannot read the target file '{tmp_path}/missing.yaml'" in capsys.readouterr().err


@pytest.mark.slow
def test_run(recipe: str, tmp_path: Path, capsys) -> None:
    assert main(["run", recipe, "--set", "budget=5 bits", "--set", "output=there"]) == 0
    printed, told = capsys.readouterr()
    left = {"model.onnx", "plan.json", "weights.safetensors", "recipe.yaml"}
    assert files_in(tmp_path) == {f"there/{name}" for name in left}
    assert re.search(r"^metric of the float model +100$", printed, re.M)
    assert re.search(r"^ONNX file, quantized +[\d,]+ bytes \(\d+% (smaller|larger)\)$", printed, re.M)
    assert re.search(r"^conv +w\da8 +w\da8 adds ", printed, re.M)
    assert "left in there: model.onnx, plan.json, weights.safetensors, recipe.yaml" in printed
    assert "quantkit: reusing the profile " in told
    assert Plan.load("there/plan.json").provenance["budget"] == "5 bits"


def test_plan(recipe: str, tmp_path: Path, capsys) -> None:
    assert main(["plan", recipe]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^stem\.0 +conv2d +12x2x3x3 +w3a8, w5a8, w8a8$", printed, re.M)
    assert "4 bits can be met" in printed
    assert files_in(tmp_path) == set()


def test_profile_then_allocate(recipe: str, tmp_path: Path, capsys) -> None:
    assert main(["profile", recipe]) == 0
    printed = capsys.readouterr().out
    measured = Profile.load("out/tiny/profile.safetensors")
    assert f"digest {measured.digest()}, written to out/tiny/profile.safetensors" in printed
    assert f"{len(measured.entries)} formats of 4 layers and {len(measured.sites)} sites" in printed
    assert main(["allocate", "out/tiny/profile.safetensors", "--budget", "7 bits", "--schemes", "w3a8", "w8a8"]) == 0
    plan = Plan.load("plan.json")
    assert {str(scheme) for scheme in plan.schemes.values()} == {"w3a8", "w8a8"}
    assert capsys.readouterr().out == f"{plan}\nwritten to plan.json\n"
    arguments = ["--budget", "4 bits", "--solver", "greedy", "--out", "deep/greedy.json"]
    assert main(["allocate", "out/tiny/profile.safetensors", *arguments]) == 0
    assert Plan.load("deep/greedy.json").provenance["solver"] == "greedy"


def test_front_of_a_profile(shared: Path, recipe: str, tmp_path: Path, capsys) -> None:
    assert main(["allocate", str(shared / "profile.safetensors"), "--front", "--out", "every"]) == 0
    assert files_in(tmp_path) == {"every.csv", "every.png"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len((tmp_path / "every.csv").read_text().splitlines()) + 1
    assert lines[-1] == "written to every.csv and every.png"


def test_front_measured_by_the_recipe_of_the_profile(recipe: str, tmp_path: Path, capsys) -> None:
    assert main(["profile", recipe]) == 0
    capsys.readouterr()
    arguments = ["allocate", "out/tiny/profile.safetensors", "--front", "--measure", recipe]
    assert main(arguments) == 0
    head, *rows = (tmp_path / "front.csv").read_text().splitlines()
    assert head.split(",")[2:] == ["predicted_damage", "measured_damage"]
    predicted, measured = np.array([[float(value) for value in row.split(",")[2:]] for row in rows]).T
    assert spearmanr(predicted, measured).statistic > 0.8
    capsys.readouterr()
    assert main(["profile", recipe, "--set", "seed=5", "--out", "five.safetensors"]) == 0
    assert main([arguments[0], "five.safetensors", *arguments[2:]]) == 1
    assert "was not measured by this request: seed differ" in capsys.readouterr().err
    assert main(["allocate", "p.safetensors", "--budget", "4 bits", "--measure", recipe]) == 1


def test_explain(shared: Path, recipe: str, capsys) -> None:
    assert main(["allocate", str(shared / "profile.safetensors"), "--budget", "5 bits"]) == 0
    capsys.readouterr()
    assert main(["explain", "plan.json", "conv"]) == 0
    assert re.match(r"conv: w\da8\n  w\da8 adds [\d.e-]+ of damage on its own\n", capsys.readouterr().out)
    assert main(["explain", "plan.json"]) == 0
    everything = capsys.readouterr().out
    assert all(f"{name}: " in everything for name in Plan.load("plan.json").schemes)
    assert main(["explain", "plan.json", "cnov"]) == 1
    assert "Did you mean 'conv'" in capsys.readouterr().err


def test_list(capsys, monkeypatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for line in (
        r"target +onnxruntime-cpu: ",
        r"  schemes +w2a8, w3a8, .*, float$",
        r"  layers +conv1d, conv2d, conv3d, linear, matmul$",
        r"sensitivity +(?!.*(lim|zd,|depth)).*gram, .*kl.*, weight-error, weight-error-zd$",
        r"rankings +depth, lim, lim-layer, zd, zd-layer \(only order layers: for solver by-rank\)$",
        r"solver +.*auto",
        r"rounding +auto, gptq, gptaq, nearest, hqq, adaround, signround$",
        r"ranges +minmax, mse, percentile, entropy$",
        r"reconstruction +auto, none, adaquant, adaquant-parallel, block, network$",
        r"correction +auto, none, bias, norm, tuning, confidence$",
        r"metric +top1$",
        r"recipes +.*recipes/quickstart\.yaml",
    ):
        assert re.search(f"^{line}", printed, re.M), line


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_a_verb_does(verb: str, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"usage: quantkit {verb}" in printed
    assert "--debug show where an error was raised" in printed
    assert "--quiet no progress, only warnings" in printed


def test_help_and_version(capsys) -> None:
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as left:
            main([option])
        assert left.value.code == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^    {verb} +\w", printed, re.M) for verb in VERBS)
    assert printed.endswith(f"quantkit {VERSION}\n")


UNREADABLE = {
    "no verb": ([], "the following arguments are required: COMMAND"),
    "unknown verb": (["quantise"], "invalid choice: 'quantise'"),
    "no recipe": (["run"], "the following arguments are required: recipe"),
    "unknown option": (["run", "x.yaml", "--fast"], "unrecognized arguments: --fast"),
    "no budget": (["allocate", "p.safetensors"], "one of the arguments --budget --front is required"),
}


@pytest.mark.parametrize(("arguments", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_command_that_cannot_be_read_exits_with_1(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("usage: quantkit")
    assert message in told


REFUSED = {
    "missing recipe": (["run", "none.yaml"], 1, "Cannot read the recipe 'none.yaml': No such file"),
    "unreadable change": (["run", "RECIPE", "--set", "budget"], 1, "--set 'budget' is not key=value"),
    "unknown key": (["plan", "RECIPE", "--set", "buget=3 bits"], 1, "buget: unknown key. Did you mean 'budget'"),
    "unreadable budget": (["run", "RECIPE", "--set", "budget=-3 KB"], 1, "size='-3 KB': a limit is a finite number"),
    "budget not run": (
        ["run", "RECIPE", "--set", "budget=w4g128a8"],
        1,
        "weight groups (w4g128) are not supported by",
    ),
    "unwritable output": (["run", "RECIPE", "--set", "output=FILE/out"], 1, "Cannot write 'FILE/out/.writable'"),
    "unwritable profile": (["profile", "RECIPE", "--out", "FILE/p"], 1, "Cannot write 'FILE/.writable'"),
    "budget out of reach": (["run", "RECIPE", "--set", "budget=1 bits"], 2, "the smallest that can be reached is 3.8"),
    "plan out of reach": (["plan", "RECIPE", "--set", "budget=1 bits"], 2, "the smallest that can be reached is 3.8"),
    "missing profile": (["allocate", "none", "--budget", "4 bits"], 1, "Cannot read the profile 'none': No such file"),
    "no profile": (["allocate", "FILE", "--budget", "4 bits"], 1, "'FILE' is not a complete quantkit profile"),
    "allocation out of reach": (["allocate", "PROFILE", "--budget", "900 B"], 2, "the smallest that can be reached"),
    "unknown solver": (["allocate", "PROFILE", "--budget", "4 bits", "--solver", "x"], 1, "Unknown solver 'x'; known"),
    "scheme not profiled": (["allocate", "PROFILE", "--budget", "4 bits", "--schemes", "w4a8"], 1, "w4a8"),
    "unwritable plan": (["allocate", "PROFILE", "--budget", "4 bits", "--out", "FILE/p"], 1, "Cannot write 'FILE/p'"),
    "missing result": (["export", "none"], 1, "Cannot load a result: there is no folder 'none'"),
    "no result": (["export", "."], 1, "'.' was not made by a recipe"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refused_request(
    arguments: list[str], code: int, message: str, recipe: str, shared: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "FILE").write_text("not a folder")
    places = {"RECIPE": recipe, "PROFILE": str(shared / "profile.safetensors")}
    assert main([places.get(a, a) for a in arguments]) == code
    printed, told = capsys.readouterr()
    assert printed == ""
    assert told.splitlines()[-1].startswith("quantkit: ")  # one paragraph, no traceback
    assert message in told.splitlines()[-1]
    assert files_in(tmp_path) == {"FILE"}


def test_a_file_that_computes_something_else_exits_with_3(recipe: str, tmp_path: Path, monkeypatch, capsys) -> None:
    compare = onnx_writer.require_parity
    nothing = onnx_writer.Tolerance(exact=-1.0, optimized=-1.0)
    monkeypatch.setattr(onnx_writer, "require_parity", lambda found, tolerance: compare(found, nothing))
    assert main(["run", recipe, "--quiet"]) == 3
    assert "does not compute what the simulated model computes" in capsys.readouterr().err
    assert "out/tiny/model.onnx" not in files_in(tmp_path)


def test_an_accuracy_that_no_plan_keeps_exits_with_3(recipe: str, tmp_path: Path, capsys) -> None:
    changes = ["budget=accuracy_drop=0.5", "evaluate={python: network.py:worse_every_time}"]
    assert main(["run", recipe, "--quiet", *(word for change in changes for word in ("--set", change))]) == 3
    assert "quantkit: No plan keeps the drop within 0.5: the least found is " in capsys.readouterr().err
    assert files_in(tmp_path) == set()


def test_debug_shows_where(recipe: str) -> None:
    with pytest.raises(InvalidRequest, match="unknown key"):
        main(["plan", recipe, "--debug", "--set", "buget=3 bits"])


def test_an_interrupted_run(recipe: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Ctrl-C while the plan is carried out: the profile, the range of a read and the four rounded layers are kept,
    nothing else is there.
    """

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantkit.stages.applying.round_biases", interrupt)
    monkeypatch.setattr(stage, "notice", lambda message: None)
    assert main(["run", recipe, "--set", "workdir=work", "--quiet"]) == 130
    told = capsys.readouterr().err
    assert told == "quantkit: interrupted; no file was left half-written, finished stages are reused.\n"
    *pieces, kept = sorted(files_in(tmp_path))
    assert kept.startswith("work/profile-")
    Profile.load(kept)
    assert len(pieces) == 5 and all(piece.startswith("work/applied-") for piece in pieces)


def in_a_process(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "quantkit.cli", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        # a shell without job control starts what runs in its background deaf to Ctrl-C, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


SLOW = """

class Slow(type(small())):
    def forward(self, x):
        time.sleep(0.1)
        return super().forward(x)


def build_slow():
    return Slow()
"""


@pytest.mark.slow
def test_ctrl_c_leaves_no_half_written_file(tmp_path: Path) -> None:
    recipe = write_tiny(tmp_path / "recipe")
    network = tmp_path / "recipe" / "network.py"
    network.write_text(network.read_text() + SLOW)
    process = in_a_process("run", str(recipe), "--set", "model.python=network.py:build_slow", folder=tmp_path)
    assert process.stderr is not None
    assert any("measuring on" in line for line in process.stderr)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.splitlines()[-1].startswith("quantkit: interrupted; no file was left half-written")
    assert "Traceback" not in told
    left = files_in(tmp_path / "out")
    assert all(re.fullmatch(r"tiny/work/layers-\w+/\w+\.safetensors", str(path)) for path in left), left


@pytest.mark.slow
def test_two_processes_write_the_same_plan_to_the_byte(tmp_path: Path, monkeypatch) -> None:
    """This one and another, into different folders."""
    recipe = str(write_tiny(tmp_path / "recipe"))
    monkeypatch.chdir(tmp_path)
    torch.rand(7)  # what this process did before must not matter
    assert main(["run", recipe, "--quiet", "--set", "output=here"]) == 0
    process = in_a_process("run", recipe, "--quiet", "--set", "output=there", folder=tmp_path)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    text = (tmp_path / "here" / "plan.json").read_bytes()
    assert text == (tmp_path / "there" / "plan.json").read_bytes()
    assert json.loads(text)["schemes"].keys() == {"stem.0", "conv", "mix", "head"}


@pytest.mark.slow
def test_the_quickstart_runs_to_the_end(tmp_path: Path, monkeypatch, capsys) -> None:
    """As it stands, but for fewer samples and candidates."""
    monkeypatch.chdir(tmp_path)
    fewer = ["--set", "samples=48", "--set", "schemes=[w2a8,w3a8,w4a8]"]
    assert main(["run", str(REPOSITORY / "recipes/quickstart.yaml"), *fewer]) == 0
    printed = capsys.readouterr().out
    found = dict(re.findall(r"^(\S.*?)  +(\S.*)$", printed, re.M))
    assert float(found["metric of the float model"]) > 98
    assert float(found["metric of the ONNX file in onnxruntime"]) > 95
    assert float(found["same largest output, simulated and onnxruntime (%)"]) > 99
    assert Plan.load("out/quickstart/plan.json").average_bits <= 3
    assert {"model.onnx", "weights.safetensors"} <= files_in(tmp_path / "out/quickstart")
