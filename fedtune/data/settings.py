"""What every source of data is: a table of settings, [data] of a recipe, that reads rows."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from pydantic import Field

from fedtune.settings import Settings, path_below

if TYPE_CHECKING:
    from fedtune.data.rows import Table

Task = Literal["causal-lm", "instruct", "preference", "classify", "image-classify"]


class Source(Settings):
    """[data]: where the rows come from, what they mean, and what is held out. A source is one file in
    fedtune/data/sources/.

    tasks     that its rows can serve
    has_test  whether it brings a test set of its own, always
    suffixes  of the files that it reads
    """

    source: str
    tasks: ClassVar[frozenset[str]] = frozenset(get_args(Task))
    has_test: ClassVar[bool] = False
    suffixes: ClassVar[tuple[str, ...]] = ()
    duplicates: Literal["keep", "drop"] = "keep"
    """Rows that stand twice: keep (and say how many of the test set are trained on), or drop all but the
    first, of the test set's the
    training rows."""
    task: Task = "classify"
    """What is learned: next tokens, responses to prompts, which of two responses is the better one, a class
    of a text, a class of an image. preference needs a loss on pairs, such as method.train.objective.loss =
    "dpo"."""
    text: str = "text"
    """Column of the text (causal-lm, classify)."""
    label: str = "label"
    """Column of the class (classify, image-classify); whole numbers become their digits."""
    prompt: str = "prompt"
    """Column of the prompt (instruct, preference); preference: "" where chosen and rejected begin with it."""
    response: str = "response"
    """Column of the response (instruct)."""
    chosen: str = "chosen"
    """Column of the better response (preference): a text, or chat messages in any form that `messages` may
    have, with the prompt's before them where they stand in no column of their own."""
    rejected: str = "rejected"
    """Column of the worse response (preference), in the form of the better one."""
    messages: str = ""
    """Column of chat messages (instruct); replaces prompt and response. A list of {role, content}, with
    tool_calls and other keys that
    the model's chat template knows, or ShareGPT's {from, value}; content may be a list of text parts; a cell
    of a file may hold the list
    as JSON text. A column `tools` beside it, if there is one, describes the tools."""
    template: str = Field("auto", pattern=r"^(auto|chat|plain)$|\{[^{}]+\}")
    """How prompt and response become one text (instruct, preference): auto (as the model's own chat template
    writes a question and its answer; without one, two lines), chat (the template, which must be there), plain
    (the one glued to the other), or a text with columns in braces that
    goes before the response, such as "Question: {prompt}\\nAnswer: "; {prompt} is data.prompt's column."""
    system: str = ""
    """System message before conversations that have none of their own (instruct, preference; needs a chat
    template)."""
    date: datetime.date = datetime.date(2025, 1, 1)
    """What chat templates that ask for today's date are told, on every day and at every site, as in
    "2025-01-01"."""
    group: str = ""
    """Column that says which of several tasks or sorts a row is of, for [[select]] by = "group"."""
    image: str = "image"
    """Column of the image (image-classify)."""
    labels: tuple[str, ...] = ()
    """The label set; empty takes the sorted labels of the data."""
    max_length: int = Field(128, ge=2)
    """Tokens per example; longer ones are cut and counted. For causal-lm, the length of a block."""
    stride: int = Field(0, ge=0)
    """causal-lm: distance between the starts of training blocks; 0 means max_length (no overlap)."""
    separator: Literal["eos", "none"] = "eos"
    """causal-lm: what stands between two rows of the token stream."""
    overlong: Literal["cut", "refuse"] = "cut"
    """What to do with examples longer than max_length: cut and report, or refuse to start."""
    limit: int = Field(0, ge=0)
    """Use at most this many rows, drawn with the run's seed; 0 means all. A source's own test set is not
    limited."""
    test_share: float = Field(0.1, ge=0, lt=1)
    """Share of all rows that becomes the global test set, drawn with the run's seed; 0 pools the clients'
    held-out shares instead.

    Ignored where the source has a test set of its own, which is used whole: clinc150, and folders with a file
    named `test`."""
    client_test_share: float = Field(0.1, ge=0, lt=1)
    """Share of each client's rows that it holds out for itself: of n rows int((1 - share) * n) train."""
    cache: bool = True
    """Keep rows as tokens on disk, so that the next start need not make them again. What they say can be read
    from these files; they lie beside what a site holds (`HOME/tokens`, none with --cache-gib 0) or in the
    user's own cache, where nobody else may read them. No part of a run's identity."""
    order: Literal["random", "time"] = "random"
    """How a client's held-out rows are chosen: at random with the run's seed, or the last ones in file
    order."""

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if self.task not in self.tasks:
            known = ", ".join(sorted(self.tasks))
            yield (
                f"data.task = '{self.task}' with data.source = '{self.source}'",
                f"one of {known}",
                "change data.task or data.source",
            )
        if not self.is_placed and not ("deploy" in recipe.model_fields_set and recipe.deploy.data == "sites"):
            do = (
                "set it in the recipe or with --set data.path=PATH; a recipe for real sites has a [deploy] "
                "table instead"
            )
            yield f"no data.path for data.source = '{self.source}'", "a file, a folder or a hub name", do
        if self.test_share == 0 and self.client_test_share == 0 and not self.has_test:
            yield (
                "data.test_share = 0 and data.client_test_share = 0",
                "some rows to test on",
                "raise one of them",
            )
        if self.stride > self.max_length:
            found = f"data.stride = {self.stride} above data.max_length = {self.max_length}"
            yield found, "at most max_length, so that no token is passed over", "lower it"
        if self.task == "preference" and recipe.method.objective is None:
            yield (
                f"data.task = 'preference' with method.type = '{recipe.method.type}'",
                "a method that trains by [method.train.objective]",
                "set method.type = 'fedpeft'",
            )
        yield from self.template_conflicts()

    def template_conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Keys that say how prompts and conversations become texts, where nothing would use them."""
        for key, said, tasks in (
            ("messages", self.messages, ("instruct",)),
            ("template", self.template != "auto", ("instruct", "preference")),
            ("system", self.system, ("instruct", "preference")),
        ):
            if said and self.task not in tasks:
                yield (
                    f"data.{key} with data.task = '{self.task}'",
                    f"data.task = '{tasks[0]}'",
                    "remove one of them",
                )
        if self.task == "preference" and not self.prompt and "{" in self.template:
            yield (
                "data.template of columns with data.prompt = '', which leaves the prompt in the responses",
                "a column of the prompt",
                "set data.prompt, or data.template = 'plain'",
            )
        own = self.template not in (
            "auto",
            "chat",
        )  # the text is the user's own, and no chat template writes it
        if own and self.messages:
            yield (
                f"data.template = '{self.template}' with data.messages",
                "the model's chat template",
                "remove one of them",
            )
        if own and self.system:
            yield (
                f"data.system with data.template = '{self.template}'",
                "a chat template, which knows where it goes",
                "write it into data.template",
            )
        if "{response}" in self.template.removesuffix("{response}"):
            yield (
                "data.template with {response} before its end",
                "a text that goes before the response",
                "end data.template where the response begins",
            )

    def begin(self) -> bool:
        """Begin to read, where that goes on by itself; whether it does."""
        return False

    def table(self) -> Table:
        """All rows, and the test set where the source has one. Raises D201, D202, D203, D208."""
        raise NotImplementedError(f"'{self.source}' reads no rows")

    @property
    def is_placed(self) -> bool:
        """Whether the recipe says where the rows are, where that has to be said."""
        return True


class PathSource(Source):
    """A source that is read from a path."""

    path: str | tuple[str, ...] = ""
    """File, list of files, pattern (data/*.jsonl) or folder, relative to the working directory, or a hub data
    set's name. Of a folder, jsonl
    (.jsonl, .ndjson, .json), csv (.csv, .tsv), parquet and text (.txt) read all files with their suffix, also
    as .gz. Names such as train,
    validation and test are respected: the test split is the global test set, a validation split stands in
    where there is none and is left
    out otherwise. Subfolders become the column `folder`: by = "column", column = "folder" makes each a
    client."""

    shared: str = ""
    """A file or folder of rows, of the same form, that every client mixes into its own. Real sites have a
    copy each (fedtune client --shared); what a recipe names is not read there."""
    share: float = Field(0.0, ge=0, lt=1)
    """How much of a client's training rows are shared ones, the same for all as far as they go; where there
    are fewer, they come again."""

    @property
    def is_placed(self) -> bool:
        return bool(self.path)

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        yield from super().conflicts(recipe)
        sites = "deploy" in recipe.model_fields_set and recipe.deploy.data == "sites"
        if self.share and not self.shared and not sites:
            yield f"data.share = {self.share} without data.shared", "a file of rows", "set data.shared"
        if self.share and recipe.method.spends:
            yield (
                "data.share with method.train.private",
                "rows whose number does not depend on others",
                "remove data.share",
            )

    def located(self, place: Path) -> Self:
        path = (
            path_below(place, self.path)
            if isinstance(self.path, str)
            else tuple(path_below(place, one) for one in self.path)
        )
        return self.model_copy(update={"path": path, "shared": path_below(place, self.shared)})


class TextFileSource(PathSource):
    """A source of text files."""

    encoding: str = "utf-8"
    """Of text files without a byte order mark."""
