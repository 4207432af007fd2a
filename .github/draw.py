"""Draw what runs have measured; needs matplotlib.

    python .github/draw.py OUT             a run's held-out loss and effective rank: OUT/curves.png
    python .github/draw.py --study RUNS    pictures of README and study, beside this

RUNS holds the study's runs: s70-adam-SEED are the tiny world's, with all starts for seeds 0 to 2,
long-OPTIMIZER-METHOD a real teacher's; kept.json and watch-OPTIMIZER.jsonl are what
.github/watch.py writes. A picture whose runs are not there is left as it is.
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

STYLES = {"teacher": ("k", "*", "-"), "red": ("C3", "o", "-"), "pca": ("C0", "D", "-.")}
STYLES |= {"random-selection": ("C5", "P", "--"), "shared-orthogonal": ("C4", "s", "-.")}
STYLES |= {"orthogonal": ("C2", "^", ":"), "lrc": ("C1", "v", ":")}
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


def curves_of(folder):
    """Method -> its records with measurements, also of a run that has not ended."""
    curves = {}
    for path in sorted(folder.glob("*/metrics.jsonl")):
        records = map(json.loads, path.read_text().splitlines())
        curves[path.parent.name] = [record for record in records if "held_out" in record]
    return curves


def summaries(runs, name):
    """One summary for each seed."""
    return [json.loads(path.read_text()) for path in sorted(runs.glob(f"{name}-*/summary.json"))]


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


def draw_story(runs):
    """For the README: effective rank over steps, and chains by length, of `red` and `lrc`."""
    figure, seeds = Figure(figsize=(9, 3.9), layout="constrained"), summaries(runs, "s70-adam")
    rank, chains = figure.subplots(1, 2)
    for method in ("red", "lrc"):
        curves = [seed[method]["curve"] for seed in seeds]
        steps = [record["step"] for record in curves[0]]
        columns = [[mean(r["held_out"]["erank"]) for r in records] for records in zip(*curves)]
        draw(rank, steps, columns, method)
    teachers = [mean(seed["teacher"]["erank"]) for seed in seeds]
    draw(rank, [steps[0], steps[-1]], [teachers, teachers], "teacher")
    for method in ("red", "lrc", "teacher"):
        draw(chains, range(1, 6), chains_by_length(seeds, method), method)
    rank.set(title="effective rank of hidden states", xlabel="training step", ylim=(0, None))
    chains.set(title="chains written right, %", xlabel="operations in the chain", ylim=(0, 105))
    chains.set_xticks(range(1, 6))
    save(figure, "story.png", f"tiny world, half width: mean and range of {len(seeds)} seeds", rank)


def chains_by_length(seeds, method):
    """For each length the seeds' shares of chains written right, in %."""
    columns = zip(*[seed[method]["chains"] for seed in seeds])
    return [[100 * share for share in column] for column in columns]


def draw_starts(runs):
    """For the study: the tiny world at half width, all starts, with Adam."""
    figure, seeds = Figure(figsize=(13, 5.4), layout="constrained"), summaries(runs, "s70-adam")
    seeds = [seed for seed in seeds if "pca" in seed]
    pairs, chains = figure.subplots(1, 2)
    for number, method in enumerate(STYLES):
        for kind, shift, look in zip(("chosen", "written"), (0.2, -0.2), ("0.9", "0.6")):
            place = shift - number
            shares = [100 * seed[method]["pairs"][kind] for seed in seeds]
            pairs.barh(place, mean(shares), height=0.38, color=look, edgecolor="k")
            pairs.plot([min(shares), max(shares)], [place, place], "k|-", ms=9)
        lengths = [length + 0.05 * (number - 3) for length in range(1, 6)]
        draw(chains, lengths, chains_by_length(seeds, method), method)
    pairs.set(title="pairs (knowledge): light, chosen of four; dark, written", xlabel="right, %")
    pairs.set_yticks([-number for number in range(len(STYLES))], STYLES)
    chains.set(title="chains (reasoning), written", xlabel="operations in the chain", ylim=(0, 105))
    title = "tiny world, students of width 48 of 96, Adam, 70 steps: mean and range of three seeds"
    save(figure, "starts.png", title, chains)


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
    """A real teacher: loss, results and effective rank over tokens."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    panels = {LOSS: lambda point: point["loss"]}
    panels["results right, %"] = lambda point: 100 * point["results"]
    panels["effective rank, mean of the blocks"] = lambda point: mean(point["erank"])
    teacher = json.loads((runs / "long-muon-pca/summary.json").read_text())["teacher"]
    grid = figure.subplots(1, 3)
    for axes, (title, look) in zip(grid, panels.items()):
        for folder in sorted(runs.glob("long-*")):
            _, optimizer, method = folder.name.split("-", 2)
            curve = curves_of(folder)[method]
            columns = [[look(record["held_out"])] for record in curve]
            tokens = [record["tokens_seen"] / 1e6 for record in curve]
            draw(axes, tokens, columns, method, optimizer)
        axes.axhline(look(teacher), color="k", ls=(0, (6, 3)), lw=1, label="the teacher")
        axes.set(title=title, xlabel="million tokens")
    title = "SmolLM2-135M-Instruct at half width on GSM8K's text, one seed"
    save(figure, "real.png", title, grid[0], 8)


STUDY = {draw_story: "s70-adam-0", draw_starts: "s70-adam-2", draw_kept: "kept.json"}
STUDY |= {draw_spectrum: "watch-muon.jsonl", draw_real: "long-muon-pca"}

if __name__ == "__main__":
    place = Path(sys.argv[-1])
    if sys.argv[1:-1] == ["--study"]:
        for picture, needed in STUDY.items():
            if (place / needed).exists():
                picture(place)
    elif len(sys.argv) == 2 and curves_of(place):
        draw_curves(place)
    else:
        print("draw.py needs a folder with a run in it; see its first lines.", file=sys.stderr)
        sys.exit(2)
