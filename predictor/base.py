"""AttentionPredictor: the interface of predictors, networks or rules that rank the blocks the next token attends to.

One predictor serves every layer and head. It does not read past score rows, but a *state* per block that each new row
updates. `predictor/history.py` keeps the state of a growing sequence.

Suffixes: B sequences, G KV heads, R history rows (oldest first), S chosen rows among them, N blocks, C
state channels.
"""

from __future__ import annotations

import importlib
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from attention_predictor.errors import CheckpointError, ConfigError
from attention_predictor.predictor import checkpoint
from attention_predictor.predictor.prompt_rows import PROMPT_ROWS

WEIGHTS = Path(__file__).parent / "weights"  # checkpoints shipped with the package, by name

ARCHITECTURES: dict[str, type[AttentionPredictor]] = {}
Class = TypeVar("Class", bound="type[AttentionPredictor]")


def register(cls: Class) -> Class:
    """Make an architecture loadable by its `arch` name."""
    ARCHITECTURES[cls.arch] = cls
    return cls


def architectures() -> dict[str, type[AttentionPredictor]]:
    """All architectures by name, independent of the order of imports."""
    importlib.import_module("attention_predictor.predictor.model")  # registers them
    return ARCHITECTURES


def architecture(name: str) -> type[AttentionPredictor]:
    """The class with this architecture name; ConfigError with the valid names for any other."""
    known = architectures()
    if name not in known:
        raise ConfigError(f"arch={name!r} is not a predictor; choose from {', '.join(sorted(known))}")
    return known[name]


class AttentionPredictor(nn.Module):
    """Interface of all predictors. Score rows are in [0, 1] (`scores.block_scores`); missing history is zero."""

    arch: ClassVar[str]
    rows: ClassVar[int] = PROMPT_ROWS  # how many of the last prompt rows `start` uses
    channels: ClassVar[int]  # C
    state_dtype: ClassVar[torch.dtype] = torch.float32
    learned: ClassVar[bool] = True  # False: a fixed rule, loadable by name without any file
    gives_logits: ClassVar[bool] = False  # its scores are logits, not on the scale of score rows

    def __init__(self, *, block_size: int = 16):
        super().__init__()
        self.block_size = block_size  # tokens; a learned predictor is valid only for the size it was trained on
        self.training_facts: dict[str, Any] = {}

    def start(self, rows_BGRN: Tensor) -> Tensor:
        """State after the prompt, state_BGNC, from its last R score rows, of which it uses the last `rows`."""
        raise NotImplementedError

    def observe(self, state_BGNC: Tensor, row_BGN: Tensor) -> Tensor:
        """Update the state with one more score row, in place; returns the same tensor."""
        raise NotImplementedError

    def forward(self, state_BGNC: Tensor, candidate_BN: Tensor | None = None) -> Tensor:
        """The next token's scores, scores_BGN in fp32, on any scale: only their order within a row matters.

        `candidate_BN`, bool: the contiguous blocks to score, as if there were no others; results elsewhere are
        undefined. `None`: all blocks.
        """
        raise NotImplementedError

    def unroll(self, rows_BGRN: Tensor, steps_S: Tensor) -> Tensor:
        """States after each of the rows `steps_S` (ascending), state_BGSNC, starting from row 0."""
        wanted = set(steps_S.tolist())
        state_BGNC = self.start(rows_BGRN[:, :, :1])
        states = [state_BGNC.clone()] if 0 in wanted else []
        for step in range(1, max(wanted) + 1):
            state_BGNC = self.observe(state_BGNC, rows_BGRN[:, :, step])
            if step in wanted:
                states.append(state_BGNC.clone())
        return torch.stack(states, dim=2)

    def describe(self) -> dict[str, Any]:
        """The content of `config.json`, training facts included."""
        return {
            "arch": self.arch,
            "block_size": self.block_size,
            "rows": self.rows,
            "parameters": sum(p.numel() for p in self.parameters()),
            "training": dict(self.training_facts),
        }

    def save(self, directory: str | PathLike[str]) -> None:
        """Write `model.safetensors` and `config.json` into `directory`; overwrites existing ones."""
        checkpoint.write(Path(directory), self.describe(), self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str],
        device: torch.device | str | None = None,
        *,
        block_size: int = 16,
    ) -> AttentionPredictor:
        """Load "default", a rule by name ("last", "ema", "mean"), or a directory that `save` wrote.

        Names take precedence over directories of the same name (write "./last" for those). The result is in
        evaluation mode and must have been trained for `block_size`. A bad file raises CheckpointError with one line
        that names the file, what was found and what is allowed.
        """
        known = architectures()
        named = known.get(str(name_or_path)) if isinstance(name_or_path, str) else None
        if named is not None and not named.learned:
            predictor = named(block_size=block_size)
        else:
            directory = WEIGHTS / "default" if name_or_path == "default" else Path(name_or_path)
            if not directory.is_dir():
                rules = sorted(name for name, entry in known.items() if not entry.learned)
                raise CheckpointError(
                    f"{directory}: no such checkpoint; allowed: a directory with "
                    f"{checkpoint.WEIGHTS_FILE} and {checkpoint.CONFIG_FILE}, 'default' (where its weights "
                    f"are installed), {', '.join(rules)}"
                )
            config = checkpoint.read_config(directory, known, block_size)
            predictor = known[config["arch"]](block_size=block_size)
            checkpoint.check_rows(directory, config, predictor.rows)
            predictor.load_state_dict(checkpoint.read_tensors(directory, predictor.state_dict()))
            predictor.training_facts = dict(config.get("training") or {})
        if not isinstance(predictor, cls):
            raise CheckpointError(f"{name_or_path}: arch is {predictor.arch!r}, expected {cls.arch!r}")
        return predictor.to(device).eval()

    @classmethod
    def from_upstream(
        cls, path: str | PathLike[str], device: torch.device | str | None = None, *, block_size: int = 16
    ) -> AttentionPredictor:
        """Load weights in the form that the method's authors publish (`best_model.pth`): the "paper" architecture.

        The file is a pickled state-dict with `conv1.weight` [16, 1, 3, 3] to `conv3.bias` [1]; only tensors are
        unpickled. CheckpointError names missing and unexpected keys, or another fault.
        """
        predictor = architecture("paper")(block_size=block_size)
        predictor.load_state_dict(checkpoint.read_upstream(Path(path), predictor.state_dict()))
        predictor.training_facts = {"upstream": Path(path).name}
        if not isinstance(predictor, cls):
            raise CheckpointError(f"{path}: arch is {predictor.arch!r}, expected {cls.arch!r}")
        return predictor.to(device).eval()
