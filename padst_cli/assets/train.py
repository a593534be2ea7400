"""Train the embedded checkpoint: `python -m padst_cli.assets.train --output DIR`.

A byte-level BPE and a small GPT-2 (4 layers, hidden 256, context 256, 2048 tokens) are trained on the train split of
`python-source`. The run is bounded by steps or by minutes; the learning rate follows the share of that bound that is
used up, so that it reaches zero at the end on any machine. DIR always holds the best checkpoint so far, whole, and
beside it in `DIR-state` what an interrupted run goes on from when the same command is given again.

Where other work shares the cores, set OMP_WAIT_POLICY=PASSIVE: threads that spin at barriers made this run four times
slower on two busy cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from padst_cli.data.corpus import python_source
from padst_cli.data.items import TokenWindows, collate, step_indices

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 256
LAYERS = 4
HIDDEN = 256
HEADS = 4
STEPS = 4000

log = logging.getLogger("padst.assets.train")


@dataclass
class Progress:
    """What a run has behind it; saved with every state, so that a resumed run counts on from it."""

    steps: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0


def train_tokenizer(documents: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens, whose one special token begins, ends and separates documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    return with_special_tokens(tokenizer)


def with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers saves and loads it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(separator: int) -> GPT2LMHeadModel:
    """The untrained network. `gelu_pytorch_tanh` is GPT-2's own activation computed by one fused operation."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=separator,
        eos_token_id=separator,
    )
    return GPT2LMHeadModel(config)


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay, biases and norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def rate_at(share: float, peak: float, warmup: float) -> float:
    """Linear warm-up to `peak`, then a cosine to zero, over the used-up share (0 to 1) of the run."""
    if share < warmup:
        return peak * share / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (share - warmup) / (1.0 - warmup))))


@torch.inference_mode()
def held_out_loss(
    model: torch.nn.Module, windows: TokenWindows, device: torch.device, limit: int | None = None
) -> float:
    """Mean cross-entropy (nats a token) over at most `limit` evenly spread windows, each begun without context."""
    count = len(windows) if limit is None else min(limit, len(windows))
    chosen = [index * len(windows) // count for index in range(count)]
    model.eval()
    total = 0.0
    for start in range(0, count, 16):
        batch = collate([windows[index] for index in chosen[start : start + 16]])["input_ids"].to(device)
        total += model(input_ids=batch, labels=batch).loss.item() * batch.shape[0]
    model.train()
    return total / count


def _replace_folder(temporary: Path, target: Path) -> None:
    """Put a finished folder in the place of an older one; a kill in between leaves a whole one, old or new."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    shutil.rmtree(old, ignore_errors=True)


def _recover(target: Path) -> None:
    """Undo a replacement that a kill cut short between its two renames."""
    old = target.with_name(target.name + ".old")
    if old.exists() and not target.exists():
        os.rename(old, target)


def _empty_beside(target: Path) -> Path:
    temporary = target.with_name(target.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def save_checkpoint(
    output: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, facts: dict[str, object]
) -> None:
    """Write the fp16 checkpoint, its tokenizer and `training.json` as one whole folder."""
    temporary = _empty_beside(output)
    halved = GPT2LMHeadModel(model.config).to(torch.float16)
    halved.load_state_dict(model.state_dict())
    halved.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for file in temporary.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone, and an installed package is read by others
    _replace_folder(temporary, output)


class Run:
    """One training run: what it holds on to between steps, and where it stands."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.output: Path = arguments.output
        self.state = self.output.with_name(self.output.name + "-state")
        for folder in (self.output, self.state):
            _recover(folder)
        set_seed(arguments.seed)
        self.corpora = {"train": python_source("train"), "heldout": python_source("heldout")}
        self.tokenizer = self._tokenizer()
        self.train = TokenWindows.from_corpus(self.corpora["train"], self.tokenizer, CONTEXT)
        self.heldout = TokenWindows.from_corpus(self.corpora["heldout"], self.tokenizer, CONTEXT)
        self.accelerator = Accelerator(cpu=arguments.device == "cpu", mixed_precision=_precision(arguments.device))
        model = new_model(self.tokenizer.eos_token_id)
        optimizer = torch.optim.AdamW(
            decay_groups(model, arguments.weight_decay), lr=arguments.learning_rate, betas=(0.9, 0.95), fused=True
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.progress = Progress()
        if (self.state / "progress.json").is_file():
            self.accelerator.load_state(str(self.state))
            self.progress = Progress(**json.loads((self.state / "progress.json").read_text(encoding="utf-8")))
            log.info("resumed after %d steps", self.progress.steps)

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        if (self.state / "tokenizer.json").is_file():
            return with_special_tokens(Tokenizer.from_file(str(self.state / "tokenizer.json")))
        return train_tokenizer(self.corpora["train"].documents)

    def share(self) -> float:
        """How much of the run is used up, 0 to 1."""
        if self.arguments.minutes is not None:
            return min(1.0, self.progress.seconds / (60.0 * self.arguments.minutes))
        return min(1.0, self.progress.steps / self.arguments.steps)

    def step(self) -> Tensor:
        """One optimizer step on the batch that the step's number names; the detached loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.share(), self.arguments.learning_rate, self.arguments.warmup)
        chosen = step_indices(len(self.train), self.arguments.batch_size, self.arguments.seed, self.progress.steps)
        batch = collate([self.train[index] for index in chosen])["input_ids"].to(self.accelerator.device)
        loss = self.model(input_ids=batch, labels=batch).loss
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.steps += 1
        return loss.detach()

    def facts(self, loss: float, windows: int) -> dict[str, object]:
        """The content of `training.json`."""
        flags = (
            f"--steps {self.arguments.steps}"
            if self.arguments.minutes is None
            else f"--minutes {self.arguments.minutes:g}"
        )
        return {
            "command": f"python -m padst_cli.assets.train --output DIR {flags}",
            "data": "python-source",
            "python": platform.python_version(),
            "digest": {split: corpus.digest for split, corpus in self.corpora.items()},
            "steps": self.progress.steps,
            "batch_size": self.arguments.batch_size,
            "learning_rate": self.arguments.learning_rate,
            "tokens": self.progress.steps * self.arguments.batch_size * CONTEXT,
            "train_split_tokens": self.train.stream.numel(),
            "minutes": round(self.progress.seconds / 60.0, 1),
            "heldout_loss": round(loss, 4),
            "heldout_perplexity": round(math.exp(loss), 3),
            "heldout_windows": windows,
            "context": CONTEXT,
        }

    def evaluate_and_save(self, limit: int | None) -> float:
        """Held-out loss now; keeps the checkpoint where it is the best so far, and always the state to go on from."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        loss = held_out_loss(unwrapped, self.heldout, self.accelerator.device, limit)
        windows = len(self.heldout) if limit is None else min(limit, len(self.heldout))
        # The last evaluation sees other windows than those in between, so it does not compare with them: the run is
        # annealed by then and its end is taken.
        if limit is None or loss < self.progress.best:
            self.progress.best, self.progress.best_step = loss, self.progress.steps
            save_checkpoint(self.output, unwrapped, self.tokenizer, self.facts(loss, windows))
        temporary = _empty_beside(self.state)
        self.accelerator.save_state(str(temporary))
        self.tokenizer.save_pretrained(temporary)
        (temporary / "progress.json").write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
        _replace_folder(temporary, self.state)
        return loss

    def go(self) -> None:
        """Train to the bound, evaluating and saving every few minutes; at the end on the whole held-out split."""
        arguments = self.arguments
        log.info(
            "%.2fM parameters; %.2fM train tokens; %.0fk held-out tokens",
            sum(parameter.numel() for parameter in self.model.parameters()) / 1e6,
            self.train.stream.numel() / 1e6,
            self.heldout.stream.numel() / 1e3,
        )
        recent: list[Tensor] = []
        last_save = time.monotonic()
        while self.share() < 1.0:
            started = time.monotonic()
            recent.append(self.step())
            self.progress.seconds += time.monotonic() - started
            if self.progress.steps % arguments.log_every == 0:
                self._report(float(torch.stack(recent).mean()))
                recent.clear()
            if time.monotonic() - last_save > 60.0 * arguments.save_minutes:
                started = time.monotonic()
                loss = self.evaluate_and_save(arguments.heldout_windows)
                last_save = time.monotonic()
                self.progress.seconds += last_save - started
                log.info("step %d  held-out loss %.4f  perplexity %.3f", self.progress.steps, loss, math.exp(loss))
        loss = self.evaluate_and_save(None)
        log.info(
            "done: %d steps, whole held-out split: loss %.4f, perplexity %.3f",
            self.progress.steps,
            loss,
            math.exp(loss),
        )
        shutil.rmtree(self.state)

    def _report(self, loss: float) -> None:
        tokens = self.progress.steps * self.arguments.batch_size * CONTEXT
        log.info(
            "step %d  loss %.4f  rate %.2e  %.1f%%  %.0f tokens/s",
            self.progress.steps,
            loss,
            self.optimizer.param_groups[0]["lr"],
            100.0 * self.share(),
            tokens / self.progress.seconds,
        )


def _precision(device: str) -> str:
    return "bf16" if device != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m padst_cli.assets.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint; an older one is replaced")
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument("--steps", type=int, default=STEPS, help="optimizer steps; the default made the shipped one")
    bound.add_argument("--minutes", type=float, help="bound the run by time instead")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice without it")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=float, default=0.03, help="share of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--heldout-windows", type=int, default=64, help="windows of the evaluations in between")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    arguments = _arguments(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    Run(arguments).go()


if __name__ == "__main__":
    main()
