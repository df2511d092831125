"""Draws how near decoding and prefill come to what this machine can do, as a picture.

    python benchmarks/roofline.py [--model wide] [--rows 1 2 4 8 16 32] [--prompts 32 128 512] [--quant int8] --png FILE

A roofline (Williams, Waterman and Patterson, 2009): across, how many operations a step does for every byte that it must
read; upwards, how many it does in a second. The roof is what memory lets through on the left and what the processor
multiplies on the right, both measured in the same run; a point on it cannot be improved without doing less work.
Random weights with the shapes of contenders.py, or a checkpoint's with --model-dir. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from contenders import SHAPES, cpu_name, write_random_model

from mptserve.commands.bench import Ceilings, ceilings, measure, work
from mptserve.engine.checkpoint.config import read_config
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.devices import choose_placement
from mptserve.engine.placement import Placement, chosen_quant
from mptserve.engine.start import EngineOptions, start_engine
from mptserve.log import set_up_logging

N_NEW, N_PROMPT = 16, 128


@dataclass(frozen=True)
class Point:
    """A measured step. intensity: operations per byte.  gflops: operations per second, in billions."""

    label: str
    phase: str
    intensity: float
    gflops: float
    of_limit: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="wide")
    parser.add_argument("--model-dir", type=Path, help="a checkpoint instead")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--prompts", nargs="+", type=int, default=[32, 128, 512], help="lengths, one row each")
    parser.add_argument("--quant", choices=("int8", "int4"), default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--png", type=Path, required=True)
    args = parser.parse_args()
    set_up_logging("WARNING")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model_dir or write_random_model(Path(scratch), args.model)
        config = read_config(folder)
        stored = WeightReader(folder, config).dtype
        place = choose_placement("auto", "auto", quant=chosen_quant(args.quant, config), stored=stored)
        options = EngineOptions(quant=args.quant, max_rows=max(args.rows), kv_cache_gb=4)
        engine = start_engine(folder, config, config.vocab_size, options)
    found = ceilings(place)
    points = []
    for rows in args.rows:
        case = measure(engine, place, found, rows, N_PROMPT, N_NEW, args.rounds)
        n_bytes, operations = work(config, place, rows, rows * (N_PROMPT + N_NEW // 2), rows)
        steps = case.decode_tok_s / rows
        share = case.decode_tok_s / case.limit_decode_tok_s
        points.append(Point(f"{rows}", "decode, rows", operations / n_bytes, operations * steps / 1e9, share))
    for n in args.prompts:
        case = measure(engine, place, found, 1, n, 1, args.rounds)
        n_bytes, operations = work(config, place, n, n, 1, n * n // 2)
        seconds = case.first_token_ms / 1e3
        share = case.limit_first_token_ms / case.first_token_ms
        points.append(Point(f"{n}", "prefill, tokens", operations / n_bytes, operations / seconds / 1e9, share))
    engine.close()
    name = args.model_dir.name if args.model_dir else args.model
    title = f"{name}, {config.n_parameters / 1e9:.2f} B parameters, {place.quant or str(place.dtype)[6:]}"
    draw(points, found, place, title, args.png)
    for point in points:
        print(f"{point.phase:16} {point.label:>4}: {point.gflops:9.1f} GFLOP/s, {point.of_limit:.0%} of the roof")
    print(json.dumps({"ceilings": asdict(found), "points": [asdict(point) for point in points]}))


def draw(points: list[Point], found: Ceilings, place: Placement, title: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    peak = found.matmul_tflops * 1e3
    ends = min(p.intensity for p in points) / 2, max(max(p.intensity for p in points) * 2, 2 * peak / found.read_gbs)
    roof = [ends[0], peak / found.read_gbs, ends[1]]
    axes.plot(roof, [min(x * found.read_gbs, peak) for x in roof], color="black", label="what the machine allows")
    middle = (roof[0] * roof[1]) ** 0.5
    at = (middle, middle * found.read_gbs)
    axes.annotate(f"{found.read_gbs:,.0f} GB/s", at, (-6, 6), textcoords="offset points", ha="right")
    axes.annotate(f"{peak:,.0f} GFLOP/s in {str(place.dtype)[6:]}", (roof[1] * 1.1, peak * 1.12))
    for phase, marker in (("decode, rows", "o"), ("prefill, tokens", "s")):
        own = [p for p in points if p.phase == phase]
        axes.plot([p.intensity for p in own], [p.gflops for p in own], marker, label=phase)
        for p in own:
            axes.annotate(f"{p.label}: {p.of_limit:.0%}", (p.intensity, p.gflops), (6, -12), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s", ylim=(None, peak * 2))
    axes.set_title(f"{title}\n{cpu_name() if place.device.type == 'cpu' else place.device}", fontsize=10)
    axes.legend(loc="lower right")
    axes.grid(visible=True, which="major", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
