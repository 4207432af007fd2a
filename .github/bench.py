"""A step against its floor, taken in turns: python .github/bench.py CONFIG.json 8 512 step floor

CONFIG.json: of any model, used with random weights; then sequences and tokens per micro-batch, and
what to time: `step` (Adam), `muon` (a step with it), `floor` (the work that no distillation can
avoid: the teacher's forward pass, and the forward and backward pass of an ordinary student), and
`width=N` for a student that is not half as wide. For a peak of memory, ask for one alone.
"""

import itertools
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import red

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)


def build(config):
    with torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE)


def batches(vocabulary, sequences, length):
    while True:
        ids = torch.randint(vocabulary, (sequences, length))
        yield {"input_ids": ids, "labels": ids}


def steps(teacher, width, batches, optimizer):
    few = [{"input_ids": next(batches)["input_ids"][:1, :16]}] * 2
    calibration = red.calibrate(teacher, few, width)
    student = red.new_student("red", teacher, width, calibration)
    config = red.Config(optimizer=optimizer)
    loop = red.distill(teacher, student, batches, config, calibration.scales)
    while True:
        if GPU:
            red.fuse_norms(teacher)  # as red.py does
        yield next(loop)


def floors(teacher, width, batches):
    ordinary = build(red.student_config(teacher.config, width))
    for batch in batches:
        for module in teacher.modules():
            vars(module).pop("forward", None)  # norms as transformers has them
        batch = {name: ids.to(DEVICE) for name, ids in batch.items()}
        with torch.no_grad():
            teacher(batch["input_ids"], use_cache=False)
        ordinary(**batch, use_cache=False).loss.backward()
        ordinary.zero_grad()
        yield


def main(path, sequences, length, *names):
    values = transformers.AutoConfig.for_model(**json.loads(Path(path).read_text()))
    width = values.hidden_size // 2
    wanted = [int(name.removeprefix("width=")) for name in names if name.startswith("width=")]
    width = wanted[0] if wanted else width
    names = [name for name in names if not name.startswith("width=")]
    teacher = build(values).eval().requires_grad_(False)
    data = batches(values.vocab_size, int(sequences), int(length))
    work = {}
    for name in names:
        optimizer = "muon" if name == "muon" else "adam"
        work[name] = floors(teacher, width, data) if name == "floor" else None
        work[name] = work[name] or steps(teacher, width, data, optimizer)

    times = {name: [] for name in names}
    for _, name in itertools.product(range(8), names):  # the first turn warms up
        started = time.perf_counter()
        next(work[name])
        if GPU:
            torch.cuda.synchronize()
        times[name].append(time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # on Linux
    if GPU:
        memory = torch.cuda.max_memory_allocated() / 2**30
    for name in names:
        median = statistics.median(times[name][1:])
        speed = int(sequences) * int(length) / median
        print(f"{name}: {median:.3f} s, {speed:,.0f} tokens/s, peak of all {memory:.2f} GiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
