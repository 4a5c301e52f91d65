"""Steps of every policy by itself: what it makes of each length, against arithmetic on the host's numbers.

The references here know lengths as whole numbers and cut their tensors to them; the policies know neither.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from capturable import Capturable, NotCapturable
from histories import predicted
from torch import Tensor

from attention_predictor import OffloadConfig
from attention_predictor.offload.attention.dense import Chunk, Terms, score_rows
from attention_predictor.offload.attention.sparse import attend_slots, score_slots
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.selection import ALWAYS, NEVER, Selection
from attention_predictor.offload.blocks.slot_table import chosen_blocks
from attention_predictor.offload.policies import LayerSpec, policy_class
from attention_predictor.offload.policies.base import Policy, Step
from attention_predictor.offload.policies.snapkv import pooled
from attention_predictor.offload.policy_names import BUILT_IN
from attention_predictor.predictor.base import AttentionPredictor
from attention_predictor.predictor.history import ScoreHistory, row_of_logits
from attention_predictor.predictor.model import WindowPredictor, architecture
from attention_predictor.predictor.scores import block_peak_and_sum

B, G, H, D, SIZE, CAPACITY = 2, 2, 4, 8, 16, 64
SMALL = {"budget": 96, "sink": 16, "recent": 16, "kernels": "none"}
CAPTURED = [name for name in BUILT_IN if name not in ("full", "oracle")]
TERMS = Terms(1.0)


def predictor_named(name: str) -> AttentionPredictor:
    if name == "time-filters":
        return AttentionPredictor.from_pretrained("default")
    torch.manual_seed(0)
    return WindowPredictor() if name == "paper" else architecture(name)()


class Layer:
    """One layer without a model: keys and queries at random, with blocks that are looked at again and again."""

    def __init__(self, policy: str, tokens: int, *, padding: tuple[int, int] | None = None, seed=0, **changes) -> None:
        generator = torch.Generator().manual_seed(seed)
        name = changes.pop("predictor", "ema")
        config = OffloadConfig(**(SMALL | {"policy": policy} | changes))
        spec = LayerSpec(config, predictor_named(name), B, G, D, torch.float32, torch.device("cpu"))
        self.policy: Policy = policy_class(policy)(spec)
        self.selection = self.policy.selection
        shape = (B, G, CAPACITY * SIZE, D)
        self.key_BGLD, self.value_BGLD = (torch.randn(shape, generator=generator) for _ in range(2))
        # Every query looks for the keys of a few blocks, others from time to time.
        topic_BGLD = torch.roll(self.key_BGLD, 40, 2)
        noise_BHLD = torch.randn((B, H, CAPACITY * SIZE, D), generator=generator)
        self.query_BHLD = 2 * topic_BGLD.repeat_interleave(H // G, 1) + noise_BHLD
        self.padding_B = None if padding is None else torch.tensor(padding)
        self.real_BL = None
        if self.padding_B is not None:
            self.real_BL = torch.arange(CAPACITY * SIZE) >= self.padding_B[:, None]
        self.length = 0
        self.prompt(tokens)

    @property
    def extent(self) -> Extent:
        return Extent(torch.full((B,), self.length), self.padding_B, CAPACITY, SIZE)

    @property
    def n_blocks(self) -> int:
        return -(-self.length // SIZE)

    def prompt(self, tokens: int) -> None:
        """Tokens that are attended to in full."""
        part = slice(self.length, self.length + tokens)
        self.length += tokens
        self.policy.reserve(CAPACITY)
        self.policy.extend(self.key_BGLD[:, :, part], self.query_BHLD[:, :, part])
        if rows := min(self.policy.prompt_rows, tokens):
            self.policy.observe_rows(self.true_rows(rows))
        self.choose_ahead()

    def true_rows(self, queries: int):
        mask_BL = None if self.real_BL is None else self.real_BL[:, : self.length]
        last_BHQD = self.query_BHLD[:, :, self.length - queries : self.length]
        terms = Terms(TERMS.scaling, mask=mask_BL)
        return score_rows(last_BHQD, self.chunks(), self.length, terms, kv_heads=G, block_size=SIZE)

    def chunks(self, query_BHQD: Tensor | None = None):
        yield Chunk(0, self.key_BGLD[:, :, : self.length], self.value_BGLD[:, :, : self.length])

    def choose_ahead(self) -> None:
        self.score_BGC = self.policy.score_next(self.extent)
        score_BGC = torch.full((B, G, CAPACITY), NEVER) if self.score_BGC is None else self.score_BGC
        score_BGC = score_BGC.masked_fill(~self.extent.begun_BC[:, None], NEVER)
        limits, unspent_BG = self.selection.limits(self.length + 1), self.policy.unspent(self.extent)
        self.chosen_BGC = chosen_blocks(limits, self.extent.next, score_BGC, unspent_BG)

    def step(self, mode=None) -> Step:
        """One token; the policy's own operations within ``mode``, if one is given."""
        policy = self.policy
        self.length += 1
        policy.advance()
        extent, token = self.extent, self.length - 1
        query_BHD, key_BGD = self.query_BHLD[:, :, token], self.key_BGLD[:, :, token]
        step = Step(query_BHD, extent, self.real_BL, TERMS, G, False, self.length, self.chunks)
        pool_BGSTD, value_BGSTD = (x.unflatten(2, (-1, SIZE)) for x in (self.key_BGLD, self.value_BGLD))
        block_BGS = torch.where(self.chosen_BGC, extent.block_C, -1)  # slot and block have the same number
        room = (extent.length_B, self.real_BL, TERMS)
        with mode if mode is not None else torch.no_grad():
            policy.append(key_BGD, query_BHD, extent)
            scores = policy.score_now(step)
        if isinstance(scores, Tensor):
            now_BGC = scores.masked_fill(~extent.begun_BC[:, None], NEVER)
            block_BGS = torch.where(
                chosen_blocks(self.selection.limits(self.length), extent, now_BGC), extent.block_C, -1
            )
        elif scores is not None:
            step.estimates = scores
            active_BHC = (block_BGS >= 0).repeat_interleave(H // G, 1)
            step.rest_BH = torch.logsumexp(scores.sum_BHC.masked_fill(active_BHC, NEVER), -1)
        step.block_BGS = block_BGS
        step.attention = attend_slots(query_BHD, pool_BGSTD, value_BGSTD, block_BGS, *room)
        with mode if mode is not None else torch.no_grad():
            policy.observe(step)
            self.score_BGC = policy.score_next(extent)
            policy.unspent(extent)
        self.choose_ahead()
        return step


# ---- what can be captured --------------------------------------------------------------------------------------------

VARIANTS = [
    *({"policy": name} for name in CAPTURED),
    *({"policy": "predictor", "predictor": name} for name in ("time-filters", "paper", "last", "mean")),
    {"policy": "predictor", "calibration": "none", "late_fetch": 0.0},
    {"policy": "predictor", "calibration": "exact", "calibration_interval": 1000, "late_fetch": 0.0},
]


@pytest.mark.parametrize("padding", [None, (0, 37)], ids=["even", "padded"])
@pytest.mark.parametrize("settings", VARIANTS, ids=lambda given: "-".join(map(str, given.values())))
def test_steps_can_be_captured(monkeypatch, settings, padding):
    """The same operations on the same shapes at every length: in and beyond the budget, at a block's first token."""
    # The sketch without kernels is the host's, which no capture holds: what a policy asks it is all the same.
    monkeypatch.setattr("attention_predictor.offload.policies.predictor.KeySketch", DeviceSketch)
    records = []
    for tokens, steps in ((70, 1), (112, 18), (300, 3)):
        layer = Layer(tokens=tokens, padding=padding, **settings)
        memory = addresses(layer.policy)
        for _ in range(steps):
            mode = Capturable()
            layer.step(Both(mode))
            records.append(mode.record)
        assert addresses(layer.policy) == memory
        layer.policy.check_integrity()
    assert all(record == records[0] for record in records[1:])
    if settings["policy"] not in ("streaming", "snapkv", "pyramidkv", "cake", "tappa"):
        assert len(records[0]) > 4


def addresses(policy: Policy) -> dict[str, int]:
    """Where the tensors of a policy and its parts lie."""
    owners = {"": policy, **policy.parts}
    found = {f"{part}.{name}": value for part, owner in owners.items() for name, value in vars(owner).items()}
    return {name: value.data_ptr() for name, value in found.items() if isinstance(value, Tensor)}


class Both:
    """A mode, and no gradients."""

    def __init__(self, mode: Capturable) -> None:
        self.mode, self.no_grad = mode, torch.no_grad()

    def __enter__(self) -> None:
        self.no_grad.__enter__()
        self.mode.__enter__()

    def __exit__(self, *error) -> None:
        self.mode.__exit__(*error)
        self.no_grad.__exit__(*error)


class DeviceSketch:
    """A sketch of every bit of the keys, which asks the host nothing."""

    group = 1

    def __init__(self, *, batch: int, kv_heads: int, head_dim: int, **_) -> None:
        self.length = 0
        self.key_BGLD = torch.zeros(batch, kv_heads, CAPACITY * SIZE, head_dim)

    def reserve(self, tokens: int) -> None:
        assert tokens <= CAPACITY * SIZE

    def extend(self, key_BGTD: Tensor, query_BHQD: Tensor, kernel: bool) -> None:
        self.key_BGLD[:, :, self.length : self.length + key_BGTD.shape[2]] = key_BGTD
        self.length += key_BGTD.shape[2]

    def append(self, key_BGD: Tensor, query_BHD: Tensor, length_B: Tensor, kernel: bool) -> None:
        token_BG1D = (length_B - 1)[:, None, None, None].expand(-1, G, -1, D)
        self.key_BGLD.scatter_(2, token_BG1D, key_BGD[:, :, None])

    def advance(self) -> None:
        self.length += 1

    def block_scores(self, query_BHD: Tensor, scaling: float, softcap, *, real_BL, capacity, length_B, **_):
        block_BGC = torch.arange(capacity).expand(B, G, -1)
        key_BGCTD = self.key_BGLD.unflatten(2, (-1, SIZE))
        return score_slots(query_BHD, key_BGCTD, block_BGC, length_B, real_BL, Terms(scaling, softcap))

    def check_integrity(self) -> None:
        assert not bool(self.key_BGLD[:, :, self.length :].any())


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: int(x.max()),
    ],
)
def test_what_asks_the_host_is_found(operation):
    with pytest.raises(NotCapturable), Capturable():
        operation(torch.ones(3))


def test_a_length_in_a_shape_is_found():
    records = []
    for length in (3, 4):
        with Capturable() as mode:
            torch.ones(8)[:length].sum()
        records.append(mode.record)
    assert records[0] != records[1]


@pytest.mark.parametrize("policy", BUILT_IN)
def test_only_what_reads_every_key_is_never_captured(policy):
    reason = policy_class(policy).why_never_captured(OffloadConfig(policy=policy))
    assert (reason is None) == (policy in CAPTURED)
    assert reason is None or policy in reason


# ---- the same as the host's arithmetic -------------------------------------------------------------------------------


def sink_blocks(selection: Selection, padding: int) -> int:
    """One more behind padding that ends within a block, if the budget has it; recent tokens begin anywhere in one."""
    sink, recent = selection.sink // SIZE, -(-(max(selection.recent, 1) - 1) // SIZE) + 1
    return sink + (sink > 0 and padding % SIZE > 0 and selection.budget // SIZE > sink + recent)


def wanted(selection: Selection, score_BGN: Tensor | None, length: int, padding_B: Tensor | None) -> Tensor:
    """Blocks of the step at ``length`` tokens, bool BGN: one row after another, by sorting."""
    n_blocks = -(-length // SIZE)
    wanted_BGN = torch.zeros(B, G, n_blocks, dtype=torch.bool)
    for b in range(B):
        first = 0 if padding_B is None else int(padding_B[b]) // SIZE
        recent = max(length - max(selection.recent, 1), 0) // SIZE
        always = set(range(first, first + sink_blocks(selection, 0 if padding_B is None else int(padding_B[b])))) | set(
            range(max(recent, first), n_blocks)
        )
        for g in range(G):
            if length <= max(selection.budget, selection.dense_tokens):
                wanted_BGN[b, g, first:] = True
                continue
            row = [] if score_BGN is None else score_BGN[b, g].tolist()
            others = [n for n in range(first, min(len(row), n_blocks)) if n not in always and row[n] > NEVER]
            others.sort(key=lambda n: (-row[n], n))
            for n in [*always, *others[: selection.budget // SIZE - len(always)]]:
                wanted_BGN[b, g, n] = True
    return wanted_BGN


class HostH2O:
    """H2O, growing with the sequence."""

    def __init__(self, layer: Layer) -> None:
        self.selection = layer.selection
        self.mass_BGN = layer.true_rows(layer.length).mass_BGQN.sum(2)
        self.evicted_BGN = torch.zeros_like(self.mass_BGN, dtype=torch.bool)

    def observe(self, step: Step) -> None:
        more = step.blocks - self.mass_BGN.shape[-1]
        self.mass_BGN = F.pad(self.mass_BGN, (0, more)) + step.mass_BGC[..., : step.blocks]
        self.evicted_BGN = F.pad(self.evicted_BGN, (0, more)) | ~step.attended_BGC[..., : step.blocks]

    def scores(self, length: int) -> Tensor:
        more = -(-length // SIZE) - self.mass_BGN.shape[-1]
        mass_BGN = F.pad(self.mass_BGN, (0, more))
        score_BGN = newest_first(mass_BGN, (length - self.selection.budget // 2) // SIZE)
        return score_BGN.masked_fill(F.pad(self.evicted_BGN, (0, more)), NEVER)


class HostSnapKV:
    """SnapKV, whose votes cover the prompt."""

    def __init__(self, layer: Layer) -> None:
        policy = layer.policy
        mass_BGQN = layer.true_rows(policy.prompt_rows).mass_BGQN
        votes_BGN, window = policy.indicator(mass_BGQN), -(-policy.prompt_rows // SIZE)
        parts = votes_BGN.split([votes_BGN.shape[-1] - window, window], -1)
        self.votes_BGN = torch.cat([pooled(part_BGN, 5, SIZE) for part_BGN in parts], -1)
        self.recent_blocks, self.window = layer.selection.recent // SIZE, window

    def observe(self, step: Step) -> None:
        """Nothing changes."""

    def scores(self, length: int) -> Tensor:
        n_blocks, prompt_blocks = -(-length // SIZE), self.votes_BGN.shape[-1]
        first = max(min(n_blocks - 1 - self.recent_blocks, prompt_blocks - self.window), 0)
        return newest_first(F.pad(self.votes_BGN, (0, n_blocks - prompt_blocks)), first)


class HostLazyEviction:
    """LazyEviction, which evicts in each row when that row is full."""

    alpha = 5e-4

    def __init__(self, layer: Layer) -> None:
        self.selection, self.padding_B = layer.selection, layer.padding_B
        self.steps = 0
        self.last_BGN = self.interval_BGN = torch.zeros(B, G, 0)
        self.evicted_BGN = torch.zeros(B, G, 0, dtype=torch.bool)
        for peak_BGN in layer.true_rows(layer.policy.prompt_rows).scores_BGQN.unbind(2):
            self.note(peak_BGN)

    def note(self, peak_BGN: Tensor) -> None:
        more = peak_BGN.shape[-1] - self.last_BGN.shape[-1]
        before_BGN = F.pad(self.last_BGN, (0, more), value=self.steps)
        self.steps += 1
        self.last_BGN = before_BGN.masked_fill(peak_BGN >= self.alpha, self.steps)
        self.interval_BGN = torch.maximum(F.pad(self.interval_BGN, (0, more)), self.last_BGN - before_BGN)

    def observe(self, step: Step) -> None:
        self.note(step.score_BGC[..., : step.blocks])

    def scores(self, length: int) -> Tensor:
        selection, n_blocks = self.selection, -(-length // SIZE)
        self.evicted_BGN = F.pad(self.evicted_BGN, (0, n_blocks - self.evicted_BGN.shape[-1]))
        away_BGN = self.steps - self.last_BGN
        score_BGN = 2 * torch.sigmoid(-away_BGN / self.interval_BGN) + 2 * torch.sigmoid(1 - self.interval_BGN)
        score_BGN = score_BGN.masked_fill(self.interval_BGN == 0, -1)
        rank_BGN = F.pad(score_BGN, (0, n_blocks - score_BGN.shape[-1]), value=-1)
        sink, recent = selection.candidates(length)
        budget, recent_blocks = selection.budget // SIZE, selection.recent // SIZE
        keep = budget + 1 - max(min(recent_blocks, (budget - sink - recent_blocks - 1) // 2), 1)
        for b in range(B):
            first = 0 if self.padding_B is None else int(self.padding_B[b]) // SIZE
            more = sink_blocks(selection, 0 if self.padding_B is None else int(self.padding_B[b]))
            rank_BGN[b, :, first : first + more] = rank_BGN[b, :, recent:] = ALWAYS
            for g in range(G):
                held = [n for n in range(first, n_blocks) if not self.evicted_BGN[b, g, n]]
                if length > max(selection.budget, selection.dense_tokens) and len(held) > budget:
                    rank_N = rank_BGN[b, g].tolist()
                    # Of blocks that were never active the oldest goes first, of other equals the newest.
                    held.sort(key=lambda n: (rank_N[n], n if rank_N[n] < 0 else -n))
                    for n in held[: len(held) - keep]:
                        self.evicted_BGN[b, g, n] = True
        return torch.zeros(self.evicted_BGN.shape).masked_fill(self.evicted_BGN, NEVER)


class HostQuestAhead:
    """The bound of the last query, from the keys themselves."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def observe(self, step: Step) -> None:
        """Everything is in the keys."""

    def scores(self, length: int) -> Tensor:
        return bounds(self.layer, length - 1)


def bounds(layer: Layer, length: int) -> Tensor:
    """Quest's, of the newest query, BGN."""
    pieces = layer.key_BGLD[:, :, :length].split(SIZE, 2)
    low_BGND, high_BGND = (torch.stack(x, 2) for x in zip(*((p.amin(2), p.amax(2)) for p in pieces), strict=True))
    query_BGM1D = layer.query_BHLD[:, :, length - 1].unflatten(1, (G, -1))[:, :, :, None]
    return torch.maximum(query_BGM1D * low_BGND[:, :, None], query_BGM1D * high_BGND[:, :, None]).sum(-1).amax(2)


def newest_first(score_BGN: Tensor, first: int) -> Tensor:
    newer = max(score_BGN.shape[-1] - first, 0)
    if newer == 0:
        return score_BGN
    top_BG1 = score_BGN.amax(-1, keepdim=True).clamp_min(0)
    return torch.cat([score_BGN[..., :first], top_BG1 + torch.arange(1, newer + 1)], -1)


HOSTS = {
    "h2o": HostH2O,
    "snapkv": HostSnapKV,
    "pyramidkv": HostSnapKV,
    "cake": HostSnapKV,
    "tappa": HostSnapKV,
    "lazy-eviction": HostLazyEviction,
    "quest-ahead": HostQuestAhead,
}


@pytest.mark.parametrize("padding", [None, (0, 37)], ids=["even", "padded"])
@pytest.mark.parametrize(("prompt", "recent"), [(50, 16), (97, 32), (300, 0), (290, 16)])
@pytest.mark.parametrize("policy", HOSTS)
def test_the_same_blocks_at_every_length(policy, prompt, recent, padding):
    budget = 160 if recent == 32 else 96
    layer = Layer(policy, prompt, padding=padding, recent=recent, budget=budget)
    host = HOSTS[policy](layer)
    left = 0
    for _ in range(110):
        length = layer.length + 1
        expected_BGN = wanted(layer.selection, host.scores(length), length, layer.padding_B)
        n_blocks = expected_BGN.shape[-1]
        assert torch.equal(layer.chosen_BGC[..., :n_blocks], expected_BGN), length
        assert not layer.chosen_BGC[..., n_blocks:].any()
        left += int((~expected_BGN).sum())
        host.observe(layer.step())
    assert left > 0
    layer.policy.check_integrity()


def test_quest_bounds_are_those_of_the_keys():
    layer = Layer("quest", 50)
    for _ in range(60):
        step = layer.step()
        bound_BGC, expected_BGN = layer.policy.score_now(step), bounds(layer, layer.length)
        assert torch.allclose(bound_BGC[..., : step.blocks], expected_BGN, atol=1e-5)
        assert (bound_BGC[..., step.blocks :] < expected_BGN.min()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quest_bounds_are_not_rounded(dtype):
    """Products of half precision are summed in fp32: rounded ones could not tell blocks apart."""
    torch.manual_seed(0)
    spec = LayerSpec(OffloadConfig(policy="quest", **SMALL), None, B, G, D, dtype, torch.device("cpu"))
    policy = policy_class("quest")(spec)
    key_BGTD, query_BHD = torch.randn(B, G, 304, D).to(dtype), torch.randn(B, H, D).to(dtype)
    policy.reserve(CAPACITY)
    policy.extend(key_BGTD, query_BHD[:, :, None])
    bound_BGC = policy.bounds.bound(query_BHD)
    key_BGNTD, query_BGM1D = key_BGTD.double().unflatten(2, (-1, SIZE)), query_BHD.double().view(B, G, -1, 1, D)
    low_BG1ND, high_BG1ND = (x[:, :, None] for x in (key_BGNTD.amin(3), key_BGNTD.amax(3)))
    expected_BGN = torch.maximum(query_BGM1D * low_BG1ND, query_BGM1D * high_BG1ND).sum(-1).amax(2)
    assert bound_BGC.dtype == torch.float32
    assert torch.allclose(bound_BGC[..., :19].double(), expected_BGN, rtol=1e-5)
    assert (bound_BGC[..., 19:] < expected_BGN.min()).all()


def test_an_oracle_scores_all_blocks_by_their_mass():
    layer = Layer("oracle", 90)
    for _ in range(20):
        step = layer.step()
        mass_BGC = layer.policy.score_now(step)
        assert torch.equal(mass_BGC[..., : step.blocks], layer.true_rows(1).mass_BGQN[:, :, 0])
        assert not mass_BGC[..., step.blocks :].any()


# ---- the predictor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, (0, 37)], ids=["even", "padded"])
@pytest.mark.parametrize("calibration", ["sketch", "none", "exact"])
@pytest.mark.parametrize("predictor", ["ema", "time-filters"])
def test_the_predictor_is_told_of_every_step(predictor, calibration, padding):
    """Its history is that of rows made on the host; its candidates end where the next step's recent tokens begin."""
    settings = {"calibration": calibration, "calibration_interval": 4, "late_fetch": 0.0, "predictor": predictor}
    layer = Layer("predictor", 100, padding=padding, **settings)
    policy = layer.policy
    host = ScoreHistory(policy.spec.predictor, batch=B, kv_heads=G, device="cpu")
    host.start(layer.true_rows(policy.prompt_rows).scores_BGQN)
    for number in range(1, 41):
        step, n_blocks = layer.step(), layer.n_blocks
        assert policy.reads_all_keys == (calibration == "exact" and number % 4 == 0)
        if policy.reads_all_keys:
            row_BGN = layer.true_rows(1).scores_BGQN[:, :, 0]
        else:
            peak_BHN, total_BH = None, step.attention.lse_BH
            if calibration == "sketch":
                mask_BL = None if step.real_BL is None else step.real_BL[:, : layer.length]
                logits_BHT = policy.sketch.logits(step.query_BHD, 1.0)
                if mask_BL is not None:
                    logits_BHT = logits_BHT.masked_fill(~mask_BL[:, None], NEVER)
                peak_BHN, sum_BHN = block_peak_and_sum(logits_BHT, SIZE)
                attended_BHN = step.attended_BGC[..., :n_blocks].repeat_interleave(H // G, 1)
                total_BH = torch.logaddexp(total_BH, torch.logsumexp(sum_BHN.masked_fill(attended_BHN, NEVER), -1))
            block_BGN = step.block_BGS[..., :n_blocks]
            row_BGN = row_of_logits(
                peak_BHN, block_BGN, step.attention.scores.peak_BHS[..., :n_blocks], total_BH, n_blocks
            )
        host.push(row_BGN)
        difference = (policy.history.state_BGNC - host.state_BGNC).abs().max()
        assert difference < 1e-4
        first, last = layer.selection.candidates(layer.length + 1)
        for b in range(B):
            start = first if padding is None else first + padding[b] // SIZE
            expected_GN = predicted(host, min(start, n_blocks), max(min(last, n_blocks), 0))[b]
            found_GC = layer.score_BGC[b]
            assert torch.allclose(found_GC[:, start:last], expected_GN[:, start:last], atol=1e-3)
            assert (found_GC[:, :start] == NEVER).all()
            assert (found_GC[:, last:] == NEVER).all()


def test_without_a_sketch_nothing_is_estimated():
    layer = Layer("predictor", 100, calibration="none", late_fetch=0.0)
    assert layer.step().estimates is None
    assert layer.policy.row(layer.step()).shape == (B, G, CAPACITY)


@pytest.mark.parametrize("policy", CAPTURED)
def test_copies_made_under_inference_mode_are_apart(policy):
    """Where a layer makes them (``TieredLayer``): outside of that mode, in which they could not be written to."""
    layer = Layer(policy, 120)
    with torch.inference_mode(), torch.inference_mode(False):
        twin = copy.deepcopy(layer)
    before = {name: part.nbytes for name, part in layer.policy.parts.items()}
    layer.step()
    twin.step()
    assert torch.equal(layer.chosen_BGC, twin.chosen_BGC)
    assert {name: part.nbytes for name, part in twin.policy.parts.items()} == before
