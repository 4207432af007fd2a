"""Draw the README's picture: python .github/draw.py runs/half-0 runs/half-1 runs/half-2

One folder of the tiny world's runs for each seed; needs matplotlib, and writes compare.png here.
"""

import json
import sys

try:
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("draw.py needs matplotlib: pip install matplotlib")

STYLES = {"teacher": "k*-", "red": "C3o-", "pca": "C0D--", "lrc": "C1v:", "orthogonal": "C2^:"}
STYLES |= {"shared-orthogonal": "C4s-.", "random-selection": "C5P-."}


def draw(axes, x, values, label, shift=0):
    """The mean of the seeds, values a list for each, with a band from the least to the most."""
    x, columns = [number + shift for number in x], list(zip(*values))
    mean = [sum(column) / len(column) for column in columns]
    axes.plot(x, mean, STYLES[label], label=label, fillstyle="none", markersize=8)
    band = list(map(min, columns)), list(map(max, columns))
    axes.fill_between(x, *band, color=axes.lines[-1].get_color(), alpha=0.15)


seeds = [json.load(open(f"{folder}/summary.json")) for folder in sys.argv[1:]]
figure = Figure(figsize=(12, 4.8), layout="constrained")
ability, training = figure.subplots(1, 2)
for number, label in enumerate(seeds[0]):
    rows = [seed[label] for seed in seeds]
    draw(ability, [0], [[row["pairs"]["chosen"]] for row in rows], label, 0.06 * number)
    draw(ability, range(1, 6), [row["chains"]["written"] for row in rows], label, 0.06 * number)
    if label != "teacher":
        curves = [row["curve"] for row in rows]
        means = [[sum(point["held_out"]["erank"]) / 3 for point in curve] for curve in curves]
        draw(training, [point["step"] for point in curves[0]], means, label)

teacher, *_, student = seeds[0].values()
widths = f"students of width {student['hidden_size']} of {teacher['hidden_size']}"
steps = f"{student['curve'][-1]['step']} steps, seeds: {len(seeds)}"
figure.suptitle(f"a teacher of {teacher['parameters']:,} parameters, {widths}, {steps}")
x = "0: pairs, chosen of four; 1 to 5: chains of so many steps, written"
ability.set(title="right answers", xlabel=x)
training.set(title="effective rank, mean of the blocks", xlabel="training step")
handles, labels = ability.get_legend_handles_labels()
names = dict(zip(labels, handles))  # each once
figure.legend(names.values(), names, loc="outside lower center", ncols=7)
figure.savefig("compare.png", dpi=80)
