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


def kept_shares(teacher, calibration):
    """Start -> for each norm the share of its input that the start keeps, every token at RMS 1."""
    norms = red.modules_of(teacher, red.NORMS)
    bases = dict(calibration.bases)
    for method in ("random-selection", "shared-orthogonal"):
        generator = torch.Generator().manual_seed(0)
        bases[method] = red.initial_projection(method, calibration, generator)
    shares = {method: torch.zeros(len(norms)) for method in bases}
    tokens = 0
    for batch in calibration.batches:
        tokens += batch["input_ids"].numel()
        _, seen = red.look_inside(teacher, batch["input_ids"], norms)
        for number, name in enumerate(norms):
            unit = torch.nn.functional.normalize(seen[name][0].float().flatten(0, 1), dim=-1)
            for method, basis in bases.items():
                shares[method][number] += (unit @ basis.to(unit.device)).square().sum().cpu()
    return {method: (share / tokens).tolist() for method, share in shares.items()}


def watch_random_start(task, calibration, config):
    """Yields at each of STEPS what the pictures need of `lrc`."""
    hidden_size = calibration.bases["red"].shape[1]
    student = red.new_student("lrc", task.teacher, hidden_size, calibration)
    last = len(task.teacher.model.layers) - 1
    names = ["model.embed_tokens"]
    for block in (0, last // 2, last):
        names += [f"model.layers.{block}.mlp.{kind}_proj" for kind in ("up", "down")]

    def look(step):
        student.merge()
        values = {n: torch.linalg.svdvals(student.projections[n].detach()) for n in names}
        line = {"step": step} | red.evaluate(student.model, task.held_out)
        line["values"] = {name: some[::8].tolist() for name, some in values.items()}
        line["spread"] = {name: (some.max() / some.mean()).item() for name, some in values.items()}
        return line

    yield look(0)
    batches = red.training_batches(config, task)
    for record in red.distill(task.teacher, student, batches, config, calibration.scales):
        if record["step"] in STEPS:
            yield look(record["step"])


def main(teacher, data, runs):
    runs = Path(runs)
    runs.mkdir(parents=True, exist_ok=True)
    short = {"seq_len": 256, "batch_size": 2, "steps": 240}
    config = red.Config(model=teacher, data=data, **short)
    task = red.open_task(config, teacher)
    width = red.student_width(config.ratio, task.teacher.config)
    calibration = red.calibrate(task.teacher, task.samples, width)
    (runs / "kept.json").write_text(json.dumps(kept_shares(task.teacher, calibration)))
    for config.optimizer, config.learning_rate in RATES.items():
        with open(runs / f"watch-{config.optimizer}.jsonl", "w") as file:
            for line in watch_random_start(task, calibration, config):
                print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("watch.py needs TEACHER DATA RUNS; see its first lines.")
    main(*sys.argv[1:])
