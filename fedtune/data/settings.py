"""The tables [data] and [partition] of a recipe."""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import Field

from fedtune.settings import Settings

Task = Literal["causal-lm", "instruct", "classify", "image-classify"]
Source = Literal["docstrings", "jsonl", "csv", "parquet", "text", "plays", "clinc150", "images", "digits", "hub"]
SUFFIXES: dict[str, Source] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"
}  # fmt: skip


class DataSettings(Settings):
    """Where the rows come from, what they mean, and what is held out."""

    source: Source = "docstrings"
    """Kind of source; `docstrings` is built in and needs no file, `hub` takes a data set's name as path.

    Columns of the sources that bring their own: docstrings text, label; text (one row a paragraph) text, file; plays (one row
    a speaker's turn) text, speaker; clinc150 text, label, domain; images (one subfolder per class) and digits image, label."""
    path: str | tuple[str, ...] = ""
    """File, list of files, pattern (data/*.jsonl) or folder, relative to the working directory, or a hub data set's name. Of a folder, jsonl
    (.jsonl, .ndjson, .json), csv (.csv, .tsv), parquet and text (.txt) read all files with their suffix, also as .gz. Names such as train,
    validation and test are respected: the test split is the global test set, a validation split stands in where there is none and is left
    out otherwise. Subfolders become the column `folder`: by = "column", column = "folder" makes each a client."""
    encoding: str = "utf-8"
    """Of text files without a byte order mark."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Rows that stand twice: keep (and say how many of the test set are trained on), or drop all but the first, of the test set's the
    training rows."""
    split: str = "train"
    """Hub only: which split to load."""
    task: Task = "classify"
    """What is learned: next tokens, responses to prompts, a class of a text, a class of an image."""
    text: str = "text"
    """Column of the text (causal-lm, classify)."""
    label: str = "label"
    """Column of the class (classify, image-classify); whole numbers become their digits."""
    prompt: str = "prompt"
    """Column of the prompt (instruct)."""
    response: str = "response"
    """Column of the response (instruct)."""
    messages: str = ""
    """Column of chat messages (instruct); replaces prompt and response. A list of {role, content}, with tool_calls and other keys that
    the model's chat template knows, or ShareGPT's {from, value}; content may be a list of text parts; a cell of a file may hold the list
    as JSON text. A column `tools` beside it, if there is one, describes the tools."""
    template: str = Field("auto", pattern=r"^(auto|chat|plain)$|\{[^{}]+\}")
    """How prompt and response become one text (instruct): auto (as the model's own chat template writes a question and its answer; without
    one, two lines), chat (the template, which must be there), plain (the one glued to the other), or a text with columns in braces that
    goes before the response, such as "Question: {prompt}\\nAnswer: "; {prompt} is data.prompt's column."""
    system: str = ""
    """System message before conversations that have none of their own (instruct; needs a chat template)."""
    date: datetime.date = datetime.date(2025, 1, 1)
    """What chat templates that ask for today's date are told, on every day and at every site, as in "2025-01-01"."""
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
    """Use at most this many rows, drawn with the run's seed; 0 means all. A source's own test set is not limited."""
    test_share: float = Field(0.1, ge=0, lt=1)
    """Share of all rows that becomes the global test set, drawn with the run's seed; 0 pools the clients' held-out shares instead.

    Ignored where the source has a test set of its own, which is used whole: clinc150, and folders with a file named `test`."""
    client_test_share: float = Field(0.1, ge=0, lt=1)
    """Share of each client's rows that it holds out for itself: of n rows int((1 - share) * n) train."""
    order: Literal["random", "time"] = "random"
    """How a client's held-out rows are chosen: at random with the run's seed, or the last ones in file order."""


class PartitionSettings(Settings):
    """How the rows of one source become clients (simulation only: a real site has its own rows)."""

    by: Literal["iid", "dirichlet", "column", "shards", "size"] = "dirichlet"
    """iid; dirichlet over labels; one client per value of a column; label shards (pathological); sizes of 1 : 2 : ... : clients."""
    clients: int = Field(8, ge=1)
    """Number of clients; with by = "column", the values with most characters (classes: most rows) are kept, and the rows of the
    others left out and counted (0 is not allowed, see `all_values`)."""
    all_values: bool = False
    """by = "column": every value becomes a client, whatever `clients` says."""
    alpha: float = Field(0.5, gt=0)
    """Concentration of the Dirichlet distribution: small is skewed."""
    column: str = ""
    """by = "column": the column that names the client; by = "dirichlet" or "shards": the column to skew, if not the label."""
    shards_per_client: int = Field(2, ge=1)
    """by = "shards": label-sorted shards of equal size (to one row) that each client receives."""
    min_rows: int = Field(1, ge=1)
    """A client with fewer training rows is an error."""
