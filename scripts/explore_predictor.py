"""Compare what a predictor could be shown, trained for and made of: same recording, same steps, same seed for each.

Every variant is a small network on top of exponential averages and held peaks of the rows, whose decays are fixed, so
that they are computed once. A variant changes one thing; the table says what it is worth. Variants that share between
heads or layers show what an architecture could gain, before anyone builds it.

The table gives recovery relative to the best choice of that size on held-out documents: of the next step's mass, and
ahead, where each block counts with its largest mass of the next 24 steps. Answers hang on rarer things, looks: steps at
which a head puts more than 0.3 of its mass on one block, and put less than 0.1 there the step before. The last column
of each kind is the share of them whose block was chosen. Documents with continuations (questions) and plain text have
columns of their own.

example:
  python scripts/explore_predictor.py --data runs/histories --steps 600 --out runs/explored.json

Suffixes: X KV heads of all layers, L layers, G KV heads of a layer, S chosen steps, A steps ahead of one, N blocks, C
channels, H hidden channels.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attention_predictor.predictor.filters import FilterPredictor, exponential_averages, held_peaks
from attention_predictor.predictor.scores import recovery
from attention_predictor.train.dataset import HistoryDataset
from attention_predictor.train.fit import schedule
from attention_predictor.train.objective import prediction_loss
from attention_predictor.train.shards import Recording
from attention_predictor.train.validate import BUDGETS, WARM, attended, candidates, room
from attention_predictor.writing import why_not_writable

BLOCK = 16
COLUMNS = ("next", "ahead", "looks")
HORIZON = 24
SPAN = {"next": 1, "mean 24": HORIZON, "max 8": 8, "max 24": HORIZON, "next + max 24": HORIZON}
LOOK, ELSEWHERE = 0.3, 0.1  # mass on a block when a head looks at it, and when it doesn't
SEQUENCES = 3  # of a document that are learned from
SCALE = FilterPredictor()  # for its logarithm and its drops
HALF_LIFE_F = 0.5 * 2 ** torch.linspace(0, 8, 16)
LOG, SQRT, LAST, PEAKS = range(16), range(16, 32), [32], range(33, 38)  # channels that are computed
SHIPPED = (*LOG[1::2], *LAST, *PEAKS)
FEW = [3, 7, 11, 32, 35]  # averages of about 1, 4 and 21 steps, the last row, a peak: shared between heads


@dataclass
class Moments:
    """Some steps of one sequence, all heads: states, mass of the next steps and of the step itself, tokens so far."""

    state_XSNC: Tensor
    mass_XSAN: Tensor
    now_XSN: Tensor
    tokens_S: list[int]
    kv_heads: int
    is_text: bool


@dataclass(frozen=True)
class Variant:
    """What differs from the first one."""

    name: str
    channels: tuple[int, ...] = SHIPPED
    extra: Callable[[Tensor, Moments, int], Tensor] | None = None
    target: str = "max 24"
    loss: str = "ce"
    weight: str = "peak"  # of the target, or the "root" of its sum, or "none"
    kernel: int = 3
    hidden: int = 32
    layers: int = 3  # further convolutions, each 3 blocks wide
    gated: bool = False  # hidden channels scaled by what a head's blocks have in common
    named: bool = False  # a learned vector for each head of the model: no predictor for other models, but a bound
    true_rows: bool = False  # histories are the truth, not what sparse decoding knows
    rate: float = 1e-2


def of_the_layer(state_XNC: Tensor, moments: Moments, step: int) -> Tensor:
    """The largest value among the layer's KV heads."""
    few_LGNC = _of_layers(state_XNC[..., FEW], moments)
    return few_LGNC.amax(1, keepdim=True).expand_as(few_LGNC).flatten(0, 1)


def of_the_layer_before(state_XNC: Tensor, moments: Moments, step: int) -> Tensor:
    """The largest value among the KV heads of the layer below."""
    few_LGNC = _of_layers(state_XNC[..., FEW], moments)
    below_LGNC = torch.cat([torch.zeros_like(few_LGNC[:1]), few_LGNC[:-1]])
    return below_LGNC.amax(1, keepdim=True).expand_as(few_LGNC).flatten(0, 1)


def of_all(state_XNC: Tensor, moments: Moments, step: int) -> Tensor:
    """Mean and largest value over all heads of all layers."""
    few = state_XNC[..., FEW]
    return torch.cat([few.mean(0, keepdim=True).expand_as(few), few.amax(0, keepdim=True).expand_as(few)], -1)


def true_mass(state_XNC: Tensor, moments: Moments, step: int) -> Tensor:
    """The step's true mass of each block: more than sums of attended blocks beside their peaks could tell."""
    return SCALE.log_scale(moments.now_XSN[:, step].float())[..., None]


def position(state_XNC: Tensor, moments: Moments, step: int) -> Tensor:
    """Distance to the end (its logarithm), which is a block's age, and place in the sequence."""
    X, N, _ = state_XNC.shape
    block_N = torch.arange(N)
    age_N = torch.log2((moments.tokens_S[step] / BLOCK - block_N).clamp_min(1)) / 16
    return torch.stack([age_N, block_N / N], -1).expand(X, N, 2)


def _of_layers(x_XNC: Tensor, moments: Moments) -> Tensor:
    return x_XNC.unflatten(0, (-1, moments.kv_heads))


VARIANTS = (
    Variant("as shipped: 8 averages of logarithms, last row, 5 peaks; max of 24; cross-entropy, by the peak; 9 blocks"),
    Variant("target: next", target="next"),
    Variant("target: mean of 24", target="mean 24"),
    Variant("target: max of 8", target="max 8"),
    Variant("target: next + max of 24", target="next + max 24"),
    Variant("loss: by the root of the mass", weight="root"),
    Variant("loss: heads all weigh the same", weight="none"),
    Variant("loss: squared error of shares", loss="mse"),
    Variant("histories: true rows", true_rows=True),
    Variant("channels: last row alone", channels=tuple(LAST)),
    Variant("channels: without peaks", channels=(*LOG[1::2], *LAST)),
    Variant("channels: peaks and last row alone", channels=(*LAST, *PEAKS)),
    Variant("channels: 4 averages", channels=(*LOG[1::4], *LAST, *PEAKS)),
    Variant("channels: 16 averages", channels=(*LOG, *LAST, *PEAKS)),
    Variant("channels: 16 averages, and 16 of square roots", channels=(*LOG, *SQRT, *LAST, *PEAKS)),
    Variant("channels: with distance, age, place", extra=position),
    Variant("channels: with block sums, even true ones", extra=true_mass),
    Variant("channels: with the layer's other heads", extra=of_the_layer),
    Variant("channels: with the layer before", extra=of_the_layer_before),
    Variant("channels: with all heads of all layers", extra=of_all),
    Variant("context: 1 block", kernel=1, layers=0),
    Variant("context: 3 blocks", layers=0),
    Variant("context: 5 blocks, 1 further convolution", layers=1),
    Variant("context: 7 blocks, 2 further convolutions", layers=2),
    Variant("context: 9 blocks, a single convolution", kernel=9, layers=0),
    Variant("size: 128 hidden", hidden=128, rate=4e-3),
    Variant("gates from what a head's blocks have in common", gated=True),
    Variant("a vector for each head of the model", named=True),
    Variant("all heads, gates, 128 hidden", extra=of_all, gated=True, hidden=128, rate=4e-3),
)


class Network(nn.Module):
    """Convolutions over blocks."""

    def __init__(self, variant: Variant, channels: int, heads: int) -> None:
        super().__init__()
        H, padding = variant.hidden, variant.kernel // 2
        self.first = nn.Conv1d(channels, H, variant.kernel, padding=padding)
        self.further = nn.ModuleList([nn.Conv1d(H, H, 3, padding=1) for _ in range(variant.layers)])
        self.last = nn.Conv1d(H, 1, 1)
        self.gate = (
            nn.Sequential(nn.Linear(2 * channels, 32), nn.ReLU(), nn.Linear(32, 2 * H)) if variant.gated else None
        )
        self.name = nn.Embedding(heads, 2 * H) if variant.named else None
        for gentle in (self.gate[-1] if self.gate is not None else None, self.name):
            if gentle is not None:
                nn.init.normal_(gentle.weight, std=0.01)

    def forward(self, x_XCN: Tensor) -> Tensor:
        hidden_XHN = self.first(x_XCN)
        gates_X2H = []
        if self.gate is not None:
            gates_X2H.append(self.gate(torch.cat([x_XCN.mean(-1), x_XCN.amax(-1)], -1)))
        if self.name is not None:
            gates_X2H.append(self.name.weight[: len(x_XCN)])
        for gate_X2H in gates_X2H:
            scale_XH, shift_XH = gate_X2H.chunk(2, -1)
            hidden_XHN = hidden_XHN * (1 + scale_XH[..., None]) + shift_XH[..., None]
        hidden_XHN = hidden_XHN.relu()
        for convolution in self.further:
            hidden_XHN = hidden_XHN + convolution(hidden_XHN).relu()
        return self.last(hidden_XHN)[:, 0]


def states(rows_XQN: Tensor, steps: list[int]) -> Tensor:
    """All channels after each of the steps, state_XSNC."""
    log_XQN = SCALE.log_scale(rows_XQN)
    averages = [exponential_averages(x_XQN, 0.5 ** (1 / HALF_LIFE_F), steps) for x_XQN in (log_XQN, rows_XQN.sqrt())]
    return torch.cat([*averages, log_XQN[:, steps, :, None], held_peaks(log_XQN, SCALE.drop, steps)], -1)


@torch.no_grad()
def moments_of(
    recording: Recording, rng: random.Random, sequences: int, steps: int, true_rows: bool
) -> Iterator[Moments]:
    """Random steps of random sequences."""
    every = sorted(set(recording.sequences))
    for sequence in sorted(rng.sample(every, min(sequences, len(every)))):
        rows = [row for row, found in enumerate(recording.sequences) if found == sequence]
        mass_XQN = recording.mass_XQN[rows]
        possible = range(WARM - 1, recording.steps - 1)
        chosen = sorted(rng.sample(possible, min(steps * (1 if len(every) > 1 else SEQUENCES), len(possible))))
        shown_XQN = mass_XQN if true_rows else recording.scores_XQN[rows]
        ahead = [
            nn.functional.pad(mass_XQN[:, step + 1 :][:, :HORIZON], (0, 0, 0, HORIZON))[:, :HORIZON] for step in chosen
        ]
        yield Moments(
            states(shown_XQN.float(), chosen).half(),
            torch.stack(ahead, 1),
            mass_XQN[:, chosen],
            [recording.first_tokens + step + 1 for step in chosen],
            1 + max(recording.heads),
            len(every) == 1,
        )


def inputs(variant: Variant, moments: Moments, step: int, meta: dict) -> tuple[Tensor, int, int]:
    """The network's input x_XCN over the candidate blocks, and which blocks these are."""
    first, last = candidates(moments.tokens_S[step], meta)
    state_XNC = moments.state_XSNC[:, step].float()
    parts = [state_XNC[..., list(variant.channels)]]
    if variant.extra is not None:
        parts.append(variant.extra(state_XNC, moments, step))
    return torch.cat(parts, -1)[:, first:last].transpose(1, 2), first, last


def target(variant: Variant, mass_XAN: Tensor) -> Tensor:
    """What is predicted, of the next steps' mass."""
    mass_XAN = mass_XAN[:, : SPAN[variant.target]].float()
    if variant.target.startswith("mean"):
        return mass_XAN.mean(1)
    peak_XN = mass_XAN.amax(1)
    return peak_XN + mass_XAN[:, 0] if variant.target.startswith("next +") else peak_XN


def train(variant: Variant, training: list[Moments], meta: dict, steps: int, batch: int, seed: int) -> Network:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    x_XCN, _, _ = inputs(variant, training[0], 0, meta)
    network = Network(variant, x_XCN.shape[1], len(x_XCN))
    optimizer = torch.optim.AdamW(network.parameters(), lr=variant.rate, weight_decay=1e-4)
    for number in tqdm(range(1, steps + 1), desc=variant.name, disable=None, leave=False):
        optimizer.param_groups[0]["lr"] = variant.rate * schedule(number, steps)
        optimizer.zero_grad()
        for _ in range(batch):
            moments = rng.choice(training)
            step = rng.randrange(len(moments.tokens_S))
            x_XCN, first, last = inputs(variant, moments, step, meta)
            target_X1N = target(variant, moments.mass_XSAN[:, step])[:, None, first:last]
            scores_X1N = network(x_XCN)[:, None]
            if variant.loss == "mse":
                share_X1N = target_X1N / target_X1N.sum(-1, keepdim=True).clamp_min(1e-6)
                loss = 1e4 * (scores_X1N.softmax(-1) - share_X1N).square().mean()
            else:
                loss_X1, weight_X1 = prediction_loss(scores_X1N, target_X1N, "ce")
                if variant.weight != "peak":
                    weight_X1 = target_X1N.sum(-1).sqrt() if variant.weight == "root" else torch.ones_like(weight_X1)
                loss = (loss_X1 * weight_X1).sum() / weight_X1.sum()
            (loss / batch).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return network


@torch.no_grad()
def judge(
    scores: Callable[[Moments, int], tuple[Tensor, int, int]], held_out: list[Moments], meta: dict
) -> dict[str, float]:
    """Mean relative recovery by kind of document, span (the next step, or the largest of 24) and budget."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for moments in held_out:
        for step, tokens in enumerate(moments.tokens_S):
            scores_XN, first, last = scores(moments, step)
            mass_XAN = moments.mass_XSAN[:, step].float()
            most_X1, block_X1 = mass_XAN[:, 0, first:last].max(-1, keepdim=True)
            before_X1 = moments.now_XSN[:, step, first:last].gather(-1, block_X1)
            looks_X = ((most_X1 > LOOK) & (before_X1 < ELSEWHERE))[:, 0]
            kind = "text" if moments.is_text else "questions"
            for budget in BUDGETS:
                choice = room(tokens, meta, budget)
                if not 0 < choice < last - first:
                    continue
                chosen_XN = attended(scores_XN, choice, first, mass_XAN.shape[-1])
                for span, wanted_XN in (("next", mass_XAN[:, 0]), ("ahead", mass_XAN.amax(1))):
                    best_XN = attended(wanted_XN[:, first:last], choice, first, mass_XAN.shape[-1])
                    relative_X = recovery(wanted_XN, chosen_XN, best_XN).relative
                    found[f"{kind}, {span}, {budget}"].append(relative_X)
                is_chosen_X = chosen_XN.gather(-1, first + block_X1)[:, 0]
                found[f"{kind}, looks, {budget}"].append(is_chosen_X[looks_X].float())
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory that attnpred record wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON of the table; what is done is kept")
    parser.add_argument("--steps", type=int, default=600, help="of training, each variant (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="moments of all heads a step (%(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name holds this")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    args = parser.parse_args()
    if (reason := why_not_writable(args.out)) is not None:
        parser.error(f"--out {args.out}: can't be written: {reason}")
    dataset = HistoryDataset(args.data)

    def prepared(split: str, true_rows: bool = False) -> list[Moments]:
        every = SEQUENCES if split == "train" else 10**9
        moments = []
        for document in tqdm(dataset.documents, desc=f"states ({split})", disable=None, leave=False):
            if dataset.split(document) == split:
                rng = random.Random(document)
                moments += moments_of(dataset.load(document), rng, every, 6, true_rows)
        return moments

    training, held_out = prepared("train"), prepared("validation")
    kinds = sorted({"text" if one.is_text else "questions" for one in held_out})
    results = json.loads(args.out.read_text()) if args.out.exists() else {}

    def keep(name: str, parameters: int, found: dict[str, float]) -> None:
        results[name] = {"parameters": parameters} | found
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))
        line = [
            " / ".join(f"{found[f'{kind}, {span}, {budget}']:.3f}".lstrip("0") for budget in BUDGETS)
            for kind in kinds
            for span in COLUMNS
        ]
        print(f"| {name} | {parameters:,} | " + " | ".join(line) + " |", flush=True)

    columns = [f"{kind}, {column}" for kind in kinds for column in COLUMNS]
    print(f"| variant ({' / '.join(map(str, BUDGETS))}) | parameters | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    rules = {"last row": LAST[0], f"average of logarithms, half-life {HALF_LIFE_F[7]:.1f}": LOG[7]}
    for name, channel in rules.items():
        alone = Variant(name, channels=(channel,))

        def score(moments: Moments, step: int, variant: Variant = alone) -> tuple[Tensor, int, int]:
            x_XCN, first, last = inputs(variant, moments, step, dataset.meta)
            return x_XCN[:, 0], first, last

        keep(name, 0, judge(score, held_out, dataset.meta))
    for variant in sorted(VARIANTS, key=lambda one: one.true_rows):
        if variant.name in results or args.only not in variant.name:
            continue
        if variant.true_rows:
            training, held_out = prepared("train", True), prepared("validation", True)
        network = train(variant, training, dataset.meta, args.steps, args.batch, args.seed)

        def score(moments: Moments, step: int, variant: Variant = variant, network: Network = network):
            x_XCN, first, last = inputs(variant, moments, step, dataset.meta)
            return network(x_XCN), first, last

        keep(variant.name, sum(one.numel() for one in network.parameters()), judge(score, held_out, dataset.meta))


if __name__ == "__main__":
    main()
