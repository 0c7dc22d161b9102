"""The commands: python -m harness infer | convert | compare | judge | gate | bisect | locate | ratchet | bench | doctor | report | emulate.

Every command parses here and works elsewhere; torch is imported by the work, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.errors import HarnessError
from harness.typed_json import shown

DTYPES = ("float32", "float16", "bfloat16")


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 when it did what it was asked, 1 when it failed, 2 for bad usage."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["emulate"] and argv[1:2] not in (["-h"], ["--help"]):  # what follows belongs to the program, flags and all
        arguments = argparse.Namespace(command="emulate", run=_emulate, program=argv[1:])
    else:
        arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (HarnessError, ValueError, OSError) as error:
        print(f"harness {arguments.command}: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"harness {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split()), 4000) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness",
        description="Accuracy validation of torch models on Ascend NPUs. The accuracy cases run by `pytest -k precision`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str, example: str, **options) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        added.set_defaults(run=run)
        return added

    infer = command(
        "infer",
        _infer,
        "Run AIMv2 on one picture, or on seeded random input, and print what came out.",
        "python -m harness infer --image photo.jpg --dtype float16 --model-dir ./aimv2-large-patch14-224-distilled",
    )
    infer.add_argument("--image", type=Path, help="a picture that Pillow opens; without it the input is random, seeded")
    infer.add_argument("--dtype", choices=DTYPES, default="float32")
    _add_device(infer)
    _add_model_dir(infer)
    infer.add_argument("--seed", type=int, default=42, help="of the random input (default 42)")
    infer.add_argument("--output", type=Path, metavar="FILE", help="write the features there as safetensors")

    convert = command(
        "convert",
        _convert,
        "Convert an AIMv2 checkpoint and its config to another key layout.",
        "python -m harness convert ./aimv2-large-patch14-224-distilled ./converted --to apple",
    )
    convert.add_argument("source", type=Path, metavar="SRC", help="a .safetensors file, or a directory with one or with shards")
    convert.add_argument("destination", type=Path, metavar="DST", help="a new directory")
    convert.add_argument("--to", required=True, choices=("apple", "transformers", "timm"), help="the layout to write")

    bench = command(
        "bench",
        _bench,
        "Time AIMv2 on the device and on the CPU, each forward ended by a device synchronisation.",
        "python -m harness bench --batch-size 1 4 --iters 100 --warmup 10",
    )
    bench.add_argument("--batch-size", type=_positive, nargs="+", default=[1, 4], metavar="B")
    bench.add_argument("--iters", type=_positive, default=20, help="timed forwards (default 20; p99 needs 100)")
    bench.add_argument("--warmup", type=int, default=3, help="untimed forwards before them (default 3)")
    bench.add_argument("--dtype", choices=DTYPES, default="float32")
    _add_device(bench)
    _add_model_dir(bench)

    report = command(
        "report",
        _report,
        "Render reports/precision.json again, as markdown or HTML, without a run.",
        "python -m harness report reports/precision.json --lang zh --output report.md",
    )
    report.add_argument("json", type=Path, nargs="?", metavar="JSON")
    report.add_argument("--schema", choices=("report", "baseline"), help="print the JSON schema of a report, or of a baseline, in place of a report")
    report.add_argument("--lang", choices=("en", "zh"), default="en")
    report.add_argument("--output", type=Path, metavar="FILE", help="default: standard output; .html gives HTML")

    compare = command(
        "compare",
        _compare,
        "Compare two files or folders of tensors by name and judge every pair; exit status 0 only when all pass.",
        "python -m harness compare npu_outputs/ cpu_outputs/ --preset pair\n"
        "  python -m harness compare npu.pt cpu.pt --golden float64.safetensors\n"
        "  python -m harness compare npu_dump/ gpu_dump/ --strip-prefix module. --map '^layer([0-9]+)=layers.\\1'\n\n"
        "folders that msprobe and SGLang's dumper wrote are read as they are; harness/docs/compare.md",
    )
    compare.add_argument(
        "actual",
        type=Path,
        metavar="A",
        help="what is judged: .safetensors, .npy, .npz, .pt (weights only), or a folder of these",
    )
    compare.add_argument("expected", type=Path, metavar="B", help="what it is held against")
    compare.add_argument("--golden", type=Path, metavar="G", help="the same in float64; the floor is then B's own error")
    _add_preset(compare, "default: pair, with --golden floor")
    compare.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE", help="a limit of your own, such as max_diff=1e-3; with --preset it replaces that one")
    compare.add_argument(
        "--strip-prefix",
        action="append",
        default=[],
        metavar="PREFIX",
        help="take this off the names that begin with it, on either side; may be repeated",
    )
    compare.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="rename the tensors of A: a regular expression and what takes its place; may be repeated",
    )
    compare.add_argument(
        "--coarser-dtype",
        action="store_true",
        help="compare pairs of two dtypes in the one with fewer bits, in place of failing them",
    )
    compare.add_argument(
        "--max-inflated",
        default="512MiB",
        metavar="SIZE",
        help="memory that one tensor may take beyond its bytes in the file (default 512MiB)",
    )
    compare.add_argument("--json", type=Path, metavar="FILE", help="write every number there")

    judge = command(
        "judge",
        _judge,
        "Judge stored results again, without a run; exit status 0 only when all pass.",
        "python -m harness judge reports/precision.json --preset cann",
    )
    judge.add_argument("json", type=Path, metavar="JSON")
    _add_preset(judge, "default: what each row was judged by")

    gate = command(
        "gate",
        _gate,
        "Hold a report against an older one: what broke, regressed, drifted, improved, went missing, and what changed in the stack.",
        "python -m harness gate before/precision.json after/precision.json --output upgrade.md",
    )
    gate.add_argument("reports", type=Path, nargs="+", metavar="JSON", help="two or more, the oldest first; the last two decide the exit status")
    gate.add_argument("--output", type=Path, metavar="FILE", help="write the markdown there too, for a pull request or a step summary")
    gate.add_argument("--json", type=Path, metavar="FILE", help="write every transition there")
    gate.add_argument("--plot", type=Path, metavar="FILE", help="draw each case's error over the reports, as .png, .svg or .pdf; needs matplotlib")
    gate.add_argument("--every", action="store_true", help="list the IDENTICAL rows too")
    gate.add_argument("--subset", action="store_true", help="the newer report is of a part of the rows, a nightly run say: compare these alone")

    bisect = command(
        "bisect",
        _bisect,
        "Find between which two of an ordered list of stacks the numbers changed; exit status 0 only when that was found.",
        "python -m harness bisect stacks.toml --case aimv2-digits --output bisect.md\n\nstacks.toml:\n"
        '  command = ".venv-{name}/bin/pytest -k precision --report={report}"\n  timeout = 3600\n  [[stack]]\n  name = "2.9.0"\n  [[stack]]\n  name = "2.10.0"',
    )
    bisect.add_argument("stacks", type=Path, metavar="STACKS.toml", help="a [[stack]] for each, the oldest first: name, and command that writes precision.json into {report}")
    bisect.add_argument("--case", metavar="NAME", help="a case's name, or a part of test ids: the rows that decide (default: all)")
    bisect.add_argument("--what", choices=("worse", "changed"), default="worse", help="bad is what is worse than the good end, as gate says (default), or any bit changed")
    bisect.add_argument("--state", type=Path, default=Path("reports/bisect"), metavar="DIR", help="where runs are kept; none is run again (default reports/bisect)")
    bisect.add_argument("--retry", action="store_true", help="run again what could not run before")
    bisect.add_argument("--output", type=Path, metavar="FILE", help="write the markdown there too")

    locate = command(
        "locate",
        _locate,
        "Find the operator that a case's error comes from, also of one that passes, and write a repro of one that is wrong.",
        "python -m harness locate aimv2-digits --seed 42\n  python -m harness locate 'float16-photo' --fault 'aclnnSilu:scale:by=1.001'",
    )
    locate.add_argument("case", metavar="CASE", help="a case's name, or a part of test ids")
    locate.add_argument("--seed", type=int, help="only the row with this seed")
    locate.add_argument("--level", choices=("auto", "operators", "modules"), default="auto", help="modules: a fast first look")
    locate.add_argument("--backward", action="store_true", help="look at each operator's gradients too")
    locate.add_argument("--cases", type=Path, default=Path("cases"), metavar="PATH", help="where the cases are (default cases/)")
    locate.add_argument("--report", type=Path, default=Path("reports/located"), metavar="DIR", help="where the report and the repro go (default reports/located/)")
    locate.add_argument("--fault", action="append", default=[], metavar="FAULT", help="break the emulated device on purpose")
    _add_device(locate)

    ratchet = command(
        "ratchet",
        _ratchet,
        "List the limits of the cases that could come down, by what stored reports found; the exit status is 0 either way.",
        "python -m harness ratchet reports/precision.json",
    )
    ratchet.add_argument("reports", type=Path, nargs="+", metavar="JSON")
    ratchet.add_argument("--every", action="store_true", help="those of presets too, not only the limits that a case sets itself")

    doctor = command(
        "doctor",
        _doctor,
        "Print the stack, check that its versions fit, and that the device answers; or measure how it rounds, sums and overflows.",
        "python -m harness doctor --device npu\n  python -m harness doctor --device npu --probe probe.json\n  python -m harness doctor --read-probe probe.json\n"
        "  python -m harness doctor --model-size 7B --dtype float16 --workers 2",
    )
    _add_device(doctor)
    doctor.add_argument("--probe", type=Path, metavar="FILE", help="take the ten measurements of a card (about a minute) and write them there as JSON")
    doctor.add_argument("--read-probe", type=Path, metavar="FILE", help="say what such a file of another machine means")
    doctor.add_argument("--model-size", metavar="N", help="what a case with N parameters (7B, 350M) needs of host and device")
    doctor.add_argument("--dtype", help="with --model-size: that dtype alone (default: float32, float16, bfloat16)")
    doctor.add_argument("--workers", type=int, default=1, metavar="N", help="with --model-size: workers of xdist (default 1)")

    emulate = command(
        "emulate",
        _emulate,
        "Run a torch_npu program over the emulated CANN.",
        "python -m harness emulate train.py --epochs 1\n  python -m harness emulate -m package.module ARGS",
        usage="python -m harness emulate [-h] (SCRIPT | -m MODULE) [ARGS ...]",
    )
    emulate.add_argument("program", nargs=argparse.REMAINDER, metavar="SCRIPT | -m MODULE, ARGS")
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        help="auto (default), npu[:n], emulated, cuda[:n] or cpu; a named one that cannot run is an error",
    )


def _add_preset(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--preset", metavar="NAME", help=f"floor, sharp, card, cann, dynamo, close or pair ({default})")


def _add_model_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-dir",
        type=Path,
        metavar="DIR",
        help="the checkpoint; default: the environment variable MODEL_DIR, else seeded weights",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _infer(arguments) -> int:
    from harness.commands.infer import infer

    print(
        infer(
            image=arguments.image,
            dtype=arguments.dtype,
            device=arguments.device,
            model_dir=arguments.model_dir,
            seed=arguments.seed,
            output=arguments.output,
        )
    )
    return 0


def _convert(arguments) -> int:
    from harness.models.aimv2 import convert_checkpoint

    print(convert_checkpoint(arguments.source, arguments.destination, to=arguments.to))
    return 0


def _bench(arguments) -> int:
    from harness.commands.bench import bench_aimv2

    print(
        bench_aimv2(
            device=arguments.device,
            dtype=arguments.dtype,
            batch_sizes=arguments.batch_size,
            iterations=arguments.iters,
            warmup=arguments.warmup,
            model_dir=arguments.model_dir,
        )
    )
    return 0


def _report(arguments) -> int:
    from harness.report import rerender

    if arguments.schema:
        return _print_schema(arguments.schema)
    if arguments.json is None:
        raise ValueError("name a report to render, such as reports/precision.json, or give --schema")
    text = rerender(arguments.json, lang=arguments.lang, output=arguments.output)
    if text is not None:
        print(text)
    return 0


def _print_schema(name: str) -> int:
    import json

    from harness import report
    from harness.upgrade import baseline

    schema = baseline.json_schema() if name == "baseline" else report.json_schema()
    print(json.dumps(schema, indent=1))
    return 0


def _compare(arguments) -> int:
    from harness.judging.tolerance import Tolerance
    from harness.pairs import Options, compare_paths
    from harness.pairs.names import Naming
    from harness.report import pairs_text, write_pairs

    limits = dict(_limit(each) for each in arguments.limit)
    preset = arguments.preset or ("" if limits else "floor" if arguments.golden else "pair")
    tolerance = Tolerance(preset=preset, reason="--limit" if limits else "", **limits)
    naming = Naming(prefixes=tuple(arguments.strip_prefix), renames=tuple(_rename(each) for each in arguments.map))
    options = Options(naming=naming, coarser=arguments.coarser_dtype, limit=_bytes(arguments.max_inflated))
    if arguments.golden and options.coarser:
        raise ValueError(
            "--coarser-dtype and --golden exclude one another: a golden tensor judges a pair of one dtype; give one"
        )
    found = compare_paths(arguments.actual, arguments.expected, tolerance, golden=arguments.golden, options=options)
    paths = f"{shown(str(arguments.actual), 400)} against {shown(str(arguments.expected), 400)}"
    title = f"{paths}, {preset or 'limits of your own'}"
    if arguments.json:
        write_pairs(found.pairs, arguments.json)
    print(pairs_text(found.pairs, title=title, notes=found.notes))
    return 0 if found.passed else 1


def _rename(text: str) -> tuple[str, str]:
    import re

    old, equals, new = text.partition("=")
    if not equals or not old:
        raise ValueError(f"--map {shown(text)}: OLD=NEW was expected, such as '^module\\.=model.'")
    try:
        re.compile(old)
    except re.error as error:
        raise ValueError(f"--map {shown(text)}: {shown(old)!r} is no regular expression: {error}") from None
    return old, new


def _bytes(text: str) -> int:
    import re

    units = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
    found = re.fullmatch(r"([0-9]{1,12})([A-Z]*)", text.strip().upper())
    if found is None or found.group(2) not in units:
        raise ValueError(
            f"--max-inflated {shown(text)}: a number of bytes with a unit was expected, such as 512MiB or 4GiB"
        )
    return int(found.group(1)) * units[found.group(2)]


def _limit(text: str) -> tuple[str, float]:
    from harness.judging.tolerance import LIMITS

    name, _, value = text.partition("=")
    if name not in LIMITS:
        raise ValueError(f"--limit {text}: there is no limit {name!r}; there are {', '.join(LIMITS)}")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"--limit {text}: {value!r} is no number; write it as max_diff=1e-3") from None


def _judge(arguments) -> int:
    from harness.report import judged, load, verdicts_text

    report = load(arguments.json)
    found = judged(report, arguments.preset)
    if not found:
        raise HarnessError(f"{arguments.json} holds no rows to judge; `pytest -k precision` writes them")
    print(verdicts_text(found, title=f"{arguments.json}, {arguments.preset or 'as it was judged'}"))
    statuses = {verdict.status for _, verdict in found}
    return 0 if "PASS" in statuses and statuses <= {"PASS", "SKIPPED"} else 1


def _gate(arguments) -> int:
    import json

    from harness.report import jsonable, load, upgrade_text, write_text
    from harness.upgrade.transitions import compare_reports

    if len(arguments.reports) < 2:
        raise ValueError("one report was given where two or more are compared; give the older one first")
    stored = [load(each) for each in arguments.reports]
    found = [compare_reports(*each, subset=arguments.subset) for each in zip(stored, stored[1:])]
    titles = [f"{before} → {after}" for before, after in zip(arguments.reports, arguments.reports[1:])]
    text = "\n\n".join(upgrade_text(each, title=title, every=arguments.every) for each, title in zip(found, titles))
    print(text)
    if arguments.output:
        write_text(arguments.output, text + "\n")
    if arguments.json:
        write_text(arguments.json, json.dumps(jsonable([each.to_dict() for each in found]), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if arguments.plot:
        from harness.upgrade.baseline import error_of
        from harness.report.plot import plot_history

        plot_history(stored, error_of, arguments.plot)
    return 0 if found[-1].passed else 1


def _bisect(arguments) -> int:
    from harness.upgrade.bisect import bisect
    from harness.report import write_text

    text, found = bisect(arguments.stacks, case=arguments.case, what=arguments.what, state=arguments.state, retry=arguments.retry)
    print(text)
    if arguments.output:
        write_text(arguments.output, text + "\n")
    return 0 if found else 1


def _locate(arguments) -> int:
    import pytest

    from harness.report import load

    if not arguments.cases.exists():
        raise HarnessError(f"no cases at {arguments.cases}; name their file or folder with --cases")
    command = [str(arguments.cases), "-q", "-p", "no:cacheprovider", "-p", "harness.plugin.entry", "--precision-baseline=off"]
    command += [f"--precision-device={arguments.device}", f"--precision-report={arguments.report}"]
    command += [f"--precision-locate={arguments.level}", f"--precision-locate-case={arguments.case}", *(f"--precision-fault={each}" for each in arguments.fault)]
    command += ["--precision-locate-backward"] if arguments.backward else []
    command += [f"--precision-locate-seed={arguments.seed}"] if arguments.seed is not None else []
    status = pytest.main(command)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):  # it said why
        return 1
    rows = load(arguments.report / "precision.json").rows
    return 0 if rows and all(row.located is not None and row.located.operators for row in rows) else 1


def _ratchet(arguments) -> int:
    from harness.upgrade.ratchet import loose, ratchet_text
    from harness.report import load

    print(ratchet_text(loose([row for each in arguments.reports for row in load(each).rows], every=arguments.every)))
    return 0


def _doctor(arguments) -> int:
    if arguments.probe is not None or arguments.read_probe is not None:
        return _probe(arguments)
    if arguments.model_size is not None:
        from harness.commands.model_size import model_size

        emulated = arguments.device.startswith("emulated")
        text, fits = model_size(arguments.model_size, dtype=arguments.dtype, workers=arguments.workers, emulated=emulated)
        print(text)
        return 0 if fits else 1
    from harness.commands.doctor import doctor

    text, healthy = doctor(arguments.device)
    print(text)
    return 0 if healthy else 1


def _probe(arguments) -> int:
    from harness.commands.probe import probe, read_probe, text_of

    if arguments.read_probe is not None:
        print(text_of(read_probe(arguments.read_probe)))
        return 0
    document = probe(arguments.device, arguments.probe, say=lambda text: print(text, file=sys.stderr))
    print(text_of(document))
    print(f"\nwritten to {arguments.probe}")
    return 0 if document["stopped"] is None else 1


def _emulate(arguments) -> int:
    from harness.emulator import emulate

    return emulate(arguments.program)
