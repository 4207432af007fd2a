"""What the study looks at beside its runs: python .github/watch.py TEACHER DATA RUNS

It writes RUNS/kept.json: for each start, norm by norm, the share of the teacher's stream that lies
in the start's directions; and RUNS/watch-adam.jsonl and RUNS/watch-muon.jsonl: `lrc` over 240 short
steps, with singular values of seven projections, and effective rank and cosine of all blocks.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import red

RATES = {"adam": 1e-3, "muon": 1e-2}  # the best of four for `lrc`
STEPS = (0, 2, 5, 10, 20, 40, 80, 120, 160, 200, 240)


def kept_shares(calibration, width):
    """Start -> for each norm the share of its input that the start keeps, every token at RMS 1."""
    shares = {}
    for method in ("red", "pca", "random-selection", "shared-orthogonal"):
        generator = torch.Generator().manual_seed(0)
        basis = red.initial_projection(method, calibration, width, generator)
        moments = [moment.cpu() for moment in calibration.moments.values()]
        shares[method] = [(moment @ basis * basis).sum().item() for moment in moments]
    return shares


def mean_cosines(model, batches):
    """For each block the mean cosine of two tokens of its output."""
    names, parts = [f"model.layers.{i}" for i in range(len(model.model.layers))], {}
    for batch in batches:
        _, seen = red.look_inside(model, batch["input_ids"], names)
        for name, stream in seen.items():
            unit = torch.nn.functional.normalize(stream.flatten(0, 1).float(), dim=-1)
            parts.setdefault(name, []).append(unit)
    return [torch.cat(part).mean(0).square().sum().item() for part in parts.values()]


def watch_random_start(task, calibration, config, width):
    """Yields at each of STEPS what the pictures need of `lrc`."""
    student = red.new_student("lrc", task.teacher, width, calibration)
    last = len(task.teacher.model.layers) - 1
    names = ["model.embed_tokens"]
    for block in (0, last // 2, last):
        names += [f"model.layers.{block}.mlp.{kind}_proj" for kind in ("up", "down")]

    def look(step):
        student.merge()
        values = {n: torch.linalg.svdvals(student.projections[n].detach()) for n in names}
        line = {"step": step} | red.evaluate(student.model, task.held_out)
        line["similarity"] = mean_cosines(student.model, task.held_out[:8])
        line["values"] = {name: some[::8].tolist() for name, some in values.items()}
        line["spread"] = {name: (some.max() / some.mean()).item() for name, some in values.items()}
        return line

    yield look(0)
    batches = red.training_batches(config, task, 0, None)
    for record in red.distill(
        task.teacher, student, batches, config, calibration.teacher_mean_squares
    ):
        if record["step"] in STEPS:
            yield look(record["step"])


def main(teacher, data, runs):
    runs = Path(runs)
    runs.mkdir(parents=True, exist_ok=True)
    config = red.Config(model=teacher, data=data, seq_len=256, batch_size=2, steps=240)
    task = red.open_task(config)
    width = red.choose_width(config.ratio, task.teacher.config)
    calibration = red.calibrate(task.teacher, task.samples)
    (runs / "kept.json").write_text(json.dumps(kept_shares(calibration, width)))
    for config.optimizer, config.learning_rate in RATES.items():
        with open(runs / f"watch-{config.optimizer}.jsonl", "w") as file:
            for line in watch_random_start(task, calibration, config, width):
                print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("watch.py needs TEACHER DATA RUNS; see its first lines.")
    main(*sys.argv[1:])
