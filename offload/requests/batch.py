"""RequestBatch: requests whose steps are one forward, though their lengths differ and they begin and end at any time.

Suffixes: B places, V vocabulary; 2 is a token and whether its logits are all numbers.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from attention_predictor.arithmetic import ceil_div
from attention_predictor.errors import HostMemoryError, one_line
from attention_predictor.offload.generation import next_logits
from attention_predictor.offload.hf.graph import CapturedSteps
from attention_predictor.offload.hf.places import COMING, Places, why_no_place
from attention_predictor.offload.requests.request import Running, to_host

ROUND_UP = 4096  # places have room for a multiple of so many tokens


class RequestBatch:
    """Prefilled requests, each in a place of one captured step (``Places``).

    Args:
        first: A prefilled request that could have a place.
        count: Places wanted; fewer are made if memory allows no more.
        tokens: Tokens of the longest request.

    Raises:
        HostMemoryError, torch.OutOfMemoryError: There is no memory for two places.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        captured: CapturedSteps,
        first: Running,
        count: int,
        tokens: int,
    ) -> None:
        self.model = model
        room = ceil_div(tokens + COMING + 1, ROUND_UP) * ROUND_UP  # one more: a last step may run past the end
        while True:
            try:
                self.places = Places(captured, first.cache, count, room)
                break
            except torch.OutOfMemoryError:
                if count <= 2:
                    raise
                count = max(count // 2, 2)
        self.members: list[Running | None] = [None] * count
        self._token_B1 = torch.zeros((count, 1), dtype=torch.int64, device=first.token_B1.device)

    @property
    def is_empty(self) -> bool:
        """Whether nobody has a place."""
        return not any(self.members)

    def has_place_for(self, one: Running) -> bool:
        """Whether a place is free that is long enough."""
        return None in self.members and one.final_length + COMING < self.places.room

    def join(self, one: Running) -> None:
        """Give a place to a prefilled request, which leaves its own cache."""
        place = self.members.index(None)
        self.places.put(place, one.cache, final_length=one.final_length)
        self._token_B1[place] = one.token_B1[0]
        self.members[place] = one

    def leave(self, one: Running) -> None:
        """Take the place of a request back."""
        place = self.members.index(one)
        self.places.release(place)
        self.members[place] = None

    @torch.no_grad()
    def step(self) -> None:
        """Read the newest token of each member and choose its next one."""
        stepping = [(place, one) for place, one in enumerate(self.members) if one and not one.steps_are_over]
        if not stepping:
            return
        position_B1 = self.places.length_B[:, None].clone()
        logits_BV = next_logits(self.model, self.places.cache, self._token_B1, position_BT=position_B1)
        token_B1 = logits_BV.argmax(-1, keepdim=True)
        for place, one in stepping:
            if one.request.sampling.temperature > 0:
                token_B1[place] = one.choose(logits_BV[place : place + 1])[0]
        self._token_B1 = token_B1
        found_B2, event = to_host(token_B1, logits_BV)
        for place, one in stepping:
            one.count_step(found_B2[place], event)


def batch_of(
    model: PreTrainedModel, captured: CapturedSteps | None, first: Running, count: int, tokens: int
) -> RequestBatch | str:
    """A batch for this request and others like it, or why there is none."""
    if captured is None:
        return "steps are not captured here"
    if (reason := why_no_place(first.cache)) is not None:
        return reason
    try:
        return RequestBatch(model, captured, first, count, tokens)
    except (HostMemoryError, torch.OutOfMemoryError) as error:
        return f"no memory for two places of {tokens} tokens: {one_line(error, 100)}"
