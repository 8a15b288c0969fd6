"""What a coordinator's tickets tell a site of a split model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fedtune.errors import FedtuneError
from fedtune.forms import read_json
from fedtune.split.selftest import Card
from fedtune.split.session import Offer

NEEDED = {
    "model": str,
    "k": int,
    "m": int,
    "blocks": int,
    "width": int,
    "seed": int,
    "dtype": str,
    "head": dict,
    "body": dict,
    "tail": dict,
}


@dataclass(frozen=True)
class SplitFacts:
    """Which model is meant, so that a site knows before any training that its ends and the body behind the
    wire are parts of it.

    base       fingerprint of the coordinator's base
    tokenizer  digest of its tokenizer
    card       of its parts (split/selftest.py), as JSON
    token      for the body service, in this round
    """

    base: str
    tokenizer: str
    card: str
    token: str = ""

    @property
    def model(self) -> tuple[str, str, str]:
        """All but the token: what a site loads."""
        return self.base, self.tokenizer, self.card

    def read_card(self) -> Card:
        """Raises S702 for a card that no coordinator writes."""
        try:
            card: Card = read_json(self.card)
            if any(not isinstance(card[name], kind) for name, kind in NEEDED.items()) or not (
                self.base and self.tokenizer
            ):
                raise ValueError("an entry of another kind")
        except (ValueError, KeyError, TypeError) as error:
            found = (
                f"a ticket that does not describe the model's parts ({type(error).__name__}: "
                f"{str(error)[:80]})"
            )
            expected = "fingerprint, tokenizer and card as the coordinator's run makes them"
            raise FedtuneError(
                "S702", found, expected, "install the same version of fedtune on both sides"
            ) from error
        return card

    @property
    def offer(self) -> Offer:
        """The body that a site expects at the other end. Raises S702."""
        card = self.read_card()
        return Offer(self.base, card["body"]["sha256"], card["k"], card["m"], card["width"])

    def to_words(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_words(cls, words: Mapping[str, str]) -> SplitFacts:
        """Raises S702 for a ticket that does not say them."""
        try:
            return cls(words["base"], words["tokenizer"], words["card"], words.get("token", ""))
        except KeyError as error:
            found, expected = (
                f"a ticket that does not describe the model's parts (no {error})",
                "fingerprint, tokenizer and card",
            )
            raise FedtuneError(
                "S702", found, expected, "install the same version of fedtune on both sides"
            ) from error
