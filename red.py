"""RED: Reasoning-preserved Efficient Distillation, in one file that reads beside the paper.

He, Tang, Nie, Li, Yang, Du, Sun, Ma: "Reasoning-preserved Efficient Distillation of Large
Language Models via Activation-aware Initialization", ICML 2026, arXiv 2605.29327.

A Llama- or Qwen-like teacher is compressed to a smaller hidden width: the student's weights are
the teacher's frozen ones seen through trainable projections, and RED starts each of these as the
same channel-selection matrix, picked from the teacher's activations. The file follows the paper
from top to bottom; a comment marked [ours] is our reading where the paper is silent to us.
    python red.py                                       the tiny world: everything, in minutes
    python red.py --model Qwen/Qwen2-0.5B --ratio 0.5   a real teacher; torchrun for many GPUs
"""

import argparse, concurrent.futures, contextlib, copy, dataclasses, hashlib, itertools, json, math
import multiprocessing, os, random, re, shutil, signal, statistics, sys, time, types
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# ==== Configuration ===========================================================================
# Every choice of a run is one field of one dataclass, with its help text; from here come the
# command line and the settings stored beside the results.

METHODS = ("red", "lrc", "orthogonal", "shared-orthogonal", "random-selection")
STATISTICS = ("norm-output", "normalised-stream", "variance")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TINY_CONFIG = Path(__file__).with_name("tiny_config.json")
LEAST = dict(hidden_size=1, calibration_samples=2, steps=0, batch_size=1, grad_accum=1, seq_len=2,
             seed=0, seeds=1, eval_limit=1, alpha=0, orthogonality=0, save_every=0, measure_every=0)

class UserError(Exception):
    """Something the user can mend: one sentence for stderr, exit code 2, no traceback."""

@contextlib.contextmanager
def explained(sentence):
    """What goes wrong inside is a UserError: `sentence`, with the error's first line for its {}."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(sentence.replace("{}", first_line(error))) from error

def first_line(error):
    """The first line of an exception's text (and the next, if it only leads to it)."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")

def option(default, help, *choices):
    """One field of Config: its default, its help text, and what it may be.
    default: a pair is for the tiny world's lines, and for text; `check` takes one of them."""
    pair = default if isinstance(default, tuple) else (default,)
    listed = [" ".join(map(str, x)) if isinstance(x, list) else str(x) for x in pair]
    shown = "" if default is None or default is False else f" [{' | '.join(listed)}]"
    words = {"help": help + shown, "choices": choices or None}
    return dataclasses.field(default_factory=lambda: default, metadata=words)

@dataclasses.dataclass
class Config:
    """All settings of a run. A default in brackets is [tiny world | with --model]."""
    model: str = option(None, "teacher: a folder or a hub name; without it, the tiny world runs")
    revision: str = option(None, "the hub revision of --model and --eval-only")
    ratio: float = option(None, "student width as a share of the teacher's, in (0, 1] [0.5]")
    hidden_size: int = option(None, "student width itself, instead of --ratio")
    methods: list[str] = option((["red", "lrc", "lrc"], ["red"]), "how projections start", *METHODS)
    data: str = option(None, ".txt, .jsonl, .parquet or hub NAME[:CONFIG[:SPLIT]] [FineWeb-Edu]")
    calibration_data: str = option(None, "calibration text, given like --data [the same data]")
    calibration_samples: int = option(15, "sequences to calibrate on")
    importance: str = option(("norm-output", "variance"), "what scores channels", *STATISTICS)
    alignment: str = option("relative", "as LRC has it, or over mean squares", "plain", "relative")
    steps: int = option((100, 1000), "optimiser steps; 0 exports and measures the start")
    batch_size: int = option((64, 8), "sequences per micro-batch and process")
    grad_accum: int = option(1, "micro-batches per optimiser step and process")
    seq_len: int = option((48, 512), "tokens per sequence")
    learning_rate: list[float] = option(([1e-2], [3e-4]), "Adam's peak: one, or one a method")
    temperature: list[float] = option(([1.0, 1.0, 40.0], [1.0]), "of KL: one, or one a method")
    alpha: float = option(0.2, "weight of the alignment loss")
    orthogonality: float = option(0.0, "weight of the penalty on |P.T @ P - I|^2")
    seed: int = option(0, "seed of everything random")
    seeds: int = option(1, "repeat all with so many seeds, counted from --seed")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = option("auto", "bfloat16 on cuda, else float32", "auto", "float32", "bfloat16")
    out: str = option(None, "folder for the results [runs/tiny | runs/MODEL-WIDTH]")
    overwrite: bool = option(False, "replace an earlier run's results in --out")
    save_every: int = option((0, 250), "steps between checkpoints; 0: on a signal only")
    measure_every: int = option((10, 250), "steps between measures of eRank; 0: none")
    eval: str = option(("chains", "none"), "task to measure", "none", "chains", "gsm8k")
    eval_data: str = option(None, "GSM8K problems, given like --data [openai/gsm8k:main:test]")
    eval_shots_data: str = option(None, "its first five are the shots [openai/gsm8k:main:train]")
    eval_limit: int = option(None, "measure only the first so many GSM8K problems")
    eval_only: str = option(None, "train nothing, measure this checkpoint (beside --model's)")
    benchmark: bool = option(False, "train nothing, time a step of --model against its floor")
    benchmark_config: str = option(None, "the same, random weights of this config.json's shape")

def parse_arguments(arguments=None):
    """Command line (list of words; None: sys.argv) -> Config. A mistake raises UserError."""
    def refuse(message):
        raise ValueError(message)
    words = {"prog": "red.py", "description": __doc__.partition("\n")[0], "allow_abbrev": False}
    parser = transformers.HfArgumentParser(Config, formatter_class=argparse.HelpFormatter, **words)
    parser.error = refuse
    with explained("{}; python red.py --help lists every flag."):
        (config,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    check(config)
    return config

def check(config):
    """Fill in what was not given and refuse what cannot be (UserError). Loads nothing."""
    tiny = not (config.model or config.eval_only or config.benchmark_config)
    lines = tiny or config.data is None and config.eval == "chains"
    if isinstance(config.methods, tuple) and isinstance(config.temperature, list):
        config.methods = ["red", "lrc"] if lines else ["red"]
    elif isinstance(config.temperature, tuple) and isinstance(config.methods, list):
        config.temperature = [1.0]
    for name in "data calibration_data revision eval_data eval_shots_data benchmark".split():
        if tiny and getattr(config, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} needs --model, the teacher to use.")
    for name, value in vars(config).items():
        if isinstance(value, tuple):
            setattr(config, name, copy.copy(value[0 if lines else 1]))
    for name, least in LEAST.items():
        flag, value = name.replace("_", "-"), getattr(config, name)
        if value is not None and not least <= value < 2**63:
            raise UserError(f"--{flag} must be a number of at least {least}, got {value}.")
    if not lines and config.data is None:
        config.data = "HuggingFaceFW/fineweb-edu:sample-10BT"
    if config.hidden_size is None:
        config.ratio = 0.5 if config.ratio is None else config.ratio
    elif config.ratio is not None:
        raise UserError("--ratio and --hidden-size say the same thing twice; give one of them.")
    for name in ("learning_rate", "temperature"):
        flag, values, count = name.replace("_", "-"), getattr(config, name), len(config.methods)
        if len(values) not in (1, count) or not all(0 < value < math.inf for value in values):
            raise UserError(f"--{flag} takes one positive number, or one for all {count} methods.")
        setattr(config, name, values * (count // len(values)))
    if config.ratio is not None and not 0 < config.ratio <= 1:
        raise UserError(f"--ratio must lie in (0, 1], got {config.ratio:g}.")
    if len(set(zip(config.methods, config.temperature))) < len(config.methods):
        raise UserError("--methods names the same method twice at one temperature; name it once.")
    if (config.benchmark or config.benchmark_config) and "WORLD_SIZE" in os.environ:
        raise UserError("--benchmark measures one process; run it without torchrun.")
    if tiny and config.eval == "gsm8k":
        raise UserError("--eval gsm8k needs --model: the tiny world knows only digits.")
    if config.out is None:
        own = f"{Path(config.model or '').name}-{config.hidden_size or config.ratio}"
        own = f"eval-{Path(config.eval_only).name}" if config.eval_only else own
        config.out = "runs/tiny" if tiny else f"runs/{own}"

def rank_and_world():
    """(number of this process, how many there are), as torchrun set them up; else (0, 1)."""
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if on else (0, 1)

def add_up(*tensors):
    """Sum each tensor over all processes, in place."""
    for tensor in tensors if rank_and_world()[1] > 1 else ():
        torch.distributed.all_reduce(tensor)

def gather(value=None):
    """[every process's value]; also the point where all processes wait for each other."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values

def say(what, text):
    """One line of the announcement or of progress, from the first process."""
    if rank_and_world()[0] == 0:
        tqdm.write(f"{what:<12} {text}")

def shown(items, what, **words):
    """The items behind a progress bar, which the first process shows if they take a while."""
    words = {"delay": 2, "disable": rank_and_world()[0] > 0} | words
    return tqdm(items, desc=what, leave=False, **words)

def resolve_device(config):
    """--device and --dtype -> (torch.device, torch.dtype), and joins torchrun's processes."""
    name, several = config.device, int(os.environ.get("WORLD_SIZE", 1)) > 1
    if name == "auto":
        name = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
    name += f":{os.environ['LOCAL_RANK']}" if several and name == "cuda" else ""
    with explained(f"there is no device {name!r} on this machine; --device cpu always works."):
        device = torch.empty(0, device=name).device
        assert device.type in ("cpu", "cuda", "mps")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if several and not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend)
    half = config.dtype == "bfloat16" or config.dtype == "auto" and device.type == "cuda"
    return device, torch.bfloat16 if half else torch.float32

# ==== Teacher and data (App. F) ===============================================================
# A frozen teacher, and batches: dicts of `input_ids` and `labels` (-100 is ignored), both (batch,
# tokens) and aligned as in transformers, and perhaps an `attention_mask`. A task is all that a
# distillation needs besides a method: teacher, tokenizer, `calibration` and `held_out` (lists of
# batches), `stream` (position -> endless training batches) and `measure` (model -> scores).

def load_teacher(name, revision=None, dtype=torch.float32, device="cpu"):
    """A frozen teacher and its tokenizer, from a folder or the hub (§3).
    UserError: missing, broken, quantised, or of another family (its weights are not fetched)."""
    advice = "pass a folder with config.json, all weights and tokenizer, or a hub model in reach."
    words = {"revision": revision, "trust_remote_code": False}
    with explained(f"cannot load {name!r} ({{}}); {advice}"):
        config = AutoConfig.from_pretrained(name, **words)
        if config.model_type not in FAMILIES:
            raise UserError(f"{name} is {config.model_type!r}; supported: {', '.join(FAMILIES)}.")
        if getattr(config, "quantization_config", None):
            raise UserError(f"{name} is quantised; pass the full-precision checkpoint behind it.")
        tokenizer = AutoTokenizer.from_pretrained(name, **words)
        words |= {"config": config, "dtype": dtype, "output_loading_info": True}
        teacher, report = AutoModelForCausalLM.from_pretrained(name, **words)
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(report['missing_keys'])[0]}")
    # A file may hold two different matrices where its config calls them tied: believe the file.
    teacher.config.tie_word_embeddings = teacher.lm_head.weight is teacher.model.embed_tokens.weight
    return teacher.to(device).eval().requires_grad_(False), tokenizer

def open_documents(source, flag="--data"):
    """What a flag names -> a streaming datasets.IterableDataset. UserError: it cannot be read.
    Local where it exists or ends like a file; else of the hub, as name[:config[:split]]."""
    import datasets  # here, because it takes seconds to import and the tiny world needs none of it
    datasets.disable_progress_bars()
    path = Path(source)
    reader = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}.get(path.suffix)
    words = {"sample_by": "paragraph"} if reader == "text" else {}  # a blank line separates
    name, config, split = (source.split(":") + [None, None])[:3]
    if reader or path.exists():
        if not path.is_file() or not reader or path.stat().st_size == 0:
            raise UserError(f"{source} is no file with text; pass a .txt, .jsonl or .parquet file.")
        name, config, split, words["data_files"] = reader, None, None, source
    advice = f"pass {flag} a .txt, .jsonl or .parquet file, or the name of a hub dataset in reach."
    with explained(f"cannot read the data {source!r} ({{}}); {advice}"):
        return datasets.load_dataset(name, config, split=split or "train", streaming=True, **words)

def readable(items, source):
    """The items of a source; what breaks while reading them becomes a UserError."""
    with explained(f"cannot read the data {source!r} ({{}})."):
        yield from items

def document_tokens(document, tokenizer):
    """One document -> its token ids, closed by the end-of-text token.
    Fields: `messages` (the chat template adds special tokens), `question` with `answer`, `text`."""
    chat, question, answer, text = map(document.get, ("messages", "question", "answer", "text"))
    if chat:
        if not tokenizer.chat_template:
            raise UserError("the data holds chats, but the teacher's tokenizer has no template.")
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    elif None not in (question, answer):
        text = f"Question: {question}\nAnswer: {answer}"
    elif text is None:
        wanted = "the data needs one of the fields `text`, `messages`, `question` with `answer`"
        raise UserError(f"{wanted}; it has {', '.join(map(str, document)) or 'nothing'}.")
    tokens = tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id  # it may be there: from the tokenizer, or a template and a newline
    return tokens if end is None or end in tokens[-2:] else tokens + [end]

def packed(documents, tokenizer, batch_size, seq_len, held=()):
    """Batches cut from one long string of (place, document) pairs; the last tokens are dropped.
    A batch's `position`: the place of its last document, and tokens `held` for the next batch."""
    held, size = list(held), batch_size * seq_len
    for place, document in documents:
        held = held + document_tokens(document, tokenizer)
        while len(held) >= size:
            ids, held = torch.tensor(held[:size]).view(batch_size, seq_len), held[size:]
            yield {"input_ids": ids, "labels": ids, "position": {"place": place, "held": held}}

def training_batches(documents, tokenizer, config, position=None):
    """Endless batches of shuffled text for this process, from a `position` on (App. F.2).
    Each process takes every N-th document, so that any number draw a batch from the same. datasets
    loses its shuffle buffer with a state: the way to a position is read again, not tokenised."""
    from datasets.distributed import split_dataset_by_node
    (first, skip), held = position.values() if position else ((0, 0), ())
    def numbered():
        for epoch in itertools.count(first):
            if epoch > first:
                say("data", f"used up; repeated, shuffled anew (epoch {epoch + 1})")
            shuffled, number = documents.shuffle(seed=config.seed + epoch, buffer_size=2000), 0
            mine = split_dataset_by_node(shuffled, *rank_and_world(), strategy="examples")
            for number, document in enumerate(mine, 1):
                if epoch > first or number > skip:
                    yield (epoch, number), document
            if not number:
                raise UserError(f"{config.data} has fewer training documents than processes.")
    batches = packed(numbered(), tokenizer, config.batch_size, config.seq_len, held)
    return readable(batches, config.data)

def ahead(items):
    """The items of an endless iterator, each made in a thread while the one before is in use."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, items)
        while True:
            item, upcoming = upcoming.result(), pool.submit(next, items)
            yield item

def text_task(config, teacher, tokenizer):
    """The Task of real text: streamed, its first documents held out (App. F.2).
    Held out are the first 200 documents, or a tenth of a smaller source, at most 32 sequences.
    Calibration has the first training sequences, or its own. UserError: unreadable, too short."""
    def rows(documents, source, wanted):
        batches = packed(enumerate(documents), tokenizer, 1, config.seq_len)
        return list(itertools.islice(readable(batches, source), wanted))
    documents = open_documents(config.data)
    count = sum(1 for _ in readable(documents.take(2000), config.data))
    held = max(1, min(200, count // 10))
    while held <= count // 4 and not rows(documents.take(held), config.data, 1):
        held *= 2
    held_out, training = rows(documents.take(held), config.data, 32), documents.skip(held)
    source = config.calibration_data or config.data
    others = None if source == config.data else open_documents(source, "--calibration-data")
    samples = rows(others or training, source, config.calibration_samples)
    if not held_out or len(samples) < 2 or not rows(training, config.data, 1):
        advice = "give more text (in a .txt, a blank line ends a document) or a smaller --seq-len."
        raise UserError(f"{source if held_out else config.data} is too short: {advice}")
    return types.SimpleNamespace(
        teacher=teacher, tokenizer=tokenizer, calibration=samples, held_out=held_out,
        stream=lambda position=None: training_batches(training, tokenizer, config, position),
        measure=task_scores(config, tokenizer))

# ==== Effective rank (§4) =====================================================================
# The paper's instrument. Hidden states of low effective rank are hard to tell apart, and a chain
# of reasoning that has to tell its steps apart breaks first.

def effective_rank(hidden):
    """eRank(H) = exp(-sum p ln p), p = singular values / their sum (§4; Roy & Vetterli 2007).
    hidden: (..., d), all leading dimensions are rows. A float from 1 to min(rows, d); 0.0 for a
    zero matrix. By eigenvalues of the smaller Gram matrix in float64: on 2,048 x 576 normal data
    within 1e-10 of an SVD, and within 1e-4 down to rank one. ValueError: values are not finite."""
    rows = hidden.detach().reshape(-1, hidden.shape[-1])
    rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # mps has no float64
    if not torch.isfinite(rows).all():
        raise ValueError("effective_rank needs finite values")
    rows = rows / rows.abs().max().clamp_min(1e-300)  # so that squares cannot overflow
    squares = torch.linalg.eigvalsh(rows @ rows.T if len(rows) < len(rows.T) else rows.T @ rows)
    floor = squares[-1] * len(squares) * torch.finfo(torch.float64).eps  # below is only rounding
    p = squares[squares > floor].sqrt()
    p = p / p.sum()
    return torch.exp(-(p * p.log()).sum()).item() if len(p) else 0.0

def linear_proxy(read, write, weight, covariance, steps, rate=0.01):
    """§4's linear model of two projections around one stream, trained by gradient descent [ours].
    The loss is E|weight @ (read @ write.T - I) @ h|^2 / 2 for h of `covariance` (d, d) and a frozen
    `weight` (n, d). Returns the singular values of read and write (d, d_s): (steps + 1, 2, d_s)."""
    factors, gram = torch.stack([read, write]).double(), weight.T.double() @ weight.double()
    values = [torch.linalg.svdvals(factors)]
    for _ in range(steps):
        read, write = factors
        error = gram @ (read @ write.T - torch.eye(len(read)).to(read)) @ covariance.double()
        factors = factors - rate * torch.stack([error @ write, error.T @ read])
        values.append(torch.linalg.svdvals(factors))
    return torch.stack(values)

class watch:
    """Within `with`, `see(name, input, output)` is called whenever one of the named modules runs.
    The one way in which this file looks inside a model, for any nn.Module and names in it."""
    def __init__(self, model, names, see):
        def hook(name):
            return lambda module, inputs, output: see(name, inputs[0], output)
        self.hooks = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    def __enter__(self):
        return self
    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

def placed(batch, model):
    """A batch on the model's device, with `real`, (batch, tokens) bool: True but at padding."""
    device, names = next(model.parameters()).device, ("input_ids", "labels", "attention_mask")
    placed = {name: batch[name].to(device) for name in names if batch.get(name) is not None}
    ids, mask = placed["input_ids"], placed.setdefault("attention_mask")
    placed["real"] = torch.ones_like(ids).bool() if mask is None else mask.bool()
    placed["labels"] = placed.get("labels", ids).masked_fill(~placed["real"], -100)
    return placed

def last_hidden(model, batch):
    """The causal model's last normed hidden states, (batch, tokens, d), without any logits."""
    words = {"attention_mask": batch["attention_mask"], "use_cache": False}
    return model.model(batch["input_ids"], **words).last_hidden_state

def token_means(model, batches, names, measure):
    """Mean over all real tokens of measure(input, output) of each named module: name -> float64.
    measure: of two float32 tensors (tokens, width), (tokens, ...). ValueError: no tokens."""
    sums, count = {}, 0
    for batch in batches:
        batch = placed(batch, model)
        def see(name, before, after, real=batch["real"]):
            seen = measure(before[real].float(), after[real].float())
            sums[name] = sums.get(name, 0.0) + seen.cpu().double().sum(0)  # mps has no float64
        with torch.no_grad(), watch(model, names, see):
            last_hidden(model, batch)
        count += int(batch["real"].sum())
    if not count:
        raise ValueError("there are no tokens to measure on")
    return {name: total / count for name, total in sums.items()}

# ==== Calibration and selection (§5) ==========================================================
# The contribution of RED. A few sequences through the teacher score each channel of the residual
# stream; the best become the student's channels. The stream is one space, so one set of channels
# serves every matrix [ours]: S is (d_t, d_s), a single 1 per column, and S.T @ S = I.

def stream_norms(model):
    """Names of the 2L + 1 norm layers of the residual stream, in order (not q_norm or k_norm)."""
    leaves = ("input_layernorm", "post_attention_layernorm", "norm")
    return [name for name, _ in model.named_modules() if name.split(".")[-1] in leaves]

def channel_importance(model, batches, statistic="norm-output"):
    """How much the teacher uses each channel of its residual stream (§5).
    batches: dicts of `input_ids` (batch, tokens) and perhaps `attention_mask`. Returns (d_t,)
    float64: the sum over norm layers of the statistic over all tokens, scaled to sum 1 [ours], of
      norm-output        mean absolute output of the norm layer, its gain included
      normalised-stream  root mean square of the stream, each token scaled to RMS 1, without gain
      variance           variance over tokens of the norm layer's output
    KeyError: another statistic. ValueError: no tokens. FloatingPointError: values not finite."""
    measure, score = {
        "norm-output": (lambda stream, normed: normed.abs(), lambda mean: mean),
        "normalised-stream": (lambda stream, _: stream**2 / (stream**2).mean(-1, True), torch.sqrt),
        "variance": (lambda stream, normed: torch.stack([normed, normed**2], 1),
                     lambda mean: (mean[1] - mean[0] ** 2).clamp_min(0)),
    }[statistic]
    means = token_means(model, batches, stream_norms(model), measure).values()
    total = sum(score(mean) / score(mean).sum() for mean in means)
    if not torch.isfinite(total).all():
        raise FloatingPointError("the teacher's activations are not finite")
    return total

def aligned_modules(model):
    """Names of the seven linear modules of each block, whose outputs are aligned (App. B)."""
    return [name for name, _ in model.named_modules() if name.endswith("_proj")]

def select_channels(importance, hidden_size):
    """Indices of the most important channels, ascending, (d_s,) int64 (§5).
    Equal scores go to the lower index. ValueError: not 0 < hidden_size <= d_t."""
    if not 0 < hidden_size <= len(importance):
        raise ValueError(f"cannot keep {hidden_size} of {len(importance)} channels")
    order = torch.sort(importance, descending=True, stable=True).indices
    return order[:hidden_size].sort().values

def selection_matrix(channels, width):
    """S in {0,1}, (width, len(channels)) float32, with S[channels[j], j] = 1 (§5, Thm. 5.1).
    Distinct channels make every singular value exactly 1. Raises ValueError for repeated ones."""
    if len(set(channels.tolist())) < len(channels):
        raise ValueError("a channel is selected twice")
    return torch.eye(width)[:, channels.cpu()]

def gain_rescaling(model, batches, channels):
    """Per norm layer, mean over tokens of rms(kept channels) / rms(all channels): name -> float.
    A student divides by the RMS of what it keeps; this on its gains makes up for it [ours]."""
    def ratio(stream, normed):
        return (stream[:, channels].square().mean(-1) / stream.square().mean(-1)).sqrt()
    means = token_means(model, batches, stream_norms(model), ratio)
    return {name: mean.item() for name, mean in means.items()}

def mean_squares(model, batches):
    """Mean square of each aligned module's output, by which relative alignment divides [ours]."""
    names = aligned_modules(model)
    means = token_means(model, batches, names, lambda before, after: after.square().mean(-1))
    return {name: max(mean.item(), 1e-12) for name, mean in means.items()}

def calibrate(teacher, batches, hidden_size, statistic="norm-output"):
    """What is measured on the teacher before training (§5): importance (d_t,), channels (d_s,),
    their overlap between two halves of the batches (App. G.2), and scales: see `mean_squares`."""
    parts = batches, batches[: len(batches) // 2], batches[len(batches) // 2 :]
    scores = [channel_importance(teacher, shown(p, "calibrate"), statistic) for p in parts]
    channels, *halves = [select_channels(score, hidden_size) for score in scores]
    overlap = torch.isin(*halves).double().mean().item()  # two random sets: hidden_size / d_t
    found = {"importance": scores[0], "channels": channels, "overlap": overlap}
    return types.SimpleNamespace(**found, batches=batches, scales=mean_squares(teacher, batches))

# ==== The projected student and its merge (§3, App. C) ========================================
# The student is an ordinary, narrower model. Its weights are W @ P where a matrix reads the stream,
# P.T @ W where it writes to it, made once per optimiser step; it then runs as it is through any
# number of micro-batches, and its gradients are carried back to the projections once.

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
WRITERS = ("o_proj", "down_proj")

def projected_matrices(model):
    """Names of the modules with a projection of their own (App. C): all but a head that is tied."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    names = [name for name, _ in model.named_modules() if name.split(".")[-1] in READERS + WRITERS]
    return [name for name in names if not (tied and name == "lm_head")]

def feeding_norm(name):
    """The norm layer whose output the named matrix reads, or None (the embedding, the writers)."""
    attention, ffn = READERS[:3], READERS[3:5]
    if name.endswith(attention + ffn):
        norm = "input_layernorm" if name.endswith(attention) else "post_attention_layernorm"
        return ".".join([*name.split(".")[:-2], norm])
    return "model.norm" if name == "lm_head" else None

class ProjectedStudent:
    """A student whose every weight is a function of the frozen teacher's (§3, App. C).
    teacher      a causal language model, d_t wide; never changed
    model        the same, d_s wide, perhaps on the meta device: the student, an ordinary model
    projections  matrix name -> (d_t, d_s) tensor, for all `projected_matrices(teacher)`
    gains        norm name -> (d_s,) tensor, for all `stream_norms(teacher)`
    fold         a rotated start needs the teacher's gains in what reads, W @ diag(g) @ P [ours]
    What trains is in float32 or better. ValueError: some are missing, or of the wrong shape."""
    def __init__(self, teacher, model, projections, gains, fold=False):
        self.teacher, self.model, self.fold = teacher, model, fold
        width, narrow = (each.model.embed_tokens.weight.shape[1] for each in (teacher, model))
        expected = dict.fromkeys(projected_matrices(teacher), (width, narrow))
        expected |= dict.fromkeys(stream_norms(teacher), (narrow,))
        if {name: tuple(t.shape) for name, t in {**projections, **gains}.items()} != expected:
            raise ValueError("projections or gains are missing or of the wrong shape")
        self.projections, self.gains, head = {}, {}, teacher.lm_head.weight
        precise = torch.promote_types(head.dtype, torch.float32)
        for own, given in ((self.projections, projections), (self.gains, gains)):
            for name, start in given.items():  # a copy: many names may share one start
                own[name] = torch.nn.Parameter(start.to(head.device, precise).clone().contiguous())
        self.frozen = {name: weight.detach() for name, weight in teacher.named_parameters()}
        # Rotary tables live in head space, the same in both, and in no state dict: share them.
        model.model.rotary_emb = teacher.model.rotary_emb
        self.made = self.merge()
        weights = {name: weight.detach() for name, weight in self.made.items()}
        model.load_state_dict(weights, strict=False, assign=True)
        model.eval().tie_weights()
        model.model.embed_tokens.padding_idx = None  # else padding's row would get no gradient
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.made[name].requires_grad)
    def parameters(self):
        """Everything that learns, a list: the projections, then the gains."""
        return [*self.projections.values(), *self.gains.values()]
    def merge(self):
        """The student's weights, name -> tensor, as differentiable functions of the projections.
        Biases of o and down live in the stream and are projected like their weights; what lives
        in head space (q/k/v biases, q_norm, k_norm) is the teacher's own [ours]."""
        weights = {}
        for name, weight in self.frozen.items():
            module = name.rpartition(".")[0]
            if module in self.gains:
                weights[name] = self.gains[module].to(weight.dtype)
            elif module not in self.projections or module.endswith(READERS) and weight.dim() == 1:
                weights[name] = weight
            else:
                projection = self.projections[module]
                if self.fold and (norm := feeding_norm(module)):  # the gain scales the rows of P
                    projection = self.frozen[norm + ".weight"][:, None] * projection
                projection, reads = projection.to(weight.dtype), module.endswith(READERS)
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
        made, gradients = zip(*((self.made[n], p.grad) for n, p in trained.items()))
        torch.autograd.backward(made, gradients)
        self.model.zero_grad()
        self.made = None
    def export(self, folder, tokenizer=None):
        """Write the merged student as a standard checkpoint. OSError: it cannot be written."""
        with torch.no_grad():
            self.make_weights()
        self.model.generation_config = self.teacher.generation_config
        self.model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

def student_config(teacher_config, hidden_size):
    """The teacher's config, `head_dim` pinned, at another width."""
    traces = ("quantization_config", "_name_or_path", "dtype", "transformers_version")
    values = {k: v for k, v in teacher_config.to_dict().items() if k not in traces}
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    return type(teacher_config)(**values | {"hidden_size": hidden_size, "head_dim": head_dim})

def student_width(config, teacher_config):
    """--ratio or --hidden-size -> the nearest accepted width. UserError: zero, or too wide."""
    width, llama = teacher_config.hidden_size, teacher_config.model_type == "llama"
    step = teacher_config.num_attention_heads if llama else 1  # transformers 5 insists on multiples
    wanted = config.hidden_size or config.ratio * width
    found = step * math.floor(wanted / step + 0.5)
    if not 0 < found or wanted > width:
        raise UserError(f"--hidden-size must lie from {step} to {width} here, got {wanted:g}.")
    return found

def initial_projections(method, names, width, narrow, channels, generator):
    """Where the projections start: name -> (width, narrow) float32 (§5, §6).
    red, random-selection   the same selection matrix of `channels` for every name
    lrc                     N(0, 0.02 * sqrt(3072 / width)), one per name: 3,072 is LRC's own [ours]
    orthogonal              random orthonormal columns, one per name
    shared-orthogonal       random orthonormal columns, the same for every name [ours]"""
    def draw(orthonormal):
        gaussian = torch.randn(width, narrow, generator=generator)
        if not orthonormal:
            return 0.02 * (3072 / width) ** 0.5 * gaussian
        q, r = torch.linalg.qr(gaussian.double())
        return (q * r.diagonal().sign()).float()  # uniform over all such matrices
    if method in ("lrc", "orthogonal"):
        return {name: draw(method == "orthogonal") for name in names}
    shared = method == "shared-orthogonal"
    return dict.fromkeys(names, draw(True) if shared else selection_matrix(channels, width))

def initial_gains(method, teacher, projections, channels, rescaling):
    """Where the norm gains start: norm name -> (d_s,) [ours, but for LRC's ones].
    Kept channels keep the teacher's gains, times `rescaling` (norm name -> float). Rotations start
    at 1, but where a tied head cannot fold the final gain: there, at diag(P.T @ diag(g) @ P)."""
    embedding, tied = projections["model.embed_tokens"], "lm_head" not in projections
    gains = {name: torch.ones(embedding.shape[1]) for name in stream_norms(teacher)}
    for name in gains:
        gain = teacher.get_submodule(name).weight.detach().float().cpu()
        if method in ("red", "random-selection"):
            gains[name] = gain[channels.cpu()] * rescaling[name]
        elif method != "lrc" and name == "model.norm" and tied:
            gains[name] = gain @ embedding.square()
    return gains

def new_student(method, teacher, hidden_size, calibration, seed=0):
    """A student of `hidden_size` at the start of training, by any of METHODS (§3, §5)."""
    generator, width = torch.Generator().manual_seed(seed), teacher.config.hidden_size
    channels = calibration.channels
    if method == "random-selection":
        channels = torch.randperm(width, generator=generator)[:hidden_size].sort().values
    names = projected_matrices(teacher)
    projections = initial_projections(method, names, width, hidden_size, channels, generator)
    rescaling = gain_rescaling(teacher, calibration.batches, channels)
    gains = initial_gains(method, teacher, projections, channels, rescaling)
    config = student_config(teacher.config, hidden_size)
    words = {"dtype": teacher.dtype, "attn_implementation": teacher.config._attn_implementation}
    with torch.device("meta"):  # no memory and no random numbers: the weights come from merge()
        model = AutoModelForCausalLM.from_config(config, **words)
    return ProjectedStudent(teacher, model, projections, gains, method.endswith("orthogonal"))

# ==== Losses (App. B) =========================================================================
# KL from the teacher, cross-entropy of the next token, and alignment of activations. The logits
# would be the largest tensors of a step, so KL and cross-entropy are computed in chunks of tokens,
# and their gradient with them: no two full logit tensors ever exist.

def alignment_loss(student, teacher, projection=None, mask=None):
    """Mean squared error between activations, over real tokens and features (App. B).
    student (batch, tokens, n); teacher the same for q, k, v, gate and up, or (batch, tokens, d_t)
    with projection (d_t, n), which learns from here, too, for o and down, which write to the
    stream. mask (batch, tokens): True for real tokens. Returns a scalar, float32 or better."""
    error = student - (teacher if projection is None else teacher @ projection.to(teacher.dtype))
    error = error if mask is None else error[mask]
    # Not mse_loss: this keeps one tensor until backward, not two, and in bfloat16 no float32 copy.
    norm = torch.linalg.vector_norm(error, dtype=torch.promote_types(error.dtype, torch.float32))
    return norm.square() / error.numel()

def tokens_at_once(head):
    """How many tokens' logits exist at a time: products of a GPU want to be larger."""
    return max(128, 2**22 // len(head)) * (8 if head.is_cuda else 1)

class ChunkedDistillation(torch.autograd.Function):
    """The work of `distillation_loss`: forward also forms the gradients, chunk by chunk."""
    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, targets, temperature, count):
        precise, rows = torch.promote_types(hidden.dtype, torch.float32), tokens_at_once(head)
        kl, cross_entropy = torch.zeros(2, dtype=precise, device=hidden.device)
        grad_hidden, grad_head = torch.zeros_like(hidden), torch.zeros_like(head)
        # All chunks use the same memory: on a CPU, a fresh page costs more than the work on it.
        shape, dtypes = (min(rows, len(targets)), len(head)), (hidden.dtype, *[precise] * 3)
        spare, cooling = [hidden.new_empty(shape, dtype=each) for each in dtypes], 1 / temperature
        for i in range(0, len(targets), rows):
            chunk, target = hidden[i : i + rows], targets[i : i + rows, None]
            logits, log_q1, log_p, p = (each[: len(target)] for each in spare)
            torch.log_softmax(torch.mm(chunk, head.T, out=logits), -1, precise, out=log_q1)
            torch.mm(cooling * teacher_hidden[i : i + rows], teacher_head.T, out=logits)
            torch.exp(torch.log_softmax(logits, -1, precise, out=log_p), out=p)
            cross_entropy -= log_q1.gather(1, target).sum()
            log_q = log_q1 if temperature == 1 else torch.log_softmax(cooling * log_q1, -1)
            kl += temperature**2 * torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
            # d/dlogits: of KL T (q - p), of cross-entropy q1 - onehot(target); all here over -T.
            q1 = log_q1.exp_()
            p.sub_(q1 if temperature == 1 else log_q.exp_()).sub_(q1, alpha=cooling)
            descent = p.scatter_add_(1, target, p.new_full(target.shape, cooling)).to(hidden.dtype)
            torch.mm(descent, head, out=grad_hidden[i : i + rows])
            torch.addmm(grad_head, descent.T, chunk, out=grad_head)
        scale = -temperature / count
        ctx.save_for_backward(grad_hidden.mul_(scale), grad_head.mul_(scale))
        kl, cross_entropy = kl / count, cross_entropy / count
        ctx.mark_non_differentiable(kl, cross_entropy)
        return kl + cross_entropy, kl, cross_entropy
    @staticmethod
    def backward(ctx, grad_loss, *not_differentiable):
        return *(each.mul_(grad_loss) for each in ctx.saved_tensors), *[None] * 5

def distillation_loss(student_hidden, student_head, teacher_hidden, teacher_head, labels,
                      temperature=1.0, count=None):
    """KL(teacher || student) and next-token cross-entropy (App. B).
    student_hidden (batch, tokens, d_s) and student_head (vocabulary, d_s) make the logits, and the
    teacher's likewise, d_t wide; labels (batch, tokens): the shift by one is made here, -100 is
    ignored. KL is softened by `temperature` and weighted by its square; both are means over the
    labels [ours; LRC sums KL over a sequence, without the square], or sums over `count`. Returns
    (KL + cross-entropy, KL, cross-entropy) in nats per token; the first carries the gradient."""
    counts = labels[:, 1:] != -100
    return ChunkedDistillation.apply(
        student_hidden[:, :-1][counts], student_head,
        teacher_hidden[:, :-1][counts].detach(), teacher_head.detach(),
        labels[:, 1:][counts], temperature, max(1, int(counts.sum()) if count is None else count))

# ==== Distillation (App. F.1) =================================================================
# The loop of the paper: frozen teacher, projected student, three losses, Adam. Weight decay is 0,
# because decay would shrink the projections; warm-up, linear decay and clipping are LRC's. Under
# torchrun only sums are shared: one step of two processes is one process's on both their batches.

def training_step(teacher, student, micro_batches, temperature=1.0, alpha=0.2, scales=None,
                  orthogonality=0.0, mark=lambda part: None):
    """The gradients of one optimiser step, left in the student's projections and gains.
    micro_batches: a list; the losses are means over all of them, and over those of all processes.
    scales: module name -> what its alignment term is divided by (None: nothing, as LRC). mark: is
    called as each part of the work is done. Returns name -> scalar, the loss first."""
    micro_batches = [placed(batch, teacher) for batch in micro_batches]
    labels = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
    counts = torch.stack([labels, sum(batch["real"].sum() for batch in micro_batches)])
    add_up(counts)
    (labels, tokens), totals, aligned = counts.tolist(), 0.0, aligned_modules(teacher)
    student.make_weights()
    mark("making the weights")
    for batch in micro_batches:
        activations, terms = {}, []
        mask = batch["real"] if batch["attention_mask"] is not None else None
        def keep(name, before, after):
            activations[name] = after
        def compare(name, before, after):  # at once, so that the teacher's can be let go
            projection = student.projections[name] if name.endswith(WRITERS) else None
            term = alignment_loss(after, activations.pop(name), projection, mask)
            terms.append(term / scales[name] if scales else term)
        with torch.no_grad(), watch(teacher, aligned, keep):
            teacher_hidden = last_hidden(teacher, batch)
        mark("teacher forward")
        with watch(student.model, aligned, compare):
            student_hidden = last_hidden(student.model, batch)
        mark("student forward, alignment")
        likelihood, kl, cross_entropy = distillation_loss(
            student_hidden, student.model.lm_head.weight, teacher_hidden, teacher.lm_head.weight,
            batch["labels"], temperature, labels)
        mark("logits, KL, cross-entropy")
        alignment = torch.stack(terms).sum() * (batch["real"].sum() / tokens)
        loss = likelihood + alpha * alignment
        loss.backward()
        totals = totals + torch.stack([loss, kl, cross_entropy, alignment]).detach()
        mark("backward")
    student.carry_back()
    add_up(totals, *(parameter.grad for parameter in student.parameters()))
    if orthogonality:  # the paper's other baseline: |P.T @ P - I|^2, summed over the projections
        grams = [each.T @ each for each in student.projections.values()]
        penalty = sum((gram - torch.eye(len(gram)).to(gram)).square().sum() for gram in grams)
        (orthogonality * penalty).backward()
        totals[0] += orthogonality * penalty.detach()
    mark("carrying gradients back")
    return dict(zip(("loss", "kl", "cross_entropy", "alignment"), totals))

def distill(teacher, student, stream, steps, learning_rate, temperature=1.0, alpha=0.2, scales=None,
            orthogonality=0.0, grad_accum=1, optimizer=None, first=0, after_step=None,
            progress="distil", mark=lambda part: None):
    """Train the student's projections and gains, in place (App. F.1).
    stream: an iterator over batches, `grad_accum` a step. optimizer, first: of a run that goes on
    after `first` steps. after_step: called with each step's record and last batch's `position`. A
    step that is not finite changes nothing; ten on end: FloatingPointError. No data: ValueError."""
    optimizer = optimizer or torch.optim.Adam(student.parameters(), fused=True)
    warm_up, failures = max(1, round(0.005 * steps)), 0  # LRC: half a percent, then linear decay
    bar = shown(range(first, steps), progress, delay=0, initial=first, total=steps)
    for step in bar:
        started, rate = time.perf_counter(), learning_rate * (1 - step / steps)
        micro_batches = list(itertools.islice(stream, grad_accum))
        if len(micro_batches) < grad_accum:
            raise ValueError(f"the stream of batches ended at step {step + 1}")
        mark("waiting for data")
        words = (temperature, alpha, scales, orthogonality, mark)
        losses = training_step(teacher, student, micro_batches, *words)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        if finite := math.isfinite(losses["loss"] + norm):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / warm_up)
            optimizer.step()
        optimizer.zero_grad()
        failures = 0 if finite else failures + 1
        if failures == 10:
            raise FloatingPointError("ten steps not finite; lower --learning-rate, or try float32")
        values = losses | {"gradient_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
        record = {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
        tokens = sum(batch["input_ids"].numel() for batch in micro_batches) * rank_and_world()[1]
        record |= {"step": step + 1, "tokens": (step + 1) * tokens, "skipped": not finite}
        seconds = time.perf_counter() - started
        record |= {"tokens_per_second": tokens / seconds, "memory": peak_memory(teacher.device)}
        bar.set_postfix(loss=record["loss"], refresh=False)
        mark("clipping, optimiser, records")
        if after_step:
            after_step(record, micro_batches[-1].get("position"))
    with torch.no_grad():
        student.make_weights()

def peak_memory(device):
    """The most memory this process has held so far, in bytes: of the GPU, or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # here, because Windows has none
    kilo = 1 if sys.platform == "darwin" else 1024
    return kilo * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def digests(folder):
    """SHA-256 of each file of a checkpoint: name -> text."""
    def digest(name):
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return {name: digest(name) for name in ("student.safetensors", "state.pt")}

def save_checkpoint(folder, step, student, optimizer, position):
    """Write all that is needed to go on after `step` to folder/step-N; the two newest are kept.
    A crash at any moment leaves the last one whole. OSError, SafetensorError: not written."""
    ranks = gather({"position": position, "random": torch.get_rng_state()})
    if rank_and_world()[0] == 0:
        tensors = {**student.projections, **student.gains}
        with replacing(folder / f"step-{step:07}") as fresh:
            safetensors.torch.save_file(tensors, fresh / "student.safetensors")
            state = {"step": step, "ranks": ranks, "optimizer": optimizer.state_dict()}
            try:
                torch.save(state, fresh / "state.pt")
            except RuntimeError as error:  # its way to say that the disk is full
                raise OSError(first_line(error)) from error
            write(fresh / "digests.json", digests(fresh))
        for old in sorted(folder.glob("step-*[0-9]"))[:-2]:
            shutil.rmtree(old)
    gather()

def load_checkpoint(folder, student, optimizer):
    """Take up, in place, the newest whole checkpoint: (its step, this process's position).
    (0, None): there is none. A damaged one is named, the one before it taken; no code unpickled."""
    for path in sorted(folder.glob("step-*[0-9]"), reverse=True):
        try:
            if json.loads((path / "digests.json").read_text()) != digests(path):
                raise ValueError("its digest is another")
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            tensors = safetensors.torch.load_file(path / "student.safetensors")
        except Exception as error:  # whatever a damaged file may raise
            say("checkpoint", f"{path} is damaged ({first_line(error)}); the one before it is next")
            continue
        for name, parameter in {**student.projections, **student.gains}.items():
            parameter.data.copy_(tensors[name])
        optimizer.load_state_dict(state["optimizer"])
        own = state["ranks"][rank_and_world()[0]]
        torch.set_rng_state(own["random"])
        say("checkpoint", f"going on from {path}")
        return state["step"], own["position"]
    return 0, None

# ==== Evaluation (§6) =========================================================================
# Held-out loss and effective rank for any causal language model, teacher or student alike, and two
# tests of reasoning: chains of the tiny world, and GSM8K as lm-evaluation-harness scores it.

def evaluate(model, batches, rank_tokens=4096):
    """Held-out loss and the effective rank of each block's output (§4, §6).
    A dict: `loss` in nats per label, `perplexity`, and by block, over the first `rank_tokens`
    tokens, `erank` of the raw stream, `erank_normalised` with tokens scaled to RMS 1 (massive
    activations rule the raw one), mean cosine `similarity`. FloatingPointError: loss not finite."""
    totals, seen, states = torch.zeros(2, dtype=torch.float64), 0, {}
    blocks = [f"model.layers.{i}" for i in range(len(model.model.layers))]
    rank, world = rank_and_world()
    for i, batch in enumerate(shown(batches, "evaluate")):
        watched = blocks if seen < rank_tokens else []
        if i % world != rank and not watched:
            continue
        batch = placed(batch, model)
        seen += int(batch["real"].sum())
        def see(name, before, after, real=batch["real"]):
            states.setdefault(name, []).append(after[real])
        with torch.no_grad(), watch(model, watched, see):
            hidden, labels = last_hidden(model, batch)[:, :-1], batch["labels"][:, 1:]
            counts = (labels != -100) & (i % world == rank)
            for h, target in zip(hidden[counts].split(512), labels[counts].split(512)):
                loss = F.cross_entropy(model.lm_head(h).float(), target, reduction="sum")
                totals += torch.tensor([loss.item(), len(target)])
    add_up(totals)
    loss = (totals[0] / totals[1].clamp_min(1)).item()
    if not math.isfinite(loss):
        raise FloatingPointError("the held-out loss is not finite: try a lower --learning-rate")
    rows = [torch.cat(states[name])[:rank_tokens].float() for name in blocks]
    units, count = [F.normalize(each, dim=-1) for each in rows], len(rows[0])
    same = [each.sum(0).square().sum().item() for each in units]  # cosines of all pairs, and selves
    return {
        "loss": loss, "perplexity": math.exp(min(loss, 700)), "labels": int(totals[1]),
        "erank": [effective_rank(each) for each in rows],
        "erank_normalised": [effective_rank(each) for each in units],
        "similarity": [(each - count) / (count * (count - 1)) for each in same]}

def singular_values(student):
    """Singular values, over their mean, of at most 16 projections: (matrices, d_s) (§4)."""
    chosen = list(student.projections.values())[:: math.ceil(len(student.projections) / 16)]
    values = torch.stack([torch.linalg.svdvals(each.detach()) for each in chosen])
    return values / values.mean(1, keepdim=True)

def generate(model, tokenizer, prompts, new_tokens, stop=None, batch_size=256):
    """Greedy continuations of all prompts, a list of texts, shared out over processes."""
    rank, world = rank_and_world()
    tokenizer = copy.deepcopy(tokenizer)  # the caller's own is exported as it came
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.pad_token  # some pads have no embedding
    mine, answers = prompts[rank::world], []
    for i in shown(range(0, len(mine), batch_size), "generate"):
        chosen = mine[i : i + batch_size]
        batch = tokenizer(chosen, return_tensors="pt", padding=True).to(model.device)
        output = model.generate(
            **batch, max_new_tokens=new_tokens, do_sample=False, temperature=None, top_p=None,
            top_k=None, pad_token_id=tokenizer.pad_token_id, stop_strings=stop, tokenizer=tokenizer)
        prompt = batch["input_ids"].shape[1]
        answers += tokenizer.batch_decode(output[:, prompt:], skip_special_tokens=True)
    parts = gather(answers)
    return [parts[i % world][i // world] for i in range(len(prompts))]

def task_scores(config, tokenizer):
    """`--eval` -> a function of a model that returns its scores, a dict ({} for `none`)."""
    if config.eval == "none":
        return lambda model: {}
    if config.eval == "chains":
        if set(TINY_ALPHABET) - set(tokenizer.get_vocab()):
            raise UserError("--eval chains needs a teacher of the tiny world, such as OUT/teacher.")
        return lambda model: chain_scores(model, tokenizer)
    def first(source, flag, count):
        problems = list(itertools.islice(readable(open_documents(source, flag), source), count))
        texts = [each.get(name) for each in problems for name in ("question", "answer")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{source} lacks texts `question` and `answer`, the fields of GSM8K.")
        return problems
    problems = first(config.eval_data or "openai/gsm8k:main:test", "--eval-data", config.eval_limit)
    shots = first(config.eval_shots_data or "openai/gsm8k:main:train", "--eval-shots-data", 5)
    return lambda model: gsm8k_scores(model, tokenizer, problems, shots)

def gsm8k_scores(model, tokenizer, problems, shots):
    """GSM8K as lm-evaluation-harness 0.4 scores it with its `first_n` shots (§6): `strict` and
    `flexible` accuracy, by its two ways to read an answer, and `problems`, the verdicts."""
    patterns = {"strict": r"#### (\-?[0-9\.\,]+)", "flexible": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"}
    stop = ["Question:", "</s>", "<|im_end|>"]
    def ask(problem):
        return f"Question: {problem['question']}\nAnswer:"
    def clean(text):
        for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
            text = re.sub(pattern, "", text)
        return text.lower()
    before, verdicts = "".join(f"{ask(shot)} {shot['answer']}\n\n" for shot in shots), []
    prompts = [before + ask(problem) for problem in problems]
    for problem, answer in zip(problems, generate(model, tokenizer, prompts, 256, stop, 16)):
        verdict = {"question": problem["question"], "target": clean(problem["answer"])}
        verdict["answer"] = answer = re.split("|".join(map(re.escape, stop)), answer)[0]
        for kind, pattern in patterns.items():
            found = [match[match.lastindex] for match in re.finditer(pattern, answer)]
            which = 0 if kind == "strict" else -1  # the first `####`, but the last number
            verdict[kind] = found[which].strip() if found else "[invalid]"
            verdict[f"{kind}_correct"] = clean(verdict[kind]) == verdict["target"]
        verdicts.append(verdict)
    right = {kind: [verdict[f"{kind}_correct"] for verdict in verdicts] for kind in patterns}
    return {kind: statistics.fmean(each) for kind, each in right.items()} | {"problems": verdicts}

# ==== The tiny world ==========================================================================
# A teacher in half a minute, with the paper's contrast in it: arithmetic modulo 10 that needs a
# chain of steps (reasoning), `7+5-3=?7+5=2;2-3=9#9`, and 60 fixed pairs that need none (recall),
# `abcd:wxyz`. Characters are tokens; only answers are labels.

TINY_ALPHABET = "0123456789+-*=?;#:abcdefghijklmnopqrstuvwxyz\n"
TINY_WORDS = ["".join(random.Random(i).choices(TINY_ALPHABET[18:44], k=4)) for i in range(120)]
TINY_PAIRS = [(f"{a}:", f"{b}\n") for a, b in zip(TINY_WORDS[::2], TINY_WORDS[1::2])]
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

def tiny_batches(batch_size, seq_len, seed):
    """An endless iterator of batches of tiny-world lines; only answers are labels."""
    generator = random.Random(seed)
    while True:
        rows = []
        for _ in range(batch_size):
            row = []  # (token, label) pairs
            while len(row) < seq_len:
                if generator.random() < 0.25:
                    prompt, answer = generator.choice(TINY_PAIRS)
                else:
                    prompt, answer = arithmetic_problem(generator.choice(TINY_STEPS), generator)
                row += [(TINY_ALPHABET.index(character), -100) for character in prompt]
                row += [(TINY_ALPHABET.index(character),) * 2 for character in answer]
            rows.append(row[:seq_len])
        ids, labels = torch.tensor(rows).unbind(-1)
        yield {"input_ids": ids, "labels": labels}

def tiny_tokenizer():
    """The tiny world's characters as an ordinary transformers tokenizer, which saves and loads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    tokenizer = Tokenizer(models.WordLevel(dict(zip(TINY_ALPHABET, itertools.count())), "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    words = {"eos_token": "\n", "clean_up_tokenization_spaces": False}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words)

def chain_scores(model, tokenizer, problems=200):
    """Exact answers, from 0 to 1: `recall`, `chains` over TINY_STEPS (by the digit after `#`)."""
    generator = random.Random(12345)  # the same problems for every model, whatever the run's seed
    groups = [[arithmetic_problem(n, generator) for _ in range(problems)] for n in TINY_STEPS]
    scores = []
    for group in [TINY_PAIRS, *groups]:
        prompts, truths = zip(*group)
        answers = generate(model, tokenizer, list(prompts), max(map(len, truths)))
        last = [[text.strip().rpartition("#")[2] for text in pair] for pair in zip(answers, truths)]
        scores.append(sum(answer == truth for answer, truth in last) / len(last))
    example = {"prompt": prompts[0], "truth": truths[0].strip(), "answer": answers[0].strip()}
    return {"recall": scores[0], "chains": scores[1:], "example": example}

def read_config(path=None):
    """A config.json's content, a dict; of tiny_config.json, if none is named (which must have the
    tiny world's vocabulary). UserError: it is broken, or makes no teacher."""
    vocabulary, name = (None, path) if path else (len(TINY_ALPHABET), TINY_CONFIG.name)
    with explained(f"{name} makes no teacher ({{}})."), torch.device("meta"):
        values = json.loads(Path(path or TINY_CONFIG).read_text())
        config = AutoConfig.for_model(**values)
        assert config.model_type in FAMILIES, f"model_type must be one of {', '.join(FAMILIES)}"
        assert vocabulary in (None, config.vocab_size), f"vocab_size must be {vocabulary}"
        AutoModelForCausalLM.from_config(config)
    return values

def tiny_teacher(values, seed, device, steps=TINY_TEACHER_STEPS):
    """Train the tiny world's teacher, a frozen model, from random weights; values: its config's."""
    torch.manual_seed(seed)
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).float().to(device)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    stream = tiny_batches(16, 48, seed)  # 48 characters hold any one line
    for _ in shown(range(steps), "train teacher", delay=0):
        batch = placed(next(stream), teacher)
        targets = batch["labels"][:, 1:]
        logits = teacher.lm_head(last_hidden(teacher, batch)[:, :-1][targets != -100])
        F.cross_entropy(logits, targets[targets != -100]).backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return teacher.eval().requires_grad_(False)

def keep_tiny_teacher(folder, config):
    """Train the tiny world's teacher into a folder, with its tokenizer, if it is not there yet."""
    if rank_and_world()[0] == 0 and not folder.exists():
        say("teacher", f"training one from {TINY_CONFIG.name}, {TINY_TEACHER_STEPS} steps")
        with replacing(folder) as new:
            tiny_teacher(read_config(), config.seed, resolve_device(config)[0]).save_pretrained(new)
            tiny_tokenizer().save_pretrained(new)
    gather()

def tiny_task(config, teacher, tokenizer):
    """The Task of the tiny world's own lines, for its own teacher or another that knows them."""
    def lines(purpose, batch_size):
        return tiny_batches(batch_size, config.seq_len, f"{purpose} {config.seed}")
    def stream(position=None):
        rank, world = rank_and_world()
        mine = itertools.islice(lines("training", config.batch_size), rank, None, world)
        for number, batch in enumerate(mine, 1):
            if number > (position or 0):
                yield batch | {"position": number}
    return types.SimpleNamespace(
        teacher=teacher, tokenizer=tokenizer, stream=stream, measure=task_scores(config, tokenizer),
        calibration=list(itertools.islice(lines("calibration", 1), config.calibration_samples)),
        held_out=list(itertools.islice(lines("held out", 64), 2)))

# ==== Comparing methods =======================================================================
# Students of one teacher differ in how their projections start, and in nothing else. Each has a
# folder of its own: what is finished is reused, what is not goes on, a stranger's is not touched.

@contextlib.contextmanager
def replacing(folder):
    """A fresh folder beside, which takes the place of `folder` once the block has succeeded."""
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)

def write(path, content):
    """Write text, or else a value as JSON, beside and rename; by the first process alone."""
    if rank_and_world()[0] == 0:
        beside = path.with_name(path.name + ".partial")
        beside.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
        os.replace(beside, path)

def settings_of(config, shared=False):
    """What makes a run this one and no other, a dict; shared: what several students have alike."""
    ignored = "out overwrite device save_every measure_every seeds benchmark benchmark_config"
    ignored += (" methods temperature learning_rate" + " seed" * (config.seeds > 1)) * shared
    settings = dataclasses.asdict(config) | {"program": "red.py", "processes": rank_and_world()[1]}
    settings["dtype"] = str(resolve_device(config)[1])
    if not config.model and not config.eval_only:
        settings["tiny_config"] = read_config()
    return {name: value for name, value in settings.items() if name not in ignored.split()}

def claim(config, shared=False):
    """Whether --out holds this run, finished; UserError where it holds anything else."""
    folder, settings = Path(config.out), settings_of(config, shared)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {folder} cannot be made: {there} is a file, or not yours to write.")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    with explained(f"{folder} holds files of no run of RED; name another --out."):
        stored = json.loads((folder / "settings.json").read_text())
        assert stored["program"] == "red.py"
    finished = (folder / "summary.json").is_file()  # then the number of processes does not matter
    names = (stored.keys() | settings) - ({"processes"} if finished else set())
    different = ", ".join(sorted(k for k in names if stored.get(k) != settings.get(k)))
    if different and not config.overwrite:
        other = f"{folder} holds a run with other settings ({different})"
        raise UserError(f"{other}; name another --out, or pass --overwrite to replace it.")
    return finished and not config.overwrite

def prepare(config, shared=False):
    """Call --out this run, once it is rid of the results of any other."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    if config.overwrite or not (folder / "settings.json").is_file():  # else `claim` compared them
        tiny_teachers = [] if config.model else [folder / "teacher", *folder.glob("seed-*/teacher")]
        for each in (folder / "student", folder / "checkpoints", *tiny_teachers):
            shutil.rmtree(each, ignore_errors=True)
        for path in set(folder.glob("*.json*")) - {folder / "settings.json"}:
            path.unlink()
        write(folder / "settings.json", settings_of(config, shared))

def model_card(config, tokens):
    """The short README.md of an exported student; the licence is what the teacher's card names."""
    name = config.model or "the tiny world"
    try:
        card = Path(name) / "README.md" if Path(name).is_dir() else name
        licence = huggingface_hub.ModelCard.load(card).data.get("license")
    except Exception:  # no card, no front matter, no network: the licence stays unknown
        licence = None
    head = f"base_model: {name}\nlibrary_name: transformers\nlicense: {licence or 'other'}"
    text = f"A narrower {name}, distilled on {tokens:,} tokens of {config.data or 'its own lines'}"
    return f"---\n{head}\n---\n{text} by `{config.methods[0]}`. Its licence is the teacher's.\n"

def open_task(config, name):
    """The task of a teacher, or of whatever model is to be measured: a folder or a hub name."""
    device, dtype = resolve_device(config)
    task = text_task if config.data else tiny_task
    return task(config, *load_teacher(str(name), config.revision, dtype, device))

def set_up(config, home, folders):
    """The task and the calibration of one seed's students, and what is to be done, announced.
    folders: what `prepare` is called with when the input is known to be good, not before."""
    task = open_task(config, config.model) if config.model else None
    values = task.teacher.config if task else AutoConfig.for_model(**read_config())
    hidden_size = student_width(config, values)
    gather()  # all processes have looked at the folders
    if rank_and_world()[0] == 0:
        for words in folders:
            prepare(*words)
    if not task:
        keep_tiny_teacher(home / "teacher", config)
        task = open_task(config, home / "teacher")
    teacher, world = task.teacher, rank_and_world()[1]
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(student_config(teacher.config, hidden_size))
    large, small = teacher.num_parameters(), student.num_parameters()
    width, tokens = values.hidden_size, config.batch_size * config.seq_len
    learn = len(projected_matrices(teacher)) * width * hidden_size
    # Weights, made ones with gradients, activations; 16 bytes for what learns; logits; Python.
    aligned = sum(teacher.get_submodule(name).out_features for name in aligned_modules(teacher))
    memory = 0.7 * 2**30 + teacher.dtype.itemsize * (large + 2 * small + 3 * tokens * aligned)
    memory += 16 * (learn + tokens_at_once(teacher.lm_head.weight) * values.vocab_size)
    say("teacher", f"{config.model or 'tiny'}: {teacher.config.model_type}, {large:,} parameters")
    say("student", f"width {width} -> {hidden_size}, {small:,} parameters, {learn:,} learn")
    total = tokens * config.steps * config.grad_accum * world
    say("training", f"{config.steps:,} steps, {total:,} tokens of {config.data or 'its lines'}")
    say("machine", f"{world} x {teacher.device}, {teacher.dtype}; ~{memory / 2**30:.1f} GiB each")
    calibration = calibrate(teacher, task.calibration, hidden_size, config.importance)
    trust = f"{calibration.overlap:.0%} of the channels (chance: {hidden_size / width:.0%})"
    say("calibration", f"the two halves of {len(task.calibration)} samples agree on {trust}")
    return task, calibration

def train_student(config, task, calibration, teacher_row):
    """One student, from its start or its last checkpoint, to its summary, a dict; all in --out."""
    folder, leads = Path(config.out), rank_and_world()[0] == 0
    teacher, hidden_size, method = task.teacher, len(calibration.channels), config.methods[0]
    student = new_student(method, teacher, hidden_size, calibration, config.seed)
    for parameter in student.parameters() if rank_and_world()[1] > 1 else ():
        torch.distributed.broadcast(parameter.data, 0)  # GPUs may differ in the last digit
    if method == "red":
        found = {"statistic": config.importance, "halves_agree": calibration.overlap}
        found |= {name: getattr(calibration, name).tolist() for name in ("channels", "importance")}
        write(folder / "selection.json", found)
    optimizer = torch.optim.Adam(student.parameters(), fused=True)
    first, position = load_checkpoint(folder / "checkpoints", student, optimizer)
    metrics, noted = folder / "metrics.jsonl", []
    lines = metrics.read_text().splitlines()[: first + 1] if first else []  # the rest comes again
    history = [json.loads(line) for line in lines]
    gather()
    write(metrics, "\n".join([*lines, ""]))
    def log(record, measure):
        if measure:
            with torch.no_grad():
                student.make_weights()
            record["held_out"] = evaluate(student.model, task.held_out)
            values = singular_values(student).mean(0)[[0, hidden_size // 2, -1]]
            record["singular_values"] = values.tolist()  # largest, middle, smallest
        history.append(record)
        if leads:
            with open(metrics, "a") as file:
                file.write(json.dumps(record) + "\n")
    def after_step(record, position):
        step = record["step"]
        due = {n: n and (step == config.steps or step % n == 0) for n in periods}
        log(record, due[config.measure_every])
        stop = torch.tensor(len(noted))
        add_up(stop)  # all processes stop together
        if stop or due[config.save_every]:
            save_checkpoint(folder / "checkpoints", step, student, optimizer, position)
        if stop:
            raise KeyboardInterrupt
    def note(number, frame):  # a first signal ends the run after its step, a second at once
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)
    periods = (config.measure_every, config.save_every)
    if not history:
        log({"step": 0, "tokens": 0}, True)
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        distill(
            teacher, student, ahead(task.stream(position)), config.steps, config.learning_rate[0],
            config.temperature[0], config.alpha,
            calibration.scales if config.alignment == "relative" else None, config.orthogonality,
            config.grad_accum, optimizer, first, after_step, folder.name)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if leads:
        with replacing(folder / "student") as fresh:
            student.export(fresh, task.tokenizer)
            (fresh / "README.md").write_text(model_card(config, history[-1]["tokens"]))
    gather()
    # What is measured is what was written: the checkpoint, opened as anyone would open it.
    exported, _ = load_teacher(str(folder / "student"), None, teacher.dtype, teacher.device)
    summary = {
        "method": method, "temperature": config.temperature[0], "tokens": history[-1]["tokens"],
        "learning_rate": config.learning_rate[0],
        "skipped": sum(record.get("skipped", False) for record in history),
        "singular_spread": singular_values(student).std(1, correction=0).mean().item(),
        "curve": [{name: record[name] for name in ("step", "held_out", "singular_values")}
                  for record in history if "held_out" in record],
        "teacher": teacher_row, **measured(exported, task, folder)}
    write(folder / "summary.json", summary)
    return summary

def measured(model, task, folder, name="gsm8k.jsonl"):
    """Everything that is measured on a finished model, a dict; GSM8K's answers go to a file."""
    result = evaluate(model, task.held_out) | task.measure(model)
    result |= {"hidden_size": model.config.hidden_size, "parameters": model.num_parameters()}
    if problems := result.pop("problems", None):
        write(folder / name, "".join(json.dumps(problem) + "\n" for problem in problems))
    return result

def table(rows):
    """Summaries, label -> list of dicts (one a seed), as text: the mean, and ± the deviation."""
    def cells(row):
        yield "parameters", "{:,.2f}M", row["parameters"] / 1e6
        yield "held-out loss", "{:.3f}", row["loss"]
        for key in sorted(row.keys() & {"recall", "strict", "flexible"}):
            yield key, "{:.0%}", row[key]
        for steps, score in zip(TINY_STEPS, row.get("chains", ())):
            yield f"{steps} step{'s' * (steps > 1)}", "{:.0%}", score
        yield "spread", "{:.2f}", row.get("singular_spread", 0.0)
        yield "similarity", "{:.2f}", statistics.fmean(row["similarity"])
        for block in sorted({max(1, round(len(row["erank"]) * part / 6)) for part in range(1, 7)}):
            yield f"eRank {block}", "{:.0f}", row["erank"][block - 1]
    lines = [["", *(title for title, _, _ in cells(next(iter(rows.values()))[0]))]]
    for label, several in rows.items():
        lines.append([label])
        for same in zip(*map(cells, several)):
            form, values = same[0][1].format, [value for _, _, value in same]
            spread = f"±{form(statistics.stdev(values))}" if len(set(values)) > 1 else ""
            lines[-1].append(form(statistics.fmean(values)) + spread)
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line) for line in padded)

STYLES = dict(zip(("teacher", *METHODS), ("k*", "C0o", "C3s", "C2^", "C4D", "C1v")))

def picture(rows, path):
    """Draw rows, as of `table`, to a file: a line for each seed (§4, Tables 6, 7)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say("picture", f"{path} needs matplotlib: pip install matplotlib, and this again")
    def over_steps(what, value):
        return what, "training step", lambda row: [
            (point["step"], value(point)) for point in row.get("curve", ())]
    panels = [  # what is drawn, over what, and a row's points
        over_steps("held-out loss, nats per token", lambda point: point["held_out"]["loss"]),
        ("effective rank", "layer", lambda row: list(enumerate(row["erank_normalised"], 1))),
        over_steps("effective rank, mean of the layers",
                   lambda point: statistics.fmean(point["held_out"]["erank_normalised"])),
        over_steps("largest and smallest singular value of projections, over the mean",
                   lambda point: point["singular_values"][::2])]
    if "chains" in rows["teacher"][0]:
        panels[0] = ("accuracy", "steps of reasoning (0: recall)",
                     lambda row: list(enumerate((row["recall"], *row["chains"]))))
    figure = Figure(figsize=(12, 9), layout="constrained")
    for axes, (what, over, points) in zip(figure.subplots(2, 2).flat, panels):
        for label, several in reversed(rows.items()):  # the teacher last, on top
            style = STYLES[label.partition("-T")[0]] + (":" if "-T" in label else "-")
            for seed, row in enumerate(several):
                if drawn := points(row):  # the teacher has none from training
                    axes.plot(*zip(*drawn), style, label="" if seed else label)
        axes.set(title=what, xlabel=over)
        axes.xaxis.get_major_locator().set_params(integer=True)
    names = figure.axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=len(rows), reverse=True)
    figure.savefig(path)

def train_all(config, out):
    """Every method with every seed: label -> list of summaries, the teacher's first."""
    cells, seeds = {}, range(config.seed, config.seed + config.seeds)
    homes = {seed: out / f"seed-{seed}" if config.seeds > 1 else out for seed in seeds}
    for seed in seeds:
        for method, heat, rate in zip(config.methods, config.temperature, config.learning_rate):
            label = f"{method}-T{heat:g}" if (seed, method) in cells else method
            own = {"methods": [method], "temperature": [heat], "learning_rate": [rate]}
            place = str(homes[seed] / label if len(config.methods) > 1 else homes[seed])
            cells[seed, label] = dataclasses.replace(config, seed=seed, out=place, **own)
    if many := len(cells) > 1:
        claim(config, shared=True)
    done = [(cell, Path(own.out) / "summary.json") for cell, own in cells.items() if claim(own)]
    done = {cell: json.loads(path.read_text()) for cell, path in done}
    folders = [(config, True)] * many + [(own,) for cell, own in cells.items() if cell not in done]
    for seed in seeds:
        todo = {cell: own for cell, own in cells.items() if cell[0] == seed and cell not in done}
        if todo:
            task = None  # an earlier seed's teacher may go
            task, calibration = set_up(next(iter(todo.values())), homes[seed], folders)
            folders = []
            teacher = measured(task.teacher, task, homes[seed], "gsm8k-teacher.jsonl")
        for cell, own in todo.items():
            done[cell] = train_student(own, task, calibration, teacher)
            say("student", f"{cell[1]}: held-out loss {done[cell]['loss']:.3f} -> {own.out}")
    rows = {label: [done[seed, label] for seed in seeds] for _, label in cells}
    rows = {"teacher": [row["teacher"] for row in next(iter(rows.values()))]} | rows
    if many:
        write(out / "summary.json", rows)
    return rows

def measure_checkpoints(config, out):
    """--eval-only: the checkpoint, and before it --model where that is given: name -> [summary]."""
    rows, files = {}, {config.model: "gsm8k-teacher.jsonl", config.eval_only: "gsm8k.jsonl"}
    if claim(config):
        return json.loads((out / "summary.json").read_text())
    for name in filter(None, files):
        task = None  # one model at a time
        task = open_task(config, name)
        gather()
        if not rows and rank_and_world()[0] == 0:
            prepare(config)
        rows[name] = [measured(task.teacher, task, out, files[name])]
    write(out / "summary.json", rows)
    return rows

def run(config):
    """Everything that one command line asks for (§6)."""
    if config.benchmark or config.benchmark_config:
        return benchmark(config)
    resolve_device(config)
    rows = (measure_checkpoints if config.eval_only else train_all)(config, Path(config.out))
    if rank_and_world()[0] == 0:
        print("\n" + table(rows))
        if len(rows) > 2:
            picture(rows, Path(config.out) / "compare.png")
    for label, (row, *_) in rows.items():
        if example := row.get("example"):
            say(label, f"{example['prompt']}{example['answer']}")
    for label, (row, *_) in rows.items():
        curve = row.get("curve", [])
        for point in curve[:: max(1, len(curve) // 4)]:
            rank, values = point["held_out"]["erank_normalised"], point["singular_values"]
            text = f"step {point['step']}: mean eRank {statistics.fmean(rank):.0f}, singular values"
            say(label, f"{text} {values[2]:.2f} to {values[0]:.2f}")

# ==== Benchmark ===============================================================================
# The step against its floor, the work that no such distillation can avoid, done by plain models:
# in one process and in turns, because machines are noisy.

def benchmark_work(config, alone=None):
    """The device; `step`, which distils for some steps; `floor`, an iterator that does at each turn
    the teacher's forward, and an ordinary student's with plain cross-entropy and its backward.
    alone: do one of both, twice, and return the peak memory of this process, in bytes."""
    device, dtype = resolve_device(config)
    if config.benchmark_config:
        values = AutoConfig.for_model(**read_config(config.benchmark_config))
        with torch.device(device):
            teacher = AutoModelForCausalLM.from_config(values, dtype=dtype)
        teacher.eval().requires_grad_(False)
    else:
        teacher, _ = load_teacher(config.model, config.revision, dtype, device)
    narrow = student_config(teacher.config, student_width(config, teacher.config))
    def batches():
        while True:
            ids = torch.randint(narrow.vocab_size, (config.batch_size, config.seq_len))
            yield {"input_ids": ids, "labels": ids}
    def step(steps, **words):
        few = [{"input_ids": next(batches())["input_ids"][:1, :16]}] * 2
        calibration = calibrate(teacher, few, narrow.hidden_size)
        student = new_student("red", teacher, narrow.hidden_size, calibration)
        words |= {"grad_accum": config.grad_accum, "scales": calibration.scales}
        distill(teacher, student, ahead(batches()), steps, 3e-4, progress="benchmark", **words)
    def floor():
        with torch.device(device):
            ordinary = AutoModelForCausalLM.from_config(narrow, dtype=dtype).eval()
        while True:
            for batch in itertools.islice(batches(), config.grad_accum):
                ids = batch["input_ids"].to(device)
                with torch.no_grad():
                    teacher(ids, use_cache=False)
                ordinary(ids, labels=ids, use_cache=False).loss.backward()
            ordinary.zero_grad()
            yield
    if alone:
        step(2) if alone == "step" else list(itertools.islice(floor(), 2))
    return peak_memory(device) if alone else (device, step, floor())

def benchmark(config, rounds=7):
    """Print time, memory and FLOPs of a step, over those of its floor."""
    times, spent, last, names = {}, {}, 0.0, ("step", "floor")
    spawn = multiprocessing.get_context("spawn")
    # A process each, and first, while this one is small: children inherit its peak.
    with concurrent.futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        memory = dict(zip(names, pool.map(benchmark_work, [config] * 2, names)))
    device, step, floor = benchmark_work(config)
    def count(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()
    def mark(part):
        nonlocal last
        if device.type != "cpu":
            torch.accelerator.synchronize()
        last, begun = time.perf_counter(), last
        spent[part] = spent.get(part, 0.0) + last - begun
    def after_step(record, position):  # the floor, in turn
        spent["step"] = sum(spent.values())
        next(floor)
        mark("floor")
        for name, seconds in spent.items():
            times.setdefault(name, []).append(seconds)
        spent.clear()
    flops = {"step": count(lambda: step(2)) - count(lambda: step(1))}
    flops["floor"] = count(lambda: next(floor))
    step(rounds + 1, mark=mark, after_step=after_step)
    times = {name: each[1:] for name, each in times.items()}  # the first warms up
    middle = {name: statistics.median(each) for name, each in times.items()}
    for name, each in times.items():
        print(f"{name:<28}{middle[name]:9.3f} s  ({min(each):.3f} to {max(each):.3f})")
    speed = config.batch_size * config.seq_len * config.grad_accum / middle["step"]
    step, floor = (memory[name] / 2**30 for name in ("step", "floor"))
    print(f"{speed:,.0f} tokens a second; peak memory {step:.2f} GiB, of the floor {floor:.2f} GiB")
    ratio = [each["step"] / each["floor"] for each in (middle, memory, flops)]
    print("step / floor: {:.2f} in time, {:.2f} in memory; FLOPs alone: {:.2f}".format(*ratio))

# ==== Command line ============================================================================
# One sentence and exit code 2 for what the user can mend; 1 where a run broke off.

def main(arguments=None):
    """Run one command line (a list of words; None: sys.argv) and return its exit code."""
    transformers.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()  # it would report each retry
    transformers.logging.disable_progress_bar()
    try:
        run(parse_arguments(arguments))
        if rank_and_world()[1] > 1:  # its threads must not outlive Python
            torch.distributed.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        code, text = 130, "interrupted; the same command goes on (without --overwrite)."
    except UserError as error:
        code, text = 2, str(error)
    except torch.OutOfMemoryError:
        code, text = 1, "out of memory; try a smaller --batch-size or --seq-len."
    except (FloatingPointError, OSError, safetensors.SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and rank_and_world()[1] == 1:
            raise  # with several, it is how torch.distributed says that another process is gone
        code, text = 1, f"{first_line(error)}; what was saved is kept, the same command goes on."
    if int(os.environ.get("RANK", 0)):
        time.sleep(5)  # the first process says it, and torchrun then ends this one
    print(f"red.py: {text}", file=sys.stderr)
    return code

if __name__ == "__main__":
    sys.exit(main())
