"""RED: Reasoning-preserved Efficient Distillation, in one file that reads beside the paper.

He, Tang, Nie, Li, Yang, Du, Sun, Ma: "Reasoning-preserved Efficient Distillation of Large
Language Models via Activation-aware Initialization", ICML 2026, arXiv 2605.29327.

A Llama- or Qwen-like teacher is compressed to a smaller hidden width. The student's weights are
the teacher's frozen weights seen through trainable projection matrices; RED starts each projection
as the same channel-selection matrix, picked from the teacher's activations. The file follows the
paper from top to bottom; a comment marked [ours] is our reading where the paper is silent to us.

    python red.py                                       the tiny world: everything, in minutes
    python red.py --model Qwen/Qwen2-0.5B --ratio 0.5   a real teacher
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# ==== Configuration ===========================================================================
# Every choice of a run is one field of one dataclass, with its help text. The command line, the
# announcement before a run and the settings stored beside its results all come from here.

METHODS = ("red", "lrc", "orthogonal", "shared-orthogonal", "random-selection")
STATISTICS = ("norm-output", "normalised-stream", "variance")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TINY_CONFIG = Path(__file__).with_name("tiny_config.json")

# What a flag that was not given means: without --model (the tiny world), and with it.
TINY_DEFAULTS = {
    "methods": ["red", "lrc", "lrc"], "temperature": [1.0, 1.0, 40.0], "steps": 100,
    "batch_size": 64, "seq_len": 48, "learning_rate": 3e-3, "eval": "chains", "out": "runs/tiny",
}  # fmt: skip
MODEL_DEFAULTS = {
    "methods": ["red"], "temperature": [1.0], "steps": 1000, "batch_size": 8, "seq_len": 512,
    "learning_rate": 3e-4, "eval": "none", "data": "HuggingFaceFW/fineweb-edu:sample-10BT",
}  # fmt: skip
LEAST = {
    "hidden_size": 1, "calibration_samples": 2, "steps": 0, "batch_size": 1, "grad_accum": 1,
    "seq_len": 2, "seed": 0, "eval_limit": 1, "alpha": 0,
}  # fmt: skip


class UserError(Exception):
    """Something the user can mend: one sentence for stderr, exit code 2, no traceback."""


def option(default, help, **words):
    """One field of Config: its default, its help text, and further words for argparse."""
    shown = "" if default is None or default is False else f" [{default}]"
    words["help"] = (help + shown).replace("%", "%%")
    return dataclasses.field(default=default, metadata=words)


@dataclasses.dataclass
class Config:
    """All settings of a run. A default in brackets is [tiny world | with --model]."""

    model: str = option(None, "teacher: a folder or a hub name; without it, the tiny world runs")
    revision: str = option(None, "the hub revision of --model")
    ratio: float = option(None, "student width as a share of the teacher's, in (0, 1] [0.5]")
    hidden_size: int = option(None, "student width itself, instead of --ratio")
    methods: list[str] = option(None, "how projections start [red lrc lrc | red]", choices=METHODS)
    data: str = option(None, ".txt, .jsonl, .parquet or hub NAME[:CONFIG[:SPLIT]] [FineWeb-Edu]")
    calibration_data: str = option(None, "calibration text, given like --data [the same data]")
    calibration_samples: int = option(15, "sequences to calibrate on")
    importance: str = option("norm-output", "statistic that scores channels", choices=STATISTICS)
    alignment: str = option(
        "relative", "alignment as LRC has it, or over mean squares", choices=("plain", "relative")
    )
    steps: int = option(None, "optimiser steps; 0 initialises, exports and measures [100 | 1000]")
    batch_size: int = option(None, "sequences per micro-batch [64 | 8]")
    grad_accum: int = option(1, "micro-batches per optimiser step")
    seq_len: int = option(None, "tokens per sequence [48 | 512]")
    learning_rate: float = option(None, "peak learning rate of Adam [3e-3 | 3e-4]")
    temperature: list[float] = option(None, "of the KL term: one, or one a method [1 1 40 | 1]")
    alpha: float = option(0.2, "weight of the alignment loss")
    seed: int = option(0, "seed of everything random")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = option(
        "auto", "auto: bfloat16 on cuda, else float32", choices=("auto", "float32", "bfloat16")
    )
    out: str = option(None, "folder for the results [runs/tiny | runs/MODEL-WIDTH]")
    overwrite: bool = option(False, "replace an earlier run's results in --out")
    eval: str = option(None, "task to measure [chains | none]", choices=("none", "chains", "gsm8k"))
    eval_data: str = option(None, "GSM8K problems, given like --data [openai/gsm8k:main:test]")
    eval_shots_data: str = option(None, "its first five are the shots [openai/gsm8k:main:train]")
    eval_limit: int = option(None, "measure only the first so many GSM8K problems")


def parse_arguments(arguments=None):
    """Command line (list of words; None: sys.argv) -> Config. A mistake raises UserError."""

    def refuse(message):
        raise UserError(f"{message}; python red.py --help lists every flag.")

    about = "RED: compress a language model's hidden width, keeping its reasoning."
    style = argparse.HelpFormatter  # defaults that depend on --model are in the help texts
    parser = transformers.HfArgumentParser(
        Config, prog="red.py", description=about, formatter_class=style, allow_abbrev=False
    )
    parser.error = refuse
    config, *_, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        refuse(f"unknown argument {unknown[0]}")
    check(config)
    return config


def check(config):
    """Fill in what was not given and refuse what cannot be (UserError). Loads nothing."""
    if config.methods is None and config.temperature and not config.model:
        config.methods = ["red", "lrc"]
    if config.methods is not None and config.temperature is None:
        config.temperature = [1.0]
    for name, value in (MODEL_DEFAULTS if config.model else TINY_DEFAULTS).items():
        if getattr(config, name) is None:
            setattr(config, name, copy.copy(value))
    if config.ratio is None and config.hidden_size is None:
        config.ratio = 0.5
    if len(config.temperature) == 1:
        config.temperature *= len(config.methods)
    for name, least in LEAST.items():
        value = getattr(config, name)
        if value is not None and not least <= value < 2**63:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be a number of at least {least}, got {value}.")
    for value in (config.learning_rate, *config.temperature):
        if not 0 < value < math.inf:
            raise UserError(f"--learning-rate and --temperature must be positive, got {value:g}.")
    if config.ratio is not None and not 0 < config.ratio <= 1:
        raise UserError(f"--ratio must lie in (0, 1], got {config.ratio:g}.")
    if None not in (config.ratio, config.hidden_size):
        raise UserError("--ratio and --hidden-size say the same thing twice; give one of them.")
    methods, temperatures = config.methods, config.temperature
    if len(temperatures) != len(methods):
        raise UserError(f"--temperature takes one value, or one for all {len(methods)} methods.")
    if len(set(zip(methods, temperatures))) < len(methods):
        raise UserError("--methods names the same method twice at one temperature; name it once.")
    for name in ("data", "calibration_data", "revision", "eval_data", "eval_shots_data"):
        if not config.model and getattr(config, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} needs --model, the teacher to use.")
    if not config.model and config.eval == "gsm8k":
        raise UserError("--eval gsm8k needs --model: the tiny world knows only digits.")
    if config.out is None:
        config.out = f"runs/{Path(config.model).name}-{config.hidden_size or config.ratio}"


def resolve_device(config):
    """--device and --dtype -> (torch.device, torch.dtype). A device not there: UserError."""
    name = config.device
    try:
        if name == "auto":
            name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        device = torch.empty(0, device=name).device
        known = device.type in ("cpu", "cuda", "mps")
    except (RuntimeError, AssertionError, ValueError):
        known = False
    if not known:
        raise UserError(f"there is no device {name!r} on this machine; --device cpu always works.")
    if config.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, getattr(torch, config.dtype)


# ==== Teacher and data (App. F) ===============================================================
# A frozen teacher of a supported family, and batches of packed tokens. A batch is a dict of
# `input_ids` and `labels`, both (batch, tokens) and aligned as in transformers (the shift by one
# is made inside the loss; -100 is ignored), and an `attention_mask` where there is padding.


@dataclasses.dataclass
class Task:
    """What a distillation needs besides a method: the same for all methods that are compared."""

    teacher: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    calibration: list  # batches of one sequence, for the channel statistics
    held_out: list  # batches that training never sees
    stream: object  # () -> a fresh, endless iterator over training batches, the same every time
    measure: object  # model -> dict of task scores
    name: str = "the tiny world"  # of the teacher
    data: str = "the tiny world"


def first_line(error):
    """The first line of an exception's text (and the next, if it only leads to it)."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")


def load_teacher(name, revision=None, dtype=torch.float32, device="cpu"):
    """A frozen teacher and its tokenizer, from a folder or the hub (§3).

    The config comes first: an unsupported model is refused before its weights are downloaded.
    Raises UserError where the model is missing, broken, quantised or of another family.
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name} holds no config.json, so it is no model folder.")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"cannot read the config of {name!r} ({first_line(error)}); check the name, or pass "
            "a folder that holds config.json, the weights and the tokenizer."
        ) from error
    if config.model_type not in FAMILIES:
        families = ", ".join(FAMILIES)
        raise UserError(f"{name} is a {config.model_type!r} model; supported are {families}.")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{name} is quantised; pass the full-precision checkpoint it came from.")
    words = {"revision": revision, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **words)
        words |= {"config": config, "dtype": dtype, "output_loading_info": True}
        teacher, report = AutoModelForCausalLM.from_pretrained(name, **words)
        if report["missing_keys"]:
            raise ValueError(f"without {sorted(report['missing_keys'])[0]}")
    except Exception as error:
        raise UserError(
            f"cannot load {name!r} ({first_line(error)}); its weights or tokenizer are missing or "
            "damaged, so fetch them again."
        ) from error
    # A file may hold two different matrices where its config calls them tied: believe the file.
    teacher.config.tie_word_embeddings = teacher.lm_head.weight is teacher.model.embed_tokens.weight
    return teacher.to(device).eval().requires_grad_(False), tokenizer


def open_documents(source, flag="--data"):
    """What a flag names -> a streaming datasets.IterableDataset. UserError where it cannot be read.

    Local where it exists or ends like a file; else of the hub, as name[:config[:split]].
    """
    import datasets  # here, because it takes seconds to import and the tiny world needs none of it

    datasets.disable_progress_bars()
    path, readers = Path(source), {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
    local = path.suffix in readers or path.exists()
    if local and not path.is_file():
        raise UserError(f"there is no file {source}.")
    if local and path.suffix not in readers:
        raise UserError(f"{source} must end in .txt, .jsonl or .parquet.")
    if local and path.stat().st_size == 0:
        raise UserError(f"{source} is empty.")
    name, config, split = [source, "", ""] if local else (source.split(":") + ["", ""])[:3]
    words = {"data_files": source} if local else {"name": config or None}
    if path.suffix == ".txt":
        words["sample_by"] = "paragraph"  # a blank line separates documents
    try:
        return datasets.load_dataset(
            readers[path.suffix] if local else name, split=split or "train", streaming=True, **words
        )
    except Exception as error:
        raise UserError(
            f"cannot read the data {source!r} ({first_line(error)}); pass {flag} a local .txt, "
            ".jsonl or .parquet file, or the name of a hub dataset that can be reached."
        ) from error


def document_tokens(document, tokenizer):
    """One document -> its token ids, closed by the end-of-text token.

    Fields: `messages` (through the tokenizer's chat template), `question` and `answer`, or `text`.
    """
    special = not document.get("messages")  # a chat template writes the special tokens itself
    if not special:
        if not tokenizer.chat_template:
            raise UserError("the data holds chats, but the teacher's tokenizer has no template.")
        text = tokenizer.apply_chat_template(document["messages"], tokenize=False)
    elif document.get("question") is not None and document.get("answer") is not None:
        text = f"Question: {document['question']}\nAnswer: {document['answer']}"
    elif document.get("text") is not None:
        text = document["text"]
    else:
        raise UserError(
            "the data has none of the fields `text`, `messages`, or `question` with `answer`; "
            f"it has {', '.join(map(str, document)) or 'no field at all'}."
        )
    tokens = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    closed = end is None or end in tokens[-2:]  # by the tokenizer, or by a template and a newline
    return tokens if closed else tokens + [end]


def packed_rows(documents, tokenizer, seq_len):
    """Documents -> rows of exactly `seq_len` token ids, cut from one long string of documents."""
    held = []
    for document in documents:
        held += document_tokens(document, tokenizer)
        while len(held) >= seq_len:
            yield held[:seq_len]
            held = held[seq_len:]


def as_batches(rows, batch_size, device):
    """Rows of token ids -> batches in which every token is a label. A last short batch is kept."""
    rows = iter(rows)
    while chosen := list(itertools.islice(rows, batch_size)):
        ids = torch.tensor(chosen, device=device)
        yield {"input_ids": ids, "labels": ids}


def readable(items, source):
    """The items of a source; what breaks while reading them becomes a UserError."""
    try:
        yield from items
    except UserError:
        raise
    except Exception as error:  # a file that opens but is no text, a hub that drops halfway
        raise UserError(f"cannot read the data {source!r} ({first_line(error)}).") from error


def text_task(config, teacher, tokenizer, device):
    """The Task of a real teacher: streamed text, its first documents held out (App. F.2).

    Held out are the first 200 documents, or a tenth of a smaller source (more, where that is less
    than one sequence), of which at most 32 sequences are measured. Calibration uses the first
    training sequences unless it has data of its own. UserError: data unreadable, or too short.
    """

    def rows(documents, source, wanted=None):
        packed = packed_rows(readable(documents, source), tokenizer, config.seq_len)
        return list(itertools.islice(packed, wanted))

    documents = open_documents(config.data)
    count = sum(1 for _ in readable(documents.take(2000), config.data))
    held = max(1, min(200, count // 10))
    while held <= count // 4 and not rows(documents.take(held), config.data, 1):
        held *= 2
    held_out, training = rows(documents.take(held), config.data, 32), documents.skip(held)
    calibration, source = training, config.calibration_data or config.data
    if source != config.data:
        calibration = open_documents(source, "--calibration-data")
    samples = rows(calibration, source, config.calibration_samples)
    if not held_out or not rows(training, config.data, 1) or len(samples) < 2:
        raise UserError(
            f"{source if held_out else config.data} is too short for {config.seq_len} tokens at a "
            "time; give more text (in a .txt, a blank line ends a document) or a smaller --seq-len."
        )

    def endless():
        for epoch in itertools.count():
            if epoch:
                say("data", f"used up; repeated, shuffled anew (epoch {epoch + 1})")
            shuffled = training.shuffle(seed=config.seed + epoch, buffer_size=2000)
            yield from readable(shuffled, config.data)

    def stream():
        packed = packed_rows(endless(), tokenizer, config.seq_len)
        return as_batches(packed, config.batch_size, device)

    samples = list(as_batches(samples, 1, device))
    held_out = list(as_batches(held_out, config.batch_size, device))
    measure = task_scores(config, tokenizer)
    return Task(teacher, tokenizer, samples, held_out, stream, measure, config.model, config.data)


# ==== Effective rank (§4) =====================================================================
# The paper's instrument. Hidden states whose effective rank is low are hard to tell apart, and a
# chain of reasoning that has to tell its steps apart breaks first.


def effective_rank(hidden):
    """eRank(H) = exp(-sum p ln p), p = singular values / their sum (§4; Roy & Vetterli 2007).

    hidden: (..., d), any floating dtype; all leading dimensions are rows. Returns a float between
    1 and min(rows, d), or 0.0 for a zero matrix. The singular values are the roots of the smaller
    Gram matrix's eigenvalues, in float64: on 2,048 x 576 normal data within 1e-10 of an SVD, and
    it stays within 1e-4 down to rank one. Raises ValueError for values that are not finite.
    """
    hidden = hidden.detach().reshape(-1, hidden.shape[-1])
    hidden = (hidden.cpu() if hidden.device.type == "mps" else hidden).double()  # mps: no float64
    if not torch.isfinite(hidden).all():
        raise ValueError("effective_rank needs finite values")
    hidden = hidden / hidden.abs().max().clamp_min(1e-300)  # so that squares cannot overflow
    gram = hidden.T @ hidden if hidden.shape[0] >= hidden.shape[1] else hidden @ hidden.T
    eigenvalues = torch.linalg.eigvalsh(gram)
    floor = eigenvalues[-1] * len(eigenvalues) * torch.finfo(torch.float64).eps
    values = eigenvalues[eigenvalues > floor].sqrt()  # below the floor there is only rounding
    if len(values) == 0:
        return 0.0
    p = values / values.sum()
    return torch.exp(-(p * p.log()).sum()).item()


class watch:
    """While open, `see(name, input, output)` is called whenever one of the named modules runs.

    The one way in which this file looks inside a model: calibration, alignment and effective rank
    all use it, for any nn.Module. `names` are those of `model.named_modules()`.
    """

    def __init__(self, model, names, see):
        self.model, self.names, self.see = model, names, see

    def __enter__(self):
        def hook_of(name):
            return lambda module, inputs, output: self.see(name, inputs[0], output)

        get = self.model.get_submodule
        self.hooks = [get(name).register_forward_hook(hook_of(name)) for name in self.names]

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def last_hidden(model, batch):
    """The causal model's last normed hidden states, (batch, tokens, d), without any logits."""
    mask = batch.get("attention_mask")
    output = model.model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
    return output.last_hidden_state


def real_tokens(batch):
    """(batch, tokens) bool: True but at padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()


def real_labels(batch):
    """The labels, with -100 at padding, too."""
    return batch["labels"].masked_fill(~real_tokens(batch), -100)


def token_means(model, batches, names, measure):
    """The mean over all real tokens of what each named module does: name -> float64 tensor.

    measure(input, output), of two float32 tensors (tokens, width), returns (tokens, ...). Only
    running sums are kept, so memory does not grow with the batches; padding counts nowhere.
    Raises ValueError where there are no tokens.
    """
    sums, count = {}, 0
    for batch in batches:
        real = real_tokens(batch)

        def see(name, before, after):
            seen = measure(before[real].float(), after[real].float())
            sums[name] = sums.get(name, 0.0) + seen.cpu().double().sum(0)  # mps has no float64

        with torch.no_grad(), watch(model, names, see):
            last_hidden(model, batch)
        count += int(real.sum())
    if count == 0:
        raise ValueError("there are no tokens to measure on")
    return {name: total / count for name, total in sums.items()}


# ==== Calibration and selection (§5) ==========================================================
# The contribution of RED. A few sequences through the teacher score each channel of the residual
# stream; the best become the student's channels. The stream is one space, so one set of channels
# serves every matrix [ours]: S is (d_t, d_s), a single 1 per column, and S.T @ S = I.


@dataclasses.dataclass
class Calibration:
    """What `calibrate` found."""

    batches: list
    importance: torch.Tensor  # (d_t,)
    channels: torch.Tensor  # (d_s,)
    overlap: float  # of the channels that two halves of the calibration set pick, from 0 to 1
    scales: dict  # aligned module -> mean square of the teacher's output


def stream_norms(model):
    """Names of the 2L + 1 norm layers of the residual stream, in order (not q_norm or k_norm)."""
    leaves = ("input_layernorm", "post_attention_layernorm", "norm")
    return [name for name, _ in model.named_modules() if name.split(".")[-1] in leaves]


def channel_importance(model, batches, statistic="norm-output"):
    """How much the teacher uses each channel of its residual stream (§5).

    batches: dicts of `input_ids` (batch, tokens) and perhaps `attention_mask`. Returns (d_t,)
    float64, which sums to the number of norm layers: per layer, the statistic over all tokens,
    scaled to sum 1 [ours: the paper's Eqs. 9-10 are not known to us], one of
      norm-output        mean absolute output of the norm layer, its gain included
      normalised-stream  root mean square of the stream, each token scaled to RMS 1, without gain
      variance           variance over tokens of the norm layer's output
    ValueError: unknown statistic, or no tokens. FloatingPointError: activations not finite.
    """
    measures = {
        "norm-output": lambda stream, normed: normed.abs(),
        "normalised-stream": lambda stream, normed: stream**2 / (stream**2).mean(-1, True),
        "variance": lambda stream, normed: torch.stack([normed, normed.square()], 1),
    }
    if statistic not in measures:
        raise ValueError(f"unknown statistic {statistic!r}")
    total = 0.0
    for mean in token_means(model, batches, stream_norms(model), measures[statistic]).values():
        score = mean.sqrt() if statistic == "normalised-stream" else mean
        if statistic == "variance":
            score = (mean[1] - mean[0].square()).clamp_min(0)
        total = total + score / score.sum()
    if not torch.isfinite(total).all():
        raise FloatingPointError("the teacher's activations are not finite")
    return total


def aligned_modules(model):
    """Names of the seven linear modules of each block, whose outputs are aligned (App. B)."""
    return [name for name, _ in model.named_modules() if name.endswith("_proj")]


def select_channels(importance, hidden_size):
    """Indices of the `hidden_size` most important channels, ascending, (d_s,) int64 (§5).

    Equal scores go to the lower index. Raises ValueError unless 0 < hidden_size <= d_t.
    """
    if not 0 < hidden_size <= len(importance):
        raise ValueError(f"cannot keep {hidden_size} of {len(importance)} channels")
    order = torch.sort(importance, descending=True, stable=True).indices
    return order[:hidden_size].sort().values


def selection_matrix(channels, width):
    """S in {0,1}, (width, len(channels)) float32, with S[channels[j], j] = 1 (§5, Thm. 5.1).

    Distinct channels make every singular value exactly 1. Raises ValueError for repeated ones.
    """
    if len(set(channels.tolist())) < len(channels):
        raise ValueError("a channel is selected twice")
    return torch.eye(width)[:, channels.cpu()]


def gain_rescaling(model, batches, channels):
    """Per norm layer, mean over tokens of rms(kept channels) / rms(all channels) [ours].

    A student that keeps some channels divides them by their own RMS where the teacher divided by
    that of all; this ratio on its gains makes up for it. Returns name -> float, 1.0 at full width.
    """

    def ratio(stream, normed):
        return (stream[:, channels].square().mean(-1) / stream.square().mean(-1)).sqrt()

    means = token_means(model, batches, stream_norms(model), ratio)
    return {name: mean.item() for name, mean in means.items()}


def mean_squares(model, batches):
    """Mean square of each aligned module's output over the real tokens: name -> float.

    Measured once, these are the constants that `--alignment relative` divides by [ours].
    """
    names = aligned_modules(model)
    means = token_means(model, batches, names, lambda before, after: after.square().mean(-1))
    return {name: max(mean.item(), 1e-12) for name, mean in means.items()}


def calibrate(teacher, batches, hidden_size, statistic="norm-output"):
    """Everything that is measured on the teacher before training starts (§5), as a Calibration.

    batches: a list of batches, of which each half also picks its own channels, to show how far
    the choice can be trusted (App. G.2): `overlap` is the share on which the halves agree, and two
    random sets would agree on hidden_size / d_t.
    """
    shown = functools.partial(tqdm, desc="calibrate", leave=False, delay=2)
    importance = channel_importance(teacher, shown(batches), statistic)
    channels = select_channels(importance, hidden_size)
    middle = len(batches) // 2
    halves = [
        set(select_channels(channel_importance(teacher, part, statistic), hidden_size).tolist())
        for part in (shown(batches[:middle]), shown(batches[middle:]))
    ]
    overlap = len(halves[0] & halves[1]) / hidden_size
    scales = mean_squares(teacher, shown(batches))
    return Calibration(batches, importance, channels, overlap, scales)


# ==== The projected student and its merge (§3, App. C) ========================================
# The student is an ordinary transformers model of the teacher's own architecture, only narrower,
# whose weights are made from the teacher's: W @ P where a matrix reads the residual stream, P.T @ W
# where it writes to it. They are made once per optimiser step and handed to the model, which then
# runs as it is, on any attention kernel, through any number of micro-batches; its gradients are
# carried back to the projections once. (The other way, projecting inside every forward, would pay
# for the products anew with each micro-batch, and needs functional_call around each use.)

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
WRITERS = ("o_proj", "down_proj")


def projected_matrices(model):
    """Names of the modules with a projection of their own: seven a block, embedding, head (App. C).

    A head tied to the embedding has none: it uses the embedding's.
    """
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    names = [name for name, _ in model.named_modules() if name.split(".")[-1] in READERS + WRITERS]
    return [name for name in names if not (tied and name == "lm_head")]


def feeding_norm(name):
    """The norm layer whose output the named matrix reads, or None (the embedding, the writers)."""
    block, _, leaf = name.rpartition(".")
    if leaf in ("q_proj", "k_proj", "v_proj"):
        return block.rpartition(".")[0] + ".input_layernorm"
    if leaf in ("gate_proj", "up_proj"):
        return block.rpartition(".")[0] + ".post_attention_layernorm"
    return "model.norm" if leaf == "lm_head" else None


class ProjectedStudent:
    """A student whose every weight is a function of the frozen teacher's (§3, App. C).

    teacher      a causal language model, (d_t) wide; never changed
    model        the same architecture, (d_s) wide, its parameters perhaps on the meta device: the
                 student itself, an ordinary model that may be called, or generate, at any time
    projections  matrix name -> (d_t, d_s) float tensor, for all `projected_matrices(teacher)`
    gains        norm name -> (d_s,) float tensor, for all `stream_norms(teacher)`
    fold         let the teacher's gains act inside the reading weights, W @ diag(g) @ P, as a
                 rotated start needs; the student's gains then start at 1 [ours]

    Not an nn.Module, so that what trains is plain to see: `parameters()` is projections and gains,
    in float32 or better. Raises ValueError where these are missing or of the wrong shape.
    """

    def __init__(self, teacher, model, projections, gains, fold=False):
        self.teacher, self.model, self.fold = teacher, model, fold
        embedding = teacher.model.embed_tokens.weight
        width, narrow = embedding.shape[1], model.model.embed_tokens.weight.shape[1]
        expected = {name: (width, narrow) for name in projected_matrices(teacher)}
        expected |= {name: (narrow,) for name in stream_norms(teacher)}
        if {name: tuple(t.shape) for name, t in {**projections, **gains}.items()} != expected:
            raise ValueError("projections or gains are missing or of the wrong shape")
        precise = torch.promote_types(embedding.dtype, torch.float32)
        new, where = torch.nn.Parameter, {"device": embedding.device, "dtype": precise}
        self.projections = {n: new(t.to(**where, copy=True)) for n, t in projections.items()}
        self.gains = {n: new(t.to(**where, copy=True)) for n, t in gains.items()}
        self.frozen = {name: weight.detach() for name, weight in teacher.named_parameters()}
        # Rotary tables live in head space, the same in both, and in no state dict: share them.
        model.model.rotary_emb = teacher.model.rotary_emb
        made = self.merge()
        weights = {name: weight.detach() for name, weight in made.items()}
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
        model.model.embed_tokens.padding_idx = None  # else padding's row would get no gradient
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(made[name].requires_grad)
        model.eval()

    def parameters(self):
        """Everything that learns, a list: the projections, then the gains."""
        return [*self.projections.values(), *self.gains.values()]

    def merge(self):
        """The student's weights, name -> tensor, as differentiable functions of the projections.

        Names and shapes are those of the student's own checkpoint (App. C). Biases of o and down
        live in the stream and are projected like their weights [ours]; what lives in head space
        (q/k/v biases, q_norm, k_norm) is the teacher's own [ours].
        """
        weights = {}
        for name, weight in self.frozen.items():
            module = name.rpartition(".")[0]
            if module in self.gains:
                weights[name] = self.gains[module].to(weight.dtype)
            elif module not in self.projections or module.endswith(READERS) and weight.dim() == 1:
                weights[name] = weight
            else:
                projection = self.projections[module]
                norm = feeding_norm(module) if self.fold else None
                if norm is not None:  # W @ diag(g) @ P: the gain scales the rows of P
                    projection = self.frozen[norm + ".weight"][:, None] * projection
                projection = projection.to(weight.dtype)
                reads = module.endswith(READERS)
                weights[name] = weight @ projection if reads else projection.T @ weight
        return weights

    def make_weights(self):
        """Merge, and let the model use the result; its gradients start anew. Once per step."""
        self.made = self.merge()
        for name, parameter in self.model.named_parameters():
            parameter.data = self.made[name].detach()
            parameter.grad = None

    def carry_back(self):
        """From the gradients of the made weights to those of the projections and gains."""
        trained = {n: p for n, p in self.model.named_parameters() if p.grad is not None}
        made = [self.made[name] for name in trained]
        torch.autograd.backward(made, [parameter.grad for parameter in trained.values()])
        self.made = None
        for parameter in trained.values():
            parameter.grad = None

    def export(self, folder, tokenizer=None):
        """Write the merged student as a standard checkpoint: no custom code is needed to load it.

        Raises OSError where the folder cannot be written.
        """
        with torch.no_grad():
            self.make_weights()
        self.model.generation_config = self.teacher.generation_config
        self.model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def width_step(teacher_config):
    """What a width must be a multiple of: for a Llama its heads, as transformers 5 insists."""
    return teacher_config.num_attention_heads if teacher_config.model_type == "llama" else 1


def student_config(teacher_config, hidden_size):
    """The teacher's config, `head_dim` pinned, at another width (ValueError: no `width_step`)."""
    if hidden_size % width_step(teacher_config):
        raise ValueError(f"width {hidden_size} is no multiple of {width_step(teacher_config)}")
    values = teacher_config.to_dict()
    for trace in ("quantization_config", "_name_or_path", "dtype", "transformers_version"):
        values.pop(trace, None)
    heads = teacher_config.num_attention_heads
    head_dim = getattr(teacher_config, "head_dim", None) or teacher_config.hidden_size // heads
    values.update(hidden_size=hidden_size, head_dim=head_dim)
    return type(teacher_config)(**values)


def student_width(config, teacher_config):
    """--ratio or --hidden-size -> the nearest accepted width. UserError: zero, or too wide."""
    width, step = teacher_config.hidden_size, width_step(teacher_config)
    if (config.hidden_size or 0) > width:
        raise UserError(f"--hidden-size must be at most the teacher's width, {width}.")
    wanted = config.hidden_size or config.ratio * width
    if found := step * math.floor(wanted / step + 0.5):
        return found
    raise UserError(f"a width of {wanted:g} rounds to zero; the least for this teacher is {step}.")


def initial_projections(method, names, width, narrow, channels, generator):
    """Where the projections start: name -> (width, narrow) float32 (§5, §6).

    red, random-selection   the same selection matrix of `channels` for every name
    lrc                     N(0, std), one per name; std = 0.02 * sqrt(3072 / width), so that
                            P.T @ P has the mean diagonal it has at LRC's own width of 3,072 [ours]
    orthogonal              random orthonormal columns, one per name
    shared-orthogonal       random orthonormal columns, the same for every name [ours]
    Raises ValueError for an unknown method.
    """

    def orthonormal():  # uniform over all such matrices
        q, r = torch.linalg.qr(torch.randn(width, narrow, generator=generator).double())
        return (q * r.diagonal().sign()).float()

    if method in ("red", "random-selection"):
        return dict.fromkeys(names, selection_matrix(channels, width))
    if method == "shared-orthogonal":
        return dict.fromkeys(names, orthonormal())
    if method == "orthogonal":
        return {name: orthonormal() for name in names}
    if method == "lrc":
        std = 0.02 * (3072 / width) ** 0.5
        return {name: std * torch.randn(width, narrow, generator=generator) for name in names}
    raise ValueError(f"unknown method {method!r}")


def initial_gains(method, teacher, projections, channels, rescaling):
    """Where the norm gains start: norm name -> (d_s,) [ours, but for LRC's ones].

    Kept channels keep the teacher's gains, times `rescaling` (norm name -> float). Rotations fold
    the gains into the reading weights and start at 1; a tied head cannot fold, so there the final
    gain is the diagonal of P.T @ diag(g) @ P.
    """
    gains, embedding = {}, projections["model.embed_tokens"]
    for name in stream_norms(teacher):
        gain = teacher.get_submodule(name).weight.detach().float().cpu()
        if method in ("red", "random-selection"):
            gains[name] = gain[channels.cpu()] * rescaling[name]
        elif method != "lrc" and name == "model.norm" and "lm_head" not in projections:
            gains[name] = gain @ embedding.square()
        else:
            gains[name] = torch.ones(embedding.shape[1])
    return gains


def new_student(method, teacher, hidden_size, calibration, seed=0):
    """A student of `hidden_size` at the start of training, by any of METHODS (§3, §5)."""
    generator = torch.Generator().manual_seed(seed)
    width = teacher.config.hidden_size
    channels = calibration.channels
    if method == "random-selection":
        channels = torch.randperm(width, generator=generator)[:hidden_size].sort().values
    rescaling = gain_rescaling(teacher, calibration.batches, channels)
    names = projected_matrices(teacher)
    projections = initial_projections(method, names, width, hidden_size, channels, generator)
    gains = initial_gains(method, teacher, projections, channels, rescaling)
    config = student_config(teacher.config, hidden_size)
    words = {"dtype": teacher.dtype, "attn_implementation": teacher.config._attn_implementation}
    with torch.device("meta"):  # no memory and no random numbers: the weights come from merge()
        model = AutoModelForCausalLM.from_config(config, **words)
    return ProjectedStudent(teacher, model, projections, gains, method.endswith("orthogonal"))


# ==== Losses (App. B) =========================================================================
# KL from the teacher, cross-entropy of the next token, and alignment of activations. At a real
# vocabulary the logits are the largest tensors of a step, so KL and cross-entropy are computed in
# chunks of tokens, and their gradient with them: no two full logit tensors ever exist.


def alignment_loss(student, teacher, projection=None, mask=None):
    """Mean squared error between activations, over real tokens and features (App. B).

    student (batch, tokens, n), teacher (batch, tokens, n) for what lives in head or FFN space (q,
    k, v, gate, up); teacher (batch, tokens, d_t) with projection (d_t, d_s) for what the student
    writes to its stream (o, down). The projection is not detached: it learns from here, too.
    mask (batch, tokens): True for real tokens. Returns a scalar, float32 or better.
    """
    target = teacher if projection is None else teacher @ projection.to(teacher.dtype)
    if mask is not None:
        student, target = student[mask], target[mask]
    precise = torch.promote_types(student.dtype, torch.float32)
    return torch.nn.functional.mse_loss(student.to(precise), target.to(precise))


CHUNK = 2**23  # logits that exist at a time, for the student and for the teacher


class ChunkedDistillation(torch.autograd.Function):
    """The work of `distillation_loss`: forward also forms the gradients, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, targets, temperature, count):
        precise = torch.promote_types(hidden.dtype, torch.float32)
        kl, cross_entropy = torch.zeros(2, dtype=precise, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros_like(head, dtype=precise)
        rows = max(1, CHUNK // len(head))
        for i in range(0, len(targets), rows):
            chunk, target = hidden[i : i + rows], targets[i : i + rows, None]
            logits = (chunk @ head.T).to(precise)
            logits_t = (teacher_hidden[i : i + rows] @ teacher_head.T).to(precise)
            log_q1 = torch.log_softmax(logits, -1)
            cross_entropy -= log_q1.gather(1, target).sum()
            log_q = torch.log_softmax(logits.div_(temperature), -1)
            log_p = torch.log_softmax(logits_t.div_(temperature), -1)
            p = log_p.exp()
            kl += temperature**2 * torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
            # d/dlogits of KL is T (q - p), of cross-entropy q1 - onehot(target): in place, because
            # each pass over the logits costs, and with the sign at the end.
            descent = p.sub_(log_q.exp_()).mul_(temperature).sub_(log_q1.exp_())
            descent.scatter_add_(1, target, descent.new_ones(target.shape))
            descent = descent.to(hidden.dtype)
            torch.mm(descent, head, out=grad_hidden[i : i + rows])
            grad_head += descent.T @ chunk
        ctx.save_for_backward(grad_hidden.div_(-count), grad_head.div_(-count).to(head.dtype))
        kl, cross_entropy = kl / count, cross_entropy / count
        ctx.mark_non_differentiable(kl, cross_entropy)
        return kl + cross_entropy, kl, cross_entropy

    @staticmethod
    def backward(ctx, grad_loss, *not_differentiable):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_loss * grad_hidden, grad_loss * grad_head, None, None, None, None, None


def distillation_loss(
    student_hidden, student_head, teacher_hidden, teacher_head, labels, temperature=1.0, count=None
):
    """KL(teacher || student) and next-token cross-entropy (App. B).

    student_hidden (batch, tokens, d_s) and student_head (vocabulary, d_s) make the logits, and the
    teacher's likewise, d_t wide; labels (batch, tokens), aligned with the tokens: the shift by one
    is made here, and -100 is ignored. KL is softened by `temperature` and weighted by its square;
    both terms are means over the labels that count [ours; LRC sums KL over a sequence, without
    the square], or sums over `count` where micro-batches share one mean.
    Returns (KL + cross-entropy, KL, cross-entropy) in nats per token; only the first carries
    gradient, to student_hidden and student_head. Raises ValueError unless temperature > 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    counts = labels[:, 1:] != -100
    return ChunkedDistillation.apply(
        student_hidden[:, :-1][counts], student_head,
        teacher_hidden[:, :-1][counts].detach(), teacher_head.detach(),
        labels[:, 1:][counts], temperature, max(1, int(counts.sum()) if count is None else count),
    )  # fmt: skip


# ==== Distillation (App. F.1) =================================================================
# The loop of the paper: frozen teacher, projected student, three losses, Adam. Weight decay is 0,
# because decay would shrink the projections, and warm-up, linear decay and clipping are LRC's.


def training_step(teacher, student, micro_batches, temperature=1.0, alpha=0.2, scales=None):
    """The gradients of one optimiser step, left in the student's projections and gains.

    micro_batches: a list of batches; the losses are means over all of them together. scales:
    module name -> what its alignment term is divided by (None: by nothing, LRC's plain form).
    Returns the total loss and its terms, as detached scalars.
    """
    student.make_weights()
    labels = sum(int((real_labels(batch)[:, 1:] != -100).sum()) for batch in micro_batches)
    tokens = sum(int(real_tokens(batch).sum()) for batch in micro_batches)
    aligned = aligned_modules(teacher)
    totals = dict.fromkeys(("loss", "kl", "cross_entropy", "alignment"), 0.0)
    for batch in micro_batches:
        activations, terms, real = {}, [], real_tokens(batch)
        mask = None if real.all() else real  # picking all of them would copy for nothing

        def keep(name, before, after):
            activations[name] = after

        def compare(name, before, after):  # at once, so that the teacher's can be let go
            projection = student.projections[name] if name.endswith(WRITERS) else None
            term = alignment_loss(after, activations.pop(name), projection, mask)
            terms.append(term / scales[name] if scales else term)

        with torch.no_grad(), watch(teacher, aligned, keep):
            teacher_hidden = last_hidden(teacher, batch)
        with watch(student.model, aligned, compare):
            student_hidden = last_hidden(student.model, batch)
        likelihood, kl, cross_entropy = distillation_loss(
            student_hidden, student.model.lm_head.weight,
            teacher_hidden, teacher.lm_head.weight,
            real_labels(batch), temperature, labels,
        )  # fmt: skip
        alignment = torch.stack(terms).sum() * (real.sum() / tokens)
        loss = likelihood + alpha * alignment
        loss.backward()
        for name, term in zip(totals, (loss, kl, cross_entropy, alignment)):
            totals[name] = totals[name] + term.detach()
    student.carry_back()
    return totals


def distill(teacher, student, stream, steps, learning_rate, temperature=1.0, alpha=0.2,
            scales=None, grad_accum=1, log=None, progress="distil"):  # fmt: skip
    """Train the student's projections and gains, in place (App. F.1).

    stream: an iterator over batches, of which each step takes `grad_accum`. log: called after
    each step with a dict of step, loss terms, learning rate, gradient norm and seconds. Raises
    FloatingPointError as soon as the loss is not finite, ValueError where the stream ends early.
    """
    optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate, fused=True)
    warm_up = max(1, round(0.005 * steps))  # LRC: half a percent, under a linear decay

    def rate(step):
        return min(1.0, (step + 1) / warm_up) * (steps - step) / max(1, steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    bar = tqdm(range(steps), desc=progress, leave=False, disable=steps == 0)
    for step in bar:
        started = time.perf_counter()
        micro_batches = list(itertools.islice(stream, grad_accum))
        if len(micro_batches) < grad_accum:
            raise ValueError(f"the stream of batches ended at step {step + 1}")
        losses = training_step(teacher, student, micro_batches, temperature, alpha, scales)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        if not torch.isfinite(losses["loss"] + norm):
            advice = "try a lower learning rate, or float32"
            raise FloatingPointError(f"the loss is not finite at step {step + 1}: {advice}")
        optimizer.step()
        optimizer.zero_grad()
        record = {"step": step + 1} | {name: float(value) for name, value in losses.items()}
        record |= {"learning_rate": schedule.get_last_lr()[0], "gradient_norm": float(norm)}
        record["seconds"] = time.perf_counter() - started
        schedule.step()
        bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        if log:
            log(record)
    with torch.no_grad():
        student.make_weights()


# ==== Evaluation (§6) =========================================================================
# Held-out loss and effective rank for any causal language model, teacher or student alike, and two
# tests of reasoning: chains of the tiny world, and GSM8K as lm-evaluation-harness scores it.


def evaluate(model, batches, rank_tokens=4096):
    """Held-out loss and the effective rank of each block's output (§4, §6).

    Returns a dict: `loss` in nats per label, `perplexity`, and by block, over `rank_tokens` tokens
    at most, `erank` of the raw stream and `erank_normalised` of the stream with each token scaled
    to RMS 1 (massive activations rule the raw one). FloatingPointError: the loss is not finite.
    """
    total, count, states = 0.0, 0, {}
    blocks = [f"model.layers.{i}" for i in range(len(model.model.layers))]

    def see(name, before, after):
        seen = states.setdefault(name, [])
        if sum(map(len, seen)) < rank_tokens:
            seen.append(after[real])

    with torch.no_grad(), watch(model, blocks, see):
        for batch in tqdm(batches, desc="evaluate", leave=False, delay=2):
            real = real_tokens(batch)
            hidden, labels = last_hidden(model, batch)[:, :-1], real_labels(batch)[:, 1:]
            counts = labels != -100
            for h, target in zip(hidden[counts].split(512), labels[counts].split(512)):
                total += F.cross_entropy(model.lm_head(h).float(), target, reduction="sum").item()
            count += int(counts.sum())
    loss = total / max(1, count)
    if not math.isfinite(loss):
        raise FloatingPointError("the held-out loss is not finite: try a lower learning rate")
    rows = [torch.cat(states[name])[:rank_tokens].float() for name in blocks]
    return {
        "loss": loss, "perplexity": math.exp(min(loss, 700)), "labels": count,
        "erank": [effective_rank(h) for h in rows],
        "erank_normalised": [effective_rank(F.normalize(h, dim=-1)) for h in rows],
    }  # fmt: skip


def singular_spread(student):
    """Standard deviation / mean of each projection's singular values, mean over projections (§4).

    0 for a start with selection matrices or orthonormal ones; it grows as few directions win.
    """
    values = [torch.linalg.svdvals(each.detach()) for each in student.projections.values()]
    return sum((v.std(correction=0) / v.mean()).item() for v in values) / len(values)


def generate(model, tokenizer, prompts, new_tokens, stop=None):
    """Greedy continuations of a list of prompts, as text without special tokens."""
    tokenizer = copy.deepcopy(tokenizer)  # the caller's own is exported as it came
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    output = model.generate(
        **batch, max_new_tokens=new_tokens, do_sample=False, temperature=None, top_p=None,
        top_k=None, pad_token_id=tokenizer.pad_token_id, stop_strings=stop, tokenizer=tokenizer,
    )  # fmt: skip
    prompt = batch["input_ids"].shape[1]
    return tokenizer.batch_decode(output[:, prompt:], skip_special_tokens=True)


def task_scores(config, tokenizer):
    """`--eval` -> a function of a model that returns its scores, a dict ({} for `none`)."""
    if config.eval == "none":
        return lambda model: {}
    if config.eval == "chains":
        if set(TINY_ALPHABET) - set(tokenizer.get_vocab()):
            raise UserError("--eval chains needs a teacher of the tiny world, such as OUT/teacher.")
        return lambda model: chain_scores(model, tokenizer)

    def first(source, flag, count):
        return list(itertools.islice(readable(open_documents(source, flag), source), count))

    problems = config.eval_data or "openai/gsm8k:main:test"
    problems = first(problems, "--eval-data", config.eval_limit)
    shots = first(config.eval_shots_data or "openai/gsm8k:main:train", "--eval-shots-data", 5)
    if not all({"question", "answer"} <= each.keys() for each in problems + shots):
        raise UserError("GSM8K data needs the fields `question` and `answer`.")
    return lambda model: gsm8k_scores(model, tokenizer, problems, shots)


def gsm8k_scores(model, tokenizer, problems, shots, batch_size=16):
    """GSM8K accuracy, scored as lm-evaluation-harness 0.4 scores its task `gsm8k` (§6).

    problems, shots: lists of dicts of `question` and `answer`; the same shots for all problems (the
    harness's `first_n` sampler). Returns `strict` and `flexible`, the accuracies by its two ways to
    read an answer, and `problems`: the answers, extractions and verdicts.
    """
    patterns = {"strict": r"#### (\-?[0-9\.\,]+)", "flexible": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"}
    stop = ["Question:", "</s>", "<|im_end|>"]

    def ask(problem):
        return f"Question: {problem['question']}\nAnswer:"

    def clean(text):
        for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
            text = re.sub(pattern, "", text)
        return text.lower()

    before = "".join(f"{ask(shot)} {shot['answer']}\n\n" for shot in shots)
    verdicts = []
    for i in tqdm(range(0, len(problems), batch_size), desc="gsm8k", leave=False, delay=2):
        chosen = problems[i : i + batch_size]
        answers = generate(model, tokenizer, [before + ask(each) for each in chosen], 256, stop)
        for problem, answer in zip(chosen, answers):
            answer = re.split("|".join(map(re.escape, stop)), answer)[0]
            verdict = {"question": problem["question"], "answer": answer}
            verdict["target"] = clean(problem["answer"])
            for kind, pattern in patterns.items():
                found = [match[match.lastindex] for match in re.finditer(pattern, answer)]
                which = 0 if kind == "strict" else -1  # the first `####`, but the last number
                verdict[kind] = found[which].strip() if found else "[invalid]"
                verdict[f"{kind}_correct"] = clean(verdict[kind]) == verdict["target"]
            verdicts.append(verdict)
    right = {kind: [verdict[f"{kind}_correct"] for verdict in verdicts] for kind in patterns}
    scores = {kind: sum(each) / max(1, len(each)) for kind, each in right.items()}
    return scores | {"problems": verdicts}


# ==== The tiny world ==========================================================================
# A world small enough to train a teacher in half a minute, with the paper's contrast in it: lines
# of arithmetic modulo 10 that need a chain of steps (reasoning), `7+5-3=?7+5=2;2-3=9#9`, and 60
# fixed pairs that need none (recall), `abcd:wxyz`. Characters are tokens; only answers are labels.

TINY_ALPHABET = "0123456789+-*=?;#:abcdefghijklmnopqrstuvwxyz\n"
TINY_PAIRS = [
    ["".join(random.Random(2 * i + side).choices(TINY_ALPHABET[18:44], k=4) + [":\n"[side]])
     for side in (0, 1)] for i in range(60)
]  # fmt: skip
TINY_STEPS = (1, 2, 3, 4, 5)
TINY_TEACHER_STEPS = 1500


def arithmetic_problem(steps, generator):
    """A random problem of `steps` operations modulo 10, as (prompt, answer) text."""
    value = generator.randrange(10)
    prompt, chain = str(value), []
    for _ in range(steps):
        sign, operand = generator.choice("+-*"), generator.randrange(10)
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10
        chain.append(f"{value}{sign}{operand}={result}")
        prompt, value = prompt + f"{sign}{operand}", result
    return f"{prompt}=?", f"{';'.join(chain)}#{value}\n"


def tiny_batches(batch_size, seq_len, seed, device):
    """An endless iterator of batches of tiny-world lines; only answers are labels."""
    generator = random.Random(seed)
    index = {character: i for i, character in enumerate(TINY_ALPHABET)}
    while True:
        ids, labels = [], []
        for _ in range(batch_size):
            row, row_labels = [], []
            while len(row) < seq_len:
                if generator.random() < 0.25:
                    prompt, answer = generator.choice(TINY_PAIRS)
                else:
                    prompt, answer = arithmetic_problem(generator.choice(TINY_STEPS), generator)
                answer = [index[character] for character in answer]
                row += [index[character] for character in prompt] + answer
                row_labels += [-100] * len(prompt) + answer
            ids.append(row[:seq_len])
            labels.append(row_labels[:seq_len])
        ids, labels = torch.tensor([ids, labels], device=device)
        yield {"input_ids": ids, "labels": labels}


def tiny_tokenizer():
    """The tiny world's characters as an ordinary transformers tokenizer, which saves and loads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: i for i, character in enumerate(TINY_ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="\n", clean_up_tokenization_spaces=False
    )


def chain_scores(model, tokenizer, problems=200):
    """Exact answers on the tiny world: recall, and accuracy by number of steps, from 0 to 1.

    An arithmetic answer is right if the digit after `#` is: `chains` is a list over TINY_STEPS of
    `problems` problems each; `example` is the model's answer to one problem of the longest kind.
    """
    generator = random.Random(12345)  # the same problems for every model, whatever the run's seed
    answers = generate(model, tokenizer, [prompt for prompt, _ in TINY_PAIRS], 5)
    right = [answer.strip() == pair[1].strip() for answer, pair in zip(answers, TINY_PAIRS)]
    scores = {"recall": sum(right) / len(right), "chains": []}
    for steps in TINY_STEPS:
        asked = [arithmetic_problem(steps, generator) for _ in range(problems)]
        answers = generate(model, tokenizer, [prompt for prompt, _ in asked], 6 * steps + 3)
        right = [
            answer.strip().rpartition("#")[2] == truth.strip().rpartition("#")[2]
            for answer, (_, truth) in zip(answers, asked)
        ]
        scores["chains"].append(sum(right) / problems)
    scores["example"] = {"prompt": asked[0][0], "truth": asked[0][1].strip(), "answer": answers[0]}
    return scores


def tiny_values():
    """The content of tiny_config.json, a dict; UserError where it is broken or makes no teacher."""
    try:
        values = json.loads(TINY_CONFIG.read_text())
        config = AutoConfig.for_model(**values)
        if config.model_type not in FAMILIES or config.vocab_size != len(TINY_ALPHABET):
            size, families = len(TINY_ALPHABET), ", ".join(FAMILIES)
            raise ValueError(f"vocab_size must be {size}, and model_type one of {families}")
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers has its own class for each mismatch
        raise UserError(f"{TINY_CONFIG.name} makes no teacher ({first_line(error)}).") from error
    return values


def tiny_teacher(values, seed, device, steps=TINY_TEACHER_STEPS):
    """Train the tiny world's teacher, a frozen model, from random weights; values: its config's."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**values)
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    stream = tiny_batches(16, 48, seed, device)  # 48 characters hold any one line
    bar = tqdm(range(steps), desc="train teacher", leave=False)
    for _ in bar:
        batch = next(stream)
        targets = batch["labels"][:, 1:]
        logits = teacher.lm_head(last_hidden(teacher, batch)[:, :-1][targets != -100])
        loss = F.cross_entropy(logits, targets[targets != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return teacher.eval().requires_grad_(False)


def tiny_task(config, device, dtype, folder):
    """The Task of the tiny world. Its teacher is kept in `folder`, and reused where it fits."""
    values, note = tiny_values(), folder / "teacher.json"
    identity = {"config": values, "seed": config.seed, "steps": TINY_TEACHER_STEPS}
    if note.is_file() and json.loads(note.read_text()) == identity:
        say("teacher", f"reused from {folder}")
        teacher, tokenizer = load_teacher(str(folder), device=device)  # always trained in float32
    else:
        say("teacher", f"training one from {TINY_CONFIG.name}, {TINY_TEACHER_STEPS} steps")
        teacher, tokenizer = tiny_teacher(values, config.seed, device), tiny_tokenizer()
        with replacing(folder) as fresh:
            teacher.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            write_json(fresh / note.name, identity)

    def batches(purpose, count, batch_size):
        lines = tiny_batches(batch_size, config.seq_len, f"{purpose} {config.seed}", device)
        return itertools.islice(lines, count)

    calibration = list(batches("calibration", config.calibration_samples, 1))
    held_out, measure = list(batches("held out", 2, 64)), task_scores(config, tokenizer)
    stream = functools.partial(batches, "training", None, config.batch_size)
    return Task(teacher.to(dtype), tokenizer, calibration, held_out, stream, measure)


# ==== Comparing methods =======================================================================
# A run is one or more students of the same teacher, width, data, steps, loss and optimiser, which
# differ in how their projections start. Each has a folder of its own, written so that what is
# finished is reused, what is not is done again, and nothing of anyone else is touched.


def say(what, text):
    """One line of the announcement or of progress."""
    tqdm.write(f"{what:<12} {text}")


def write_json(path, value):
    """Write beside and rename, so that the file is never half there."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(beside, path)


@contextlib.contextmanager
def replacing(folder):
    """A fresh folder beside, which takes the place of `folder` once the block has succeeded."""
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def claim(folder, settings, overwrite):
    """Whether `folder` holds a finished run of these settings; UserError where it is not free."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {folder} cannot be made: {there} is a file, or not yours to write.")
    if not folder.exists() or all((each / "teacher.json").is_file() for each in folder.iterdir()):
        return False  # new, empty, or broken off after the tiny world's teacher
    try:
        stored = json.loads((folder / "settings.json").read_text())
        if stored["program"] != "red.py":
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} holds files of no run of RED; name another --out.") from error
    different = sorted(k for k in stored.keys() | settings if stored.get(k) != settings.get(k))
    if different and not overwrite:
        raise UserError(
            f"{folder} holds a run with other settings (different: {', '.join(different)}); name "
            "another --out, or pass --overwrite to replace it."
        )
    return not overwrite and (folder / "summary.json").is_file()


def prepare(folder, settings):
    """Rid the folder of an earlier run's results, and then, not before, call it a run of these."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "metrics.jsonl", "selection.json", "gsm8k.jsonl"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "student", ignore_errors=True)
    write_json(folder / "settings.json", settings)


def model_card(task, hidden_size, method, tokens):
    """The short README.md of an exported student; the licence is what the teacher's card names."""
    try:
        card = Path(task.name) / "README.md" if Path(task.name).is_dir() else task.name
        licence = huggingface_hub.ModelCard.load(card).data.get("license")
    except Exception:  # no card, no front matter, no network: the licence stays unknown
        licence = None
    return f"""---
base_model: {task.name}
library_name: transformers
license: {licence or "other"}
---

# {task.name}, compressed from hidden width {task.teacher.config.hidden_size} to {hidden_size}

Distilled with projections around the teacher's frozen weights (method `{method}`) on {tokens:,}
tokens of {task.data}, and merged: it loads with plain transformers. The teacher's licence,
{licence or "which its own page names"}, applies to it.
"""


def set_up(config, device, dtype, folders):
    """The Task and the Calibration of a run, and what it will do, said before it is done."""
    if config.model:
        teacher, tokenizer = load_teacher(config.model, config.revision, dtype, device)
        hidden_size = student_width(config, teacher.config)
        task = text_task(config, teacher, tokenizer, device)
    else:
        hidden_size = student_width(config, AutoConfig.for_model(**tiny_values()))
        task = tiny_task(config, device, dtype, Path(config.out) / "teacher")
    teacher = task.teacher
    width, kind = teacher.config.hidden_size, teacher.config.model_type
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(student_config(teacher.config, hidden_size))
    large, small = teacher.num_parameters(), student.num_parameters()
    learn = len(projected_matrices(teacher)) * width * hidden_size
    learn += len(stream_norms(teacher)) * hidden_size
    tokens = config.batch_size * config.seq_len
    # Teacher, made weights and their gradients; for what trains the value, gradient and Adam's two
    # moments; the aligned activations, thrice; chunks of logits; Python and its libraries.
    memory = teacher.dtype.itemsize * (large + 2 * small) + 16 * learn
    aligned = [teacher.get_submodule(name).out_features for name in aligned_modules(teacher)]
    memory += teacher.dtype.itemsize * 3 * tokens * sum(aligned) + 24 * 2**24 + 0.7 * 2**30
    total = config.steps * config.grad_accum * tokens
    asked = f"{config.hidden_size or config.ratio}, in steps of {width_step(teacher.config)}"
    say("teacher", f"{task.name}: {kind}, width {width}, {large:,} parameters")
    say("student", f"width {hidden_size} (asked: {asked}), {small:,} parameters, {learn:,} learn")
    say("methods", ", ".join(f"{label} -> {folder}" for label, folder in folders.items()))
    say("training", f"{config.steps:,} steps, {total:,} tokens of {task.data}")
    say("machine", f"{teacher.device}, {teacher.dtype}; about {memory / 2**30:.1f} GiB of memory")
    calibration = calibrate(teacher, task.calibration, hidden_size, config.importance)
    trust = f"{calibration.overlap:.0%} of the channels (chance: {hidden_size / width:.0%})"
    say("calibration", f"the two halves of {len(task.calibration)} samples agree on {trust}")
    return task, calibration


def train_student(config, task, calibration, own, folder):
    """One student from its start to what stays of it in `folder`; returns its summary, a dict."""
    started = time.perf_counter()
    teacher, hidden_size = task.teacher, len(calibration.channels)
    method, temperature = own["method"], own["temperature"]
    student = new_student(method, teacher, hidden_size, calibration, config.seed)
    if method == "red":
        selection = {"statistic": config.importance, "halves_agree": calibration.overlap}
        for name in ("channels", "importance"):
            selection[name] = getattr(calibration, name).tolist()
        write_json(folder / "selection.json", selection)
    initial = evaluate(student.model, task.held_out)
    with open(folder / "metrics.jsonl", "w", buffering=1) as metrics:
        distill(
            teacher, student, iter(task.stream()), config.steps, config.learning_rate, temperature,
            config.alpha, calibration.scales if config.alignment == "relative" else None,
            config.grad_accum, lambda record: metrics.write(json.dumps(record) + "\n"), folder.name,
        )  # fmt: skip
    tokens = config.steps * config.grad_accum * config.batch_size * config.seq_len
    with replacing(folder / "student") as fresh:
        student.export(fresh, task.tokenizer)
        (fresh / "README.md").write_text(model_card(task, hidden_size, method, tokens))
    # What is measured is what was written: the checkpoint, opened as anyone would open it.
    exported = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=teacher.dtype)
    exported = exported.to(teacher.device).eval()
    summary = {
        "method": method, "temperature": temperature, "hidden_size": hidden_size, "tokens": tokens,
        "parameters": exported.num_parameters(), "singular_spread": singular_spread(student),
        **evaluate(exported, task.held_out), **task.measure(exported), "initial": initial,
    }  # fmt: skip
    if problems := summary.pop("problems", None):
        lines = "".join(json.dumps(problem) + "\n" for problem in problems)
        (folder / "gsm8k.jsonl").write_text(lines)
    return summary | {"seconds": time.perf_counter() - started}


def table(rows):
    """Summaries (label -> dict) as text. eRank N: of the raw stream after block N (of width)."""

    def cells(row):
        yield "parameters", f"{row['parameters'] / 1e6:,.2f}M"
        yield "held-out loss", f"{row['loss']:.3f}"
        for key in ("recall", "strict", "flexible"):
            if key in row:
                yield key, f"{row[key]:.0%}"
        for steps, score in zip(TINY_STEPS, row.get("chains", ())):
            yield f"{steps} step{'s' * (steps > 1)}", f"{score:.0%}"
        yield "spread", f"{row['singular_spread']:.2f}" if "singular_spread" in row else "-"
        last = len(row["erank"])
        for block in sorted({max(1, round(last * part / 6)) for part in range(1, 7)}):
            rank = row["erank"][block - 1]
            yield f"eRank {block}", f"{rank:.0f} ({rank / row['hidden_size']:.0%})"

    lines = [["", *(title for title, _ in cells(next(iter(rows.values()))))]]
    lines += [[label, *(text for _, text in cells(row))] for label, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line) for line in padded)


def run(config):
    """Everything that one command line asks for (§6)."""
    device, dtype = resolve_device(config)
    out, several = Path(config.out), len(config.methods) > 1
    shared = dataclasses.asdict(config) | {"program": "red.py"}
    for name in ("out", "overwrite", "device", "methods", "temperature"):
        del shared[name]  # these do not change a student, or belong to one of several
    if not config.model:
        shared["tiny_config"] = tiny_values()
    runs, done = {}, {}  # label -> (folder, settings), and -> summary
    for method, temperature in zip(config.methods, config.temperature):
        label = f"{method}-T{temperature:g}" if method in runs else method
        own = shared | {"method": method, "temperature": temperature}
        runs[label] = (out / label if several else out, own)
    if several:
        claim(out, shared, config.overwrite)
    for label, (folder, own) in runs.items():
        if claim(folder, own, config.overwrite):
            done[label] = json.loads((folder / "summary.json").read_text())
            say("finished", f"{label}, reused from {folder}")
    if len(done) < len(runs):
        task, calibration = set_up(config, device, dtype, {k: v[0] for k, v in runs.items()})
        teacher = {"hidden_size": task.teacher.config.hidden_size}
        teacher["parameters"] = task.teacher.num_parameters()
        teacher |= evaluate(task.teacher, task.held_out) | task.measure(task.teacher)
        teacher.pop("problems", None)
        if several:
            prepare(out, shared)
        for label, (folder, own) in runs.items():
            if label not in done:
                prepare(folder, own)
        for label, (folder, own) in runs.items():
            if label not in done:
                row = train_student(config, task, calibration, own, folder)
                done[label] = row | {"teacher": teacher}
                write_json(folder / "summary.json", done[label])
                say("student", f"{label}: held-out loss {row['loss']:.3f}, {row['seconds']:.0f} s")
    rows = {"teacher": done[next(iter(runs))]["teacher"]} | {label: done[label] for label in runs}
    if several:
        write_json(out / "summary.json", rows)
    print("\n" + table(rows))
    if example := rows["teacher"].get("example"):
        print(f"\n{example['prompt']}  (right: {example['truth']})")
        for label, row in rows.items():
            print(f"{label:<16}  {row['example']['answer'].strip()}")


# ==== Command line ============================================================================
# One sentence and exit code 2 for what the user can mend; 1 where a run broke off.


def main(arguments=None):
    """Run one command line (a list of words; None: sys.argv) and return its exit code."""
    transformers.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()  # it would report each retry
    transformers.logging.disable_progress_bar()
    try:
        run(parse_arguments(arguments))
    except UserError as error:
        print(f"red.py: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"red.py: {first_line(error)}; what was finished is kept.", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print("red.py: out of memory; try a smaller --batch-size or --seq-len.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
