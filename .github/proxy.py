"""The linear proxy of §4: an autoencoder X -> X Q O of a teacher's hidden states.

    python .github/proxy.py FOLDER FILE.jsonl [adam|muon] [rate]

FOLDER: a teacher, such as runs/tiny-0-...; FILE: text. Trains the proxy from four starts, as the
paper's App. F.2 does, and prints its loss, the effective rank of the reconstruction, and the
largest singular value of Q over the mean.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import red


def starts_of(states, importance, narrow, generator):
    """Where Q and O can start: name -> ((d, narrow), (narrow, d))."""
    wide = states.shape[1]
    down = 0.02 * torch.randn(wide, narrow, generator=generator)
    up = 0.02 * torch.randn(narrow, wide, generator=generator)
    bases = {"random orthogonal": torch.linalg.qr(torch.randn(wide, narrow, generator=generator)).Q}
    bases["red"] = red.selection_matrix(red.select_channels(importance, narrow), wide)
    bases["pca"] = torch.linalg.svd(states, full_matrices=False).Vh[:narrow].T
    return {"random": (down, up)} | {name: (basis, basis.T) for name, basis in bases.items()}


def train_proxy(states, down, up, epochs=100, rate=1e-4, optimizer="adam", batch=256):
    """Yields (loss, effective rank, singular values of Q) before training and after each epoch.

    states: (rows, d). The loss is |X - X Q O|^2 / 2n.
    """
    factors = [torch.nn.Parameter(start.to(states).clone().contiguous()) for start in (down, up)]
    if optimizer == "muon":
        options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
        stepper = torch.optim.Muon(factors, lr=rate, **options)
    else:
        stepper = torch.optim.Adam(factors, lr=rate)
    for epoch in range(epochs + 1):
        with torch.no_grad():
            rebuilt = states @ factors[0] @ factors[1]
            loss = (states - rebuilt).square().sum().item() / 2 / len(states)
        yield loss, red.effective_rank(rebuilt), torch.linalg.svdvals(factors[0].detach())
        for rows in states[torch.randperm(len(states))].split(batch):
            error = rows - rows @ factors[0] @ factors[1]
            (error.square().sum() / 2 / len(rows)).backward()
            stepper.step()
            stepper.zero_grad()


def main(folder, source, optimizer="adam", rate="1e-4"):
    """Hidden states two thirds up the teacher, each token at RMS 1; the paper's sizes and rate."""
    teacher, tokenizer = red.load_teacher(folder)
    task = red.Task(teacher, tokenizer)
    batches = [next(red.packed(red.open_documents(source, "text"), task, 15, 278, []))]
    block = f"model.layers.{2 * len(teacher.model.layers) // 3 - 1}"
    _, seen = red.look_inside(teacher, batches[0]["input_ids"].to(teacher.device), [block])
    states = seen[block].flatten(0, 1)[:4169].float().cpu()
    states = states / states.square().mean(-1, keepdim=True).sqrt()
    narrow = round(states.shape[1] * 1200 / 3072)
    importance = red.calibrate(teacher, batches).importance.cpu()
    torch.manual_seed(0)
    print(f"{len(states)} rows, {states.shape[1]} -> {narrow}, {red.effective_rank(states):.1f}")
    starts = starts_of(states, importance, narrow, torch.Generator().manual_seed(0))
    for name, (down, up) in starts.items():
        results = list(train_proxy(states, down, up, 100, float(rate), optimizer))
        for epoch in (0, 10, 50, 100):
            loss, rank, values = results[epoch]
            spread = (values.max() / values.mean()).item()
            print(f"{name:18} {optimizer} epoch {epoch:3} {loss:8.2f} {rank:6.1f} {spread:5.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
