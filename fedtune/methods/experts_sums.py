"""[method.experts.gate] fit = "sums": the gate over all experts of a run is made from sums.

Down, in the last round, to the members of each group: the general expert. Up: what comes into all of its
layers on their rows, averaged over prefixes and folded to `width` numbers: their mean, and the mean of the
products of every two. The gate is the linear discriminant of the groups (fedtune/experts/discriminant.py):
nothing is trained, and no member is given an expert of others. Clients that have no expert are a group as
well, where they are enough: what looks like their rows goes to the general expert alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedtune.experts.discriminant import MEAN, PRODUCTS, Fold, discriminants, folds, packed, unfolded
from fedtune.experts.grouping import Grouping
from fedtune.experts.state import GATE, sizes_of
from fedtune.methods.experts_messages import Messages
from fedtune.methods.interface import Verb
from fedtune.schema import Schema
from fedtune.types import Client, Cohort, Round, Tensors, Update, if_answered

TELL = "gate sums"  # the verb
ROWS = 256  # of a client
NULL = ""  # the group of who has no expert


class GateSums:
    def __init__(self, grouping: Grouping, messages: Messages) -> None:
        self.grouping, self.messages = grouping, messages

    def gate(
        self,
        general: Tensors,
        names: Sequence[str],
        asked: Mapping[int, str],
        beside: Sequence[int],
        cohort: Cohort,
        now: Round,
    ) -> Tensors:
        """`asked`: the members whose groups are large enough, and their experts; `beside`: those who have
        none, whose row comes last. {} where nobody answers."""
        group = {**asked, **(dict.fromkeys(beside, NULL) if len(beside) >= self.grouping.least else {})}
        sums = if_answered(lambda: cohort.sum_groups(TELL, general, group.get, self.grouping.least))
        if sums is None:
            return {}
        said = {name: total.values() for name, total in sums.items()}
        weights = {name: total.weight for name, total in sums.items()}
        rows, bias = discriminants(said, weights, [*names, *([NULL] if NULL in said else [])])
        of = self.folds(Schema.of(general), now.seed)
        return {GATE + name: value for name, value in unfolded(rows, bias, of).items()}

    def widths(self, general: Schema) -> dict[str, int]:
        """Of what comes into the layers that have a gate."""
        sizes = sizes_of(general.shapes)
        return {layer: sizes[layer][0] for layer in self.messages.where(general, 2).gated}

    def width(self, general: Schema) -> int:
        return min(self.grouping.gate.width, sum(self.widths(general).values()))

    def folds(self, general: Schema, seed: int) -> dict[str, Fold]:
        return folds(self.widths(general), self.width(general), seed)

    def answer(self, given: Schema, now: Round) -> Schema:
        width = self.width(given)
        return Schema(((MEAN, (width,)), (PRODUCTS, (packed(width),))))

    @property
    def verbs(self) -> dict[str, Verb]:
        verb = Verb(
            self.tell,
            lambda tunable, client, now: self.messages.general(tunable),
            self.answer,
            by_group=True,
            once=True,
            shows=f"the mean, and the mean of the products of every two, of {self.grouping.gate.width} "
            "numbers that tell what a text looks like to the model, over the rows of "
            f"{self.grouping.least} clients or more",
        )
        return {TELL: verb}

    def tell(self, client: Client, given: Tensors, now: Round) -> Update:
        from fedtune.model.prefix_sums import prefix_sums

        client.model.write(given)
        about = Schema.of(given)
        of, width = self.folds(about, now.seed), self.width(about)
        mean, products, texts = prefix_sums(client.model, client.data, ROWS, of, width)
        return Update.of({MEAN: mean, PRODUCTS: products}, texts)
