"""A step against its floor, taken in turns: python .github/bench.py CONFIG.json 8 512 step floor

CONFIG.json: of any model, used with random weights; then sequences and tokens per micro-batch, and
what to time: `step` (Adam), `muon` (a step with it), `reference` (a step as the formulas read),
`floor` (the work that no distillation can avoid: the teacher's forward pass, and the forward and
backward pass of an ordinary student); `width=N` for a student that is not half as wide; `float32`
or `bfloat16`, where it is not the machine's. For a peak of memory, ask for one alone.
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
DEVICE = "cuda" if GPU else "cpu"


def build(config, dtype):
    with torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def batches(vocabulary, sequences, length):
    while True:
        ids = torch.randint(vocabulary, (sequences, length))
        yield {"input_ids": ids, "labels": ids}


def steps(teacher, width, batches, kind):
    few = [{"input_ids": next(batches)["input_ids"][:1, :16]}] * 2
    calibration = red.calibrate(teacher, few)
    student = red.new_student("red", teacher, width, calibration)
    config = red.Config(optimizer="muon" if kind == "muon" else "adam")
    loop = red.distill(teacher, student, batches, config, calibration.teacher_mean_squares)
    if GPU:
        red.fuse_norms(student.model)  # as red.py does
    while True:
        if GPU:
            red.fuse_norms(teacher)
        if kind == "reference":
            red.reference_step(
                teacher, student, next(batches), config, calibration.teacher_mean_squares
            )
            for parameter in student.parameters():
                parameter.grad = None
            yield
        else:
            yield next(loop)


def floors(teacher, width, batches, dtype):
    ordinary = build(red.student_config(teacher.config, width), dtype)
    for batch in batches:
        for module in teacher.modules():
            vars(module).pop("forward", None)  # norms as transformers has them
        batch = {name: ids.to(DEVICE) for name, ids in batch.items()}
        with torch.no_grad():
            teacher(batch["input_ids"], use_cache=False)
        ordinary(**batch, use_cache=False).loss.backward()
        ordinary.zero_grad()
        yield


def main(path, sequences, length, *words):
    values = transformers.AutoConfig.for_model(**json.loads(Path(path).read_text()))
    width, dtype, names = values.hidden_size // 2, None, []
    for word in words:
        if word.startswith("width="):
            width = int(word.removeprefix("width="))
        elif word in ("float32", "bfloat16"):
            dtype = getattr(torch, word)
        else:
            names.append(word)
    dtype = dtype or (torch.bfloat16 if GPU else torch.float32)
    teacher = build(values, dtype).eval().requires_grad_(False)
    data = batches(values.vocab_size, int(sequences), int(length))
    work = {}
    for name in names:
        kind = floors(teacher, width, data, dtype) if name == "floor" else None
        work[name] = kind or steps(teacher, width, data, name)

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
