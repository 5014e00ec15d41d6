"""The command line: one verb per question. Errors are one paragraph on stderr; see ``main`` for the exit codes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from quantkit.errors import InvalidRequest, QuantkitError
from quantkit.version import VERSION

if TYPE_CHECKING:
    from quantkit.plan import Profile

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 done, 1 bad request, 2 budget infeasible, 3 parity or accuracy not met, 130
    interrupted.
    """
    options = _parser().parse_args(arguments)
    _show_notices(options.quiet)
    try:
        options.command(options)
    except QuantkitError as error:
        if options.debug:
            raise
        print(f"quantkit: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("quantkit: interrupted; no file was left half-written, finished stages are reused.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _show_notices(quiet: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("quantkit: %(message)s"))
    logger = logging.getLogger("quantkit")
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


class _Parser(argparse.ArgumentParser):
    """Exits with 1 for a command that cannot be read; argparse's own 2 means an infeasible budget here."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="quantkit", description="Mixed-precision post-training quantization.")
    parser.add_argument("--version", action="version", version=f"quantkit {VERSION}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show where an error was raised")
    common.add_argument("--quiet", action="store_true", help="no progress, only warnings")

    def verb(name: str, command: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text, parents=[common])
        made.set_defaults(command=command)
        return made

    for name, command, text in (
        ("run", _run, "do it all: profile, allocate, quantize, export, compare"),
        ("plan", _plan, "say what a recipe would do, how long and with how much memory; changes nothing"),
        ("profile", _profile, "measure which layers are sensitive"),
        ("bench", _bench, "measure what layers and conversions take on this machine, for limits on latency"),
    ):
        made = verb(name, command, text)
        made.add_argument("recipe", type=Path)
        made.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. budget='3 bits'"
        )
        if name == "profile":
            made.add_argument("--out", type=Path, help="where to write (default: profile.safetensors in the output)")
        if name == "bench":
            _add_bench_arguments(made)
    _add_allocate_arguments(verb("allocate", _allocate, "choose bits for a budget from a profile"))
    exporting = verb("export", _export, "write the ONNX file of a saved result")
    _add_export_arguments(exporting)
    explaining = verb("explain", _explain, "say why layers got their bits, and what others would cost and gain")
    explaining.add_argument("plan", type=Path)
    explaining.add_argument("layer", nargs="?", help="only this layer")
    verb("list", _list, "name formats, targets, estimators, solvers and recipes")
    return parser


def _add_allocate_arguments(allocating: argparse.ArgumentParser) -> None:
    allocating.add_argument("profile", type=Path)
    wanted = allocating.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--budget", help="such as '4 bits', '300 KB' or 'w8a8'")
    wanted.add_argument("--front", action="store_true", help="every budget at once, as table, CSV and picture")
    allocating.add_argument(
        "--measure", type=Path, metavar="RECIPE", help="with --front: measure its plans; the recipe the profile is of"
    )
    allocating.add_argument("--target", help="a file of `quantkit bench`, for limits on latency")
    allocating.add_argument("--solver", default="auto")
    allocating.add_argument("--schemes", nargs="+", help="only these of the profiled schemes")
    allocating.add_argument("--out", type=Path, help="where to write (default: plan.json; front.csv and front.png)")


def _add_export_arguments(exporting: argparse.ArgumentParser) -> None:
    exporting.add_argument("folder", type=Path)
    exporting.add_argument("--out", type=Path, help="where to write (default: model.onnx in the folder)")
    exporting.add_argument(
        "--dynamic",
        action="append",
        default=[],
        metavar="INPUT:AXIS=NAME",
        help="let a size of an input vary, e.g. input_ids:1=sequence (default: those of the recipe)",
    )
    exporting.add_argument(
        "--external-data",
        action="store_true",
        help="tensors in a second file, FILE.data (default: where one file cannot hold them, or the recipe says so)",
    )


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="where to write (default: target.yaml in the output)")
    parser.add_argument("--threads", type=int, default=1, help="threads of onnxruntime (default 1)")
    parser.add_argument("--batch", type=int, default=32, help="samples a run (default 32)")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long to measure (default 40)")


def _run(options: argparse.Namespace) -> None:
    from quantkit.recipe.read import read_recipe
    from quantkit.recipe.run import ONNX_FILE, run_recipe
    from quantkit.report.summary import summary
    from quantkit.store import data_file

    recipe = read_recipe(options.recipe, options.set)
    result, measured = run_recipe(recipe, progress=not options.quiet)
    left = "plan.json, weights.safetensors, recipe.yaml"
    if measured is None:
        print(result.plan)
        print(f"\nleft in {recipe.output}: {left}; for model.onnx add example_inputs, one batch of model inputs")
        return
    print(summary(result.plan, measured))
    written = f"model.onnx{', model.onnx.data' * data_file(recipe.output / ONNX_FILE).exists()}"
    print(f"\nleft in {recipe.output}: {written}, {left}")


def _plan(options: argparse.Namespace) -> None:
    from quantkit.recipe.forecast import forecast_of
    from quantkit.recipe.read import read_recipe

    print(forecast_of(read_recipe(options.recipe, options.set), progress=not options.quiet))


def _profile(options: argparse.Namespace) -> None:
    from quantkit.recipe.read import read_recipe
    from quantkit.recipe.run import profile_recipe

    recipe = read_recipe(options.recipe, options.set)
    measured, path = profile_recipe(recipe, options.out, progress=not options.quiet)
    print(f"{len(measured.entries)} formats of {len(measured.candidates)} layers and {len(measured.sites)} sites")
    print(f"digest {measured.digest()}, written to {path}")


def _bench(options: argparse.Namespace) -> None:
    from quantkit.recipe.read import read_recipe
    from quantkit.recipe.run import bench_recipe
    from quantkit.report.latency import latency_summary

    recipe = read_recipe(options.recipe, options.set)
    target, path = bench_recipe(
        recipe, options.out, options.threads, options.batch, options.seconds, progress=not options.quiet
    )
    assert target.latency is not None, "it was just measured"
    print(latency_summary(target.latency))
    print(f"\nwritten to {path}: pass it as target, then budget='latency=80%' or 'latency=3 ms' can be asked for")


def _allocate(options: argparse.Namespace) -> None:
    from quantkit.allocation.allocate import allocate
    from quantkit.plan import Profile

    if options.measure and not options.front:
        raise InvalidRequest("--measure goes with --front.")
    profile = Profile.load(options.profile)
    if options.target is not None:
        profile = _with_times(profile, options.target)
    if options.front:
        _front(profile, options)
        return
    plan = allocate(profile, options.budget, solver=options.solver, schemes=options.schemes)
    path = plan.save(options.out or "plan.json")
    print(plan)
    print(f"written to {path}")


def _with_times(profile: Profile, target: str) -> Profile:
    """The profile with the latency table of a target file."""
    from dataclasses import replace

    from quantkit.plan import digest_shapes
    from quantkit.targets import Target

    table = Target.load(target).latency
    if table is None:
        return profile
    layers = [name for name, layer in profile.layers.items() if not layer.reason]
    table.require(digest_shapes(profile.layers), layers, list(profile.sites))
    return replace(profile, latency=table)


def _front(profile: Profile, options: argparse.Namespace) -> None:
    from quantkit.allocation.pareto import pareto
    from quantkit.report.front import front_table, save_csv, save_picture

    front = pareto(profile, schemes=options.schemes)
    measured = None
    if options.measure:
        from quantkit.recipe.read import read_recipe
        from quantkit.recipe.run import measure_plans

        measured = measure_plans(read_recipe(options.measure), profile, front, progress=not options.quiet)
    stem = options.out or Path("front")
    paths = [save_csv(front, stem.with_suffix(".csv"), measured)]
    paths.append(save_picture(front, stem.with_suffix(".png"), measured))
    print(front_table(front, measured))
    print(f"written to {' and '.join(map(str, paths))}")


def _explain(options: argparse.Namespace) -> None:
    from quantkit.plan import Plan
    from quantkit.report.summary import explain

    print(explain(Plan.load(options.plan), options.layer))


def _export(options: argparse.Namespace) -> None:
    from quantkit.recipe.run import ONNX_FILE, load

    named = _named_sizes(options.dynamic)
    path = options.out or options.folder / ONNX_FILE
    apart = options.external_data or None
    report = load(options.folder).export_onnx(path, dynamic=named or None, external_data=apart)
    print(f"{report.path}: {report.file_bytes:,} bytes, {report.weight_bytes:,} of them the layers' weights")
    vary = [f"{name}.shape[{axis}] ({size})" for name, axes in report.dynamic.items() for axis, size in axes.items()]
    print(f"sizes that vary: {', '.join(vary) or 'none'}{''.join(f'; {needed}' for needed in report.conditions)}")
    for found in report.parity:
        how = "integer kernels" if found.optimized else "as spelled"
        print(f"{found.output}, {how}: {found.relative_error:.2%} from the simulated model")


def _named_sizes(texts: Sequence[str]) -> dict[str, dict[int, str]]:
    """``INPUT:AXIS=NAME`` texts as the argument ``dynamic`` of ``export_onnx``."""
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        place, equals, label = text.partition("=")
        name, colon, axis = place.rpartition(":")
        if not (equals and colon and axis.lstrip("-").isdigit()):
            raise InvalidRequest(f"--dynamic {text!r} is not INPUT:AXIS=NAME, such as input_ids:1=sequence.")
        found.setdefault(name, {})[int(axis)] = label
    return found


def _list(options: argparse.Namespace) -> None:
    from quantkit.recipe.inventory import inventory

    print(inventory())


if __name__ == "__main__":
    sys.exit(main())
