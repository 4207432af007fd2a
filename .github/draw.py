"""Draw what runs have measured; needs matplotlib.

    python .github/draw.py OUT             a run's held-out loss and effective rank: OUT/curves.png
    python .github/draw.py --study RUNS    the study's pictures, beside this file

RUNS holds the study's runs by the names of its commands: wRATIO-OPTIMIZER-SEED and, of other
lengths, sSTEPS-OPTIMIZER-SEED are the tiny world's; long-OPTIMIZER-METHOD a real teacher's, with
long1-... for seed 1; kept.json and watch-OPTIMIZER.jsonl are what .github/watch.py writes.
"""

import json
import sys
from pathlib import Path
from statistics import fmean as mean

try:
    from matplotlib.figure import Figure
    from PIL import Image  # comes with it
except ImportError:
    print("draw.py needs matplotlib: pip install matplotlib", file=sys.stderr)
    sys.exit(2)

STYLES = {"teacher": ("k", "*", "-"), "red": ("C3", "o", "-"), "red-variance": ("C6", "X", "--")}
STYLES |= {"pca": ("C0", "D", "-."), "random-selection": ("C5", "P", "--")}
STYLES |= {"shared-orthogonal": ("C4", "s", "-."), "orthogonal": ("C2", "^", ":")}
STYLES |= {"lrc": ("C1", "v", ":")}
OPTIMIZERS = {"adam": (":", "none"), "muon": ("-", "full")}  # dotted and hollow, solid and filled
HERE, LOSS = Path(__file__).resolve().parent, "held-out loss, nats per token"


def draw(axes, x, columns, method, optimizer=None):
    """A line of means with a band from the least to the most; for each x a list of the seeds'."""
    color, marker, line = STYLES.get(method, ("0.5", ".", "-"))
    line, fill = OPTIMIZERS.get(optimizer, (line, "none"))
    label = f"{method}, {optimizer}" if optimizer else method
    style = {"color": color, "marker": marker, "ls": line, "fillstyle": fill, "label": label}
    axes.plot(x, list(map(mean, columns)), **style)
    axes.fill_between(x, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.1)


def save(figure, name, title, legend, columns=7):
    """With a title above, and below a legend of what is drawn in one of the axes."""
    figure.suptitle(title)
    figure.legend(*legend.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    figure.savefig(HERE / name, dpi=80)
    few = Image.open(HERE / name).convert("RGB").quantize(256)  # colours: half the bytes
    few.save(HERE / name, optimize=True)


def loss_axis(axes):
    axes.set(yscale="log")
    axes.set_yticks([1.5, 2, 3, 5, 8, 13], [1.5, 2, 3, 5, 8, 13])
    axes.minorticks_off()


def curves_of(folder):
    """Method -> its records with measurements, also of a run that has not ended."""
    if (folder / "summary.json").is_file():
        rows = json.loads((folder / "summary.json").read_text())
        return {method: row["curve"] for method, row in rows.items() if "curve" in row}
    curves = {}
    for path in sorted(folder.glob("*/metrics.jsonl")):
        records = map(json.loads, path.read_text().splitlines())
        curves[path.parent.name] = [record for record in records if "held_out" in record]
    return curves


def summaries(runs, name):
    """One summary for each seed."""
    return [json.loads(path.read_text()) for path in sorted(runs.glob(f"{name}-?/summary.json"))]


def draw_curves(out):
    """One run: loss and effective rank over steps."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    loss, rank = figure.subplots(1, 2)
    for method, curve in curves_of(out).items():
        steps, held_out = zip(*[(record["step"], record["held_out"]) for record in curve])
        draw(loss, steps, [[point["loss"]] for point in held_out], method)
        draw(rank, steps, [[mean(point["erank"])] for point in held_out], method)
    loss.set(title=LOSS, xlabel="step", yscale="log")
    rank.set(title="effective rank, mean of the blocks", xlabel="step")
    save(figure, out.resolve() / "curves.png", out.name, loss)


def draw_compare(runs):
    """For the README: the tiny world at half width, all starts, with Adam."""
    figure, seeds = Figure(figsize=(13, 5.4), layout="constrained"), summaries(runs, "w0.5-adam")
    pairs, chains = figure.subplots(1, 2)
    for number, method in enumerate(STYLES):
        for kind, shift, look in zip(("chosen", "written"), (0.2, -0.2), ("0.9", "0.6")):
            place = shift - number
            shares = [100 * seed[method]["pairs"][kind] for seed in seeds]
            pairs.barh(place, mean(shares), height=0.38, color=look, edgecolor="k")
            pairs.plot([min(shares), max(shares)], [place, place], "k|-", ms=9)
        shares = zip(*[seed[method]["chains"]["written"] for seed in seeds])
        columns = [[100 * share for share in column] for column in shares]
        draw(chains, [length + 0.05 * (number - 3) for length in range(1, 6)], columns, method)
    pairs.set(title="pairs (knowledge): light, chosen of four; dark, written", xlabel="right, %")
    pairs.set_yticks([-number for number in range(len(STYLES))], STYLES)
    chains.set(title="chains (reasoning), written", xlabel="operations in the chain", ylim=(0, 105))
    title = "tiny world, students of width 48 of 96, Adam, 100 steps: mean and range of three seeds"
    save(figure, "compare.png", title, chains, 8)


def draw_optimisers(runs):
    """Loss over steps, the tiny world beside a real teacher."""
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    tiny, real = figure.subplots(1, 2)
    for method in ("red", "pca", "lrc"):
        for optimizer in OPTIMIZERS:
            curves = [seed[method]["curve"] for seed in summaries(runs, f"w0.5-{optimizer}")]
            folders = sorted(runs.glob(f"long*-{optimizer}-{method}"))
            long = [curves_of(folder)[method] for folder in folders]
            for axes, seeds in ((tiny, curves), (real, long)):
                steps = [record["step"] for record in seeds[0]]
                columns = [[point["held_out"]["loss"] for point in some] for some in zip(*seeds)]
                draw(axes, steps, columns, method, optimizer)
    tiny.set(title="tiny world, width 48 of 96, three seeds", ylabel=LOSS, yscale="log")
    real.set(title="SmolLM2-135M, width 288 of 576, two seeds (lrc, adam: one)")
    loss_axis(real)
    save(figure, "optimisers.png", "held-out loss over steps: three starts, two optimisers", tiny)


def draw_spectrum(runs):
    """The random start's singular values, effective rank and cosine."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    spread, rank, cosine, spectrum = figure.subplots(1, 4)
    for optimizer, (line, _) in OPTIMIZERS.items():
        lines = (runs / f"watch-{optimizer}.jsonl").read_text().splitlines()
        records = list(map(json.loads, lines))
        steps, spreads = zip(*[(record["step"], record["spread"].values()) for record in records])
        draw(spread, steps, list(map(list, spreads)), "lrc", optimizer)
        for axes, kind in ((rank, "erank"), (cosine, "similarity")):
            draw(axes, steps, [[mean(record[kind])] for record in records], "lrc", optimizer)
        for record, color in zip((records[1], records[-1]), ("0.6", "k")):
            values = record["values"]["model.layers.29.mlp.down_proj"]
            places, label = range(0, 8 * len(values), 8), f"{optimizer}, step {record['step']}"
            values = [value / mean(values) for value in values]
            spectrum.plot(places, values, color=color, ls=line, label=label)
    spread.set(title="largest singular value / mean", ylim=(1, None))
    rank.set(title="eRank, mean of the blocks", ylim=(0, None))
    cosine.set(title="cosine, mean of the blocks", ylim=(0, 1.05))
    for axes in (spread, rank, cosine):
        axes.set(xlabel="step", xscale="symlog", xlim=(-0.3, 300))
        axes.set_xticks([0, 1, 2, 5, 10, 20, 40, 80, 240], [0, "", 2, 5, 10, 20, 40, 80, 240])
    spectrum.set(title="all / mean, down_proj of block 30", xlabel="number of the value")
    spectrum.legend()
    save(figure, "spectrum.png", "lrc on SmolLM2: seven projections, mean and range", rank)


def draw_budget(runs):
    """Written answers in the tiny world against width, and against steps."""
    figure = Figure(figsize=(15, 8), layout="constrained")
    kinds = {"pairs written, %": lambda row: row["pairs"]["written"]}
    kinds["chains of five written, %"] = lambda row: row["chains"]["written"][-1]
    widths = {16: "w0.1667", 24: "w0.25", 48: "w0.5", 72: "w0.75"}
    steps = {25: "s25", 50: "s50", 100: "w0.5", 200: "s200"}
    columns = [("student's width, 100 steps", widths, optimizer) for optimizer in OPTIMIZERS]
    columns += [("steps at width 48", steps, optimizer) for optimizer in OPTIMIZERS]
    for row, (kind, score) in zip(figure.subplots(2, 4), kinds.items()):
        for axes, (what, names, optimizer) in zip(row, columns):
            found = [summaries(runs, f"{name}-{optimizer}") for name in names.values()]
            for method in STYLES:
                shares = [[100 * score(seed[method]) for seed in seeds] for seeds in found]
                draw(axes, list(names), shares, method)
            axes.set(title=optimizer, ylabel=kind, ylim=(0, 104), xlabel=what, xscale="log")
            axes.set_xticks(list(names), list(names))
            axes.minorticks_off()
    title = "tiny world, teacher 96 wide: mean and range of three seeds"
    save(figure, "budget.png", title, axes, 8)


def draw_kept(runs):
    """What the starts keep of a real teacher's stream, norm by norm."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, shares in json.loads((runs / "kept.json").read_text()).items():
        color, _, line = STYLES[method]
        percent = [100 * share for share in shares]
        axes.plot(range(1, len(percent) + 1), percent, color=color, ls=line, label=method)
    axes.set(xlabel="norm, from the first block's first to the last", ylabel="kept, %")
    axes.set(ylim=(0, 100))
    title = "SmolLM2-135M-Instruct: share of each norm's input in 288 of 576 channels or directions"
    save(figure, "kept.png", title, axes, 5)


def draw_real(runs):
    """A real teacher: loss, results, effective rank and cosine over tokens."""
    figure = Figure(figsize=(15, 7.6), layout="constrained")
    panels = {LOSS: lambda point: point["loss"]}
    for block in (1, 15, 30):
        panels[f"eRank after block {block}"] = lambda point, i=block - 1: point["erank"][i]
    panels["results right, %"] = lambda point: 100 * point["results"]
    for block in (1, 15, 30):
        panels[f"cosine after block {block}"] = lambda point, i=block - 1: point["similarity"][i]
    teacher = json.loads((runs / "long-muon-pca/summary.json").read_text())["teacher"]
    grid = figure.subplots(2, 4)
    for axes, (title, look) in zip(grid.flat, panels.items()):
        for folder in sorted(runs.glob("long-*")):
            _, optimizer, method = folder.name.split("-", 2)
            curve = curves_of(folder)[method]
            columns = [[look(record["held_out"])] for record in curve]
            draw(axes, [record["tokens"] / 1e6 for record in curve], columns, method, optimizer)
        axes.axhline(look(teacher), color="k", ls=(0, (6, 3)), lw=1, label="the teacher")
        axes.set(title=title, xlabel="million tokens")
    loss_axis(grid[0, 0])
    title = "SmolLM2-135M-Instruct at half width on GSM8K's text, one seed"
    save(figure, "real.png", title, grid[0, 0], 8)


if __name__ == "__main__":
    place = Path(sys.argv[-1])
    if sys.argv[1:-1] == ["--study"]:
        draw_compare(place)
        draw_optimisers(place)
        draw_spectrum(place)
        draw_budget(place)
        draw_kept(place)
        draw_real(place)
    elif len(sys.argv) == 2 and curves_of(place):
        draw_curves(place)
    else:
        print("draw.py needs a folder with a run in it; see its first lines.", file=sys.stderr)
        sys.exit(2)
